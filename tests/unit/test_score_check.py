"""Our score against two independent ones, on random detections: COCOeval over all classes at once, faster-coco-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco.categories import CATEGORY_IDS
from app.coco.score import STATS, load_truth, quiet, read_results, score
from app.core.config import UserError
from tests.support.eval_fixtures import truth_box, write_annotations

AGREEMENT = 1e-6  # what the issue asks; both sum the same numbers in another order
N_IMAGES, N_CLASSES = 40, 6
SIDE = 300


def random_boxes(rng: np.random.Generator, n: int) -> list[list[float]]:
    """Small, medium and large ones, some of them twice."""
    sides = np.exp(rng.uniform(np.log(6), np.log(200), (n, 2)))
    corners = rng.uniform(0, 1, (n, 2)) * (SIDE - sides)
    return np.concatenate([corners, sides], axis=1).round(3).tolist()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int]]:
    """Objects, crowds and images without any; detections near objects, elsewhere, with equal scores, and over 100 of
    one class in one image."""
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    truth: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for image_id in range(1, N_IMAGES + 1):
        for box in random_boxes(rng, rng.integers(0, 8)):
            category = int(rng.choice(CATEGORY_IDS[:N_CLASSES]))
            truth.append(truth_box(image_id, box, category, int(rng.random() < 0.1)))
            if rng.random() < 0.7:
                near = (np.array(box) + rng.normal(0, 0.08, 4) * np.tile(box[2:], 2)).tolist()
                rows.append(
                    {"image_id": image_id, "category_id": category, "bbox": near, "score": 0.5 + rng.random() / 2}
                )
        for box in random_boxes(rng, 130 if image_id == 7 else 10):
            category = CATEGORY_IDS[0] if image_id == 7 else int(rng.choice(CATEGORY_IDS[: N_CLASSES + 1]))
            rows.append({"image_id": image_id, "category_id": category, "bbox": box, "score": round(rng.random(), 1)})
    annotations = write_annotations(
        folder / "instances.json", dict.fromkeys(range(1, N_IMAGES + 1), (SIDE, SIDE)), truth
    )
    (folder / "detections.json").write_text(json.dumps(rows))
    return annotations, folder / "detections.json", list(range(1, N_IMAGES + 1))


def by_pycocotools(annotations: Path, detections: Path, ids: list[int]) -> list[float]:
    truth = COCO(str(annotations))
    scorer = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
    scorer.params.imgIds = ids
    for step in (scorer.evaluate, scorer.accumulate, scorer.summarize):
        step()
    return list(scorer.stats)


def by_faster_coco_eval(annotations: Path, detections: Path, ids: list[int]) -> list[float]:
    truth = FasterCOCO(str(annotations))
    scorer = COCOeval_faster(truth, truth.loadRes(str(detections)), "bbox", print_function=lambda *_: None)
    scorer.params.imgIds = ids
    scorer.run()
    return list(scorer.stats[:12])


@pytest.mark.parametrize("other", [by_pycocotools, by_faster_coco_eval])
@pytest.mark.parametrize("every", [1, 3])
def test_same_twelve_numbers(scene: tuple[Path, Path, list[int]], other: Any, every: int) -> None:
    """All images, and a third of them."""
    annotations, detections, ids = scene
    stats = score(load_truth(annotations), detections, ids[::every])
    with quiet():
        expected = other(annotations, detections, ids[::every])
    got = [-1.0 if stats[name] is None else stats[name] for name in STATS]
    np.testing.assert_allclose(got, expected, rtol=0, atol=AGREEMENT)
    assert len({round(value, 3) for value in got}) > 9  # else the scene says nothing
    assert 0.05 < stats["AP"] < 0.95


def test_results_are_read_in_every_layout(tmp_path: Path) -> None:
    rows = [{"image_id": 9, "category_id": 3, "bbox": [1.5, 2, 3, 4], "score": 0.25}] * 3
    expected = [[9, 3, 1.5, 2, 3, 4, 0.25]] * 3
    path = tmp_path / "detections.json"
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n",
    ):
        path.write_text(text)
        assert read_results(path).tolist() == expected
    path.write_text("[]\n")
    assert read_results(path).shape == (0, 7)
    for text in ('[{"image_id": 9}]', "[{", '{"a": 1}', "[[1, 2]]"):
        path.write_text(text)
        with pytest.raises(UserError, match="no COCO results"):
            read_results(path)
    with pytest.raises(UserError, match="missing"):
        read_results(tmp_path / "none.json")
