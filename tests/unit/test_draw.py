"""The draw stage: COCO's statistics, the same bytes however often it was killed, and never the name COCO."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.coco.categories import NAMES
from app.coco.dataset import COCO_2017, DRAWN_TITLE, OTHER_COCO, SPLITS
from app.coco.score import standalone_dataset
from app.core.config import UserError, load
from app.core.os_errors import only_one
from app.core.run import RunRoot
from app.data import coco_like
from app.data import draw as draw_module
from app.data.coco_like import GRAIN, GREY, CocoLike
from app.data.draw import WORK, Wanted, draw, name_folders
from app.data.prepare import prepare
from app.data.provenance import title
from app.data.shards import Drawing, draw_image, draw_shard, encode, join, shards
from app.data.synthetic import draw_coco_subset

REPO_DIR = Path(__file__).resolve().parents[2]
SMALL = Wanted("coco", 520, 30, 0, 64, 80)  # two whole shards and two that are not
SMALL_OPTIONS = "--n-train 520 --n-val 30 --size 64".split()
DRAWING = Drawing(CocoLike(64, 80), 520, 30, 0)
OWN_FILES = {"draw.json", ".drawing.lock"}
N_SCENES = 700
# Of the built-in dataset as it was before there was a draw stage.
SUBSET_SHA256 = {
    "annotations/instances_train2017.json": "3e43ab412ce0fdc2a4eefb51afbf9b1d810e387779187faebeb6506340b249d0",
    "annotations/instances_val2017.json": "10018ff6a8c10b9427186e9d5e9c535c747ef49ba7384ae16274735091cc2f0b",
}


def contents(folder: Path) -> dict[str, bytes]:
    """File -> bytes of a dataset, without what the stage keeps for itself."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in OWN_FILES]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The small dataset, drawn by one process in one go."""
    root = tmp_path_factory.mktemp("expected")
    for shard in shards(DRAWING, *SPLITS.values()):
        draw_shard(root, DRAWING, shard)
    join(root, DRAWING)
    return contents(root)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
    drawing = Drawing(CocoLike(640, 80), N_SCENES, 1, 0)
    return [draw_image(drawing, 1 + position, position) for position in range(N_SCENES)]


def test_boxes_are_as_many_and_as_large_as_cocos(scenes: list[tuple[np.ndarray, list[dict[str, Any]]]]) -> None:
    annotations = [annotation for _, objects in scenes for annotation in objects]
    assert len(annotations) / N_SCENES == pytest.approx(7.3, abs=0.4)
    areas = np.array([annotation["area"] for annotation in annotations if not annotation["iscrowd"]])
    kinds = np.digitize(areas, (32**2, 96**2))
    np.testing.assert_allclose(np.bincount(kinds) / len(kinds), [1 / 3] * 3, atol=0.03)
    n_crowds = sum(annotation["iscrowd"] for annotation in annotations)
    assert n_crowds / N_SCENES == pytest.approx(0.09, abs=0.03)  # COCO: 10,777 in 118,287 images
    assert 0 < sum(not objects for _, objects in scenes) < 0.02 * N_SCENES  # COCO: 1,021
    assert max(len(objects) for _, objects in scenes) > 30


def test_classes_are_all_there_and_unlike_in_number(scenes: list[tuple[np.ndarray, list[dict[str, Any]]]]) -> None:
    counts = Counter(annotation["category_id"] for _, objects in scenes for annotation in objects)
    assert len(counts) == 80
    assert counts[1] == max(counts.values())
    assert counts[1] > 20 * counts[90]


def test_images_are_as_large_as_cocos_on_disk_and_in_px(scenes: list[tuple[np.ndarray, list[dict[str, Any]]]]) -> None:
    sizes = Counter(pixels.shape[:2] for pixels, _ in scenes)
    assert sizes.most_common(1)[0][0] == (480, 640)
    assert len(sizes) >= 8
    assert all(max(size) <= 640 for size in sizes)
    assert sum(pixels.ndim == 2 for pixels, _ in scenes) >= 1, "no grey image"
    n_bytes = [len(encode(pixels, 95)) for pixels, _ in scenes[:20]]
    assert 120e3 < np.mean(n_bytes) < 200e3  # COCO: 163 kB


def test_boxes_lie_in_their_images_and_shapes_in_their_boxes(
    scenes: list[tuple[np.ndarray, list[dict[str, Any]]]],
) -> None:
    for pixels, objects in scenes:
        for annotation in objects:
            x, y, w, h = annotation["bbox"]
            assert min(x, y) >= 0
            assert x + w <= pixels.shape[1] + 0.01
            assert y + h <= pixels.shape[0] + 0.01
            assert 0 < annotation["area"] <= w * h * 1.01 + 1


def test_the_builtin_dataset_is_one_case_of_it_and_has_the_bytes_that_it_had(tmp_path: Path) -> None:
    draw_coco_subset(tmp_path / "builtin")
    builtin = contents(tmp_path / "builtin")
    for name, digest in SUBSET_SHA256.items():
        assert hashlib.sha256(builtin[name]).hexdigest() == digest
    draw(tmp_path / "drawn", Wanted("coco-subset", 256, 64, 0, None, None), n_processes=2)
    assert contents(tmp_path / "drawn") == builtin


def test_annotation_files_are_those_of_one_dump(expected: dict[str, bytes]) -> None:
    for split, n_images in (("train2017", 520), ("val2017", 30)):
        text = expected[f"annotations/instances_{split}.json"].decode()
        tree = json.loads(text)
        assert json.dumps(tree) == text
        assert len(tree["images"]) == n_images
        assert [entry["id"] for entry in tree["annotations"]] == list(range(1, len(tree["annotations"]) + 1))


def test_a_killed_drawing_leaves_no_process_and_goes_on_to_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    command = [sys.executable, "-m", "app", "draw", "--to", str(tmp_path / "coco"), *SMALL_OPTIONS]
    process = subprocess.Popen(command, cwd=REPO_DIR, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("coco/.draw/shards/*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # the end of stderr comes when the last process of the pool is gone
    assert not (tmp_path / "coco" / "annotations").exists()
    result = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stderr
    assert contents(tmp_path / "coco") == expected
    assert not (tmp_path / "coco" / WORK).exists()


def test_what_is_drawn_is_not_drawn_again_unless_a_power_failure_cut_it_off(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    work_dir = tmp_path / WORK
    (whole, cut, empty, _) = shards(DRAWING, *SPLITS.values())
    for shard in (whole, cut):
        draw_shard(work_dir, DRAWING, shard)
    kept, spoiled = work_dir / "train2017/000000000001.jpg", work_dir / "train2017/000000000251.jpg"
    stamp = kept.stat().st_mtime_ns
    spoiled.write_bytes(b"")
    (work_dir / "train2017" / f"{empty.image_ids.start:012d}.jpg").write_bytes(b"half")
    (tmp_path / "draw.json").write_text(json.dumps(asdict(DRAWING)))
    draw(tmp_path, SMALL, n_processes=1)
    assert contents(tmp_path) == expected
    assert (tmp_path / "train2017/000000000001.jpg").stat().st_mtime_ns == stamp


def test_a_drawing_that_was_killed_while_its_folders_got_their_names_goes_on(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in expected.items():
        path = tmp_path / ("." if name.startswith("train2017") else WORK) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "draw.json").write_text(json.dumps(asdict(DRAWING)))
    monkeypatch.setattr(draw_module, "ProcessPoolExecutor", None)
    draw(tmp_path, SMALL)
    assert contents(tmp_path) == expected
    draw(tmp_path, SMALL)
    name_folders(tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize(
    "lost", ["train2017", "val2017", "annotations", "annotations/instances_val2017.json", "train2017/000000000300.jpg"]
)
@pytest.mark.parametrize("is_named", [True, False], ids=["finished", "killed while its folders got their names"])
def test_what_is_lost_is_drawn_again_to_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes], lost: str, is_named: bool
) -> None:
    for name, content in expected.items():
        path = tmp_path / ("." if is_named or name.startswith("train2017") else WORK) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "draw.json").write_text(json.dumps(asdict(DRAWING)))
    path = next(place / lost for place in (tmp_path, tmp_path / WORK) if (place / lost).exists())
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    draw(tmp_path, SMALL, n_processes=1)
    assert contents(tmp_path) == expected
    assert not (tmp_path / WORK).exists()


def test_a_folder_of_the_drawing_may_be_a_link_and_hold_other_files(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Moved to another disk: it is as whole there; where it is not, the link goes and not what it leads to."""
    coco, elsewhere = tmp_path / "coco", tmp_path / "elsewhere"
    draw(coco, SMALL, n_processes=2)
    (coco / "train2017").rename(elsewhere)
    (coco / "train2017").symlink_to(elsewhere)
    (elsewhere / "notes.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_module, "ProcessPoolExecutor", None)
        draw(coco, SMALL)
    (elsewhere / "000000000001.jpg").unlink()
    draw(coco, SMALL, n_processes=2)
    assert contents(coco) == expected and not (coco / "train2017").is_symlink()
    assert (elsewhere / "notes.txt").exists()


def test_a_drawing_as_large_as_coco_is_never_called_coco(tmp_path: Path, expected: dict[str, bytes]) -> None:
    coco_dir = tmp_path / "coco"
    for name, content in expected.items():
        path = coco_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    config = load("qat", sets=[f"data.coco_dir={coco_dir}"])
    run = RunRoot(tmp_path / "runs", "drawn")
    prepare(config, run, force=False)
    assert json.loads(run.provenance.read_text())["title"] == DRAWN_TITLE
    assert standalone_dataset(coco_dir, "val2017").title == DRAWN_TITLE
    sizes = {"train": (118_287, 860_001), "val": (5_000, 36_781)}
    for is_drawn, n_more, name in ((True, 0, DRAWN_TITLE), (False, 0, COCO_2017), (False, 1, OTHER_COCO)):
        listed, indices = {}, {}
        for split, (n_images, n_annotations) in sizes.items():
            images = [{"n_annotations": n_annotations}, {"n_annotations": n_more}]
            indices[split] = {"drawn": is_drawn, "names": NAMES, "is_official": True, "images": images}
            listed[split] = {"name": SPLITS[split], "n_listed": n_images}
        assert title(config.data, listed, indices) == name


def test_the_grain_has_the_numbers_of_one_call_and_takes_the_memory_of_its_bytes() -> None:
    whole = np.clip(np.random.default_rng(1).normal(0, GRAIN, (400, 400, 3)) + GREY, 0, 255).astype(np.uint8)
    tracemalloc.start()
    grain = coco_like._grain.__wrapped__(200)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(grain, whole)
    assert peak_bytes < 1.5 * whole.nbytes


def test_the_backgrounds_are_those_of_every_drawing_so_far() -> None:
    """Others here mean other bytes of the same command."""
    digest = hashlib.sha256(b"".join(map(bytes, [*coco_like._textures(64), coco_like._grain(64)]))).hexdigest()
    assert digest == "b966548c6bce6942a44f0302cf021dadadd0f0731cf614ee97dd3db34488be6c"


def foreign(folder: Path) -> None:
    (folder / "val2017").mkdir()


def of_another_seed(folder: Path) -> None:
    (folder / "draw.json").write_text(json.dumps(asdict(DRAWING) | {"seed": 3}))


def nothing(folder: Path) -> None:
    """An empty folder."""


@pytest.mark.parametrize(
    ("before", "wanted", "said"),
    [
        (foreign, SMALL, "has a val2017/ that was not drawn, and is kept: give another folder with --to DIR"),
        (of_another_seed, SMALL, r"holds another drawing \(seed: 3 -> 0\): give another folder"),
        (nothing, Wanted("coco", 0, 1, 0, None, None), "--n-train 0: a dataset needs at least one image"),
        (nothing, Wanted("coco", 1, -1, 0, None, None), "--n-val -1: a dataset needs at least one image"),
        (nothing, Wanted("coco", 1, 1, -1, None, None), "--seed -1: choose a whole number from 0 on"),
        (nothing, Wanted("coco", 1, 1, 0, 63, None), "--size 63: choose 64 to 4096 px"),
        (nothing, Wanted("coco", 1, 1, 0, None, 81), "--classes 81: choose 1 to 80"),
        (nothing, Wanted("coco", 1, 1, 0, None, 0), "--classes 0: choose 1 to 80"),
        (nothing, Wanted("coco-subset", 1, 1, 0, 64, None), "--size and --classes are for --scene coco"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, before: Callable[[Path], None], wanted: Wanted, said: str) -> None:
    before(tmp_path)
    with pytest.raises(UserError, match=said):
        draw(tmp_path, wanted)


def test_two_drawings_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with only_one(tmp_path, "drawing"), pytest.raises(UserError, match=r"another drawing into .* is running"):
        draw(tmp_path, SMALL)


def test_a_disk_that_is_too_small_is_named_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10_000))
    with pytest.raises(UserError, match=r"not enough space for 550 images .* GiB needed, 0\.0 GiB free: make room"):
        draw(tmp_path, SMALL)
    assert not list(tmp_path.rglob("*.jpg"))


def test_fewer_classes_are_the_first_ones_of_coco(tmp_path: Path) -> None:
    drawing = Drawing(CocoLike(64, 3), 40, 1, 0)
    for shard in shards(drawing, *SPLITS.values()):
        draw_shard(tmp_path, drawing, shard)
    join(tmp_path, drawing)
    tree = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    assert [category["name"] for category in tree["categories"]] == ["person", "bicycle", "car"]
    assert {annotation["category_id"] for annotation in tree["annotations"]} == {1, 2, 3}
