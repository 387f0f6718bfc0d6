"""What annotation files write otherwise than COCO is mended, counted and said, and the same for training and score."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.coco.annotations import read_instances
from app.coco.categories import CATEGORIES
from app.coco.score import load_truth, standalone_dataset, truth_of
from app.core.config import UserError
from app.core.run import RunRoot
from app.data.view import read_split
from tests.support.data_fixtures import annotation_file, edit, provenance_of, run_data, write_image

ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 3, 10, 6]}


# Image 1 has 40 x 30 px. Box -> what is left of it for training and score; None: nothing.
OVER = {
    "right": ([30, 3, 20, 6], [30, 3, 10, 6]),
    "left and above": ([-5, -4, 20, 10], [0, 0, 15, 6]),
    "all around": ([-99, -99, 999, 999], [0, 0, 40, 30]),
    "a pixel is left": ([39, 3, 20, 6], [39, 3, 1, 6]),
    "half a pixel is left": ([39.5, 3, 20, 6], None),
    "outside": ([50, 3, 20, 6], None),
    "rounding": ([30, 3, 11, 6], [30, 3, 10, 6]),  # COCOeval gets this one as it is
}


@pytest.mark.parametrize("case", OVER)
def test_box_over_the_border_is_clipped_and_counted(coco_dir: Path, run: RunRoot, case: str) -> None:
    box, left = OVER[case]
    area = 5000.0 if case == "all around" else 7.0
    edit(coco_dir, lambda tree: tree["annotations"][0].update(bbox=box, area=area))
    run_data(run, coco_dir)
    provenance = provenance_of(run)
    labels = read_split(provenance, "train")[0].labels
    truth = load_truth(annotation_file(coco_dir))
    train = provenance["splits"]["train"]
    if left is None:
        assert (train["n_clipped"], train["n_dropped"], len(labels)) == (0, 1, 1)
        assert 1 not in truth.anns
        return
    assert (train["n_clipped"], train["n_dropped"]) == (int(case != "rounding"), 0)
    x, y, w, h = left
    expected = [0, (x + w / 2) / 40, (y + h / 2) / 30, w / 40, h / 30]
    np.testing.assert_allclose(labels[0], expected, atol=5e-7)
    assert truth.anns[1]["bbox"] == (box if case == "rounding" else left)
    assert truth.anns[1]["area"] == (1200.0 if case == "all around" else min(area, w * h))


def test_crowd_over_the_border_is_clipped_too(coco_dir: Path) -> None:
    edit(coco_dir, lambda tree: tree["annotations"][2].update(bbox=[-9, 0, 24, 8]))
    assert read_instances(annotation_file(coco_dir)).n_clipped == {2: 1}
    assert load_truth(annotation_file(coco_dir)).anns[3]["bbox"] == [0, 0, 15, 8]


def test_area_and_iscrowd_may_be_missing(coco_dir: Path, run: RunRoot) -> None:
    def strip(tree: dict[str, Any]) -> None:
        tree["annotations"] = [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 3, 10, 6.5]},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [4, 3, 10, 6], "area": None, "iscrowd": None},
            {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 10, 6], "area": 12.5, "iscrowd": 1},
        ]

    edit(coco_dir, strip)
    run_data(run, coco_dir)
    train = provenance_of(run)["splits"]["train"]
    assert (train["n_crowd"], train["notes"]) == (1, {"areas taken from boxes": 2})
    truth = load_truth(annotation_file(coco_dir))
    assert [truth.anns[key]["area"] for key in (1, 2, 3)] == [65.0, 60, 12.5]
    assert [truth.anns[key]["iscrowd"] for key in (1, 2, 3)] == [0, 0, 1]


@pytest.mark.parametrize(("area", "expected", "n_mended"), [(0, [60, 310.0], 2), (7, [7, 0], 0)])
def test_areas_that_are_all_zero_are_not_given(
    coco_dir: Path, area: float, expected: list[float], n_mended: int
) -> None:
    """A single 0 is left as it is: it may be COCO's."""

    def change(tree: dict[str, Any]) -> None:
        tree["annotations"] = tree["annotations"][:2]
        tree["annotations"][0]["area"], tree["annotations"][1]["area"] = area, 0

    edit(coco_dir, change)
    truth = load_truth(annotation_file(coco_dir))
    assert [truth.anns[key]["area"] for key in (1, 2)] == expected
    assert read_instances(annotation_file(coco_dir)).notes["areas taken from boxes"] == n_mended


def test_whole_numbers_may_be_written_as_floats(coco_dir: Path, run: RunRoot) -> None:
    def as_floats(tree: dict[str, Any]) -> None:
        for entry in (*tree["images"], *tree["annotations"], *tree["categories"]):
            for key in ("id", "image_id", "category_id", "width", "height"):
                if key in entry:
                    entry[key] = float(entry[key])

    edit(coco_dir, as_floats)
    run_data(run, coco_dir)
    assert [len(image.labels) for image in read_split(provenance_of(run), "train")] == [2, 0]
    truth = load_truth(annotation_file(coco_dir))
    assert [type(key) for key in truth.imgs] == [int, int]
    assert truth.imgs[1]["width"] == 40
    assert {annotation["image_id"] for annotation in truth.anns.values()} == {1, 2}


NAMES = {
    "split before": ("train2017/000000000001.jpg", "000000000001.jpg"),
    "folders before": ("data/v3/train2017/000000000001.jpg", "000000000001.jpg"),
    "backslashes": ("train2017\\000000000001.jpg", "000000000001.jpg"),
    "sub-folder": ("a/b/1.jpg", "a/b/1.jpg"),
    "backslashes to a sub-folder": ("a\\b\\1.jpg", "a/b/1.jpg"),
    "a backslash in the name": ("a\\1.jpg", "a\\1.jpg"),
    "a number that is no id": ("000000000077.jpg", "000000000077.jpg"),
    "sub-folder named as the split": ("train2017/1.jpg", "train2017/1.jpg"),
    "with a dot": ("./1.jpg", "1.jpg"),
}


@pytest.mark.parametrize("case", NAMES)
def test_file_names_as_tools_write_them(coco_dir: Path, run: RunRoot, case: str) -> None:
    written, there = NAMES[case]
    (coco_dir / "train2017" / "000000000001.jpg").unlink()
    path = coco_dir / "train2017" / there
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, (40, 30))
    edit(coco_dir, lambda tree: tree["images"][0].update(file_name=written))
    run_data(run, coco_dir)
    first = read_split(provenance_of(run), "train")[0]
    assert (Path(first.path).resolve(), len(first.labels)) == (path, 2)
    dataset = standalone_dataset(coco_dir, "train2017")
    assert dataset.images_dir / truth_of(dataset).imgs[1]["file_name"] == path


def test_names_without_their_files_are_left_as_they_are(coco_dir: Path, run: RunRoot) -> None:
    edit(coco_dir, lambda tree: tree["images"][0].update(file_name="lost/1.jpg"))
    with pytest.raises(UserError, match=r"lost/1\.jpg cannot be read"):
        run_data(run, coco_dir)


def test_annotations_of_unlisted_images_are_counted_and_left_out(
    coco_dir: Path, run: RunRoot, caplog: pytest.LogCaptureFixture
) -> None:
    stray = [{**ANNOTATION, "id": 8, "image_id": 77}, {**ANNOTATION, "id": 9, "image_id": "x"}]
    edit(coco_dir, lambda tree: tree["annotations"].extend(stray))
    edit(coco_dir, lambda tree: tree["annotations"].extend(stray), "val2017")
    with pytest.raises(UserError, match=r"2 annotations are of images .* \(first: annotation 8, image id 77\): .*skip"):
        run_data(run, coco_dir)
    caplog.set_level(logging.INFO, "app")
    run_data(run, coco_dir, "data.skip_broken=true")
    assert provenance_of(run)["splits"]["train"]["n_unlisted"] == 2
    assert "train2017: 2 images, 4 annotations" in caplog.messages[-1]
    assert "2 annotations of unlisted images left out" in caplog.messages[-1]
    with pytest.raises(UserError, match="2 annotations are of images"):
        standalone_dataset(coco_dir, "val2017")
    assert sorted(truth_of(standalone_dataset(coco_dir, "val2017", True)).anns) == [1]


def test_only_what_is_as_in_coco_is_called_so(coco_dir: Path) -> None:
    """The number of images is looked at elsewhere: here, that everything else is COCO's."""
    file = annotation_file(coco_dir)
    assert read_instances(file).is_official
    sound = json.loads(file.read_text())
    changes: list[dict[str, Any]] = [
        {"categories": [*CATEGORIES[:-1], {**CATEGORIES[-1], "name": "brush"}]},
        {"categories": [*CATEGORIES, {"id": 91, "name": "hair brush", "supercategory": "indoor"}]},
        {"images": [{**sound["images"][0], "file_name": "7.jpg"}, sound["images"][1]]},
        {"annotations": [*sound["annotations"], {**sound["annotations"][0], "id": 0}]},
        {"annotations": [*sound["annotations"], {**sound["annotations"][0], "id": 9, "bbox": [30, 3, 20, 6]}]},
        {"annotations": [*sound["annotations"], {**sound["annotations"][0], "id": 9, "bbox": [60, 3, 20, 6]}]},
        {"annotations": [*sound["annotations"], {**sound["annotations"][0], "id": 9, "image_id": 5}]},
        {"annotations": [*sound["annotations"], {**ANNOTATION, "id": 9}]},
    ]
    for change in changes:
        file.write_text(json.dumps(sound | change))
        assert not read_instances(file).is_official, change


def test_sound_file_reaches_the_score_as_it_is(coco_dir: Path) -> None:
    sound = json.loads(annotation_file(coco_dir).read_text())
    assert load_truth(annotation_file(coco_dir)).dataset == sound
