"""A full run rehearsed where time is short: drawn data in COCO's numbers, every stage of the product, each watched.

    draw     as many images as there is time for, at most COCO's number, on all cores
    data     the stage, on all of them
    train    FP16 on all of them, stopped by SIGTERM inside the epoch and gone on with by the same command
    short    both variants on a few batches for two epochs: an end of an epoch, with its validation and checkpoint
    ptq, export, eval, report    the stages, of the short trainings

Parts that have been measured are skipped, so that a machine that is lent for minutes does them in several calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.bench.observe import Observed, described, observe
from app.coco.dataset import OFFICIAL_SIZES, SPLITS
from app.core.child import job_words
from app.core.config import Config, UserError, load
from app.core.environment import environment, n_cores
from app.core.files import read_json, write_json
from app.core.progress import clock
from app.core.results import read_rows
from app.core.run import RunRoot, images_of, n_bn_images
from app.data.coco_like import BASE_PX, CocoLike
from app.data.shards import Drawing, draw_image, encode
from app.report.tables import markdown_table

PARTS = ("draw", "data", "train", "short", "ptq", "export", "eval", "report")
RESULT = "bench-rehearsal.json"
N_SAMPLES = 32  # images that are drawn to know how many there is time for
DRAW_SHARE = 0.8  # of the time is drawn in; starting the processes and writing the annotations take the rest
SHORT_EPOCHS = 2  # the first one compiles
MIN_BATCHES = 4  # of a short epoch
BN_TIME = "time/bn_reestimation_s"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How much is rehearsed.

    Attributes:
        draw_s, train_s: seconds for drawing, and of the FP16 training in two halves, without their starts.
        n_train, n_val: images to draw at most, and of val; COCO's where None.
        n_scored: val images that eval takes; None: all.
    """

    draw_s: float
    train_s: float
    n_train: int | None = None
    n_val: int | None = None
    n_scored: int | None = None
    parts: tuple[str, ...] = PARTS


class Rehearsal:
    """The stages of one rehearsal as commands, and its two run roots: one that is stopped, and a short one."""

    def __init__(self, run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
        self.run, self.overlays, self.plan = run, overlays, plan
        self.short = RunRoot(run.runs_dir, f"{run.name}-short")
        self.coco_dir = run.root / "drawn"
        self.draws = not any(item.startswith("data.coco_dir=") for item in sets)
        self.sets = [*sets, f"data.coco_dir={self.coco_dir.resolve()}"] if self.draws else sets

    @property
    def config(self) -> Config:
        return load("fp16", self.overlays, self.sets)

    def stage(self, words: str, run: RunRoot, *sets: str, stop_after_s: float | None = None) -> Observed:
        command = [*words.split(), *job_words(run.name, run.runs_dir, self.overlays, [*self.sets, *sets])]
        return observe(command, self.log_path(words), stop_after_s)

    def log_path(self, words: str) -> Path:
        return self.run.root / "said" / f"{words.replace(' ', '')}.txt"

    def of_short(self, words: str) -> dict[str, Any]:
        """A stage of the short run root."""
        train = self.config.train
        n_short = min(max(train.bn_batches, MIN_BATCHES) * train.batch, images_of(self.run).train)
        short = (
            f"data.n_train={n_short}", f"train.epochs={SHORT_EPOCHS}", "train.val_every=1",
            "hyp.close_mosaic=0", "report.min_ap50=null", f"eval.max_images={self.plan.n_scored or 'null'}",
        )  # fmt: skip
        return described(self.stage(words, self.short, *short))


def bench_rehearsal(run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
    """Measures the parts that are not measured yet, writes bench-rehearsal.json after each, and prints the table."""
    if unknown := set(plan.parts) - set(PARTS):
        raise UserError(f"--arms {' '.join(sorted(unknown))}: a rehearsal has the parts {', '.join(PARTS)}")
    rehearsal = Rehearsal(run, overlays, sets, plan)
    path = run.root / RESULT
    result: dict[str, Any] = read_json(path, "bench ARGS=rehearsal", {"parts": dict[str, Any]}) if path.exists() else {}
    parts = result.setdefault("parts", {})
    work: dict[str, Callable[[Rehearsal], dict[str, Any]]] = {
        "draw": draw, "data": data, "train": train, "short": short,
        **{name: partial(Rehearsal.of_short, words=name) for name in ("ptq", "export", "eval", "report")},
    }  # fmt: skip
    for name in plan.parts:
        if name in parts:
            continue
        start = time.monotonic()
        facts = work[name](rehearsal)
        parts[name] = {"part_s": time.monotonic() - start, **facts}
        log.info("rehearsal: %s in %s", name, clock(parts[name]["part_s"]))
        of_train = rehearsal.config.train
        settings = {"imgsz": of_train.imgsz, "batch": of_train.batch, "workers": of_train.workers}
        result |= {"settings": {"model": rehearsal.config.model, **settings}, "environment": environment()}
        write_json(path, result)
    for line in shown(result):
        log.info("%s", line)
    log.info("rehearsal: %s", path)


# --- the parts -------------------------------------------------------------------------------------------------------


def draw(rehearsal: Rehearsal) -> dict[str, Any]:
    """As many train images as there is time for; a drawing that was stopped goes on as it was begun."""
    if not rehearsal.draws:
        return {"n_train": None, "n_val": None}
    plan, record = rehearsal.plan, rehearsal.coco_dir / "draw.json"
    n_val = plan.n_val or OFFICIAL_SIZES[SPLITS["val"]]
    n_most = plan.n_train or OFFICIAL_SIZES[SPLITS["train"]]
    n_in_time = int(n_cores() * DRAW_SHARE * plan.draw_s / image_s()) - n_val
    n_train = max(min(n_in_time, n_most), rehearsal.config.train.batch)
    if record.exists():
        begun = read_json(record, "draw", {"n_train": int, "n_val": int})
        n_train, n_val = begun["n_train"], begun["n_val"]
    words = ["draw", "--to", str(rehearsal.coco_dir), "--n-train", str(n_train), "--n-val", str(n_val)]
    observed = observe(words, rehearsal.log_path("draw"))
    rate = (n_train + n_val) / observed.seconds
    return {"n_train": n_train, "n_val": n_val, "images_per_s": rate, "n_cores": n_cores()}


def image_s() -> float:
    """Seconds of a core that drawing an image takes."""
    scene = CocoLike(BASE_PX, 1)
    drawing = Drawing(scene, N_SAMPLES, 1, 0)
    draw_image(drawing, 1, 0)  # makes the textures
    start = time.perf_counter()
    for position in range(N_SAMPLES):
        pixels, _ = draw_image(drawing, 1 + position, position)
        encode(pixels, scene.jpeg_quality)
    return (time.perf_counter() - start) / N_SAMPLES


def data(rehearsal: Rehearsal) -> dict[str, Any]:
    observed = rehearsal.stage("data", rehearsal.run)
    images = images_of(rehearsal.run)
    return {"seconds": observed.seconds, "n_train": images.train, "n_val": images.val}


def train(rehearsal: Rehearsal) -> dict[str, Any]:
    """Half of the time from the first images on, a SIGTERM, the same command again for the other half, and another."""
    words, half_s = "train --variant fp16", rehearsal.plan.train_s / 2
    halves = {}
    for name in ("begun", "resumed"):
        halves[name] = described(rehearsal.stage(words, rehearsal.run, stop_after_s=half_s))
    said = rehearsal.log_path(words).read_text(encoding="utf-8", errors="replace")
    return {**halves, "continues": [line for line in said.split("\n") if ": continues after " in line]}


def short(rehearsal: Rehearsal) -> dict[str, Any]:
    """Both variants; of each the parts of its last epoch, in which everything is compiled."""
    facts: dict[str, Any] = {"data": rehearsal.of_short("data")["seconds"]}
    images = images_of(rehearsal.short)
    for variant in ("fp16", "qat"):
        config = load(variant, rehearsal.overlays, rehearsal.sets)
        watched = rehearsal.of_short(f"train --variant {variant}")
        row = read_rows(rehearsal.short.variant_dir(config.label) / "results.csv")[-1]
        train_s, bn_s = row["time/train_s"], row.get(BN_TIME, 0.0)
        epoch = {"images_per_s": row["time/images_per_s"], "validation_s": row["time/epoch_s"] - train_s - bn_s}
        epoch |= {"bn_s": bn_s, "n_val": images.val, "n_bn": n_bn_images(config, images)}
        facts[variant] = {**watched, "last_epoch": epoch}
    return facts


# --- the table -------------------------------------------------------------------------------------------------------


def overhead(parts: dict[str, Any]) -> float | None:
    """Seconds of an epoch of COCO beside its steps, as a share of these; None where a part has not been measured."""
    if not {"train", "short"} <= parts.keys() or not parts["train"]["resumed"]["images_per_s"]:
        return None
    steps_s = OFFICIAL_SIZES[SPLITS["train"]] / parts["train"]["resumed"]["images_per_s"][-1]
    last = parts["short"]["fp16"]["last_epoch"]
    validation_s = last["validation_s"] / last["n_val"] * OFFICIAL_SIZES[SPLITS["val"]]
    return (validation_s + last["bn_s"]) / steps_s


def shown(result: dict[str, Any]) -> list[str]:
    """Lines for the terminal: what each part took, and the training by thirds of its time."""
    parts = result["parts"]
    cells = [["part", "time"]]
    cells += [[name, clock(facts["part_s"])] for name, facts in parts.items()]
    lines = [
        "{model}, {imgsz} px, batch {batch}, {workers} workers".format(**result["settings"]),
        *markdown_table(cells),
    ]
    if "train" in parts:
        lines += ["", *markdown_table(training_cells(parts["train"])), *parts["train"]["continues"]]
    for variant in ("fp16", "qat") if "short" in parts else ():
        epoch = parts["short"][variant]["last_epoch"]
        lines.append(
            "{0}, an epoch of few batches: {images_per_s:.0f} images/s, validation of {n_val} images in three states "
            "{validation_s:.1f} s, BatchNorm on {n_bn} images {bn_s:.1f} s".format(variant, **epoch)
        )
    share = overhead(parts)
    if share is not None:
        lines.append(f"an epoch of COCO beside its steps, computed from these: {share:.1%} of the steps")
    return lines


def training_cells(training: dict[str, Any]) -> list[list[str]]:
    cells = [["training", "first third", "second", "last"]]
    names = {
        "images_per_s": "images/s", "main_mib": "main process, MiB", "largest_loader_mib": "largest loader, MiB",
        "main_files": "main process, open files", "loader_files": "most open files of a loader",
    }  # fmt: skip
    for half in ("begun", "resumed"):
        facts = training[half]
        for key, name in names.items():
            values = facts[key] or (None, None, None)
            cells.append([f"{half}: {name}", *["-" if value is None else f"{value:.0f}" for value in values]])
        for key, name in (("first_images_s", "first images after, s"), ("answer_s", "ended after SIGTERM, s")):
            value = facts[key]
            cells.append([f"{half}: {name}", "" if value is None else f"{value:.1f}", "", ""])
        if use := facts["gpu_use"]:
            cells.append([f"{half}: use of the GPU", *[f"{share:.0%}" for share in use]])
        counts = (facts["images"], facts["n_loaders"], facts["exit_code"])
        cells.append([f"{half}: images, loaders, exit code", *map(str, counts)])
    return cells
