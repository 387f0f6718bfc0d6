"""A QAT training whose float warm-up has been trained already, by the FP16 variant: it begins where that one stood."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app.config import LATER_STAGES, MACHINE_KEYS, Config, UserError, difference, shown, validate
from app.curves import WARM_UP
from app.model import load_checkpoint
from app.quant.stabilise import Stabiliser, WarmUp

if TYPE_CHECKING:
    from app.training.trainer import Trainer

log = logging.getLogger(__name__)


def branch(trainer: Trainer) -> dict[str, Any] | None:
    """State for checkpoint.restore of the checkpoint that quant.warmup_from names; None where it names none.

    Weights, EMA, optimizer, GradScaler, schedule and the rows of results.csv go on; the best epoch and the options of
    `quant` begin anew.

    Raises:
        UserError: it is missing, of another recipe, or from a later epoch than the warm-up's last.
    """
    config = trainer.config
    path = config.warmup_from
    if path is None:
        return None
    state = load_checkpoint(path)
    check(config, path, state)
    log.info("train %s: the first %d epochs are those of %s", config.label, state["epoch"] + 1, path)
    return {
        **state,
        "model": with_own_scales(trainer.net, state["model"]),
        "ema": with_own_scales(trainer.ema.ema, state["ema"]),
        "optimizer": optimizer_state(trainer.optimizer, state["optimizer"]),
        "stabilisers": [begun(stabiliser) for stabiliser in trainer.stabilisers],
        "rows": [row | {WARM_UP: 1} if "AP/ema_bn" in row else row for row in state["rows"]],
        "best_fitness": None,
        "best_epoch": 0,
    }


def check(config: Config, path: Path, state: dict[str, Any]) -> None:
    """Whether the checkpoint is the end of an epoch of this training's own warm-up."""
    source, n_done = validate(state["config"]), state["epoch"] + 1
    if source.variant != "fp16" or state["batch_in_epoch"]:
        raise UserError(f"quant.warmup_from={path} is not an epochN.pt of an FP16 training")
    if n_done > config.n_warmup_epochs:
        raise UserError(
            f"quant.warmup_from={path} has {n_done} epochs, the warm-up {config.n_warmup_epochs} "
            f"(quant.warmup_share={config.quant.warmup_share if config.quant else 0} of {config.train.epochs})"
        )
    if differences := difference(source, config, ignore=(*MACHINE_KEYS, *LATER_STAGES, "variant", "quant")):
        raise UserError(f"quant.warmup_from={path} was trained with another recipe ({shown(differences)})")


def begun(stabiliser: Stabiliser) -> dict[str, Any]:
    """Its state after the warm-up's epochs: all others start with the low bits."""
    return {"was_warm": True} if isinstance(stabiliser, WarmUp) else stabiliser.state_dict()


def with_own_scales(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float weights, and of `model` what a float network has not: learned scales."""
    return {**model.state_dict(), **state}


def optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """State of the float network's optimizer for one whose groups may end with more parameters, learned scales: those
    keep what `optimizer` begins with (fused SGD refuses a parameter without momentum beside others that have it)."""
    own = optimizer.state_dict()
    moved: dict[int, Any] = dict(own["state"])
    groups: list[dict[str, Any]] = []
    for mine, theirs in zip(own["param_groups"], state["param_groups"], strict=True):
        numbers = dict(zip(theirs["params"], mine["params"], strict=False))
        moved |= {numbers[number]: state["state"][number] for number in theirs["params"] if number in state["state"]}
        groups.append({**theirs, "params": mine["params"]})
    return {"state": moved, "param_groups": groups}
