"""The draw stage: a dataset of any size in COCO's layout, to rehearse a full run. The same bytes each time."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.coco.categories import CATEGORIES
from app.coco.dataset import ANNOTATIONS, SPLITS, annotation_path
from app.core.config import BUILTIN_DATASET, UserError
from app.core.differences import difference, shown
from app.core.environment import n_cores
from app.core.files import read_json, write_json
from app.core.os_errors import explain_os_errors, free_bytes, only_one
from app.core.progress import Meter, clock
from app.data.coco_like import BASE_PX, SIDES_PX, CocoLike
from app.data.shards import Drawing, Scene, draw_image, draw_shard, encode, has_images, is_drawn, is_whole, join, shards
from app.data.synthetic import CocoSubset

log = logging.getLogger(__name__)
RECORD = "draw.json"  # in the dataset's folder: what is drawn there
WORK = ".draw"  # there too, until all is drawn
FOLDERS = (*SPLITS.values(), ANNOTATIONS)
SHAPE = {"scene": dict[str, Any], "n_train": int, "n_val": int, "seed": int}
REMEDY = "make room and start the same command again, it goes on from there"
N_SAMPLES = 16  # images that are drawn to know how large all of them will be
ROOM = 1.1  # for what the samples do not show


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; the same values give the same bytes, with the locked OpenCV.

    The scene coco-subset has a size and classes of its own, and takes None for both.
    """

    scene: str
    n_train: int
    n_val: int
    seed: int
    size_px: int | None
    n_classes: int | None


def draw(target_dir: Path, wanted: Wanted, n_processes: int | None = None) -> None:
    """Fills `target_dir` with train2017/, val2017/ and annotations/; goes on where a killed drawing has stopped.

    The folders get their names when all is drawn. A dataset that was drawn with the same values is left alone; where
    files of it are gone, it is drawn again, and its folders are replaced.
    `n_processes` None: one on each core that this process may use.

    Raises:
        UserError: wrong values, no space, another dataset in the folder, or another process that draws there.
    """
    drawing = Drawing(scene_of(wanted), wanted.n_train, wanted.n_val, wanted.seed)
    for option, number in (("--n-train", drawing.n_train), ("--n-val", drawing.n_val)):
        if number < 1:
            raise UserError(f"{option} {number}: a dataset needs at least one image in each split")
    if drawing.seed < 0:
        raise UserError(f"--seed {drawing.seed}: choose a whole number from 0 on")
    with only_one(target_dir, "drawing"), explain_os_errors(target_dir, REMEDY):
        claim(target_dir, drawing)
        if is_whole(target_dir, drawing):
            log.info("%s is drawn already", target_dir)
        else:
            if not awaits_names(target_dir, drawing):
                fill(target_dir / WORK, drawing, n_processes or n_cores())
            name_folders(target_dir)
        shutil.rmtree(target_dir / WORK, ignore_errors=True)


def scene_of(wanted: Wanted) -> Scene:
    size_px, n_classes = wanted.size_px, wanted.n_classes
    if wanted.scene == BUILTIN_DATASET:
        if size_px is not None or n_classes is not None:
            raise UserError(f"--size and --classes are for --scene coco: {BUILTIN_DATASET} has its own")
        return CocoSubset()
    size_px = BASE_PX if size_px is None else size_px
    n_classes = len(CATEGORIES) if n_classes is None else n_classes
    if size_px not in SIDES_PX:
        raise UserError(f"--size {size_px}: choose {SIDES_PX.start} to {SIDES_PX.stop - 1} px")
    if not 1 <= n_classes <= len(CATEGORIES):
        raise UserError(f"--classes {n_classes}: choose 1 to {len(CATEGORIES)}, the first ones of COCO's categories")
    return CocoLike(size_px, n_classes)


def claim(target_dir: Path, drawing: Drawing) -> None:
    """Records what is drawn in a folder; raises a UserError if another drawing, or what was not drawn, is there."""
    path = target_dir / RECORD
    if path.exists():
        if differences := difference(read_json(path, "draw", SHAPE), asdict(drawing)):
            raise UserError(
                f"{target_dir} holds another drawing ({shown(differences)}): "
                "give another folder with --to DIR, or delete that one"
            )
        return
    if there := [name for name in FOLDERS if (target_dir / name).exists()]:
        raise UserError(
            f"{target_dir} has a {there[0]}/ that was not drawn, and is kept: give another folder with --to DIR"
        )
    write_json(path, asdict(drawing))


def fill(root: Path, drawing: Drawing, n_processes: int) -> None:
    """Draws the shards that are missing, then writes the annotation files; `root` then holds the whole dataset."""
    shutil.rmtree(root / ANNOTATIONS, ignore_errors=True)  # until all images are there again, see awaits_names
    missing = [shard for shard in shards(drawing, *SPLITS.values()) if not is_drawn(root, shard)]
    n_missing = sum(len(shard.image_ids) for shard in missing)
    check_space(root, drawing, n_missing)
    meter = Meter("drawing", n_missing)
    pool = ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), start_worker)
    try:
        for n_images in pool.map(partial(draw_shard, root, drawing), missing):
            meter.update(n_images)
    finally:
        pool.shutdown(cancel_futures=True)
        meter.close()
    rate = meter.done / max(meter.seconds, 0.001)
    log.info("drawing: %s images, %.0f images/s, in %s", f"{meter.done:,}", rate, clock(meter.seconds))
    join(root, drawing)


def awaits_names(target_dir: Path, drawing: Drawing) -> bool:
    """Whether all is drawn: a drawing was killed while its folders got their names, the annotations the last one."""
    work_dir = target_dir / WORK
    for split in SPLITS.values():
        has_split = any(has_images(place, drawing, split) for place in (work_dir, target_dir))
        if not has_split or not annotation_path(work_dir, split).exists():
            return False
    return True


def name_folders(target_dir: Path) -> None:
    """Moves what is drawn to its place; a folder of the same drawing that lacks files goes."""
    os.sync()  # after a power failure no folder that has its name may lack what was in it
    for folder in FOLDERS:
        drawn, place, old = target_dir / WORK / folder, target_dir / folder, target_dir / WORK / f"{folder}.old"
        if drawn.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                place.rename(old)
            drawn.rename(place)


def start_worker() -> None:
    """In a process of the pool: Ctrl-C reaches it too, and is for the main process; without that one it ends."""
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)  # a killed main process closes no pool, and its workers would wait for work for ever


def check_space(root: Path, drawing: Drawing, n_images: int) -> None:
    """Raises a UserError if the images would not fit on the disk, by the mean size of the first ones."""
    sizes = []
    for position in range(N_SAMPLES):
        pixels, _ = draw_image(drawing, 1 + position, position)
        sizes.append(len(encode(pixels, drawing.scene.jpeg_quality)))
    needed = n_images * sum(sizes) / N_SAMPLES * ROOM
    free = free_bytes(root)
    if free < needed:
        raise UserError(
            f"not enough space for {n_images:,} images in {root.parent}: {needed / 2**30:,.1f} GiB needed, "
            f"{free / 2**30:,.1f} GiB free: make room, draw fewer (--n-train), or give another folder with --to DIR"
        )
