"""Where the time of our FP16 training loop goes: PyTorch's profiler over some steps, loader and logging included."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from app.core.config import dump, load
from app.core.files import write_text
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.report.tables import markdown_table
from app.train.device import check_devices
from app.train.train import ultralytics_args
from app.train.trainer import Trainer

log = logging.getLogger(__name__)
N_WAIT, N_WARMUP, N_STEPS = 8, 2, 8
N_ROWS = 12
PHASES = ("load", "to the device", "forward and loss", "backward", "clip, optimizer, EMA", "a whole step")


class Enough(Exception):
    """All steps have been recorded."""


class Profiled(Trainer):
    """The product's trainer with a name on each phase of a step; ends after the recorded ones."""

    profile: profile

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        with record_function(PHASES[1]):
            return super().preprocess_batch(batch)

    def _backward(self, batch: dict[str, Any]) -> None:
        with record_function(PHASES[2] + " + " + PHASES[3]):
            super()._backward(batch)

    def optimizer_step(self) -> None:
        with record_function(PHASES[4]):
            super().optimizer_step()
        self.profile.step()
        if self.profile.step_num >= N_WAIT + N_WARMUP + N_STEPS:
            raise Enough


def bench_profile(run: RunRoot, overlays: list[Path], sets: list[str]) -> None:
    """Prints the top rows by device time (or CPU time without a GPU), ms a step, and writes trace.json."""
    config = load("fp16", overlays, sets)
    device = check_devices(config)[0]
    prepare(config, run, force=False)
    out_dir = run.variant_dir(config.label)
    write_text(out_dir / "config.yaml", dump(config))
    trainer = Profiled(overrides=ultralytics_args(config, run, device))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    plan = schedule(wait=N_WAIT, warmup=N_WARMUP, active=N_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan) as trainer.profile:
        try:
            trainer.train()
        except Enough:
            log.info("%d steps recorded", N_STEPS)
    show(trainer.profile.key_averages(), on_gpu=device != "cpu")
    trainer.profile.export_chrome_trace(str(run.root / "trace.json"))  # takes a minute


def show(events: Any, on_gpu: bool) -> None:
    """ms a step: phases on the CPU's clock, then kernels (or operators) by their own time."""
    cells = [["phase", "CPU ms a step"]]
    cells += [
        [event.key, f"{event.cpu_time_total / 1e3 / N_STEPS:.2f}"] for event in events if event.key.startswith(PHASES)
    ]
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    own = [
        event for event in events if event.device_type == kind and not event.key.startswith((*PHASES, "ProfilerStep"))
    ]
    time_of = (lambda event: event.self_device_time_total) if on_gpu else (lambda event: event.self_cpu_time_total)
    own.sort(key=time_of, reverse=True)
    rows = [["kernel" if on_gpu else "operator", "ms a step", "calls a step"]]
    rows += [[e.key[:90], f"{time_of(e) / 1e3 / N_STEPS:.2f}", f"{e.count / N_STEPS:.0f}"] for e in own[:N_ROWS]]
    rows.append(["all", f"{sum(map(time_of, own)) / 1e3 / N_STEPS:.2f}", f"{sum(e.count for e in own) / N_STEPS:.0f}"])
    for line in [*markdown_table(cells), "", *markdown_table(rows)]:
        log.info("%s", line)
