"""The price of a job: the arithmetic by hand, the budget's seconds, the sample of a large dataset, and the lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from app.coco.categories import CATEGORIES
from app.core.config import Config, load
from app.core.files import read_json
from app.core.memory import own_memory, pss_bytes
from app.core.run import Images, RunRoot
from app.data.prepare import prepare
from app.estimate import cost as cost_module
from app.estimate import images as images_module
from app.estimate.cost import NOTHING, Budget, Cost, Line, line, repeat, typical
from app.estimate.estimate import command_line
from app.estimate.images import job_images
from app.estimate.pieces import AfterCosts, CheckpointCosts, FileCosts, ScoreCosts, TrainingCosts
from app.estimate.plan import plan_for_cpu, plan_for_gpu
from app.estimate.price import eval_parts, export_parts, job_files, limit, ptq_parts, report_parts, training_parts
from app.estimate.summary import disk
from tests.support.data_fixtures import annotation, config_for, write_image, write_tree

PX = 64**2


def wall(seconds: float) -> Cost:
    """A cost whose processor time is twice its seconds: both clocks are added up alike."""
    return Cost(seconds, 2 * seconds)


def seconds_of(parts: dict[str, Cost]) -> dict[str, float]:
    for part in parts.values():
        assert part.cpu_s == pytest.approx(2 * part.wall_s)
    return {name: part.wall_s for name, part in parts.items()}


PIECES = TrainingCosts(
    start=wall(20), labels=wall(0.01), decode=wall(0.1), augment=wall(0.2), loader=None,
    step=Line(wall(1), wall(0.5 / PX)), optimizer=wall(3), draw=wall(9), reestimate=Line(wall(2), wall(0.25 / PX)),
    validation=wall(5), val_px=wall(0.75 / PX), checkpoint=wall(4), end=wall(6),
    process_bytes=0,
)  # fmt: skip


def job(*sets: str) -> Config:
    sizes = ("train.imgsz=64", "train.batch=8", "train.epochs=7", "train.val_every=2", "train.bn_batches=5")
    return load("qat", sets=[*sizes, "hyp.nbs=16", *sets])


def test_a_training_by_hand() -> None:
    """100 images in 13 batches and 7 steps; validated after epochs 2, 4, 6 and 7, on 10 images, BatchNorm on 40."""
    seconds = seconds_of(training_parts(job(), Images(100, 10), PIECES, n_seen=60))
    assert seconds == pytest.approx({
        "start": 20 + 40 * 0.01 + 6,
        "samples": 7 * 100 * 0.3,
        "steps": 7 * (13 * 1 + 100 * 0.5 + 7 * 3),
        "validation": 4 * (5 + 10 * (0.1 + 0.75) + 3 * 1 * 2),  # one batch of 16 in three states
        "BatchNorm": 4 * (5 * 2 + 40 * 0.25) + 40 * 0.3,
        "checkpoints": 7 * 4,
    })  # fmt: skip


def test_images_of_another_size_cost_by_their_pixels() -> None:
    """Twice the side: four times each image's forward and backward, and the same for a batch, a step and a file."""
    small = seconds_of(training_parts(job(), Images(100, 10), PIECES, 100))
    large = seconds_of(training_parts(job("train.imgsz=128"), Images(100, 10), PIECES, 100))
    assert large["steps"] - small["steps"] == pytest.approx(7 * 3 * 100 * 0.5)
    assert large["validation"] - small["validation"] == pytest.approx(4 * 3 * 10 * 0.75)
    assert {name for name in small if small[name] != large[name]} == {"steps", "validation", "BatchNorm"}


def test_kept_images_are_decoded_once() -> None:
    seconds = seconds_of(training_parts(job("train.cache=true"), Images(100, 10), PIECES, 100))
    assert seconds["samples"] == pytest.approx(100 * 0.1 + 7 * 100 * 0.2)


@pytest.mark.parametrize(("loader_s", "steps_s"), [(0.1, 7 * (13 + 50 + 21)), (2.0, 7 * 100 * 2.0)])
def test_beside_loader_processes_the_slower_one_counts(loader_s: float, steps_s: float) -> None:
    pieces = replace(PIECES, loader=wall(loader_s))
    parts = training_parts(job(), Images(100, 10), pieces, 100)
    assert parts["steps"].wall_s == pytest.approx(steps_s)
    assert parts["steps"].cpu_s == pytest.approx(2 * 7 * (13 + 50 + 21 + 100 * loader_s)), "both are at work"
    assert parts["samples"] == NOTHING
    part, remedy = limit(job(), pieces, parts, n_cores=16)
    assert part == ("GPU" if loader_s < 1 else "loader or disk")
    assert ("train.workers higher (8 of 16 cores)" in remedy) is (loader_s > 1)


@pytest.mark.parametrize(
    ("loader_s", "n_processes", "scored_s"),
    [
        (0.3, 1, 20 * 0.75 + 2 * 3 * 2),  # two batches of 16; a third of a sample is reading: 20 * 0.1, beside that
        (9.0, 1, 20 * 3.0),  # the loader processes are slower
        (0.3, 2, 20 * 0.75 + 3 * 3 * 2),  # of each process's part: three batches of 8
    ],
)
def test_loader_processes_read_val_images_beside_the_network(
    loader_s: float, n_processes: int, scored_s: float
) -> None:
    pieces, images = replace(PIECES, loader=wall(loader_s)), Images(100, 20)
    scored = training_parts(job(), images, pieces, 100, n_processes)["validation"] - wall(4 * 5)
    assert scored.wall_s == pytest.approx(4 * scored_s)
    n_val_batches = 3 if n_processes == 2 else 2
    assert scored.cpu_s == pytest.approx(2 * 4 * (20 * 0.75 + n_val_batches * 3 * 2 + 20 * loader_s / 3))


def test_one_batch_of_val_images_has_no_loader_processes() -> None:
    pieces = replace(PIECES, loader=wall(0.3))
    validation = training_parts(job(), Images(100, 16), pieces, 100)["validation"]
    assert validation.wall_s == pytest.approx(4 * (5 + 16 * (0.1 + 0.75) + 3 * 2))


def test_without_a_gpu_the_processor_limits_or_the_images() -> None:
    parts = training_parts(job(), Images(100, 10), PIECES, 100)
    assert limit(job(), PIECES, parts, 2)[0] == "processor"
    slow = replace(PIECES, augment=wall(9))
    assert limit(job(), slow, training_parts(job(), Images(100, 10), slow, 100), 2)[0].startswith("reading")


AFTER = AfterCosts(
    ptq=wall(30),
    checkpoints={False: CheckpointCosts(wall(1), Line(wall(2), wall(1 / PX))),
                 True: CheckpointCosts(wall(10), Line(wall(20), wall(3 / PX)))},
    files={(False, False): FileCosts(wall(5), Line(wall(1), wall(0.5 / PX))),
           (True, False): FileCosts(wall(50), Line(wall(2), wall(0.25 / PX))),
           (True, True): FileCosts(wall(7), Line(wall(3), wall(0.125 / PX)))},
    scores={(False, False): ScoreCosts(wall(4), wall(0.5 / PX), wall(0.25), wall(0.1 / PX), wall(0.2)),
            (True, False): ScoreCosts(wall(8), wall(1 / PX), wall(0.25), wall(0.3 / PX), wall(0.2))},
    report=wall(12), analysis=wall(0.5),
)  # fmt: skip


def test_the_stages_after_the_trainings_by_hand() -> None:
    """Six files: FP32, its FP16, QCDQ, its INT4, and QCDQ twice from PTQ. What was not measured costs as its source."""
    config, images = job("eval.latency_warmup=3", "eval.latency_runs=20"), Images(100, 10)
    files = job_files(config, has_packed_bits=True)
    assert sum(map(len, files.values())) == 6
    assert seconds_of(ptq_parts(config, images, PIECES, AFTER.ptq)) == pytest.approx(
        {"start": 30, "BatchNorm": 40 * 0.3 + 5 * 2 + 40 * 0.25}
    )
    assert seconds_of(export_parts(config, images, AFTER, files)) == pytest.approx({
        "PyTorch": (1 + 2 + 8 * 1) + 3 * (10 + 20 + 8 * 3),
        "files": 2 * 5 + 3 * 50 + 7,
        "gates": 2 * (1 + 8 * 0.5) + 3 * (2 + 8 * 0.25) + (3 + 8 * 0.125),
    })  # fmt: skip
    assert seconds_of(eval_parts(config, images, AFTER, files)) == pytest.approx({
        "start": 2 * 4 + 4 * 8,
        "images": 10 * (2 * 0.75 + 4 * 1.25),
        "latency": 23 * (2 * 0.3 + 4 * 0.5),
    })  # fmt: skip
    assert seconds_of(report_parts(images, AFTER, files)) == pytest.approx({"figures": 12, "analysis": 6 * 10 * 0.5})
    few = export_parts(config, Images(100, 2), AFTER, files)
    assert few["gates"].wall_s == pytest.approx(2 * (1 + 2 * 0.5) + 3 * (2 + 2 * 0.25) + (3 + 2 * 0.125))


def test_a_line_through_two_sizes() -> None:
    assert line((2, Cost(5, 50)), (4, Cost(7, 70))) == Line(Cost(3, 30), Cost(1, 10))
    assert line((2, Cost(5, 5)), (4, Cost(4, 4))) == Line(NOTHING, Cost(1, 1)), "the larger one costs less"
    assert line((2, Cost(1, 1)), (4, Cost(8, 8))) == Line(NOTHING, Cost(2, 2)), "it would begin below nothing"
    assert line((4, Cost(8, 8)), (4, Cost(8, 8))) == Line(NOTHING, Cost(2, 2)), "one size alone"


def test_the_first_time_is_no_typical_one() -> None:
    assert typical([Cost(9, 9), Cost(1, 3), Cost(2, 1), Cost(3, 2)]) == Cost(2, 2)
    assert typical([Cost(9, 9)]) == Cost(9, 9)


class Clocks:
    """Stands for the module `time`: both clocks move by work alone."""

    def __init__(self) -> None:
        self.now = Cost(1000.0, 500.0)

    def monotonic(self) -> float:
        return self.now.wall_s

    def process_time(self) -> float:
        return self.now.cpu_s

    def work(self, cost: Cost) -> Cost:
        self.now += cost
        return cost


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    clocks = Clocks()
    monkeypatch.setattr(cost_module, "time", clocks)
    yield clocks


@pytest.mark.parametrize(
    ("one", "n_times", "waits"),
    [
        (Cost(1, 2), 12, None),  # two cores: a fifth of a minute on the clock
        (Cost(2, 1), 12, 2.0),  # half a core: the processor's seconds count
        (Cost(6, 1), 6, 6.0),  # a sixth of one: up to three times the minute on the clock
        (Cost(100, 100), 2, None),  # too large for its share, and still seen warm once
    ],
)
def test_work_repeats_within_its_share(clocks: Clocks, one: Cost, n_times: int, waits: float | None) -> None:
    budget = Budget(60)
    share = budget.share(0.2)
    assert len(repeat(lambda: clocks.work(one), share, range(2, 100))) == n_times
    assert budget.waits == waits


def test_a_share_ends_with_the_whole(clocks: Clocks) -> None:
    budget = Budget(60)
    clocks.work(Cost(55, 55))
    share = budget.share(0.2)
    assert share.left_s == pytest.approx(5)
    assert share.of_rest(0.4).left_s == pytest.approx(2)
    clocks.work(Cost(10, 10))
    assert not share.has(Cost(0.1, 0.1))


def test_a_gpus_process_waits_for_nobody_else(clocks: Clocks) -> None:
    budget = Budget(60, stretch=1.0)
    clocks.work(Cost(50, 1))
    assert budget.share(1.0).left_s == pytest.approx(10)
    assert budget.waits is None


def test_the_plan_is_the_jobs_where_that_fits() -> None:
    """12 seconds hold ten steps of an image of 1.2 s, or 24 images of 0.1 s."""
    there, smoke = Images(256, 64), load("qat", overlays=[Path("conf/smoke.yaml")])
    plan = plan_for_cpu(smoke, there, px_s=0.05 / 160**2, share_s=12)
    assert (plan.imgsz, plan.batch, plan.images, plan.exports_as_job) == (160, 16, Images(64, 64), True)
    full = load("qat")
    idle = plan_for_cpu(full, there, px_s=4.0 / 640**2, share_s=12)
    assert (idle.imgsz, idle.batch, idle.exports_as_job) == (320, 2, False)
    slow = plan_for_cpu(full, there, px_s=400.0 / 640**2, share_s=12)
    assert (slow.imgsz, slow.batch, slow.images.val) == (160, 2, 2), "the least that tells anything"
    gpus = plan_for_gpu(full, Images(118_287, 5_000), n_processes=4)
    assert (gpus.imgsz, gpus.batch, gpus.images, gpus.n_processes) == (640, 8, Images(192, 16), 4)


def write_many(coco_dir: Path, counts: dict[str, int], with_person: Container[int] = range(1000)) -> Path:
    """So many images by split; those with these ids have a person."""
    for split, n in counts.items():
        (coco_dir / split).mkdir(parents=True)
        images = [{"id": key, "file_name": f"{key:012d}.jpg", "width": 40, "height": 30} for key in range(1, n + 1)]
        for image in images:
            write_image(coco_dir / split / image["file_name"], (40, 30))
        boxes = [annotation(key, key, 1, [4, 3, 10, 6]) for key in range(1, n + 1) if key in with_person]
        write_tree(coco_dir, split, {"images": images, "annotations": boxes, "categories": CATEGORIES})
    return coco_dir


def test_checkpoints_that_are_kept_take_disk(tmp_path: Path) -> None:
    """30 epochs, of which every tenth is kept of both trainings, 10 and 14 MiB each."""
    sizes = {"fp16/weights/last.pt": 10 * 2**20, "qat-w4a16/weights/last.pt": 14 * 2**20}
    images = Images(100, 10)
    measured: Any = SimpleNamespace(
        sizes=sizes, images=SimpleNamespace(images=images), plan=SimpleNamespace(images=images), has_packed_bits=True
    )

    def needed(save_period: int) -> float:
        config = load("qat", sets=["train.epochs=30", f"train.save_period={save_period}"])
        return disk(config, measured, RunRoot(tmp_path, "r"))["needed_gib"]

    assert needed(10) - needed(0) == pytest.approx(3 * 24 / 1024)


def test_a_large_dataset_is_looked_at_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 of 40 train images, 3 of 8 of val: the job has them all; only their share of the time is scaled."""
    coco = write_many(tmp_path / "coco", {"train2017": 40, "val2017": 8})
    config = config_for(coco)
    whole, sampled = RunRoot(tmp_path / "runs", "whole"), RunRoot(tmp_path / "runs", "sampled")
    sampled.root.mkdir(parents=True)
    monkeypatch.setattr(images_module.WATCH, "cost", lambda work: (work(), wall(9))[1])
    monkeypatch.setattr(images_module.WATCH, "timed", lambda work: (wall(5), work()))
    found = job_images(config, whole, sampled, Images(6, 3))
    assert (found.images, found.there) == (Images(40, 8), Images(6, 3))
    assert found.cost.wall_s == pytest.approx(5 + 9 * 48 / 9)
    assert found.scaled == "data: 9 of 48 images looked at, the annotations read as a whole"
    assert not whole.provenance.exists()
    names = {item.split("=")[0] for item in found.sets}
    assert names == {f"data.{role}_{what}" for role in ("train", "val") for what in ("images", "annotations")}
    again = config_for(coco, *found.sets)
    assert len(json.loads(Path(str(again.data.train_annotations)).read_text())["images"]) == 6
    chosen = job_images(config_for(coco, "data.n_train=30"), whole, sampled, Images(6, 3))
    assert chosen.images == Images(30, 8)


@pytest.mark.parametrize("most", [Images(6, 20), Images(40, 200)], ids=["of a sample", "of all"])
def test_the_pilot_scores_a_dataset_whose_objects_are_rare(tmp_path: Path, most: Images) -> None:
    """The data stage takes it, as one of 200 val images has an object: sample and pilot have that image too."""
    coco = write_many(tmp_path / "coco", {"train2017": 40, "val2017": 200}, with_person=(30,))
    runs = [RunRoot(tmp_path / "runs", name) for name in ("job", "whole", "sampled", "pilot")]
    prepare(config_for(coco), runs[0], force=False)
    shutil.rmtree(tmp_path / "runs/.cache")
    runs[2].root.mkdir()
    found = job_images(config_for(coco), runs[1], runs[2], most)
    assert (found.there, bool(found.sets)) == (most, most.val == 20)
    for seed in range(3):
        pilot = RunRoot(tmp_path / "runs", f"pilot{seed}")
        prepare(config_for(coco, *found.sets, "data.n_val=2", f"data.seed={seed}"), pilot, force=False)
        assert read_json(pilot.provenance, "data")["splits"]["val"]["n_without_objects"] == 1


def test_shared_memory_counts_once() -> None:
    assert pss_bytes("Rss:  900 kB\nPss:  512 kB\nPss_Dirty: 5 kB\n") == 512 * 1024


def test_processes_that_this_one_has_started_count_while_they_live() -> None:
    own, before = own_memory()
    with subprocess.Popen(["sleep", "60"]) as child:
        _, with_child = own_memory()
        child.kill()
    assert own > 2**20
    _, after = own_memory()
    assert max(before, after) < with_child


def test_the_command_line_costs_what_a_new_process_takes() -> None:
    """A stage's process may have been the shell of `make` before, which built an environment for minutes."""
    cost = command_line()
    assert cost.cpu_s > 0.05
    assert cost.wall_s < time.time() - psutil.Process().create_time()
