"""The drawn dataset: the same bytes every time, official ids, and the odd cases that it promises."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from app.coco.annotations import read_instances
from app.coco.categories import CATEGORIES
from app.data import synthetic
from app.data.synthetic import draw_coco_subset

HALF_PX = 0.51  # an outline is drawn on whole pixels


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target_dir = tmp_path_factory.mktemp("drawn") / "coco"
    draw_coco_subset(target_dir, n_train=48, n_val=16)
    return target_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_twice_and_others_with_another_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_coco_subset(tmp_path / name, n_train=6, n_val=3, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    assert len(contents(tmp_path / "a")) == 6 + 3 + 2


def test_layout_and_official_categories(drawn: Path) -> None:
    for split, n_images in (("train2017", 48), ("val2017", 16)):
        tree = json.loads((drawn / "annotations" / f"instances_{split}.json").read_text())
        assert tree["categories"] == CATEGORIES
        assert sorted(image["file_name"] for image in tree["images"]) == sorted(
            path.name for path in (drawn / split).iterdir()
        )
        assert len(tree["images"]) == n_images


def test_annotations_pass_the_check(drawn: Path) -> None:
    split = read_instances(drawn / "annotations" / "instances_train2017.json")
    assert split.problems == {}
    assert sum(split.n_degenerate.values()) == 0
    assert sum(split.n_crowd.values()) == 3  # one in 16
    n_without = sum(not boxes for boxes in split.boxes.values())
    assert n_without >= 3  # one in 16 at least
    assert sum(split.n_annotations[key] == 0 for key in split.boxes) >= 3


def test_odd_sizes_and_greyscale(drawn: Path) -> None:
    images = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted((drawn / "train2017").iterdir())]
    assert sum(image.ndim == 2 for image in images) == 3
    sizes = {image.shape[:2] for image in images}
    assert len(sizes) >= 4
    assert any(height % 2 and width % 2 for height, width in sizes)


def test_boxes_fit_what_is_drawn(drawn: Path) -> None:
    tree = json.loads((drawn / "annotations" / "instances_train2017.json").read_text())
    plain = [entry for entry in tree["annotations"] if not entry["iscrowd"]]
    for entry in plain:
        corners = np.array(entry["segmentation"][0]).reshape(-1, 2)
        x, y, w, h = entry["bbox"]
        np.testing.assert_allclose(corners.min(axis=0), (x, y), atol=HALF_PX)
        np.testing.assert_allclose(corners.max(axis=0), (x + w, y + h), atol=HALF_PX)
        assert 0 < entry["area"] <= w * h * 1.001  # a rounding of float32


def test_crowd_mask_reads_back_with_its_box_and_area(drawn: Path) -> None:
    tree = json.loads((drawn / "annotations" / "instances_train2017.json").read_text())
    crowds = [entry for entry in tree["annotations"] if entry["iscrowd"]]
    assert crowds
    for entry in crowds:
        packed = rle.frPyObjects(entry["segmentation"], *entry["segmentation"]["size"])
        assert rle.area(packed) == entry["area"]
        assert rle.toBbox(packed).tolist() == entry["bbox"]


def test_finished_drawing_is_left_alone_and_a_broken_off_one_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(OSError, match="No space"):
            draw_coco_subset(tmp_path / "coco", n_train=2, n_val=1)
    assert list(tmp_path.iterdir()) == []
    draw_coco_subset(tmp_path / "coco", n_train=2, n_val=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "coco").rglob("*.*")}
    (tmp_path / "coco/train2017/000000000002.jpg").unlink()
    draw_coco_subset(tmp_path / "coco", n_train=2, n_val=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "coco").rglob("*.*")} == before
    monkeypatch.setattr(synthetic, "draw_shard", fail)
    draw_coco_subset(tmp_path / "coco", n_train=2, n_val=1)
