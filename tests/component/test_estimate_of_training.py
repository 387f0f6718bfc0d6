"""What estimate says of a training is what the training takes, on a clock that work moves and no machine disturbs."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.core.config import Config, UserError, load
from app.core.files import read_json
from app.core.run import Images, RunRoot, hold
from app.data.prepare import prepare
from app.estimate import pilot, training
from app.estimate.cost import Budget, Cost, Stopwatch
from app.estimate.estimate import Command, estimate
from app.estimate.pilot import JobImages, MeasuredJob
from app.estimate.plan import Plan
from app.estimate.price import training_parts
from app.estimate.summary import computed, gpu, ram
from app.estimate.training import from_processes, measure_training, val_image
from app.sweep.price import ESTIMATE_SHAPE
from app.train import checkpoint
from app.train.loader import CocoDataset
from app.train.loop import Loop
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.settle import sets_of
from tests.support.tiny import tiny_network

START_S, BATCH_S, IMAGE_S, STEP_S, SAMPLE_S, VAL_IMAGE_S, BN_IMAGE_S, SAVE_S = 30, 2, 1, 3, 0.125, 0.5, 0.25, 4
JOB = Images(40, 8)
SETTINGS = {
    "data.n_train": JOB.train, "data.n_val": JOB.val, "train.batch": 8, "train.epochs": 4, "train.val_every": 3,
    "train.bn_batches": 2, "guard.collapse": "warn", "hyp.nbs": 8,
}  # fmt: skip
PILOT = Plan(imgsz=64, batch=4, images=Images(24, 4), n_bn_batches=1, exports_as_job=False)


class WorkClock:
    """Seconds pass by work alone, on two cores at once."""

    now_s = 1_000_000.0

    def now(self) -> Cost:
        return Cost(self.now_s, 2 * self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkClock]:
    clock = WorkClock()
    monkeypatch.setattr(Stopwatch, "now", lambda watch: clock.now())

    def takes(owner: Any, name: str, seconds: Any) -> None:
        work = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            clock.now_s += seconds(*args, **kwargs)
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    takes(Trainer, "set_up", lambda trainer: START_S)
    takes(Loop, "backward", lambda loop, batch: BATCH_S + IMAGE_S * len(batch["img"]))
    takes(Loop, "optimizer_step", lambda loop: STEP_S)
    takes(CocoDataset, "_sample", lambda dataset, ticket, out: SAMPLE_S)
    takes(Trainer, "score", lambda trainer, *_: VAL_IMAGE_S * len(trainer.test_loader.dataset))
    takes(Trainer, "reestimate", lambda trainer, model, images, replays: BN_IMAGE_S * sum(map(len, images)))
    takes(checkpoint, "save_state", lambda *_: SAVE_S)
    yield clock


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_parts_and_whole(runs_dir: Path, clock: WorkClock, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pilot has batches of 4 and 2 where the job has 8, and half of its val images."""
    loader_bytes, close = [200], Trainer.close
    monkeypatch.setattr(Trainer, "close", lambda trainer: (close(trainer), loader_bytes.clear()))
    monkeypatch.setattr(training, "own_memory", lambda: (1000, sum(loader_bytes)))
    command = Command([], sets_of(SETTINGS), for_s=60)
    own, job = command.config(variant, *PILOT.sets()), command.config(variant)
    run = RunRoot(runs_dir, f"pilot-{variant}")
    prepare(own, run, force=False)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_network():
        pieces = measure_training(own, run, "cpu", Budget(60).share(0.05))
    assert pieces.process_bytes == 1000 + 2 * 200, "the loader processes of training live, and validation has as many"
    assert torch.get_num_threads() == 1, "the stages after a training are measured as in processes of their own"
    torch.set_num_threads(n_threads)
    parts = training_parts(job, JOB, pieces, PILOT.images.train)
    # Five batches an epoch; validated after epochs 3 and 4, with BatchNorm on 2 batches of 8; last.pt is also written
    # before the first epoch.
    assert {name: cost.wall_s for name, cost in parts.items()} == pytest.approx({
        "start": 30 + 4, "samples": 4 * 40 / 8, "steps": 4 * (5 * 2 + 40 + 5 * 3), "validation": 2 * 8 / 2,
        "BatchNorm": 2 * 16 / 4 + 16 / 8, "checkpoints": 16,
    })  # fmt: skip
    whole = sum(cost.wall_s for cost in parts.values())
    assert whole == pytest.approx(trained(job, RunRoot(runs_dir, f"job-{variant}"), clock))
    assert sum(cost.cpu_s for cost in parts.values()) == pytest.approx(2 * whole)
    assert run.finished_labels(), "the stages after it find what a training leaves"


def trained(config: Config, run: RunRoot, clock: WorkClock) -> float:
    """Seconds of a training."""
    start_s = clock.now_s
    prepare(config, run, force=False)
    with tiny_network():
        train(config, run, force=False)
    return clock.now_s - start_s


def test_every_stage_has_its_price_and_nothing_of_the_pilot_stays(
    tmp_path: Path, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = RunRoot(tmp_path, "small")
    (tmp_path / ".cache").symlink_to(runs_dir / ".cache")  # with the drawn images
    sets = {**SETTINGS, "export.contracts": ["raw"], "report.gallery_images": 0}
    with tiny_network():
        estimate(Command([], sets_of(sets), for_s=1), run)
    facts = read_json(run.root / "estimate.json", "estimate", ESTIMATE_SHAPE)
    stages = ["data", "train fp16", "train qat", "ptq", "export", "eval", "report"]
    assert list(facts["seconds"]) == list(facts["cpu_seconds"]) == stages
    assert facts["hours"]["whole job"] == pytest.approx(sum(facts["hours"][stage] for stage in stages))
    assert all(min(parts.values()) >= 0 < sum(parts.values()) for parts in facts["cpu_seconds"].values())
    assert facts["images"] == {"train": JOB.train, "val": JOB.val}
    assert facts["ram"]["largest_batch"] > SETTINGS["train.batch"]
    assert sorted(os.listdir(tmp_path)) == [".cache", "small"]
    assert os.listdir(run.root) == ["estimate.json"]
    speaking = {record.name for record in caplog.records if record.name.startswith("app.")}
    assert speaking == {"app.estimate.estimate", "app.estimate.pilot"}
    own = [
        record.message for record in caplog.records if record.name in speaking and "limited by" not in record.message
    ]
    assert max(map(len, own)) <= 100 + len(str(tmp_path))
    json.dumps(facts, allow_nan=False)


def test_a_second_estimate_of_the_name_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """The first one stops in its pilot's folder; a run of that name may be at work meanwhile."""
    run = RunRoot(tmp_path, "small")
    waiting = (
        "import sys; from pathlib import Path; from app.core.run import RunRoot\n"
        "from app.estimate import estimate as e\n"
        "e.import_costs = lambda process: (print('begun', flush=True), sys.stdin.readline(), sys.exit(0))\n"
        f"e.estimate(e.Command([], [], 1), RunRoot(Path({str(tmp_path)!r}), 'small'))\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", waiting]
    with hold(run, "train"), subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdin and first.stdout and first.stdout.readline() == "begun\n"
        words = ["estimate", "--run", "small", "--runs-dir", str(tmp_path)]
        second = subprocess.run([sys.executable, "-m", "app", *words], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert re.fullmatch(r"error: .*small-estimate is in use by 'estimate' \(process .*\n", second.stderr)
        assert (tmp_path / "small-estimate-pilot").is_dir(), "the first one's"
        first.communicate("go on\n")
    assert first.returncode == 0
    assert not list(tmp_path.glob("small-estimate*"))


def test_half_the_batch_where_the_gpu_has_no_room(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured again with fewer images, until that is one."""
    batches = []

    def measure(config: Config, run: RunRoot, device: str, share: Any) -> None:
        assert sys.exc_info()[0] is None, "the error before this keeps its network on the GPU"
        batches.append(config.train.batch)
        raise torch.OutOfMemoryError if config.train.batch > 1 else UserError("seen")

    monkeypatch.setattr(pilot, "measure_training", measure)
    command, run = Command([], sets_of(SETTINGS), for_s=60), RunRoot(runs_dir, "no-room")
    there = pilot.JobImages(JOB, Cost(), [], JOB)
    with pytest.raises(UserError, match="seen"):
        pilot.measure_plan(command, run, there, PILOT, Budget(60))
    assert batches == [4, 2, 1]


def test_the_peak_on_the_gpu_is_of_this_training_alone(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: done.append((name, *args)))

    def begin(*args: Any) -> None:
        assert done[:2] == [("empty_cache",), ("reset_peak_memory_stats", 1)]
        raise UserError("begun")

    monkeypatch.setattr(training, "Trainer", begin)
    command, run = Command([], sets_of(SETTINGS), for_s=60), RunRoot(runs_dir, "peak")
    prepare(command.config("fp16"), run, force=False)
    with pytest.raises(UserError, match="begun"):
        measure_training(command.config("fp16"), run, "1", Budget(60).share(1.0))


def test_a_sample_of_loader_processes_costs_their_processors_too(clock: WorkClock) -> None:
    """Two processes; each of the six batches of four after the eight ahead takes this process a second."""

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            clock.now_s += 1
            yield {"img": torch.zeros(4)}

    trainer = SimpleNamespace(train_loader=batches(), args=SimpleNamespace(workers=2))
    own: Any = SimpleNamespace(trainer=trainer, stopwatch=Stopwatch())
    assert from_processes(own, Cost(0.3, 0.7)) == Cost(0.25, 2 * 0.25 + 0.7)


@pytest.mark.parametrize(("n_workers", "image"), [(0, Cost(1, 2)), (3, Cost(1.5, 3))])
def test_val_images_are_read_beside_the_network_or_before(n_workers: int, image: Cost) -> None:
    loader = SimpleNamespace(dataset=range(8), num_workers=n_workers)
    assert val_image(Cost(12, 24), loader, decode=Cost(0.5, 1)) == image


def job_on_gpus(n: int, batch: int) -> MeasuredJob:
    """Each of n processes kept 1,000 MB, with 4 batches of BatchNorm, and 3,000 MB on its GPU, 1,000 before a step."""
    costs: Any = SimpleNamespace(gpu_bytes=(3 * 10**9, 10**9))
    after: Any = SimpleNamespace(files={}, scores={})
    plan = Plan(imgsz=64, batch=batch, images=Images(192, 16), n_bn_batches=4, exports_as_job=True, n_processes=n)
    images = JobImages(Images(10_000, 5_000), Cost(), [], Images(192, 16))
    return MeasuredJob(images, plan, None, {"fp16": costs}, after, True, 10**9, 8 * 10**9, {}, None)


@pytest.mark.parametrize(
    ("n", "batch", "bytes_needed"),
    [
        (1, 32, 10**9 + 32 * (10 - 4) * 3 * 64**2),  # the job's batch; ten batches of BatchNorm, four are counted
        (2, 16, 2 * 10**9 + (32 * 10 - 2 * 16 * 4) * 3 * 64**2),  # 16 on each GPU, the job's too
        (2, 8, 2 * 10**9 + (2 * 8 * 3 * 12 + 32 * 10 - 2 * 8 * 4) * 3 * 64**2),  # 8 more in 12 batches of 3 processes
    ],
)
def test_memory_beside_gpus_by_hand(n: int, batch: int, bytes_needed: int) -> None:
    sets = ["train.batch=32", "train.imgsz=64", "train.workers=3", "train.bn_batches=10"]
    config, job = load("qat", sets=sets), job_on_gpus(n, batch)
    facts = ram(config, job, 10**11)
    assert facts["peak_gib"] * 2**30 == pytest.approx(bytes_needed)
    assert facts["train_cache_gib"] * 2**30 == pytest.approx(n * 10_000 * 3 * 64**2 * 0.75), "each process has its own"
    assert gpu(config, job)["peak_gib"] * 2**30 == pytest.approx(10**9 + 32 / n * 2 * 10**9 / batch)
    assert f"the largest batch: from the memory of one batch of {batch}" in computed(config, job)
