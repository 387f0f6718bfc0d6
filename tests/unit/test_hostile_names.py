"""Names with `|` and `<` in pages: no table breaks, nothing becomes HTML, and the reader sees the name as it is."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import pytest

from app.core.config import load
from app.core.run import RunRoot
from app.report.compare import class_table, compare
from app.report.publish import publish
from app.report.report import report
from app.report.tables import markdown_table
from tests.support.drawn import kept_figures
from tests.support.markdown_tables import tables
from tests.support.report_fixtures import add_dataset, build_run, metrics, write

LABEL, FILE, TITLE, RUN = "net|<i>x", "file|<s>y.onnx", "set|<b>z", "run|<u>w"
CLASS = 'cat|<q>"'
TAGS = {"i", "s", "b", "u", "q"}


class Reader(HTMLParser):
    """What a browser makes of a page: names of its elements, its text, and the cells of each table row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.rows: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append(0)
        elif tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_data(self, data: str) -> None:
        self.text += data


def change(path: Path, section: str, values: dict[str, Any]) -> None:
    tree = json.loads(path.read_text())
    tree[section] |= values
    write(path, tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    """Baseline, QAT and a stranger's file beside them, which is quantized and was measured otherwise."""
    folder = tmp_path_factory.mktemp("names")
    run = build_run(folder / "runs", RUN)
    add_dataset(run, folder / "coco")
    stranger = metrics(f"ptq-{LABEL}", FILE, "0" * 64, 0.25, 7)
    stranger["dataset"]["title"] = f"other {TITLE}"
    write(run.root / "stranger-coco/metrics.json", stranger)
    write(run.provenance, json.loads(run.provenance.read_text()) | {"title": TITLE})
    for name in ("baseline-coco", "qat-w4a16-coco"):
        change(run.root / name / "metrics.json", "dataset", {"title": TITLE})
    change(run.root / "qat-w4a16-coco/metrics.json", "model", {"file": FILE, "label": f"qat-{LABEL}"})
    with kept_figures():
        report(load("qat", sets=["report.gallery_images=1"]), run)
    return run


@pytest.fixture(scope="module")
def compared(run: RunRoot, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A comparison of the run with itself under another hostile name."""
    other = run.root.with_name("other|<u>w")
    shutil.copytree(run.root, other, ignore=shutil.ignore_patterns("stranger-coco"))
    out = tmp_path_factory.mktemp("compared")
    with kept_figures():
        compare(run.root, other, out, load("qat", sets=["report.gallery_images=1"]).report)
    return (out / "compare.md").read_text()


def test_tables_of_the_page_keep_their_columns(run: RunRoot) -> None:
    found = tables(run.summary.read_text())
    assert len(found) > 5
    assert [len({len(cells) for cells in rows}) for rows in found] == [1] * len(found)


@pytest.mark.parametrize("name", [f"qat-{LABEL}", f"ptq-{LABEL}", FILE, TITLE, f"other {TITLE}", RUN])
def test_html_page_shows_names_as_text(run: RunRoot, name: str) -> None:
    html = Reader(run.summary.with_suffix(".html").read_text())
    assert not html.tags & TAGS
    assert name in html.text


def test_markdown_page_shows_names_as_text(run: RunRoot) -> None:
    """As any Markdown program reads the page, not only ours."""
    html = Reader(markdown.markdown(run.summary.read_text(), extensions=["tables", "fenced_code"]))
    assert not html.tags & TAGS
    assert html.rows == [len(cells) for rows in tables(run.summary.read_text()) for cells in rows]


@pytest.mark.parametrize("name", [f"qat-{LABEL} ({RUN})", f"qat-{LABEL} (other|<u>w)", TITLE, "other|<u>w", RUN])
def test_comparison_shows_names_as_text(compared: str, name: str) -> None:
    html = Reader(markdown.markdown(compared, extensions=["tables"]))
    assert not html.tags & TAGS
    assert name in html.text
    found = tables(compared)
    assert [len({len(cells) for cells in rows}) for rows in found] == [1] * len(found)


def test_headings_of_the_comparison(compared: str) -> None:
    headings = [line for line in compared.splitlines() if line.startswith("#")]
    assert len(headings) == 3
    assert not [line for line in headings if "<" in line]


def test_log_entry_shows_names_as_text(run: RunRoot) -> None:
    publish(run, None, force=False)
    entry = (run.runs_dir / "LOG.md").read_text().partition("- **report:**")[0]  # a link: open_run checks such names
    html = Reader(markdown.markdown(entry, extensions=["tables"]))
    assert not html.tags & TAGS
    assert f"qat-{LABEL}" in html.text
    assert TITLE in html.text


def test_class_names() -> None:
    a, b = ({"dir": name, "model": {"label": name}} for name in ("left", "right"))
    facts = {"variants": {"left": {"ap_by_class": {CLASS: 0.5}}, "right": {"ap_by_class": {CLASS: 0.25}}}}
    text = "\n".join(class_table(a, b, facts))
    html = Reader(markdown.markdown(text, extensions=["tables"]))
    assert CLASS in html.text
    assert not html.tags & TAGS
    assert html.rows == [4, 4]


def test_width_of_escaped_cells() -> None:
    """Columns line up on a terminal: the border stands at the same place in every line."""
    lines = markdown_table([["name", "value"], ["a|b", "<1"], ["long name", "2"]])
    assert lines == [
        "| name      | value |",
        "| --------- | ----: |",
        "| a\\|b      | &lt;1 |",
        "| long name |     2 |",
    ]
