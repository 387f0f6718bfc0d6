"""Boxes at the four borders of an image, in detections.json and in label files: each border by itself, by hand."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest

from app.coco.categories import CATEGORY_IDS
from app.coco.dataset import Dataset, annotation_path
from app.core.files import read_json
from app.core.run import RunRoot, open_run
from app.data.view import read_split
from app.eval.evaluate import evaluate_file
from tests.support.data_fixtures import annotation, edit, run_data, write_dataset
from tests.support.eval_fixtures import SETTINGS, raw_output, write_annotations, write_model

# Image id -> width and height in px. In the input of 32 x 32 px:
# 1 is halved to 32 x 24, with 4 px of padding above and below; 2 is its turned twin, with 4 px left and right;
# 3 becomes 32 x 19 (35 * 32 / 61 = 18.4, rounded up): 13 px of padding, 6 above and 7 below; 4 is its turned twin.
SIZES_WH = {1: (64, 48), 2: (48, 64), 3: (61, 35), 4: (35, 61)}
# x1, y1, x2, y2 in the input; the class of a box is its place in this table.
BOXES = {
    "inside": (8, 10, 20, 16),
    "left": (-3, 10, 20, 16),
    "top": (8, -3, 20, 16),
    "right": (8, 10, 35, 16),
    "bottom": (8, 10, 20, 35),
}
# x, y, w, h in the image. Image 1: (x * 2, (y - 4) * 2). Image 3: (x * 61 / 32, (y - 6) * 35 / 19).
EXPECTED = {
    1: {
        "inside": [16, 12, 24, 12], "left": [0, 12, 40, 12], "top": [16, 0, 24, 24], "right": [16, 12, 48, 12],
        "bottom": [16, 12, 24, 36],
    },
    2: {
        "inside": [8, 20, 24, 12], "left": [0, 20, 32, 12], "top": [8, 0, 24, 32], "right": [8, 20, 40, 12],
        "bottom": [8, 20, 24, 44],
    },
    3: {
        "inside": [15.25, 7.368, 22.875, 11.053], "left": [0, 7.368, 38.125, 11.053], "top": [15.25, 0, 22.875, 18.421],
        "right": [15.25, 7.368, 45.75, 11.053], "bottom": [15.25, 7.368, 22.875, 27.632],
    },
    4: {
        "inside": [3.684, 19.062, 22.105, 11.438], "left": [0, 19.062, 25.789, 11.438], "top": [3.684, 0, 22.105, 30.5],
        "right": [3.684, 19.062, 31.316, 11.438], "bottom": [3.684, 19.062, 22.105, 41.938],
    },
}  # fmt: skip
WRITTEN_PX = 1.1e-3  # detections.json has three decimals, and a half may round either way
HALF_DIGIT = 5e-7  # label files have six decimals


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """detections.json of a model that puts out the same boxes for every image."""
    folder = tmp_path_factory.mktemp("borders")
    write_annotations(annotation_path(folder, "val2017"), SIZES_WH, [])
    (folder / "val2017").mkdir()
    for image_id, (width, height) in SIZES_WH.items():
        cv2.imwrite(str(folder / "val2017" / f"{image_id:012d}.png"), np.zeros((height, width, 3), np.uint8))
    rows = [(x1, y1, x2, y2, 0.9 - 0.1 * i, i) for i, (x1, y1, x2, y2) in enumerate(BOXES.values())]
    path = write_model(folder / "net.onnx", raw_output(*rows))
    dataset = Dataset(folder, "val2017", None, "borders")
    evaluate_file(path, dataset, folder / "out", SETTINGS)
    return json.loads((folder / "out" / "detections.json").read_text())


@pytest.mark.parametrize("image_id", SIZES_WH)
@pytest.mark.parametrize("border", BOXES)
def test_detections_are_clipped_at_each_border(written: list[dict[str, Any]], image_id: int, border: str) -> None:
    category = CATEGORY_IDS[list(BOXES).index(border)]
    boxes = [row["bbox"] for row in written if (row["image_id"], row["category_id"]) == (image_id, category)]
    assert boxes == [pytest.approx(EXPECTED[image_id][border], abs=WRITTEN_PX)]


def test_every_image_has_every_box(written: list[dict[str, Any]]) -> None:
    assert len(written) == len(SIZES_WH) * len(BOXES)


# In an image of 40 x 30 px: box x, y, w, h as annotated, and what of it lies inside.
LABELS = {
    "inside": ([5, 6, 10, 7], [5, 6, 10, 7]),
    "left": ([-0.8, 6, 10, 7], [0, 6, 9.2, 7]),
    "top": ([5, -0.6, 10, 7], [5, 0, 10, 6.4]),
    "right": ([31, 6, 9.7, 7], [31, 6, 9, 7]),
    "bottom": ([5, 24, 10, 6.9], [5, 24, 10, 6]),
}
OUTSIDE = [-0.9, 6, 0.5, 7]  # within the tolerance of 1 px, and wholly outside


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    folder = tmp_path_factory.mktemp("labels")
    coco_dir = write_dataset(folder / "coco")
    annotated = [box for box, _ in LABELS.values()] + [OUTSIDE]
    entries = [annotation(key, 1, CATEGORY_IDS[key], box) for key, box in enumerate(annotated, start=1)]
    edit(coco_dir, lambda tree: tree.update(annotations=entries))
    run = open_run("r", folder / "runs")
    run_data(run, coco_dir)
    return run


@pytest.mark.parametrize("border", LABELS)
def test_labels_are_clipped_at_each_border(run: RunRoot, border: str) -> None:
    x, y, w, h = LABELS[border][1]
    labels = read_split(read_json(run.provenance, "data"), "train")[0].labels
    rows = labels[labels[:, 0] == list(LABELS).index(border) + 1]
    expected = [[(x + w / 2) / 40, (y + h / 2) / 30, w / 40, h / 30]]
    np.testing.assert_allclose(rows[:, 1:], expected, atol=HALF_DIGIT)


def test_a_box_outside_is_counted_and_is_no_label(run: RunRoot) -> None:
    provenance = read_json(run.provenance, "data")
    assert len(read_split(provenance, "train")[0].labels) == len(LABELS)
    assert provenance["splits"]["train"]["n_degenerate_boxes"] == 1
