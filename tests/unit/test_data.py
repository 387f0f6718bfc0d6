"""The data stage: labels by hand, a view built once, the dataset left alone, the choice of images, provenance."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

import app.data.prepare
import app.data.view
from app.coco.categories import CATEGORIES, NAMES
from app.core.config import UserError
from app.core.run import RunRoot, open_run
from app.data.prepare import follow, prepared
from app.data.provenance import choose
from app.data.view import read_split
from tests.support.data_fixtures import (
    annotation,
    annotation_file,
    edit,
    image,
    listing,
    provenance_of,
    run_data,
    write_dataset,
    write_image,
)

HALF_DIGIT = 5e-7  # label files have six decimals


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        pytest.fail("the view was built again")

    monkeypatch.setattr(app.data.prepare, "build_view", fail)
    monkeypatch.setattr(app.data.view, "build_view", fail)


def test_labels_are_right_by_hand(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    first, second = read_split(provenance_of(run), "train")
    assert (Path(first.path).name, first.shape_hw) == ("000000000001.jpg", (30, 40))
    # person [4,3,10,6] in 40 x 30: centre 9/40, 6/30; toothbrush [20,15,20,15.5] reaches 30.5 and is cut at 30
    expected = [[0, 9 / 40, 6 / 30, 10 / 40, 6 / 30], [79, 30 / 40, 22.5 / 30, 20 / 40, 15 / 30]]
    np.testing.assert_allclose(first.labels, expected, atol=HALF_DIGIT)
    assert second.labels.shape == (0, 5)  # a crowd and a box without area give no label
    (only,) = read_split(provenance_of(run), "val")
    np.testing.assert_allclose(only.labels, [[53, 0.5, 0.5, 0.5, 0.5]], atol=HALF_DIGIT)


def test_files_for_the_trainer(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    dataset = yaml.safe_load(run.dataset_yaml.read_text())
    assert list(dataset["names"].values()) == NAMES
    lines = Path(dataset["train"]).read_text().splitlines()
    assert [Path(line).resolve() for line in lines] == sorted((coco_dir / "train2017").iterdir())
    labels = [Path(line.replace("/images/", "/labels/")).with_suffix(".txt") for line in lines]
    assert labels[0].read_text() == "0 0.225000 0.200000 0.250000 0.200000\n79 0.750000 0.750000 0.500000 0.500000\n"
    assert labels[1].read_text() == ""


def test_provenance_says_what_is_there(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    provenance = provenance_of(run)
    assert provenance["title"] == "a COCO-format dataset, not COCO 2017"
    train = provenance["splits"]["train"]
    counts = ("n_listed", "n_images", "n_broken", "n_annotations", "n_crowd", "n_degenerate_boxes", "n_without_objects")
    assert [train[key] for key in counts] == [2, 2, 0, 4, 1, 1, 1]
    content = annotation_file(coco_dir).read_bytes()
    assert train["annotation_sha256"] == hashlib.sha256(content).hexdigest()
    assert train["image_ids_sha256"] == hashlib.sha256(b"1\n2").hexdigest()
    files = [coco_dir / "train2017" / f"{image_id:012d}.jpg" for image_id in (1, 2)]
    first, second = (hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
    assert train["images_sha256"] == hashlib.sha256(f"1 {first}\n2 {second}".encode()).hexdigest()
    assert (train["subset"], train["image_ids"]) == (False, None)


def test_second_run_of_the_stage_says_done(
    coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_data(run, coco_dir)
    before = listing(run.root)
    forbid_building(monkeypatch)
    caplog.set_level(logging.INFO, "app")
    run_data(run, coco_dir)
    assert caplog.messages[-1].startswith("data: done already (a COCO-format dataset, not COCO 2017, train2017: 2 im")
    assert listing(run.root) == before


def test_another_run_reuses_the_view(coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    run_data(run, coco_dir)
    view = Path(provenance_of(run)["view_dir"])
    before = listing(view)
    forbid_building(monkeypatch)
    other = open_run("other", run.runs_dir)
    run_data(other, coco_dir, "data.n_train=1")
    assert provenance_of(other)["view_dir"] == str(view)
    assert listing(view) == before


def test_force_builds_the_view_again(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    index_path = Path(provenance_of(run)["view_dir"]) / "train2017.json"
    index_path.write_text("spoiled")
    run_data(run, coco_dir, force=True)
    assert len(json.loads(index_path.read_text())["images"]) == 2


def test_dataset_folder_is_never_written(coco_dir: Path, run: RunRoot) -> None:
    folders = [coco_dir, *(path for path in coco_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = listing(coco_dir)
    run_data(run, coco_dir)
    run_data(run, coco_dir, force=True)
    assert listing(coco_dir) == before
    for folder in folders:
        folder.chmod(0o755)


def test_choice_of_images_is_seeded_recorded_and_stable(tmp_path: Path) -> None:
    chosen = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = open_run(name, tmp_path / "runs")
        run_data(run, "coco-subset", "data.n_train=20", "data.n_val=5", f"data.seed={seed}")
        chosen[name] = provenance_of(run)["splits"]
    # random.Random(0).sample of ids 1..256 and 257..320; other numbers here mean other images in old runs
    assert chosen["a"]["val"]["image_ids"] == [262, 290, 306, 310, 319]
    assert chosen["a"] == chosen["b"]
    assert chosen["a"]["train"]["image_ids"] != chosen["c"]["train"]["image_ids"]
    assert (chosen["a"]["train"]["n_images"], chosen["a"]["train"]["subset"]) == (20, True)
    listed = open_run("a", tmp_path / "runs").provenance.with_name("train.txt").read_text().split()
    assert [int(Path(line).stem) for line in listed] == chosen["a"]["train"]["image_ids"]


def test_a_choice_without_objects_takes_one_image_that_has_some() -> None:
    """Every other choice stays as it was: its runs go on."""
    entries = [{"id": number, "n_boxes": int(number == 7)} for number in range(200)]
    plain = {entry["id"] for entry in random.Random(0).sample(entries, 5)}
    chosen = {entry["id"] for entry in choose(entries, 5, 0, "val", "val2017")}
    assert 7 not in plain and 7 in chosen and len(chosen & plain) == 4
    rich = [entry | {"n_boxes": 1} for entry in entries]
    assert {entry["id"] for entry in choose(rich, 5, 0, "val", "val2017")} == plain
    bare = [entry | {"n_boxes": 0} for entry in entries]
    assert {entry["id"] for entry in choose(bare, 5, 0, "val", "val2017")} == plain, "there is none to take"


def test_broken_images_are_counted_and_left_out(coco_dir: Path, run: RunRoot) -> None:
    (coco_dir / "train2017" / "000000000001.jpg").unlink()
    run_data(run, coco_dir, "data.skip_broken=true")
    train = provenance_of(run)["splits"]["train"]
    assert (train["n_listed"], train["n_images"], train["n_broken"], train["n_annotations"]) == (2, 1, 1, 2)
    assert train["broken"] == [{"file": "000000000001.jpg", "reason": "cannot be read (No such file or directory)"}]
    assert [Path(found.path).name for found in read_split(provenance_of(run), "train")] == ["000000000002.jpg"]


def test_repaired_image_is_noticed(coco_dir: Path, run: RunRoot) -> None:
    path = coco_dir / "train2017" / "000000000001.jpg"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"000000000001\.jpg is empty"):
        run_data(run, coco_dir)
    write_image(path, (40, 30))
    run_data(run, coco_dir)
    assert provenance_of(run)["splits"]["train"]["n_images"] == 2


def test_all_images_broken(coco_dir: Path, run: RunRoot) -> None:
    (coco_dir / "val2017" / "000000000003.jpg").unlink()
    with pytest.raises(UserError, match="no image of val2017 can be used"):
        run_data(run, coco_dir, "data.skip_broken=true")
    assert not run.root.exists()


def test_other_settings_are_refused_with_the_difference(coco_dir: Path, run: RunRoot, tmp_path: Path) -> None:
    run_data(run, coco_dir)
    before = listing(run.root)
    with pytest.raises(UserError) as error:
        run_data(run, coco_dir, "data.n_train=1", "data.skip_broken=true")
    assert str(error.value) == (
        f"{run.root} was made with other data settings (data.n_train: None -> 1, data.skip_broken: False -> True): "
        "take another RUN=name, or start the run over with ARGS=--force"
    )
    with pytest.raises(UserError, match=r"no COCO folder at .*other"):
        run_data(run, tmp_path / "other")
    assert listing(run.root) == before


def test_same_folder_under_another_name_is_no_difference(
    coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_data(run, coco_dir)
    monkeypatch.chdir(coco_dir.parent)
    forbid_building(monkeypatch)
    run_data(run, "coco")


def test_changed_annotations_are_refused(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    edit(coco_dir, lambda tree: tree["annotations"].pop())
    with pytest.raises(UserError, match=r"made with another train2017 of .*annotation_sha256 \w{8} -> \w{8}.*RUN=name"):
        run_data(run, coco_dir)
    run_data(run, coco_dir, force=True)
    assert provenance_of(run)["splits"]["train"]["n_annotations"] == 3


def test_same_dataset_at_another_path_goes_on(coco_dir: Path, run: RunRoot, tmp_path: Path) -> None:
    run_data(run, coco_dir)
    old = provenance_of(run)
    shutil.copytree(coco_dir, tmp_path / "scratch")
    shutil.rmtree(coco_dir)
    run_data(run, tmp_path / "scratch")
    new = provenance_of(run)
    assert (new["coco_dir"], new["earlier_coco_dirs"]) == (str(tmp_path / "scratch"), [str(coco_dir)])
    assert new["splits"]["train"]["image_ids_sha256"] == old["splits"]["train"]["image_ids_sha256"]
    assert Path(read_split(new, "train")[0].path).resolve().parent == tmp_path / "scratch" / "train2017"
    run_data(run, tmp_path / "scratch")
    assert provenance_of(run) == new


def test_another_dataset_at_another_path_is_refused(coco_dir: Path, run: RunRoot, tmp_path: Path) -> None:
    run_data(run, coco_dir)
    other = write_dataset(tmp_path / "other")
    edit(other, lambda tree: tree["annotations"].pop())
    before = listing(run.root)
    with pytest.raises(UserError, match=r"made with another train2017 of .*other \(annotation_sha256"):
        run_data(run, other)
    assert listing(run.root) == before


def as_png(path: Path) -> None:
    """Other content under the same name: the size in px stays, and nothing but the content tells it."""
    pixels = np.asarray(cv2.imread(str(path)))
    path.write_bytes(cv2.imencode(".png", pixels // 2)[1].tobytes())


def test_images_changed_in_place_are_refused_and_touched_ones_are_not(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    path = coco_dir / "train2017" / "000000000001.jpg"
    os.utime(path, ns=(0, 1))
    before = provenance_of(run)
    run_data(run, coco_dir)
    assert provenance_of(run) == before
    content = path.read_bytes()
    as_png(path)
    for _ in range(2):  # the view knows of it after the first
        with pytest.raises(UserError, match=r"made with another train2017 of .*images_sha256 \w{8} -> \w{8}.*RUN=name"):
            run_data(run, coco_dir)
    with pytest.raises(UserError, match="images_sha256"):
        prepared(run)
    path.write_bytes(content)
    run_data(run, coco_dir)
    assert provenance_of(run) == before


def test_another_folder_of_images_is_refused_unless_they_are_the_same(coco_dir: Path, run: RunRoot) -> None:
    annotations = "data.val_annotations=annotations/instances_val2017.json"
    run_data(run, coco_dir, "data.val_images=val2017", annotations)
    shutil.copytree(coco_dir / "val2017", coco_dir / "copied", copy_function=shutil.copyfile)  # with other times
    shutil.copytree(coco_dir / "val2017", coco_dir / "dark")
    as_png(coco_dir / "dark" / "000000000003.jpg")
    run_data(run, coco_dir, "data.val_images=copied", annotations)
    assert provenance_of(run)["splits"]["val"]["images"] == "copied"
    with pytest.raises(UserError, match=r"made with another val of .*\(images_sha256 "):
        run_data(run, coco_dir, "data.val_images=dark", annotations)


def test_run_of_a_version_without_a_hash_of_images_goes_on(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    new = provenance_of(run)
    old = json.loads(run.provenance.read_text())
    for split in old["splits"].values():
        del split["images_sha256"]
    run.provenance.write_text(json.dumps(old))
    run_data(run, coco_dir)
    assert provenance_of(run) == new


def test_moved_dataset_goes_on(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    old = provenance_of(run)
    coco_dir.rename(coco_dir.with_name("moved"))
    coco_dir.symlink_to("moved")  # the settings name the same path
    run_data(run, coco_dir)
    assert provenance_of(run)["coco_dir"] == str(coco_dir.with_name("moved"))
    assert provenance_of(run)["splits"]["train"]["image_ids_sha256"] == old["splits"]["train"]["image_ids_sha256"]


@pytest.mark.parametrize("stage", [prepared, follow])
def test_a_later_stage_finds_a_dataset_that_has_moved(
    coco_dir: Path, run: RunRoot, stage: Callable[..., object]
) -> None:
    """Stages that read the view, and eval, which does not; the command's place counts where the old one is gone."""
    run_data(run, coco_dir)
    moved, other = coco_dir.with_name("moved"), write_dataset(coco_dir.with_name("other"))
    edit(other, lambda tree: tree["annotations"].pop(), "train2017")
    stage(run, str(other))
    assert provenance_of(run)["coco_dir"] == str(coco_dir), "the run's own dataset is there"
    coco_dir.rename(moved)
    with pytest.raises(UserError, match=r"made with another train2017 of .*other"):
        stage(run, str(other))
    stage(run, str(moved))
    found = provenance_of(run)
    assert (found["coco_dir"], found["earlier_coco_dirs"]) == (str(moved), [str(coco_dir)])
    assert prepared(run) == found


@pytest.mark.parametrize("other_run", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, r"cannot be read \(No such file or directory\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is cut off or damaged"),
        (lambda path: write_image(path, (30, 40)), "has 30 x 40 px, the annotations say 40 x 30"),
    ],
    ids=["deleted", "cut off", "of another size"],
)
def test_image_that_changes_after_it_was_checked(
    coco_dir: Path, run: RunRoot, change: Any, reason: str, other_run: bool
) -> None:
    run_data(run, coco_dir)
    change(coco_dir / "train2017" / "000000000001.jpg")
    if other_run:
        run = open_run("other", run.runs_dir)
    with pytest.raises(UserError, match=rf"1 of 2 images in .*train2017 cannot be used: 000000000001\.jpg {reason}"):
        run_data(run, coco_dir)
    with pytest.raises(UserError, match=r"cannot be used|is missing"):
        prepared(run)


def test_only_what_has_changed_is_checked_again(
    coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app")
    run_data(run, coco_dir)
    looked: list[str] = []
    monkeypatch.setattr(app.data.view, "fault", lambda folder, name, *_: looked.append(name) or "")
    run_data(run, coco_dir)
    assert looked == []
    os.utime(coco_dir / "train2017" / "000000000002.jpg", ns=(0, 1))
    run_data(run, coco_dir)
    run_data(run, coco_dir)
    assert looked == ["000000000002.jpg"]
    assert "data: 1 images of train2017 have changed since they were checked" in caplog.messages


def test_view_that_somebody_deleted_is_built_again(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    provenance, files = provenance_of(run), listing(run.root)
    view = Path(provenance["view_dir"])
    for spoil in (
        lambda: shutil.rmtree(run.cache_dir),
        lambda: shutil.rmtree(view / "labels" / "val2017"),
        lambda: (view / "train2017.json").unlink(),
        lambda: (view / "train2017.json").write_text('{"images": ['),
    ):
        spoil()
        assert prepared(run) == provenance
        assert [len(found.labels) for found in read_split(provenance, "train")] == [2, 0]
    assert listing(run.root) == files
    next((view / "labels").rglob("*.txt")).unlink()
    with pytest.raises(UserError, match=r"\.txt is missing or spoiled: run 'make data ARGS=--force'"):
        [read_split(provenance, split) for split in ("train", "val")]


def test_files_for_the_trainer_are_ours_whoever_wrote_them(coco_dir: Path, run: RunRoot) -> None:
    run_data(run, coco_dir)
    ours = run.dataset_yaml.read_text()
    for use in (prepared, lambda run: run_data(run, coco_dir)):
        run.dataset_yaml.write_text(ours + "download: raise SystemExit(7)\n")
        use(run)
        assert run.dataset_yaml.read_text() == ours


def test_doubtful_annotations_are_told_once(coco_dir: Path, run: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    edit(coco_dir, lambda tree: tree["annotations"].append(tree["annotations"][0] | {"id": 9}))
    run_data(run, coco_dir)
    run_data(run, coco_dir)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith(f"warning: {annotation_file(coco_dir)}: 1 of 3 boxes repeat another")
    with pytest.raises(UserError, match=r"1 of 3 boxes repeat another.*data\.strict=false"):
        run_data(run, coco_dir, "data.strict=true")


def test_val_images_that_are_train_images_are_told(
    coco_dir: Path, run: RunRoot, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy under another name, in another folder, with another id."""
    (coco_dir / "train2017" / "000000000001.jpg").rename(coco_dir / "train2017" / "a.jpg")
    edit(coco_dir, lambda tree: tree["images"][0].update(file_name="a.jpg"))
    shutil.copyfile(coco_dir / "train2017" / "a.jpg", coco_dir / "val2017" / "b.jpg")
    edit(coco_dir, lambda tree: tree["images"].append(image(1) | {"file_name": "b.jpg"}), "val2017")
    run_data(run, coco_dir)
    assert "warning: 1 of 2 val images are train images too (first: b.jpg): " in caplog.text


@pytest.mark.parametrize(("n_more", "told"), [(2, False), (3, True)])  # beside the one of the dataset
def test_boxes_without_area_are_told_where_they_are_many(
    coco_dir: Path, run: RunRoot, caplog: pytest.LogCaptureFixture, n_more: int, told: bool
) -> None:
    more = [annotation(10 + number, 1, 1, [9, 9 + number, 5, 0]) for number in range(n_more)]
    edit(coco_dir, lambda tree: tree["annotations"].extend(more))
    run_data(run, coco_dir)
    line = f"{annotation_file(coco_dir)}: {1 + n_more} of {4 + n_more} boxes have no area (first: 000000000001.jpg)"
    assert (line in caplog.text) is told


def test_view_made_before_the_images_came_is_made_again(coco_dir: Path, run: RunRoot) -> None:
    """Where the names start shows only when the images are there."""
    edit(coco_dir, lambda tree: [image.update(file_name=f"all/{image['file_name']}") for image in tree["images"]])
    (coco_dir / "train2017").rename(coco_dir / "later")
    (coco_dir / "train2017").mkdir()
    with pytest.raises(UserError, match=r"2 of 2 images in .* all/000000000001\.jpg cannot be read"):
        run_data(run, coco_dir)
    (coco_dir / "train2017").rmdir()
    (coco_dir / "later").rename(coco_dir / "train2017")
    run_data(run, coco_dir)
    assert Path(read_split(provenance_of(run), "train")[0].path).name == "000000000001.jpg"


def test_views_of_splits_with_other_names_are_apart(coco_dir: Path, run: RunRoot) -> None:
    """A view's files are named after its splits: one that is found and one that the settings name share no folder."""
    run_data(run, coco_dir)
    first = provenance_of(run)
    sets = []
    for role in ("train", "val"):
        sets += [f"data.{role}_images={role}2017", f"data.{role}_annotations=annotations/instances_{role}2017.json"]
    run_data(open_run("other", run.runs_dir), coco_dir, *sets)
    assert [len(found.labels) for found in read_split(first, "train")] == [2, 0]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_runs_without_symbolic_links_are_refused(
    coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(target: Path, link: Path, is_folder: bool = False) -> None:
        raise OSError(number, os.strerror(number), str(target), None, str(link))

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(UserError, match=r"images/train2017: its file system has no symbolic links: put runs/ on"):
        run_data(run, coco_dir)


def test_links_to_single_images_are_taken(coco_dir: Path, run: RunRoot) -> None:
    """As git-annex, DVC and the cache of Hugging Face have them; a changed target is noticed through the link."""
    path, blob = coco_dir / "train2017" / "000000000001.jpg", coco_dir.parent / "blobs" / "0a1b"
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(blob)
    before = listing(blob.parent)
    run_data(run, coco_dir)
    assert provenance_of(run)["splits"]["train"]["n_broken"] == 0
    assert listing(blob.parent) == before
    blob.write_bytes(b"")
    with pytest.raises(UserError, match=r"000000000001\.jpg is empty"):
        run_data(run, coco_dir)


def test_file_names_that_no_file_system_takes(coco_dir: Path, run: RunRoot) -> None:
    for name in ("a" * 256, "b" * 254 + ".x", "/".join(["c" * 200] * 12)):  # the label of the second is a.txt
        edit(coco_dir, lambda tree, name=name: tree["images"][0].update(file_name=name))
        with pytest.raises(UserError, match="its file name is too long; repair them"):
            run_data(run, coco_dir)


def test_folder_that_is_named_like_a_label_file(coco_dir: Path, run: RunRoot) -> None:
    edit(coco_dir, lambda tree: tree["images"][1].update(file_name="000000000001.txt/b.jpg"))
    with pytest.raises(UserError, match=r"the folder 000000000001\.txt/ has the name of an image's label file"):
        run_data(run, coco_dir)


def test_names_in_other_scripts_and_in_folders_work(coco_dir: Path, run: RunRoot) -> None:
    name = "straße/猫 é.jpg"
    (coco_dir / "train2017" / "straße").mkdir()
    (coco_dir / "train2017" / "000000000001.jpg").rename(coco_dir / "train2017" / name)
    edit(coco_dir, lambda tree: tree["images"][0].update(file_name=name))
    run_data(run, coco_dir)
    first = read_split(provenance_of(run), "train")[0]
    assert Path(first.path).read_bytes() == (coco_dir / "train2017" / name).read_bytes()
    assert first.labels.shape == (2, 5)


def test_links_inside_the_dataset_and_a_linked_split_work(coco_dir: Path, run: RunRoot) -> None:
    (coco_dir / "val2017").rename(coco_dir.parent / "elsewhere")
    (coco_dir / "val2017").symlink_to(coco_dir.parent / "elsewhere")
    path = coco_dir / "train2017" / "000000000001.jpg"
    path.rename(coco_dir / "kept.jpg")
    path.symlink_to(coco_dir / "kept.jpg")
    run_data(run, coco_dir)
    assert provenance_of(run)["splits"]["val"]["n_broken"] == 0


def test_only_the_categories_in_use_may_be_listed(coco_dir: Path, run: RunRoot) -> None:
    in_use = [category for category in CATEGORIES if category["id"] in (1, 3, 59, 90)]
    for split in ("train2017", "val2017"):
        edit(coco_dir, lambda tree: tree.update(categories=in_use), split)
    run_data(run, coco_dir)
    assert provenance_of(run)["splits"]["train"]["n_annotations"] == 4
    assert provenance_of(run)["names"] == ["person", "car", "pizza", "toothbrush"]
    assert read_split(provenance_of(run), "train")[0].labels[:, 0].tolist() == [0, 3]  # a class is a place in the list
    assert read_split(provenance_of(run), "val")[0].labels[:, 0].tolist() == [2]


def full_disk(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_full_disk_while_the_view_is_built(coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.data.view, "yolo_rows", full_disk)  # stands for the write of a label file
    disk = SimpleNamespace(f_bavail=3, f_frsize=2**20, f_files=0, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda folder: disk)
    with pytest.raises(UserError, match=r"no space left in .*\.cache \(3 MiB free\): .*make room"):
        run_data(run, coco_dir)
    assert not run.root.exists()
    assert list(run.runs_dir.glob(".cache/views/*")) == []


def test_full_disk_at_the_last_file(coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match="no space left"):
            run_data(run, coco_dir)
    assert [path for path in run.root.rglob("*") if path.is_file()] == []
    run_data(run, coco_dir)
    assert run.provenance.exists()


def test_file_the_user_may_not_read(coco_dir: Path, run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(app.data.prepare, "sha256", fail)
    with pytest.raises(UserError, match=r"instances_train2017\.json may not be read by this user: change its perm"):
        run_data(run, coco_dir)
