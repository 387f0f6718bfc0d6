"""Any annotation file and any file name: the data stage is done or says one line, and writes inside the runs alone.

FUZZ_EXAMPLES=N tries N inputs of each kind instead of the default.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.coco.annotations import read_instances
from app.coco.split import doubts
from app.core.config import UserError
from app.core.run import RunRoot
from app.data.view import read_split
from tests.support.data_fixtures import annotation_file, edit, listing, run_data, write_dataset

N_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
MAX_LINE = 5000
quick = settings(
    max_examples=N_EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([2**53, 2**53 + 1, 10**400, 1e308, 5e-324, -0.0]),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner))
BOXES = st.lists(NUMBERS, min_size=3, max_size=5)
CHANGES = st.tuples(
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 9),
    st.sampled_from(
        ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "file_name", "width", "height", "name"]
    ),
    st.one_of(VALUES, BOXES, st.just(KeyError)),
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp500"])
NAMES = st.one_of(
    st.text(max_size=12),
    st.text("./\\ a~$*\n\0\u202e\u2028é猫\ud800", max_size=12),
    st.text("ab", min_size=200, max_size=300),
    st.lists(st.text("ab.", min_size=1, max_size=90), max_size=90).map("/".join),
    st.sampled_from(
        ["a.txt/b.jpg", "a", "con.jpg", "-rf.jpg", ".jpg", "x.jpg/", "/dev/zero", "../val2017/x.jpg", "%s.jpg"]
    ),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sound") / "coco")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Inside, done or a UserError of one line; everything else goes through."""
    try:
        yield
    except UserError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < MAX_LINE, text


@quick
@given(changes=st.lists(CHANGES, min_size=1, max_size=4), encoding=ENCODINGS)
def test_spoiled_annotations(sound: Path, tmp_path: Path, changes: list[Any], encoding: str) -> None:
    tree = json.loads(annotation_file(sound).read_text())
    for kind, number, key, value in changes:
        entry = tree[kind][number % len(tree[kind])]
        if value is KeyError:
            entry.pop(key, None)
        else:
            entry[key] = value
    file = tmp_path / "instances.json"
    file.write_bytes(json.dumps(tree, ensure_ascii=encoding != "utf-8").encode(encoding, "surrogatepass"))
    with one_line():
        doubts(read_instances(file))


@quick
@given(tree=VALUES, garbage=st.binary(max_size=40), bom=st.sampled_from([b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE]))
def test_any_json_and_any_bytes(tmp_path: Path, tree: Any, garbage: bytes, bom: bytes) -> None:
    file = tmp_path / "instances.json"
    for content in (
        json.dumps(tree).encode(),
        json.dumps({"images": tree, "annotations": [], "categories": []}).encode(),
    ):
        for whole in (content, bom + content, content + garbage, content[: len(content) // 2], garbage):
            file.write_bytes(whole)
            with one_line():
                doubts(read_instances(file))


@pytest.mark.parametrize("depth", [200, 900, 990, 5000, 200_000])
def test_nested_annotations(sound: Path, tmp_path: Path, depth: int) -> None:
    text = annotation_file(sound).read_text()
    file = tmp_path / "instances.json"
    nested = "[" * depth + "]" * depth
    for key in ('"bbox": ', '"iscrowd": ', '"file_name": ', '"width": ', '"license": '):
        file.write_text(text.replace(key, f'{key}{nested}, "x": ', 1))
        with one_line():
            doubts(read_instances(file))


@settings(quick, max_examples=N_EXAMPLES // 2)
@given(name=NAMES, put=st.booleans())
def test_any_file_name(sound: Path, tmp_path: Path, name: str, put: bool) -> None:
    """With and without a sound image of this name, where the file system takes it."""
    shutil.rmtree(tmp_path / "job", ignore_errors=True)
    coco_dir = tmp_path / "job" / "coco"
    shutil.copytree(sound, coco_dir)
    edit(coco_dir, lambda tree: tree["images"][0].update(file_name=name))
    path = coco_dir / "train2017" / name
    with contextlib.suppress(OSError, ValueError):
        if put and path.resolve().is_relative_to(coco_dir):
            path.parent.mkdir(parents=True, exist_ok=True)
            (coco_dir / "train2017" / "000000000001.jpg").rename(path)
    before = listing(coco_dir)
    run = RunRoot(tmp_path / "job" / "runs", "r")
    with one_line():
        run_data(run, coco_dir, "data.skip_broken=true")
        provenance = json.loads(run.provenance.read_text())
        assert [len(read_split(provenance, split)) > 0 for split in ("train", "val")] == [True, True]
    assert listing(coco_dir) == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"job"}
    assert {entry.name for entry in (tmp_path / "job").iterdir()} <= {"coco", "runs"}
