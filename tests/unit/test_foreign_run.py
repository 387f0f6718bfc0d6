"""A run folder from somebody else: nothing in it is taken for granted, executed, or lets the page lead out of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.config import UserError, load, parse_set, validate
from app.core.files import printable, read_json
from app.core.run import PROVENANCE_SHAPE, RunRoot, open_run, record_stage
from app.core.shapes import misfits
from app.core.yaml_files import merge, read_yaml
from app.report import report as report_stage
from app.report.evidence import gather
from app.report.html import page, picture
from app.report.publish import publish
from app.report.report import report
from app.train.done import make_ready
from tests.support.drawn import kept_figures
from tests.support.report_fixtures import build_run, copy_run, edit

FUZZ = {"derandomize": True, "deadline": None, "database": None}
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
SCRIPT = "<script>alert(1)</script>"


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> RunRoot:
    return copy_run(reported, tmp_path)


def html_of(text: str, root: Path) -> str:
    return page(text, root, "n").partition("<body>")[2]


@pytest.mark.parametrize(
    "text",
    [SCRIPT, f"<div>{SCRIPT}</div>", f"# {SCRIPT}", f"a {SCRIPT} b", f"```\n{SCRIPT}\n```", f"- {SCRIPT}",
     f"| a |\n| - |\n| {SCRIPT} |", f"<picture>{SCRIPT}</picture>", f"> {SCRIPT}", f"[{SCRIPT}](x)",
     "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<!-- --><iframe src=x></iframe>", "<style>*{}</style>"],
)  # fmt: skip
def test_html_in_the_text_is_text(tmp_path: Path, text: str) -> None:
    assert not re.search(r"<(script|img|svg|iframe|picture|style|source)", html_of(text, tmp_path))


@pytest.mark.parametrize(
    "target", ["javascript:alert(1)", "http://a/b", "//a/b", "/etc/passwd", "../../x", "data:text/html,x", "a/../../b"]
)
def test_links_lead_to_files_beside_the_page(tmp_path: Path, target: str) -> None:
    for text in (f"[x]({target})", f"[x][1]\n\n[1]: {target}", f"<{target}>", f"![x]({target})"):
        assert not re.search(r"(href|src)=", html_of(text, tmp_path))
    assert '<a href="fp16/results.csv">' in html_of("[x](fp16/results.csv)", tmp_path)


def test_pictures_come_from_inside_the_run_alone(tmp_path: Path) -> None:
    root = tmp_path / "r"
    (root / "figures").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "figures" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "figures" / "own.png").write_bytes(b"own")
    made = html_of(picture("own.png", "own.png", "Text."), root)
    assert made.count("data:image/png;base64,b3du") == 2
    for name in ("link.png", "../../secret.png", "none.png"):
        assert "c2VjcmV0" not in html_of(picture(name, name, "Text."), root)
    assert "c2VjcmV0" not in html_of("![x](../secret.png) <img src='../secret.png'>", root)


def test_the_page_has_a_policy_that_forbids_scripts(run: RunRoot) -> None:
    text = run.summary.with_suffix(".html").read_text()
    assert text.index("Content-Security-Policy") < text.index("<style>")
    assert "default-src 'none'; img-src data:;" in text


def test_foreign_text_of_every_kind_is_text_on_the_page(run: RunRoot) -> None:
    """Device, commands, titles, labels outside of tables: what stands in sentences."""
    for path in run.root.glob("*-coco/metrics.json"):
        edit(path, "runtime.device", f"GPU {SCRIPT}\n\n{SCRIPT}")
        edit(path, "environment.command", f"x\n```\n{SCRIPT}")
        edit(path, "dataset.title", f"\n\n{SCRIPT}")
        edit(path, "settings.evaluator", SCRIPT)
    edit(run.root / "qat-w4a16-coco" / "metrics.json", "model.label", f"qat-{SCRIPT}")
    with kept_figures():
        report(load("qat"), run)
    text = run.summary.with_suffix(".html").read_text()
    assert "<script" not in text
    assert "&lt;script" in text


# --- publish ---------------------------------------------------------------------------------------------------------


def published(run: RunRoot) -> dict[str, str]:
    publish(run, None, force=True)
    files = (run.runs_dir / "reports").rglob("*")
    texts = {str(path): path.read_text(errors="replace") for path in files if path.is_file() and path.suffix != ".png"}
    return texts | {"LOG.md": (run.runs_dir / "LOG.md").read_text()}


PATHS = ("/home/jane doe/coco", "/Users/jane/x.yaml", "/mnt/jane/coco 2017/train")


@pytest.mark.parametrize("path", PATHS)
def test_no_absolute_path_is_published(run: RunRoot, path: str) -> None:
    edit(run.provenance, "coco_dir", path)
    edit(run.root / "fp16" / "env.json", "command", f"python -m app train --runs-dir {path.replace(' ', '_')}")
    (run.root / "fp16" / "args.yaml").write_text(
        f"data: {path}/coco.yaml\nsave_dir: {run.root.resolve()}/fp16\nx: 1/2\n"
    )
    edit(run.root / "baseline-coco" / "metrics.json", "dataset.coco_dir", path)
    with kept_figures():
        report(load("qat"), run)
    texts = published(run)
    for name, text in texts.items():
        assert "jane" not in text, name
        assert str(run.runs_dir.resolve()) not in text, name
        if name.endswith(".json"):
            json.loads(text)
    args = next(text for name, text in texts.items() if name.endswith("fp16/args.yaml"))
    assert args == f"data: {Path(path).name}/coco.yaml\nsave_dir: small/fp16\nx: 1/2\n"


def test_what_links_lead_to_is_not_published(run: RunRoot, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (run.root / "fp16" / "args.yaml").unlink(missing_ok=True)
    (run.root / "fp16" / "args.yaml").symlink_to(tmp_path / "key")
    run.summary.write_text(f"{run.summary.read_text()}\n\n{picture('../../key', '../../key', 'x')}\n\n[x](../../key)\n")
    assert not [name for name, text in published(run).items() if "secret" in text or "](../../key" in text]


# --- JSON and YAML with other types ----------------------------------------------------------------------------------

OTHER = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a tree, its own included."""
    yield prefix
    if isinstance(tree, dict | list):
        for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(inner, (*prefix, key))


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = tree.copy()
    copied[place[0]] = replaced(tree[place[0]], place[1:], value)
    return copied


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    return build_run(tmp_path_factory.mktemp("foreign") / "runs")


def allowed(work: Any, *args: Any) -> None:
    """The work ends well or with one line."""
    try:
        work(*args)
    except UserError as error:
        assert "\n" not in printable(error)
        assert str(error)


@settings(max_examples=40, suppress_health_check=SLOW, **FUZZ)
@given(data=st.data())
def test_any_json_of_a_run_is_reported_and_published_or_refused(
    scene: RunRoot, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = sorted(scene.root.rglob("*.json"))
    path = data.draw(st.sampled_from(files))
    tree = json.loads(path.read_text())
    place = data.draw(st.sampled_from(sorted(places(tree), key=str)))
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    run = RunRoot(folder, "small")
    shutil.copytree(scene.root, run.root)
    text = json.dumps(replaced(tree, place, data.draw(OTHER)))
    (run.root / path.relative_to(scene.root)).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_stage, "make_figures", lambda *args: [])
        patch.setenv("APP_REVISION", "0")  # git takes longer than all the rest
        allowed(report, load("qat"), run)
        allowed(publish, run, None, True)
        allowed(make_ready, load("fp16"), run, False)
        allowed(record_stage, run, "x", {})
    shutil.rmtree(folder)


@settings(max_examples=300, **FUZZ)
@given(tree=OTHER)
def test_any_tree_is_held_against_a_shape(tree: Any) -> None:
    assert misfits(tree, PROVENANCE_SHAPE)


@pytest.mark.parametrize(
    "text", ["", "[", "NaN", '{"a": Infinity}', "[" * 100_000, '"\\ud800"', "\ufeff{}", '{"a": 1' + "0" * 5000 + "}"]
)
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not valid JSON: delete it and run 'make eval' again"):
        read_json(path, "eval")


def test_other_types_are_named(scene: RunRoot, tmp_path: Path) -> None:
    run = RunRoot(tmp_path, "small")
    shutil.copytree(scene.root, run.root)
    edit(run.provenance, "splits.train.n_images", "many")
    with pytest.raises(
        UserError, match=r"provenance.json is not what 'make data' writes \(splits.train.n_images: .*data"
    ):
        read_json(run.provenance, "data", PROVENANCE_SHAPE)
    assert any("provenance.json splits.train.n_images" in line for line in gather(run).missing)
    run.run_json.write_text("[1]")
    with pytest.raises(UserError, match=r"run.json is not what 'make data' writes \(lacks stages\)"):
        record_stage(run, "x", {})


KEYS = st.sampled_from(["train", "train.epochs", "data.coco_dir", "quant.scheme", "model", "variant", "hyp", "a.b.c"])
SETTING = st.builds("{}={}".format, KEYS | st.text(max_size=8), st.text(max_size=20)) | st.text(max_size=20)


@settings(max_examples=150, **FUZZ)
@given(item=SETTING, variant=st.sampled_from(["fp16", "qat"]))
def test_any_setting_is_taken_or_refused(item: str, variant: str) -> None:
    allowed(load, variant, [], [item])
    allowed(parse_set, item)


YAML_PARTS = [
    "train",
    "epochs",
    ":",
    "\n",
    "  ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!int ",
    "!!timestamp ",
    "!!set",
]
YAML_PARTS += [
    "!!python/object:os.system ",
    "? ",
    "'",
    '"',
    "|",
    ">",
    "%",
    "<<",
    "null",
    "1",
    "2020-99-99",
    "\t",
    "#",
    "~",
]
BASE = load("qat").model_dump(mode="json")


@settings(max_examples=200, **FUZZ)
@given(text=st.lists(st.sampled_from(YAML_PARTS), max_size=12).map("".join) | st.text(max_size=30))
def test_any_yaml_file_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))

    def work() -> None:
        validate(merge(BASE, read_yaml(path)))

    allowed(work)


@settings(max_examples=300, **FUZZ)
@given(name=st.text(max_size=12))
def test_any_name_of_a_run_is_a_folder_below_the_runs_or_refused(name: str) -> None:
    try:
        root = open_run(name, Path("/runs")).root
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert root.parent == Path("/runs")
        assert root.name == name
