"""What a training step costs: FP16, QAT and QAT through plain Brevitas in turns."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from ultralytics.cfg import get_cfg
from ultralytics.utils.torch_utils import ModelEMA, autocast

from app.core.config import Config, UserError, load
from app.core.environment import environment
from app.core.files import write_json
from app.core.run import RunRoot
from app.quant.model import build
from app.report.tables import MISSING, markdown_table
from app.train.step import clipped_step

log = logging.getLogger(__name__)
BASE = "fp16"  # the arm that the others are compared with
N_BOXES = 8  # objects an image, about COCO's mean
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """What is timed: batch sizes, rounds in which every arm has its turn, and steps of a turn."""

    batches: list[int]
    n_rounds: int
    n_steps: int


class Arm:
    """One variant with everything that a training step touches."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.amp = config.train.amp and device.type == "cuda"
        model: Any = build(config)[0]
        model.args = get_cfg(overrides={"model": config.model, "amp": self.amp})
        memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model = model.to(device, memory_format=memory_format).train()
        weights = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".dfl" not in name:
                weights.append(parameter)
        self.optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.937, nesterov=True)
        self.scaler = GradScaler("cuda", enabled=self.amp)
        self.ema = ModelEMA(self.model)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One step of our trainer, without loader, logging and the check of losses."""
        with autocast(self.amp, device=self.device.type):
            loss = self.model(batch)[0].sum()
        self.scaler.scale(loss).backward()
        clipped_step(self.optimizer, self.scaler, lambda norm: None)
        self.ema.update(self.model)

    def time_steps(self, batch: dict[str, torch.Tensor], n_steps: int) -> float:
        """Milliseconds a step."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(n_steps):
            self.step(batch)
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3 / n_steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synthetic_batch(n_images: int, imgsz: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Noise images [N,3,S,S] 0..1 and N_BOXES boxes each, in the layout of Ultralytics' loader."""
    generator = torch.Generator().manual_seed(0)
    n_boxes = n_images * N_BOXES
    batch = {
        "img": torch.rand(n_images, 3, imgsz, imgsz, generator=generator),
        "batch_idx": torch.arange(n_images).repeat_interleave(N_BOXES).float(),
        "cls": torch.randint(0, 80, (n_boxes, 1), generator=generator).float(),
        "bboxes": torch.rand(n_boxes, 4, generator=generator) * 0.3 + 0.2,
    }
    return {name: value.to(device) for name, value in batch.items()}


def bench_step(run: RunRoot, overlays: list[Path], sets: list[str], sizes: Sizes) -> None:
    """Times whole training steps of all arms in turns; prints medians, ratios to FP16 and peak memory.

    Raises:
        UserError: train.device names a GPU that is not there.
    """
    configs = arm_configs(overlays, sets)
    base = configs[BASE]
    train = base.train
    device = torch.device("cuda" if torch.cuda.is_available() and train.device != "cpu" else "cpu")
    if train.device not in ("auto", "cpu") and device.type == "cpu":
        raise UserError(f"train.device={train.device}: torch sees no GPU; use train.device=cpu")
    torch.backends.cudnn.deterministic = train.deterministic
    result: dict[str, Any] = {
        "model": base.model,
        "imgsz": train.imgsz,
        "device": device_name(device),
        "amp": train.amp and device.type == "cuda",
        "scheme": load("qat", overlays, sets).label,
        "rounds": sizes.n_rounds,
        "steps": sizes.n_steps,
        "rows": [],
        "environment": environment(),
    }
    for n_images in sizes.batches:
        batch = synthetic_batch(n_images, train.imgsz, device)
        peaks = {name: peak_memory(config, device, batch) for name, config in configs.items()}
        arms = {name: Arm(config, device) for name, config in configs.items()}
        times = time_in_turns(arms, batch, sizes)
        result["rows"] += [step_row(n_images, name, times, peaks) for name in arms]
        write_json(run.root / "bench-step.json", result)
        show_steps(result)  # after every batch size: a lease may end before the last one


def arm_configs(overlays: list[Path], sets: list[str]) -> dict[str, Config]:
    """Arm -> its configuration."""
    return {
        BASE: load("fp16", overlays, sets),
        "qat": load("qat", overlays, [*sets, "quant.fast_path=true"]),
        "qat, plain Brevitas": load("qat", overlays, [*sets, "quant.fast_path=false"]),
    }


def time_in_turns(arms: dict[str, Arm], batch: dict[str, torch.Tensor], sizes: Sizes) -> dict[str, list[float]]:
    """Arm -> milliseconds a step, one number a round."""
    for arm in arms.values():
        arm.time_steps(batch, WARMUP_STEPS)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(sizes.n_rounds):
        for name, arm in arms.items():
            times[name].append(arm.time_steps(batch, sizes.n_steps))
    return times


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def peak_memory(config: Config, device: torch.device, batch: dict[str, torch.Tensor]) -> float:
    """GiB that torch allocates at most while one arm alone trains; 0 on the CPU, where it is not counted."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    Arm(config, device).time_steps(batch, WARMUP_STEPS)
    return torch.cuda.max_memory_allocated(device) / 2**30


def step_row(n_images: int, name: str, times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """Median of the rounds, and median of the ratios to FP16 round by round, so that drift cancels."""
    ratios = [ms / base_ms for ms, base_ms in zip(times[name], times[BASE], strict=True)]
    return {
        "batch": n_images,
        "arm": name,
        "ms": statistics.median(times[name]),
        "min_ms": min(times[name]),
        "max_ms": max(times[name]),
        "ratio": statistics.median(ratios),
        "peak_gib": peaks[name],
        "peak_ratio": peaks[name] / peaks[BASE] if peaks[BASE] else None,
    }


def show_steps(result: dict[str, Any]) -> None:
    cells = [["batch", "arm", "ms a step", "min", "max", "to FP16", "peak GiB", "to FP16"]]
    for row in result["rows"]:
        memory = [MISSING, MISSING]
        if row["peak_ratio"]:
            memory = [f"{row['peak_gib']:.2f}", f"{row['peak_ratio']:.3f}"]
        times = [f"{row[key]:.1f}" for key in ("ms", "min_ms", "max_ms")]
        cells.append([str(row["batch"]), row["arm"], *times, f"{row['ratio']:.3f}", *memory])
    precision = "FP16 autocast" if result["amp"] else "float32"
    log.info("%s, %d px, %s, %s", result["model"], result["imgsz"], precision, result["device"])
    for line in markdown_table(cells):
        log.info("%s", line)
