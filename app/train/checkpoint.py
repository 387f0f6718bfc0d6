"""A QAT training whose float warm-up has been trained already, by the FP16 variant: it begins where that one stood."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app.core.config import LATER_STAGES, MACHINE_KEYS, Config, UserError, difference, shown, validate
from app.core.results import WARM_UP
from app.quant.model import load_checkpoint
from app.quant.options import Stabiliser, WarmUp

if TYPE_CHECKING:
    from app.train.trainer import Trainer
from app.core.files import keep
from app.core.results import write_rows
from app.quant.model import save_checkpoint, scored_state
from app.train.nonfinite import NonFinite
from app.train.step import criterion_after, criterion_of_part

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


# The scale begins at 65,536 and is halved when a gradient is infinite; below 1 it is no longer the scale's fault.
SMALLEST_SCALE = 1.0


def previous_of(last: Path) -> Path:
    """Where the checkpoint before `last` lies."""
    return last.with_name("last-1.pt")


def save_state(trainer: Trainer) -> None:
    """Writes last.pt: the state after the last optimizer step, and the last scored state. The one before is kept, and
    that of every train.save_period-th epoch's end for good.

    Of several processes the first one writes. The file is the same for any number of them; BatchNorm's statistics,
    which training does not read, are the first one's.

    Raises:
        NonFinite: the state is not worth keeping.
    """
    check_finite(trainer)
    if trainer.ranks.is_first:
        save_checkpoint(trainer.last, trainer.config, state_of(trainer), previous_of(trainer.last))
        n_done, period = trainer.epoch + 1, trainer.config.train.save_period
        if period and n_done and n_done % period == 0 and trainer.batch_in_epoch == 0:
            keep(trainer.last, trainer.last.with_name(f"epoch{n_done}.pt"))


def check_finite(trainer: Trainer) -> None:
    """Weights that are not finite, or a GradScaler that no scale is small enough for, must not replace a good state.

    Raises:
        NonFinite: with the batches of the newest step, or of the loss or gradient that was not finite.
    """
    trainer.watch.check()
    weights = bool(torch.stack([weight.isfinite().all() for weight in trainer.net.parameters()]).all())
    if not weights or trainer.scaler.get_scale() < SMALLEST_SCALE:
        raise NonFinite("gradient" if weights else "weights", trainer.watch.newest)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Tensors and plain values; tensors of the model and its EMA are FP32 copies on the CPU."""
    return {
        "scored": trainer.scored, "epoch": trainer.epoch, "batch_in_epoch": trainer.batch_in_epoch,
        "loss_sum": trainer.loss_sum, "loss_names": list(trainer.loss_names), "last_step": trainer.last_step,
        "model": scored_state(trainer.net), "ema": scored_state(trainer.ema.ema),
        "ema_updates": trainer.ema.updates, "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(), "criterion_updates": trainer.net.criterion.updates,
        "stabilisers": [stabiliser.state_dict() for stabiliser in trainer.stabilisers],
        "best_fitness": trainer.best_fitness, "best_epoch": trainer.best_epoch, "rows": trainer.rows,
        "accumulate": trainer.accumulate, "codes_before": trainer.codes_before, "faults": trainer.faults,
    }  # fmt: skip


def continue_from_checkpoint(trainer: Trainer) -> None:
    """Takes up the last whole checkpoint: at the next step, or the next epoch. Without one the start is saved, or the
    warm-up's end that quant.warmup_from names."""
    state = read_in_turn(trainer)
    is_new = state is None
    if is_new:
        state = branch(trainer)
    if state is None:
        trainer.net.criterion = criterion_of_part(trainer.net, trainer.ranks)
        trainer.epoch = -1
        save_state(trainer)
        return
    restore(trainer, state)
    if is_new:
        save_state(trainer)
    if trainer.rows and trainer.ranks.is_first:  # train.make_ready has deleted it
        write_rows(trainer.save_dir / "results.csv", trainer.rows)
    n_batches = trainer.batch_in_epoch
    where = f", batch {n_batches} of the next" if n_batches else ""
    log.info(
        "train %s: continues after epoch %d%s of %d", trainer.config.label, trainer.start_epoch, where, trainer.epochs
    )


def read_in_turn(trainer: Trainer) -> dict[str, Any] | None:
    """last_whole, in the first process before the others: it may move a damaged file; nobody writes before all read."""
    ranks = trainer.ranks
    if not ranks.is_first:
        ranks.wait()
    state = last_whole(trainer.last)
    if ranks.is_first:
        ranks.wait()
    ranks.wait()
    return state


def last_whole(last: Path) -> dict[str, Any] | None:
    """Content of last.pt or, where that is damaged, of the checkpoint before it; None where there is neither.

    Raises:
        UserError: both are damaged.
    """
    previous = previous_of(last)
    if not last.exists() and not previous.exists():
        return None
    try:
        return load_checkpoint(last)
    except UserError as error:
        if not previous.exists():
            raise UserError(f"{error}; there is none before it: start over with ARGS=--force") from error
        state = load_checkpoint(previous)
        log.warning("%s; the one before it is used, %s", error, previous)
    if last.exists():  # it must not become the one before
        last.replace(last.with_name("last-damaged.pt"))
    return state


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Gives the trainer what state_of took."""
    net = trainer.net
    net.load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"])
    trainer.ema.updates = state["ema_updates"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    for stabiliser, its_state in zip(trainer.stabilisers, state["stabilisers"], strict=True):
        stabiliser.load_state_dict(its_state)
    net.criterion = criterion_after(state["criterion_updates"], net, trainer.ranks)
    trainer.best_fitness, trainer.best_epoch, trainer.rows = state["best_fitness"], state["best_epoch"], state["rows"]
    trainer.codes_before, trainer.faults = state["codes_before"], state.get("faults", [])
    trainer.scored, trainer.accumulate, trainer.last_step = state["scored"], state["accumulate"], state["last_step"]
    trainer.loss_names, trainer.batch_in_epoch = tuple(state["loss_names"]), state["batch_in_epoch"]
    trainer.loss_sum = state["loss_sum"]
    if isinstance(trainer.loss_sum, torch.Tensor):  # else 0.0: no batch of this epoch has been trained, or all left out
        trainer.loss_sum = trainer.loss_sum.to(trainer.device)
    zero = torch.zeros((), device=trainer.device)  # what validation counts from, where no step comes before it
    trainer.loss_items = dict.fromkeys(trainer.loss_names, zero)
    trainer.epoch = state["epoch"]
    trainer.start_epoch = state["epoch"] + (trainer.batch_in_epoch == 0)
