"""What a training step costs: stock Ultralytics, our FP16 and our QAT in turns."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from ultralytics.cfg import get_cfg
from ultralytics.utils.torch_utils import ModelEMA, autocast

from app.core.config import Config, UserError, load
from app.core.environment import environment
from app.core.files import write_json
from app.core.run import RunRoot
from app.quant.model import build
from app.quant.norm import install
from app.report.tables import MISSING, markdown_table
from app.train.distill import Teacher
from app.train.graph import StepGraph
from app.train.processes import ALONE
from app.train.state import State
from app.train.step import MAX_NORM, clipped_step, criterion_of_part, fuse, loss_of

log = logging.getLogger(__name__)
BASE = "stock"  # the arm that the others are compared with
N_BOXES = 8  # objects an image, about COCO's mean
WARMUP_STEPS = 5
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is timed: batch sizes, rounds in which every arm has its turn, and steps of a turn."""

    batches: list[int]
    n_rounds: int
    n_steps: int


class Arm(Protocol):
    """One variant with everything that a training step touches."""

    device: torch.device

    def step(self, batch: Batch) -> None:
        """One step on a batch as the loader gives it, without the loader and the look at losses."""
        ...


class Stock:
    """Ultralytics' modules, loss and step (engine/trainer.py, 8.4.190), of any network.

    Args:
        config: of a variant; app.quant.model.build gives its network.
        model: that network, on the CPU.
        device: where it trains.
    """

    def __init__(self, config: Config, model: Any, device: torch.device) -> None:
        self.device, self.model = device, model
        self.amp = config.train.amp and device.type == "cuda"
        self.weights = [weight for weight in on_device(model, device).parameters() if weight.requires_grad]
        self.optimizer = torch.optim.SGD(self.weights, lr=1e-4, momentum=0.937, nesterov=True)
        self.scaler = GradScaler("cuda", enabled=self.amp)
        self.ema = ModelEMA(model)

    def step(self, batch: Batch) -> None:
        with autocast(self.amp, device=self.device.type):
            loss = self.model(on_gpu(batch, self.device))[0].sum()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


class Ours:
    """The product's step; arguments as for Stock, the number of images of a batch, and the network to learn from."""

    def __init__(
        self, config: Config, model: Any, device: torch.device, n_images: int, twin: nn.Module | None = None
    ) -> None:
        self.device = device
        weight = config.quant.distill if config.quant else 0.0
        self.teacher = Teacher(on_device(twin, device), weight, ALONE) if twin else None
        if device.type == "cuda" and config.train.kernels:
            install(model)
        on_device(model, device)
        amp = config.train.amp and device.type == "cuda"
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.937, nesterov=True)
        model.criterion = criterion_of_part(model, ALONE)
        self.state = State(
            net=model, ema=ModelEMA(model), optimizer=fuse(optimizer) if device.type == "cuda" else optimizer,
            scaler=GradScaler("cuda", enabled=amp), stabilisers=[], ranks=ALONE,
        )  # fmt: skip
        self.amp = amp
        self.graph = StepGraph(self.state, n_images, config.train, teacher=self.teacher)

    def step(self, batch: Batch) -> None:
        state = self.state
        if self.graph.run(batch) is None:
            state.scaler.scale(self.loss(batch)).backward()
        clipped_step(state.optimizer, state.scaler, lambda norm: None)
        state.ema.update(state.net)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch as the loader gives it."""
        batch = on_gpu(batch, self.device)
        with autocast(self.amp, device=self.device.type):
            return loss_of(self.state.net, batch, self.teacher and self.teacher.beside)[0]


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device as Ultralytics' trainer puts it there, in training mode; the DFL layer is fixed."""
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    for name, weight in model.named_parameters():
        if ".dfl" in name:
            weight.requires_grad = False
    return model.to(device, memory_format=memory_format).train()  # pyright: ignore[reportCallIssue]


def on_gpu(batch: Batch, device: torch.device) -> Batch:
    """As Ultralytics' preprocess_batch: tensors on the device, images float32 0..1."""
    moved = {key: value.to(device, non_blocking=device.type == "cuda") for key, value in batch.items()}
    return {**moved, "img": moved["img"].float() / 255}


def synthetic_batch(n_images: int, imgsz: int, pinned: bool) -> Batch:
    """Noise images uint8 [N,3,S,S] and N_BOXES boxes each, on the CPU, in the layout of Ultralytics' loader."""
    generator = torch.Generator().manual_seed(0)
    n_boxes = n_images * N_BOXES
    batch = {
        "img": torch.randint(0, 256, (n_images, 3, imgsz, imgsz), generator=generator, dtype=torch.uint8),
        "batch_idx": torch.arange(n_images).repeat_interleave(N_BOXES).float(),
        "cls": torch.randint(0, 80, (n_boxes, 1), generator=generator).float(),
        "bboxes": torch.rand(n_boxes, 4, generator=generator) * 0.3 + 0.2,
    }
    return {name: value.pin_memory() for name, value in batch.items()} if pinned else batch


def bench_step(run: RunRoot, overlays: list[Path], sets: list[str], sizes: Sizes) -> None:
    """Times whole training steps of all arms in turns; prints medians, ratios to stock and peak memory.

    Raises:
        UserError: train.device names a GPU that is not there.
    """
    fp16, qat = load("fp16", overlays, sets), load("qat", overlays, sets)
    train = fp16.train
    device = torch.device("cuda" if torch.cuda.is_available() and train.device != "cpu" else "cpu")
    if train.device not in ("auto", "cpu") and device.type == "cpu":
        raise UserError(f"train.device={train.device}: torch sees no GPU; use train.device=cpu")
    torch.use_deterministic_algorithms(train.deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = train.deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    result: dict[str, Any] = {
        "model": fp16.model, "imgsz": train.imgsz, "device": device_name(device),
        "amp": train.amp and device.type == "cuda", "graph": train.graph, "scheme": qat.label,
        "rounds": sizes.n_rounds, "steps": sizes.n_steps, "rows": [], "environment": environment(),
    }  # fmt: skip
    networks = {config.variant: network(config) for config in (fp16, qat)}
    for n_images in sizes.batches:
        batch = synthetic_batch(n_images, train.imgsz, pinned=device.type == "cuda")
        turns = time_in_turns(Workbench(fp16, qat, networks, device), batch, sizes)
        result["rows"] += [step_row(n_images, name, turns) for name in turns]
        write_json(run.root / "bench-step.json", result)
        show_steps(result)  # after every batch size: a lease may end before the last one


@dataclass(frozen=True)
class Workbench:
    """Makes arms, each from a copy of its network (variant -> network on the CPU)."""

    fp16: Config
    qat: Config
    networks: dict[str, nn.Module]
    device: torch.device

    def arm(self, name: str, n_images: int) -> Arm:
        config = self.qat if name == "qat" else self.fp16
        model = deepcopy(self.networks[config.variant])
        if name == BASE:
            return Stock(config, model, self.device)
        is_distilled = config.quant is not None and config.quant.distill > 0
        twin = deepcopy(self.networks["fp16"]) if is_distilled else None
        return Ours(config, model, self.device, n_images, twin)


ARMS = (BASE, "fp16", "qat")


def network(config: Config) -> nn.Module:
    model: Any = build(config)[0]
    model.args = get_cfg(overrides={"model": config.model})
    return model


@dataclass(frozen=True)
class Turn:
    """One turn of an arm: milliseconds a step, and the GiB that torch allocated at most (0 on the CPU)."""

    ms: float
    peak_gib: float


def time_in_turns(bench: Workbench, batch: Batch, sizes: Sizes) -> dict[str, list[Turn]]:
    """Arm -> its turns, one a round. An arm is made for its turn: the GPU need not hold all of them."""
    turns: dict[str, list[Turn]] = {name: [] for name in ARMS}
    for _ in range(sizes.n_rounds):
        for name in ARMS:
            clear_memory(bench.device)
            turns[name].append(time_arm(bench.arm(name, len(batch["img"])), batch, sizes.n_steps))
    return turns


def clear_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def time_arm(arm: Arm, batch: Batch, n_steps: int) -> Turn:
    """A turn of n_steps steps, after some that do not count."""
    for _ in range(WARMUP_STEPS):
        arm.step(batch)
    synchronize(arm.device)
    start = time.perf_counter()
    for _ in range(n_steps):
        arm.step(batch)
    synchronize(arm.device)
    ms = (time.perf_counter() - start) * 1e3 / n_steps
    peak = torch.cuda.max_memory_allocated(arm.device) / 2**30 if arm.device.type == "cuda" else 0.0
    return Turn(ms, peak)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def step_row(n_images: int, name: str, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians of the rounds, and of the ratios to stock round by round, so that drift cancels."""
    times = [turn.ms for turn in turns[name]]
    base_times = [turn.ms for turn in turns[BASE]]
    fp16_times = [turn.ms for turn in turns["fp16"]]
    peak, base_peak = (max(turn.peak_gib for turn in turns[arm]) for arm in (name, BASE))
    return {
        "batch": n_images, "arm": name, "ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times),
        "speed": median_ratio(base_times, times), "ms_to_fp16": median_ratio(times, fp16_times), "peak_gib": peak,
        "peak_ratio": peak / base_peak if base_peak else None,
    }  # fmt: skip


def median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show_steps(result: dict[str, Any]) -> None:
    cells = [
        ["batch", "arm", "ms a step", "min", "max", "times as fast as stock", "ms to fp16", "peak GiB", "to stock"]
    ]
    for row in result["rows"]:
        memory = [MISSING, MISSING]
        if row["peak_ratio"]:
            memory = [f"{row['peak_gib']:.2f}", f"{row['peak_ratio']:.3f}"]
        times = [f"{row[key]:.1f}" for key in ("ms", "min_ms", "max_ms")]
        ratios = [f"{row['speed']:.2f}", f"{row['ms_to_fp16']:.3f}"]
        cells.append([str(row["batch"]), row["arm"], *times, *ratios, *memory])
    precision = "FP16 autocast" if result["amp"] else "float32"
    log.info("%s, %d px, %s, %s", result["model"], result["imgsz"], precision, result["device"])
    for line in markdown_table(cells):
        log.info("%s", line)
