"""Where the time of our FP16 training loop goes: PyTorch's profiler over some steps, loader and logging included."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from app.core.config import load
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.report.tables import markdown_table
from app.train.device import check_devices
from app.train.loop import Loop
from app.train.trainer import Trainer

log = logging.getLogger(__name__)
N_WAIT, N_WARMUP, N_STEPS = 8, 2, 8  # optimizer steps: unseen, seen without being recorded, recorded
N_ROWS = 12
NAME_LENGTH = 90  # of a kernel, in characters
TO_DEVICE, FORWARD_BACKWARD, STEP = "to the device", "forward and loss + backward", "clip, optimizer, EMA"
PHASES = (TO_DEVICE, FORWARD_BACKWARD, STEP)


class Enough(Exception):
    """All steps have been recorded."""


class ProfiledTrainer(Trainer):
    """The product's trainer with a name on the copy to the device."""

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        with record_function(TO_DEVICE):
            return super().preprocess_batch(batch)


class ProfiledLoop(Loop):
    """The product's loop with a name on each phase of a step; ends after the recorded steps."""

    def __init__(self, trainer: Trainer, profiler: profile) -> None:
        super().__init__(trainer)
        self.profiler = profiler

    def backward(self, batch: dict[str, Any]) -> None:
        with record_function(FORWARD_BACKWARD):
            super().backward(batch)

    def optimizer_step(self) -> None:
        with record_function(STEP):
            super().optimizer_step()
        self.profiler.step()
        if self.profiler.step_num >= N_WAIT + N_WARMUP + N_STEPS:
            raise Enough


def bench_profile(run: RunRoot, overlays: list[Path], sets: list[str]) -> None:
    """Prints the top rows by device time (or CPU time without a GPU), ms a step, and writes trace.json."""
    config = load("fp16", overlays, sets)
    device = check_devices(config)[0]
    on_gpu = device != "cpu"
    prepare(config, run, force=False)
    trainer = ProfiledTrainer(config, run, device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    plan = schedule(wait=N_WAIT, warmup=N_WARMUP, active=N_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan) as profiler:
        try:
            ProfiledLoop(trainer, profiler).run()
        except Enough:
            log.info("%d steps recorded", N_STEPS)
    show(profiler.key_averages(), on_gpu)
    profiler.export_chrome_trace(str(run.root / "trace.json"))  # takes a minute


def show(events: Any, on_gpu: bool) -> None:
    """ms a step: phases on the CPU's clock, then kernels (or operators) by their own time."""
    phases = [["phase", "CPU ms a step"]]
    for event in events:
        if event.key.startswith(PHASES):
            phases.append([event.key, ms_a_step(event.cpu_time_total)])
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    own_times = []
    for event in events:
        if event.device_type == kind and not event.key.startswith((*PHASES, "ProfilerStep")):
            own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            own_times.append((own_us, event))
    own_times.sort(key=lambda timed: timed[0], reverse=True)
    rows = [["kernel" if on_gpu else "operator", "ms a step", "calls a step"]]
    for own_us, event in own_times[:N_ROWS]:
        rows.append([event.key[:NAME_LENGTH], ms_a_step(own_us), f"{event.count / N_STEPS:.0f}"])
    total_us = sum(own_us for own_us, _ in own_times)
    n_calls = sum(event.count for _, event in own_times)
    rows.append(["all", ms_a_step(total_us), f"{n_calls / N_STEPS:.0f}"])
    for line in [*markdown_table(phases), "", *markdown_table(rows)]:
        log.info("%s", line)


def ms_a_step(total_us: float) -> str:
    """Milliseconds a recorded step, of microseconds over all of them."""
    return f"{total_us / 1e3 / N_STEPS:.2f}"
