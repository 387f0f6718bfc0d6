"""Publish: what is copied, what never is, no dead link, and the entry of the log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.coco.dataset import BUILTIN_TITLE
from app.core.config import UserError
from app.core.mounts import MOUNTS
from app.core.run import RunRoot
from app.report.publish import NO_PHOTOS, anonymous, publish
from tests.support.page_numbers import numbers_without_source
from tests.support.report_fixtures import build_run, copy_run, edit


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> RunRoot:
    return copy_run(reported, tmp_path)


def published(run: RunRoot) -> Path:
    publish(run, None, force=False)
    return run.runs_dir / "reports" / "small"


def published_names(run: RunRoot) -> set[str]:
    folder = published(run)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_no_weights_no_photos_no_detections(run: RunRoot) -> None:
    names = published_names(run)
    assert {"summary.md", "summary.html", "report.json", "fp16/results.csv", "figures/curves-dark.png"} <= names
    assert {Path(name).suffix for name in names} == {".md", ".html", ".json", ".csv", ".yaml", ".png"}
    assert not [name for name in names if "gallery" in name or "detections" in name]
    assert NO_PHOTOS in (run.runs_dir / "reports/small/summary.md").read_text()
    assert "image/jpeg" not in (run.runs_dir / "reports/small/summary.html").read_text()


@pytest.mark.parametrize("title", [BUILTIN_TITLE, "built-in coco-subset"], ids=["of today", "of an older run"])
def test_drawn_images_may_be_published(run: RunRoot, title: str) -> None:
    edit(run.provenance, "title", title)
    folder = published(run)
    assert (folder / "figures/gallery-qat-w4a16-coco.jpg").exists()
    assert NO_PHOTOS not in (folder / "summary.md").read_text()


def test_every_picture_and_link_leads_somewhere(run: RunRoot) -> None:
    folder = published(run)
    text = (folder / "summary.md").read_text()
    targets = re.findall(r'\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"', text)
    assert len(targets) > 15
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    names = {name for pair in targets for name in pair if name}
    assert [name for name in names - headings if not (folder / name).exists()] == []
    assert len(names & headings) == len(headings)  # every section is in the table of contents
    assert "`fp16/log.txt`" in text


def test_numbers_of_the_published_page_are_in_files_beside_it(run: RunRoot) -> None:
    folder = published(run)
    assert numbers_without_source((folder / "summary.md").read_text(), folder) == []


def test_the_log_gets_an_entry_each_time(run: RunRoot) -> None:
    published(run)
    publish(run, "does it hold?", force=True)
    text = (run.runs_dir / "LOG.md").read_text()
    entries = re.findall(r"^## \d{4}-\d\d-\d\d small$", text, re.MULTILINE)
    assert len(entries) == 2
    assert "- **aim:** compare fp16, qat-w4a16: yolov10m.yaml, 4 epochs, seed 0" in text
    assert "- **aim:** does it hold?" in text
    for name in ("command", "commit", "machine", "result", "verdict", "missing", "report"):
        assert text.count(f"- **{name}:** ") == 2
    assert "- **commit:** 0123456789ab\n- **machine:** 2 CPU cores, no GPU\n" in text
    assert re.search(r"\*\*result:\*\* AP on .*, n=1: baseline 0\.\d{4}, qat-w4a16 0\.\d{4} \([+-]0\.\d{4}\)", text)


def test_what_is_there_is_not_overwritten(run: RunRoot) -> None:
    published(run)
    with pytest.raises(UserError, match="is there already: ARGS=--force replaces it"):
        published(run)


def test_no_report_no_publication(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run 'make report' first"):
        publish(build_run(tmp_path), None, force=False)
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--conf /mnt/ann/x.yaml --force", "--conf .../x.yaml --force"),
        ("--conf '/mnt/Ann Lee/secret proj/x.yaml' --force", "--conf '.../x.yaml' --force"),
        ("--set 'quant.scheme=/mnt/Ann Lee/x.yaml'", "--set 'quant.scheme=.../x.yaml'"),
        ("file:///mnt/ann/x.yaml", "file://.../x.yaml"),
        ("conf:/mnt/ann/x.yaml", "conf:.../x.yaml"),
        ("--conf ../../mnt/ann/x.yaml", "--conf .../x.yaml"),
        ("--set quant.scheme=../ann/x.yaml", "--set quant.scheme=.../x.yaml"),
        ("/home/me/work/x.yaml", "~/work/x.yaml"),
        ("see https://host.org/a/b and it's a/b or c's ../x", "see https://host.org/a/b and it's a/b or c's ../x"),
        ("80 images/s, INT4/INT8, 1/2", "80 images/s, INT4/INT8, 1/2"),
    ],
)
def test_paths_in_a_text_are_shortened_to_their_last_name(text: str, expected: str) -> None:
    assert anonymous(text, {"/home/me": "~"}) == expected


def test_a_dataset_that_a_container_saw_elsewhere_is_not_named(run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page names it as the user does, here with a blank, at which the search for paths would end."""
    monkeypatch.setenv(MOUNTS, "/data/coco=/home/my user/coco")
    edit(run.provenance, "coco_dir", "/data/coco")
    run.summary.write_text(f"{run.summary.read_text()}\nsmall set in `/home/my user/coco`.\n")
    text = (published(run) / "summary.md").read_text()
    assert "small set in `coco`." in text
    assert "my user" not in text
