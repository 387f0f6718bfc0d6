"""ONNX files whose classes are others, more, fewer or in another order than those of the annotations."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.coco.score import standalone_dataset
from app.core.config import UserError
from app.eval.contract import Said
from app.eval.evaluate import evaluate_file
from tests.support.eval_fixtures import SETTINGS, truth_box, write_coco, write_model

OWN = [{"id": 0, "name": "bolt"}, {"id": 7, "name": "nut"}, {"id": 9, "name": "o-ring"}]
NAMES = [category["name"] for category in OWN]
# Image 1 has a bolt, image 2 a nut, image 3 an o-ring, all in this place.
BOX = [16.0, 8.0, 32.0, 24.0]
HIT = (8.0, 8.0, 24.0, 20.0)


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    boxes = [truth_box(image_id, BOX, category) for image_id, category in ((1, 0), (2, 7), (3, 9))]
    root = write_coco(tmp_path / "coco", dict.fromkeys((1, 2, 3), (0, 0, 255)), boxes)
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"categories": OWN}))
    return root


def raw(names: list[str], found: str) -> np.ndarray:
    """raw [4+n,21] that finds an object of one class; and 20 anchors that are surer of the first unlisted class."""
    output = np.zeros((4 + len(names), 21), np.float32)
    x1, y1, x2, y2 = HIT
    output[:4, 0] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    output[4 + names.index(found), 0] = 0.8
    unlisted = [name for name in names if name not in NAMES]
    if unlisted:
        output[4 + names.index(unlisted[0]), 1:] = 0.95
    return output


def end2end(names: list[str], found: str) -> np.ndarray:
    rows = [(*HIT, 0.8, names.index(found))]
    unlisted = [name for name in names if name not in NAMES]
    rows += [(*HIT, 0.95, names.index(name)) for name in unlisted]
    return np.array(sorted(rows, key=lambda row: -row[4]), np.float32)


OUTPUTS = {"raw": raw, "nms": raw, "end2end": end2end}


def scored(coco_dir: Path, bias: np.ndarray, contract: str, names: list[str] | None, said: Said | None = None) -> Any:
    metadata = {"contract": contract, "imgsz": "32"} | ({"names": json.dumps(names)} if names is not None else {})
    path = write_model(coco_dir.parent / "m.onnx", bias, metadata=metadata)
    out = coco_dir.parent / "out"
    metrics = evaluate_file(path, standalone_dataset(coco_dir, None), out, SETTINGS, said)
    rows = json.loads((out / "detections.json").read_text())
    return metrics, {(row["image_id"], row["category_id"]) for row in rows}


@pytest.mark.parametrize("contract", OUTPUTS)
@pytest.mark.parametrize(
    "names",
    [NAMES, ["o-ring", "bolt", "nut"], ["person", "nut", "car", "bolt", "o-ring"], ["a", "b", *NAMES, "c"]],
    ids=["the same", "in another order", "among others", "behind others"],
)
def test_classes_are_found_by_name(coco_dir: Path, contract: str, names: list[str]) -> None:
    """Every image gives one nut, whatever number the class has in the file, and nothing of the other classes."""
    _, found = scored(coco_dir, OUTPUTS[contract](names, "nut"), contract, names)
    assert found == {(1, 7), (2, 7), (3, 7)}


def test_unlisted_classes_take_no_place_among_the_best(coco_dir: Path) -> None:
    """Twenty detections of an unlisted class are surer; with room for ten the listed one is found all the same."""
    names = ["person", *NAMES]
    settings = SETTINGS.model_copy(update={"max_det": 10})
    metadata = {"contract": "raw", "imgsz": "32", "names": json.dumps(names)}
    path = write_model(coco_dir.parent / "m.onnx", raw(names, "bolt"), metadata=metadata)
    metrics = evaluate_file(path, standalone_dataset(coco_dir, None), coco_dir.parent / "out", settings)
    # One of three classes; its object is one of three detections of equal score, the first: precision 1.
    assert metrics["coco"]["AP"] == pytest.approx(1 / 3)


def test_class_that_the_file_lacks_counts_as_nothing(coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics, found = scored(coco_dir, raw(["nut"], "nut"), "raw", ["nut"])
    assert found == {(1, 7), (2, 7), (3, 7)}
    assert metrics["coco"]["AP"] is not None
    assert any("no class for 2 of the 3 categories of the annotations, whose AP is 0: 'bolt', 'o-ring'" in line
               for line in caplog.messages)  # fmt: skip


def test_left_out_classes_are_said(coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = ["person", *NAMES]
    scored(coco_dir, raw(names, "nut"), "raw", names)
    assert any("1 of its 4 classes are not in the annotations" in line and "'person'" in line
               for line in caplog.messages)  # fmt: skip


def test_file_without_names_has_those_of_the_annotations(coco_dir: Path) -> None:
    _, found = scored(coco_dir, raw(NAMES, "o-ring"), "raw", None)
    assert found == {(1, 9), (2, 9), (3, 9)}


def test_user_says_the_names(coco_dir: Path) -> None:
    """The file calls them otherwise; its user says what they are here."""
    spelled = ["Bolt", "Nut", "O-Ring"]
    with pytest.raises(UserError, match=r"only there 'Bolt', 'Nut', 'O-Ring'; only in the annotations 'bolt', .*"
                       r"say so with --names FILE"):  # fmt: skip
        scored(coco_dir, raw(NAMES, "nut"), "raw", spelled)
    _, found = scored(coco_dir, raw(NAMES, "nut"), "raw", spelled, Said(names=NAMES))
    assert found == {(1, 7), (2, 7), (3, 7)}


@pytest.mark.parametrize(
    ("n_rows", "names", "message"),
    [
        (7, ["bolt", "screw", "o-ring"], "are not the 3 categories of the annotations .*'screw'.*'nut'"),
        (7, ["bolt", "nut"], r"are not the 3 categories of the annotations \(2, "),
        (8, NAMES, r"its output has 4 classes, the contract 'raw' is one float output \[N,7,A\]"),
        (84, None, r"its output has 80 classes, the contract 'raw' is one float output \[N,7,A\]"),
        (4, [], r"the contract 'raw' is one float output \[N,4\+classes,A\]"),
    ],
)
def test_other_models_are_refused(coco_dir: Path, n_rows: int, names: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scored(coco_dir, np.zeros((n_rows, 21), np.float32), "raw", names)


def test_class_of_a_row_is_one_of_the_file(coco_dir: Path) -> None:
    rows = np.array([(*HIT, 0.8, 3)], np.float32)
    with pytest.raises(UserError, match="row 0 of the end2end output has the class 3, not a whole number from 0 to 2"):
        scored(coco_dir, rows, "end2end", NAMES)
