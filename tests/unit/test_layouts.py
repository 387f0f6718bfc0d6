"""Datasets of people's own classes: found in every layout, and the same network input and score from each."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.coco.categories import ids_by_name
from app.coco.dataset import Dataset, source_at
from app.coco.layout import find_split
from app.coco.score import score, standalone_dataset, truth_of
from app.core.config import UserError, load
from app.core.files import read_json
from app.core.run import RunRoot, open_run
from app.data.view import read_split
from tests.support.data_fixtures import annotation_file, edit, run_data, write_dataset, write_image
from tests.support.layouts import LAYOUTS, NAMES, draw_base

FOUND = {
    "coco": "train: images/train2017/ with annotations/instances_train2017.json; "
    "val: images/val2017/ with annotations/instances_val2017.json",
    "roboflow": "train: train/ with train/_annotations.coco.json; val: valid/ with valid/_annotations.coco.json",
    "cvat": "train: train/images/default/ with train/annotations/instances_default.json; "
    "val: val/images/default/ with val/annotations/instances_default.json",
    "scripts": "train: train/ with annotations/instances_train.json; val: val/ with annotations/instances_val.json",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same dataset in every layout."""
    root = tmp_path_factory.mktemp("sets")
    base = draw_base(root / "base", n_train=20, n_val=16)
    for name, write in LAYOUTS.items():
        write(base, root / name)
    return root


def prepared(sets: Path, name: str, tmp_path: Path) -> tuple[RunRoot, dict[str, Any]]:
    run = open_run(name, tmp_path / "runs")
    run_data(run, sets / name)
    return run, read_json(run.provenance, "data")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_found_and_shown(sets: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app")
    _, provenance = prepared(sets, name, tmp_path)
    assert f"data: {sets / name}: {FOUND[name]}" in caplog.messages
    assert (provenance["names"], provenance["title"]) == (NAMES, "own dataset, 5 classes")
    assert [split["n_images"] for split in provenance["splits"].values()] == [20, 16]
    left_out = [line for line in caplog.messages if "supercategory of all others: left out" in line]
    assert len(left_out) == (name == "roboflow")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "coco"])
def test_network_sees_the_same_in_every_layout(sets: Path, tmp_path: Path, name: str) -> None:
    """Images in the same order, with the same pixels and labels to the last bit."""
    _, first = prepared(sets, "coco", tmp_path)
    _, other = prepared(sets, name, tmp_path)
    for split in ("train", "val"):
        pairs = list(zip(read_split(first, split), read_split(other, split), strict=True))
        for ours, theirs in pairs:
            assert Path(ours.path).read_bytes() == Path(theirs.path).read_bytes()
            np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert {int(row[0]) for ours, _ in pairs for row in ours.labels} == set(range(5))


def scores_of(dataset: Dataset, out: Path) -> dict[str, float | None]:
    """Of detections that have the right box at every second object, and a shifted one at the others."""
    truth = truth_of(dataset)
    image_number = {image_id: number for number, image_id in enumerate(sorted(truth.imgs))}
    ids = list(ids_by_name(truth.dataset["categories"]).values())
    rows = []
    for annotation in truth.dataset["annotations"]:
        x, y, w, h = annotation["bbox"]
        is_exact = (image_number[annotation["image_id"]] + ids.index(annotation["category_id"])) % 2
        row = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
        rows.append(row | {"bbox": [x, y, w * (1 if is_exact else 0.7), h], "score": 1 / (1 + w)})
    out.write_text(json.dumps(rows))
    return score(truth, out, sorted(truth.imgs))


def test_score_is_the_same_in_every_layout(sets: Path, tmp_path: Path) -> None:
    scores = {}
    for name in LAYOUTS:
        scores[name] = scores_of(standalone_dataset(sets / name, None), tmp_path / "detections.json")
    assert 0.5 < (scores["coco"]["AP"] or 0) < 0.9
    assert all(found == scores["coco"] for found in scores.values())


def test_provenance_leads_to_the_files_wherever_the_dataset_lies(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "cvat", tmp_path / "moved")
    run, before = prepared(sets, "cvat", tmp_path)
    run_data(run, tmp_path / "moved")
    after = read_json(run.provenance, "data")
    split = after["splits"]["val"]
    source = source_at(Path(after["coco_dir"]), split["name"], split)
    assert source.images_dir == tmp_path / "moved" / "val" / "images" / "default"
    assert split["image_ids_sha256"] == before["splits"]["val"]["image_ids_sha256"]


def test_files_that_the_settings_name(tmp_path: Path) -> None:
    """From the dataset's folder, or by whole paths; COCO's own layout is left aside."""
    coco_dir = write_dataset(tmp_path / "coco")
    (coco_dir / "val2017").rename(tmp_path / "elsewhere")
    annotation_file(coco_dir, "val2017").rename(coco_dir / "mine.json")
    run = open_run("r", tmp_path / "runs")
    val = [f"data.val_images={tmp_path / 'elsewhere'}", "data.val_annotations=mine.json"]
    train = ["data.train_images=train2017", "data.train_annotations=annotations/instances_train2017.json"]
    run_data(run, coco_dir, *train, *val)
    split = read_json(run.provenance, "data")["splits"]["val"]
    assert (split["name"], split["images"], split["annotations"]) == ("val", str(tmp_path / "elsewhere"), "mine.json")
    assert Path(read_split(read_json(run.provenance, "data"), "val")[0].path).resolve().parent == tmp_path / "elsewhere"
    assert find_split(coco_dir, None, load("qat", [], val).data).annotation_file == coco_dir / "mine.json"


def one_file(tmp_path: Path, folders: bool) -> Path:
    """instances_default.json with 40 images, in folders of their own or beside each other."""
    coco_dir = tmp_path / "coco"
    images, annotations = [], []
    for number in range(40):
        name = f"{'val' if number % 4 == 0 else 'train'}/{number}.png" if folders else f"{number}.png"
        path = coco_dir / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, (8, 8))
        images.append({"id": number, "file_name": name, "width": 8, "height": 8})
        annotations.append({"id": number, "image_id": number, "category_id": 0, "bbox": [0, 0, 4, 4]})
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "dot"}]}
    (coco_dir / "annotations").mkdir()
    (coco_dir / "annotations" / "instances_default.json").write_text(json.dumps(tree))
    return coco_dir


# SHA-256 of these names, as a number, is a multiple of 5.
VAL_BY_HASH = ["0.png", "7.png", "9.png", "13.png", "25.png", "29.png", "32.png", "35.png"]


def test_one_file_for_all_images_is_parted_by_the_hash_of_their_names(tmp_path: Path) -> None:
    coco_dir, run = one_file(tmp_path, folders=False), open_run("r", tmp_path / "runs")
    run_data(run, coco_dir)
    provenance = read_json(run.provenance, "data")
    names = {split: {Path(image.path).name for image in read_split(provenance, split)} for split in ("train", "val")}
    assert sorted(names["val"], key=lambda name: int(Path(name).stem)) == VAL_BY_HASH
    assert len(names["train"] | names["val"]) == 40
    assert not names["train"] & names["val"]
    val = provenance["splits"]["val"]
    assert (val["n_listed"], val["subset"], val["part"]) == (len(VAL_BY_HASH), False, "val")
    assert len(truth_of(standalone_dataset(coco_dir, None)).imgs) == len(VAL_BY_HASH)
    assert len(truth_of(standalone_dataset(coco_dir, "all")).imgs) == 40


def test_one_file_for_all_images_is_parted_by_their_folders(tmp_path: Path) -> None:
    coco_dir, run = one_file(tmp_path, folders=True), open_run("r", tmp_path / "runs")
    run_data(run, coco_dir)
    assert [split["n_images"] for split in read_json(run.provenance, "data")["splits"].values()] == [30, 10]


def test_test_images_beside_val_are_of_neither(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 40 images 10 are in val/, 10 in test/ and 20 in train/."""
    coco_dir, run = one_file(tmp_path, folders=True), open_run("r", tmp_path / "runs")
    file = coco_dir / "annotations" / "instances_default.json"
    tree = json.loads(file.read_text())
    (coco_dir / "images" / "test").mkdir()
    for image in tree["images"][1::4]:
        (coco_dir / "images" / image["file_name"]).rename(coco_dir / "images" / "test" / f"{image['id']}.png")
        image["file_name"] = f"test/{image['id']}.png"
    file.write_text(json.dumps(tree))
    caplog.set_level("INFO", "app")
    run_data(run, coco_dir)
    splits = read_json(run.provenance, "data")["splits"]
    assert [splits[role]["n_images"] for role in ("train", "val")] == [20, 10]
    assert [splits[role]["n_annotations"] for role in ("train", "val")] == [20, 10]
    assert splits["val"]["notes"]["images of neither train nor val left out"] == 10
    assert "10 images of neither train nor val left out" in caplog.text


def test_placeholder_is_known_by_the_ids_of_its_own_file(tmp_path: Path) -> None:
    """train as Roboflow writes one class, 0 the supercategory and 1 the class; val with the class alone, as 0."""
    coco_dir, run = write_dataset(tmp_path / "coco"), open_run("r", tmp_path / "runs")
    listed = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "cat"}]
    edit(coco_dir, lambda tree: tree.update(categories=listed))
    edit(coco_dir, lambda tree: [box.update(category_id=1) for box in tree["annotations"]])
    edit(coco_dir, lambda tree: tree.update(categories=[{"id": 0, "name": "cat"}]), "val2017")
    edit(coco_dir, lambda tree: [box.update(category_id=0) for box in tree["annotations"]], "val2017")
    run_data(run, coco_dir)
    provenance = read_json(run.provenance, "data")
    assert (provenance["names"], provenance["left_out"]) == (["cat"], ["cat"])
    assert read_split(provenance, "train")[0].labels[:, 0].tolist() == [0, 0]
    assert read_split(provenance, "val")[0].labels[:, 0].tolist() == [0]


def test_other_ids_in_val_are_the_same_classes_by_name(tmp_path: Path) -> None:
    """train: 1 person, 3 car; val: 1 car, 3 person."""
    coco_dir, run = write_dataset(tmp_path / "coco"), open_run("r", tmp_path / "runs")
    listed = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
    edit(coco_dir, lambda tree: tree.update(categories=listed))
    swapped = [{"id": 1, "name": "car"}, {"id": 3, "name": " person "}, {"id": 90, "name": "toothbrush"}]
    edit(coco_dir, lambda tree: tree.update(categories=swapped), "val2017")
    edit(coco_dir, lambda tree: tree["annotations"][0].update(category_id=3), "val2017")
    run_data(run, coco_dir)
    provenance = read_json(run.provenance, "data")
    assert provenance["names"] == ["person", "car", "toothbrush"]
    assert read_split(provenance, "train")[0].labels[:, 0].tolist() == [0, 2]
    assert read_split(provenance, "val")[0].labels[:, 0].tolist() == [0]


@pytest.mark.parametrize(("is_used", "n_classes"), [(False, 2), (True, 3)])
def test_roboflow_supercategory_is_a_class_where_an_annotation_is_of_it(
    tmp_path: Path, is_used: bool, n_classes: int
) -> None:
    coco_dir, run = write_dataset(tmp_path / "coco"), open_run("r", tmp_path / "runs")
    listed = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"}, {"id": 2, "name": "dog", "supercategory": "animals"},
    ]  # fmt: skip
    for split in ("train2017", "val2017"):
        edit(coco_dir, lambda tree: [box.update(category_id=1) for box in tree["annotations"]], split)
        edit(coco_dir, lambda tree: tree.update(categories=listed), split)
    if is_used:
        edit(coco_dir, lambda tree: tree["annotations"][0].update(category_id=0))
    run_data(run, coco_dir)
    provenance = read_json(run.provenance, "data")
    assert len(provenance["names"]) == n_classes
    assert read_split(provenance, "val")[0].labels[:, 0].tolist() == [n_classes - 2]  # cat


def test_evaluation_of_a_split_that_is_not_there(sets: Path) -> None:
    with pytest.raises(
        UserError, match=r"holiday is no folder: COCO_DIR=path or --coco-dir must hold holiday/ and annotations/"
    ):
        standalone_dataset(sets / "roboflow", "holiday")
    with pytest.raises(UserError, match="has no val split in a known layout"):
        standalone_dataset(sets / "roboflow" / "test", None)
    assert standalone_dataset(sets / "roboflow", "train").split == "train"
