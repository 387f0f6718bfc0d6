"""The short way for images without objects of a class gives what COCOeval gives, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco.detail import ALL_SIZES, MAX_DETECTIONS, detail, hits_of, matched, precision_of
from app.coco.score import STATS, Matcher, load_truth, quiet, read_results, score, with_annotations
from app.core.config import UserError
from tests.support.eval_fixtures import truth_box, write_annotations

IMAGE_IDS = list(range(1, 31))
CATEGORY_IDS = (1, 3, 18, 59)
SIDE_PX = 300


def random_box(rng: np.random.Generator) -> list[float]:
    w, h = np.exp(rng.uniform(np.log(5), np.log(150), 2))
    x, y = rng.random(2) * (SIDE_PX - w, SIDE_PX - h)
    return [float(x), float(y), float(w), float(h)]


@pytest.fixture
def scene(tmp_path: Path) -> tuple[COCO, Path]:
    """Images with objects of few classes, and 40 detections each of all classes, many of equal score."""
    rng = np.random.default_rng(0)
    objects, found = [], []
    for image_id in IMAGE_IDS:
        for _ in range(int(rng.integers(0, 4))):
            box, category = random_box(rng), int(rng.choice(CATEGORY_IDS[:3]))
            objects.append(truth_box(image_id, box, category, iscrowd=int(rng.random() < 0.2)))
            found.append((image_id, category, [side + rng.normal(0, 1) for side in box]))
        for _ in range(40):
            found.append((image_id, int(rng.choice(CATEGORY_IDS)), random_box(rng)))
    keys = ("image_id", "category_id", "bbox")
    rows = [dict(zip(keys, row, strict=True)) | {"score": float(rng.integers(1, 20)) / 20} for row in found]
    (tmp_path / "detections.json").write_text(json.dumps(rows))
    sizes = dict.fromkeys(IMAGE_IDS, (SIDE_PX, SIDE_PX))
    return load_truth(write_annotations(tmp_path / "truth.json", sizes, objects)), tmp_path / "detections.json"


def plain(truth: COCO, path: Path, kind: type[COCOeval], **params: Any) -> Any:
    """COCOeval over all classes at once."""
    rows = [
        row | {"id": n, "area": row["bbox"][2] * row["bbox"][3]}
        for n, row in enumerate(json.loads(path.read_text()), 1)
    ]
    with quiet():
        evaluation: Any = kind(truth, with_annotations(truth, rows), "bbox")
        evaluation.params.imgIds = IMAGE_IDS
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def test_cells_are_those_of_cocoeval(scene: tuple[COCO, Path]) -> None:
    ours, theirs = plain(*scene, Matcher).evalImgs, plain(*scene, COCOeval).evalImgs
    assert len(ours) == len(theirs)
    n_short = 0
    for cell, expected in zip(ours, theirs, strict=True):
        assert (cell is None) == (expected is None)
        n_short += cell is not None and "dtIds" not in cell
        for key in cell or ():
            np.testing.assert_array_equal(cell[key], expected[key], err_msg=key)
    assert n_short > 100, "the short way was not taken"


def test_the_twelve_numbers_are_those_of_cocoeval(scene: tuple[COCO, Path]) -> None:
    truth, path = scene
    evaluation = plain(truth, path, COCOeval)
    with quiet():
        evaluation.summarize()
    expected = [None if number == -1 else number for number in evaluation.stats.tolist()]
    assert score(truth, path, IMAGE_IDS) == dict(zip(STATS, expected, strict=True))


def test_detail_is_that_of_all_classes_at_once(scene: tuple[COCO, Path]) -> None:
    truth, path = scene
    evaluation = plain(truth, path, COCOeval, areaRng=ALL_SIZES, areaRngLbl=["all"], maxDets=[MAX_DETECTIONS])
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    present = (precision > -1).any(axis=(0, 1))
    ap = float(precision[:, :, present].mean())
    facts = detail(truth, path.parent, IMAGE_IDS, ap)
    names = [truth.cats[number]["name"] for number in np.array(evaluation.params.catIds)[present]]
    assert facts["ap_by_class"] == pytest.approx(dict(zip(names, precision.mean(axis=(0, 1))[present], strict=True)))
    np.testing.assert_allclose(facts["precision"]["0.5"], precision[0][:, present].mean(axis=1), rtol=1e-12)
    assert list(facts["f1_by_image"]) == list(map(str, IMAGE_IDS))


@pytest.mark.parametrize("category_id", CATEGORY_IDS)
@pytest.mark.parametrize("n_more", [0, 130], ids=["few", "more than count"])
def test_a_class_is_to_the_last_bit_what_cocoeval_finds(
    scene: tuple[COCO, Path], category_id: int, n_more: int
) -> None:
    """With equal scores in many images, and with an image that has more detections of a class than COCOeval takes."""
    truth, path = scene
    rng = np.random.default_rng(1)
    rows = json.loads(path.read_text())
    for _ in range(n_more):
        score = float(rng.integers(1, 20)) / 20
        rows.append({"image_id": 5, "category_id": category_id, "bbox": random_box(rng), "score": score})
    path.write_text(json.dumps(rows))
    one = {"areaRng": ALL_SIZES, "areaRngLbl": ["all"], "maxDets": [MAX_DETECTIONS], "catIds": [category_id]}
    expected = plain(truth, path, COCOeval, **one)
    found = matched(truth, read_results(path), category_id, IMAGE_IDS)
    cells = [cell for cell in expected.evalImgs if cell]
    for name, key in (("is_hit", "dtMatches"), ("is_ignored", "dtIgnore")):
        joined = np.concatenate([cell[key] for cell in cells], axis=1)
        np.testing.assert_array_equal(getattr(found, name), joined > 0, err_msg=key)
    assert found.scores.tolist() == [score for cell in cells for score in cell["dtScores"]]
    assert len(hits_of(found)) == (~found.is_ignored[0]).sum()
    precision = expected.eval["precision"][:, :, 0, 0, 0]
    if category_id == CATEGORY_IDS[-1]:
        assert (precision == -1).all() and not found.n_objects.total(), "no image has an object of this class"
        return
    np.testing.assert_array_equal(precision_of(found), precision)
    assert 0 < precision.mean() < 1


def test_a_class_that_nothing_was_detected_of_has_no_precision(scene: tuple[COCO, Path]) -> None:
    found = matched(scene[0], np.zeros((0, 7)), CATEGORY_IDS[0], IMAGE_IDS)
    assert found.n_objects.total() > 0
    assert not precision_of(found).any()


def test_results_of_some_images_alone_are_read(tmp_path: Path) -> None:
    row = {"category_id": 3, "bbox": [1.5, 2, 3, 4], "score": 0.25}
    rows = [{"image_id": image_id, **row} for image_id in (9, 99, 9, 1)]
    path = tmp_path / "detections.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"):
        path.write_text(text)
        assert read_results(path, {9, 7})[:, 0].tolist() == [9, 9]
        assert read_results(path, set()).shape == (0, 7)
    path.write_text(f"[\n{json.dumps(rows[0])},\nof another image\n]\n")
    assert len(read_results(path, {9})) == 1, "a line that names no wanted image is not parsed"
    path.write_text(json.dumps(rows).replace("0.25", "NaN"))
    with pytest.raises(UserError, match="no COCO results"):
        read_results(path)
