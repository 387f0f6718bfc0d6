"""Do the graph and the kernels train what PyTorch's kernels train? The same training with each of them, compared.

Training amplifies the last digit: two trainings whose images differ by one unit in the last place part too. How far
such trainings part is the measure for how far our kernels may lie from PyTorch's.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any

import torch

from app.bench.train import check_ended, train_command, visible_gpus
from app.core.config import Config, UserError, load, validate
from app.core.environment import environment
from app.core.files import read_json, write_json, write_text
from app.core.results import read_rows, train_loss
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.quant.model import build, load_checkpoint
from app.report.tables import markdown_table
from app.train.loop import Loop
from app.train.processes import ALONE
from app.train.train import device_of, make_ready
from app.train.trainer import Trainer

log = logging.getLogger(__name__)
NUDGE_JSON = "nudge.json"
GRAPH, KERNELS, STOCK = "graph", "kernels", "stock"
SETTINGS = {
    GRAPH: ["train.graph=true", "train.kernels=true"],
    KERNELS: ["train.graph=false", "train.kernels=true"],
    STOCK: ["train.graph=false", "train.kernels=false"],
}
NUDGES = {"stock, images up": 1.0, "stock, images down": 0.0}  # arm -> value towards which its pixels move
VARIANTS = ("fp16", "qat")
Weights = dict[str, torch.Tensor]  # by name, as float64


@dataclass(frozen=True)
class Trained:
    """What a training leaves: the loss of each epoch, and the weights."""

    losses: list[float]
    weights: Weights


def bench_agreement(run: RunRoot, overlays: list[Path], sets: list[str], variants: list[str], n_steps: int) -> None:
    """Trains each variant with the graph, its kernels, and PyTorch's, side by side; prints how far they part.

    Args:
        variants: of VARIANTS.
        n_steps: batches that each training takes at least; it ends with an epoch.

    Raises:
        UserError: another variant, or a training failed.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--arms {variant}: choose among {', '.join(VARIANTS)}")
    config = load("fp16", overlays, sets)
    prepare(config, run, force=False)
    data = read_json(run.provenance, "data")
    n_images = data["splits"]["train"]["n_images"]
    n_epochs = ceil(n_steps / ceil(n_images / config.train.batch))
    sets = [*sets, f"train.epochs={n_epochs}", f"train.val_every={n_epochs}", "hyp.close_mosaic=0"]
    result: dict[str, Any] = {
        "model": config.model, "imgsz": config.train.imgsz, "batch": config.train.batch, "epochs": n_epochs,
        "steps": n_epochs * ceil(n_images / config.train.batch), "rows": [], "environment": environment(),
    }  # fmt: skip
    for variant in variants:
        config = load(variant, overlays, sets)
        trained = train_arms(run, config, overlays, sets)
        start = {name: weight.detach().double() for name, weight in build(config, data["names"])[0].named_parameters()}
        result["rows"] += compare(variant, trained, start)
        write_json(run.root / "bench-agreement.json", result)
    show(result)


def train_arms(run: RunRoot, config: Config, overlays: list[Path], sets: list[str]) -> dict[str, Trained]:
    """Arm -> its training; all run at the same time, each in a run root and a process of its own, over all GPUs.

    Raises:
        UserError: one failed.
    """
    commands, roots = {}, {}
    for number, arm in enumerate([*SETTINGS, *NUDGES]):
        roots[arm] = root = RunRoot(run.runs_dir, f"{run.name}-{number}")
        settings = [*sets, *SETTINGS.get(arm, SETTINGS[STOCK])]
        own = load(config.variant, overlays, settings)
        prepare(own, root, force=False)
        commands[arm] = [*train_command(root, config.variant, overlays, settings), "--force"]
        if arm in NUDGES:
            write_text(root.root / NUDGE_JSON, json.dumps([own.model_dump(mode="json"), NUDGES[arm]]))
            commands[arm] = [sys.executable, "-W", "ignore", "-m", "app.bench.agreement", str(root.root)]
    run_together(commands)
    return {arm: read_trained(roots[arm].variant_dir(config.label)) for arm in commands}


def run_together(commands: dict[str, list[str]]) -> None:
    """Runs the commands, by arm, at the same time, on all GPUs in turn; the first that fails ends the others.

    Raises:
        UserError: one failed.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    gpus = visible_gpus()
    try:
        for number, (arm, command) in enumerate(commands.items()):
            environ = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
            processes[arm] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        for arm, process in processes.items():
            _, said = process.communicate()
            check_ended(f"the training '{arm}'", process.returncode, said)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.communicate()


def read_trained(folder: Path) -> Trained:
    weights = {name: value.double() for name, value in load_checkpoint(folder / "weights" / "last.pt")["model"].items()}
    return Trained([train_loss(row) for row in read_rows(folder / "results.csv")], weights)


def compare(variant: str, trained: dict[str, Trained], start: Weights) -> list[dict[str, Any]]:
    """A row for each pair that says something."""
    pairs = [(GRAPH, KERNELS), (KERNELS, STOCK), *combinations([STOCK, *NUDGES], 2)]
    return [{"variant": variant, "pair": list(pair), **distances(trained, pair, start)} for pair in pairs]


def distances(trained: dict[str, Trained], pair: tuple[str, str], start: Weights) -> dict[str, Any]:
    """How far two trainings are apart.

    Returns:
        equal: to the last bit, in losses, weights and statistics; loss: largest relative difference of an epoch's loss;
        weights: the distance of the weights that `start` names, as a share of the second one's way from there.
    """
    ours, theirs = (trained[arm] for arm in pair)
    differences = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    are_equal = all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())
    return {
        "equal": ours.losses == theirs.losses and are_equal,
        "loss": max(differences),
        "weights": norm_between(ours.weights, theirs.weights, start) / norm_between(theirs.weights, start, start),
    }


def norm_between(weights: Weights, others: Weights, names: Weights) -> float:
    """2-norm of the difference over the tensors of these names."""
    return float(torch.stack([(weights[name] - others[name]).norm() for name in names]).norm())


def show(result: dict[str, Any]) -> None:
    cells = [
        ["variant", "trainings", "bit-equal", "largest difference of an epoch's loss", "weights apart, of their way"]
    ]
    for row in result["rows"]:
        numbers = [f"{row['loss']:.1e}", f"{row['weights']:.3f}"]
        cells.append([row["variant"], " / ".join(row["pair"]), "yes" if row["equal"] else "no", *numbers])
    log.info("%s, %d px, batch %d, %d steps", *(result[key] for key in ("model", "imgsz", "batch", "steps")))
    for line in markdown_table(cells):
        log.info("%s", line)


class NudgedTrainer(Trainer):
    """The product's trainer on images of which every pixel is moved by one unit in the last place towards `target`.

    The place is the last one of the type in which the network reads them.
    """

    target: float

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        ready = super().preprocess_batch(batch)
        images = ready["img"].half() if self.amp else ready["img"]
        return {**ready, "img": torch.nextafter(images, torch.full_like(images, self.target))}


def train_nudged(folder: Path) -> None:
    """The training that nudge.json of a run root describes."""
    tree, target = json.loads((folder / NUDGE_JSON).read_text(encoding="utf-8"))
    config, run = validate(tree), RunRoot(folder.parent, folder.name)
    make_ready(config, run, force=True)
    trainer = NudgedTrainer(config, run, device_of(config, ALONE))
    trainer.target = target
    Loop(trainer).run()


if __name__ == "__main__":
    train_nudged(Path(sys.argv[1]))
