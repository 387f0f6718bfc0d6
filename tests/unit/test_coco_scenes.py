"""COCO scenes whose twelve numbers can be worked out by hand. Image ids 1 and 2, all boxes x,y,w,h in px."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.coco.score import STATS, frequent_classes, load_truth, score
from app.core.config import UserError
from tests.support.eval_fixtures import truth_box, write_annotations

EXACT = 1e-12  # float64 arithmetic on both sides
SIZES = {1: (400, 300), 2: (400, 300)}
# A class is judged at 101 recalls 0.00, 0.01, ... 1.00 and at ten IoU thresholds 0.50, 0.55, ... 0.95.


def found(image_id: int, bbox: list[float], confidence: float, category_id: int = 1) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": confidence}


def scored(
    folder: Path, truth: list[dict[str, Any]], detections: list[dict[str, Any]], image_ids: tuple[int, ...] = (1, 2)
) -> dict[str, float | None]:
    annotations = write_annotations(folder / "instances.json", SIZES, truth)
    (folder / "detections.json").write_text(json.dumps(detections))
    return score(load_truth(annotations), folder / "detections.json", list(image_ids))


def test_perfect_is_one(tmp_path: Path) -> None:
    boxes = [(1, [10, 10, 50, 50], 1), (2, [20, 30, 60, 70], 90)]  # both medium: 32^2 < area < 96^2
    truth = [truth_box(*box) for box in boxes]
    stats = scored(tmp_path, truth, [found(i, bbox, 0.9, category) for i, bbox, category in boxes])
    assert stats == dict.fromkeys(STATS, pytest.approx(1.0)) | dict.fromkeys(
        ("AP_small", "AP_large", "AR_small", "AR_large")
    )


def test_disjoint_is_zero(tmp_path: Path) -> None:
    stats = scored(tmp_path, [truth_box(1, [10, 10, 50, 50])], [found(1, [200, 200, 50, 50], 0.9)])
    assert (stats["AP"], stats["AP50"], stats["AR_100"]) == (0.0, 0.0, 0.0)


def test_wrong_class_is_zero(tmp_path: Path) -> None:
    stats = scored(tmp_path, [truth_box(1, [10, 10, 50, 50], 17)], [found(1, [10, 10, 50, 50], 0.9, 18)])
    assert stats["AP"] == 0.0


def test_mixed(tmp_path: Path) -> None:
    """Two objects; ranked detections: exact hit 0.9, miss 0.8, hit with IoU 25/40 = 0.625 0.7.

    IoU 0.50, 0.55, 0.60: hit, miss, hit. Precision 1 up to recall 0.5 (51 of the 101 recalls), then 2/3 (50 of them):
    (51 + 50 * 2/3) / 101 = 253/303. The other seven: hit, miss, miss: 51/101.
    """
    truth = [truth_box(1, [10, 10, 40, 40]), truth_box(2, [100, 100, 40, 40])]
    detections = [found(1, [10, 10, 40, 40], 0.9), found(1, [200, 200, 40, 40], 0.8), found(2, [100, 100, 40, 25], 0.7)]
    stats = scored(tmp_path, truth, detections)
    assert stats["AP50"] == pytest.approx(253 / 303, abs=EXACT)
    assert stats["AP75"] == pytest.approx(51 / 101, abs=EXACT)
    assert stats["AP"] == pytest.approx((3 * 253 / 303 + 7 * 51 / 101) / 10, abs=EXACT)
    # The best detection of each image is no miss: recall 1 at three thresholds, 1/2 at seven.
    assert stats["AR_1"] == pytest.approx(0.65, abs=EXACT)
    assert stats["AR_100"] == pytest.approx(0.65, abs=EXACT)
    # The second hit has 40 * 25 = 1000 < 32^2 px: detections count as medium when they match a medium object.
    assert stats["AP_medium"] == pytest.approx(stats["AP"], abs=EXACT)
    assert stats["AP_small"] is None


@pytest.mark.parametrize(("iscrowd", "ap"), [(1, 1.0), (None, 1 / 3)])
def test_detections_inside_a_crowd_are_ignored(tmp_path: Path, iscrowd: int | None, ap: float) -> None:
    """Without the crowd region the two better-ranked detections are misses: precision 1/3 at every recall."""
    truth = [truth_box(1, [200, 200, 40, 40])]
    truth += [] if iscrowd is None else [truth_box(1, [0, 0, 100, 100], 1, iscrowd)]
    detections = [found(1, [5, 5, 20, 20], 0.9), found(1, [50, 50, 30, 30], 0.8), found(1, [200, 200, 40, 40], 0.5)]
    assert scored(tmp_path, truth, detections)["AP"] == pytest.approx(ap, abs=EXACT)


def test_image_without_objects_counts(tmp_path: Path) -> None:
    """A miss on image 2, ranked before the hit on image 1, halves the precision; without image 2 it does not."""
    truth = [truth_box(1, [10, 10, 40, 40])]
    detections = [found(2, [10, 10, 40, 40], 0.9), found(1, [10, 10, 40, 40], 0.5)]
    assert scored(tmp_path, truth, detections)["AP"] == pytest.approx(0.5, abs=EXACT)
    assert scored(tmp_path, truth, detections, (1,))["AP"] == pytest.approx(1.0, abs=EXACT)


def test_sizes_are_told_apart(tmp_path: Path) -> None:
    truth = [truth_box(1, [0, 0, 20, 20]), truth_box(1, [50, 50, 50, 50]), truth_box(1, [100, 100, 150, 150])]
    stats = scored(tmp_path, truth, [found(1, box["bbox"], 0.9) for box in truth[:2]])
    assert stats["AP_small"] == pytest.approx(1.0)
    assert stats["AP_medium"] == pytest.approx(1.0)
    assert stats["AP_large"] == 0.0
    assert stats["AR_100"] == pytest.approx(2 / 3)


def test_no_detections_is_zero_and_no_objects_is_null(tmp_path: Path) -> None:
    assert scored(tmp_path, [truth_box(1, [10, 10, 40, 40])], [])["AP"] == 0.0
    assert scored(tmp_path, [], [found(1, [10, 10, 40, 40], 0.9)]) == dict.fromkeys(STATS)


def with_ids(tmp_path: Path, truth: list[dict[str, Any]], numbers: list[Any]) -> Path:
    """An annotation file whose annotations have these ids."""
    path = write_annotations(tmp_path / "instances.json", SIZES, truth)
    tree = json.loads(path.read_text())
    for annotation, number in zip(tree["annotations"], numbers, strict=True):
        annotation["id"] = number
    path.write_text(json.dumps(tree))
    return path


def test_ids_that_would_falsify_the_score_are_refused(tmp_path: Path) -> None:
    """pycocotools would look up the wrong one of two equal ids."""
    with pytest.raises(UserError, match="number the annotations from 1"):
        load_truth(with_ids(tmp_path, [truth_box(1, [1, 1, 9, 9])] * 2, [3, 3]))


@pytest.mark.parametrize("numbers", [[0, 1], ["a7", "b"], [2.0, 0], [-1, 2**60]])
def test_ids_of_annotations_make_no_difference(tmp_path: Path, numbers: list[Any]) -> None:
    """pycocotools takes a match with annotation 0 for none: recall, and with it AP, would be 0.5."""
    truth = [truth_box(1, [10, 10, 40, 40]), truth_box(1, [60, 60, 30, 30])]
    detections = [found(1, box["bbox"], 0.9) for box in truth]
    path = with_ids(tmp_path, truth, numbers)
    (tmp_path / "detections.json").write_text(json.dumps(detections))
    loaded = load_truth(path)
    assert sorted(loaded.anns) == [1, 2]
    assert score(loaded, tmp_path / "detections.json", [1])["AP"] == pytest.approx(1.0, abs=EXACT)


def test_frequent_classes_have_a_hundred_objects(tmp_path: Path) -> None:
    """Half of the objects of class 17 are found, those of image 1: precision 1 at 51 of 101 recalls. Class 18 is found.
    Of class 44, which has no detection, the hundredth object is a crowd."""
    grid = [[25.0 * column, 25.0 * line, 20.0, 20.0] for line in range(6) for column in range(10)]
    boxes: dict[int, list[list[float]]] = {17: grid[:50], 18: grid, 44: grid[:50]}
    truth, detections = [], []
    for category, of_class in boxes.items():
        for image_id in SIZES:
            truth += [truth_box(image_id, bbox, category) for bbox in of_class]
            if category == 18 or (category, image_id) == (17, 1):
                detections += [found(image_id, bbox, 0.9, category) for bbox in of_class]
    truth[-1]["iscrowd"] = 1
    stats = scored(tmp_path, truth, detections)
    assert stats["AP_frequent"] == pytest.approx((51 / 101 + 1) / 2, abs=EXACT)
    assert stats["AP"] == pytest.approx((51 / 101 + 1) / 3, abs=EXACT)
    loaded = load_truth(tmp_path / "instances.json")
    assert (sorted(frequent_classes(loaded, [1, 2])), frequent_classes(loaded, [1])) == ([17, 18], [])
    assert "AP_frequent" not in scored(tmp_path, truth, detections, (1,))
