"""Writes and reads last.pt. Also starts a QAT training from a checkpoint of the FP16 training (quant.warmup_from)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from app.core.config import Config, UserError
from app.core.differences import WITHOUT_EFFECT, difference, shown
from app.core.files import keep
from app.core.results import WARM_UP, Rows, is_validated
from app.core.shapes import Count, Number, Shape, misfits
from app.quant.model import config_of, load_checkpoint, other_names, save_checkpoint
from app.quant.options import Stabiliser, WarmUp
from app.train.processes import Ranks
from app.train.state import State

log = logging.getLogger(__name__)
STATE_SHAPE: Shape = {
    "epoch": int, "batch_in_epoch": Count, "last_step": int, "accumulate": Count, "loss_names": list[str],
    "trained_s?": Number, "best_fitness": float | None, "best_epoch": Count, "rows": list[dict[str, float]],
    "faults": list[dict[str, Any]], "loss_sum": Any, "scored": dict[str, Any], "codes_before": Any,
    "model": dict[str, Any], "ema": dict[str, Any],
    "ema_updates": Count, "optimizer.state": dict[int, Any], "optimizer.param_groups": list[dict[str, Any]],
    "scaler": dict[str, Any], "names?": list[str], "criterion_updates": Count, "stabilisers": list[dict[str, Any]],
}  # fmt: skip


def previous_of(last: Path) -> Path:
    """Where the checkpoint before `last` lies."""
    return last.with_name("last-1.pt")


def start_of(last: Path) -> Path:
    """Where the state before the first step lies until there is `last`: a rollback reads it, and no later process."""
    return last.with_name("start.pt")


def newest_of(last: Path) -> Path:
    """The file that `save_state` wrote last."""
    return last if last.exists() else start_of(last)


def save_state(state: State, config: Config, last: Path) -> None:
    """Writes last.pt: the state after the last optimizer step, and the last scored state. Before the first step it is
    start.pt: a training that ends before that is not bound to its configuration.

    The checkpoint before is kept, and for good that of the end of every train.save_period-th epoch. The file is the
    same for any number of ranks, but for BatchNorm's statistics, which training does not read: they are rank 0's.
    """
    if state.last_step < 0 and not state.faults:
        save_checkpoint(start_of(last), config, state.state_dict())
        return
    save_checkpoint(last, config, state.state_dict(), previous_of(last))
    start_of(last).unlink(missing_ok=True)
    n_done, period = state.epoch + 1, config.train.save_period
    if period and n_done and n_done % period == 0 and state.batch_in_epoch == 0:
        keep(last, last.with_name(f"epoch{n_done}.pt"))


def read_in_turn(last: Path, ranks: Ranks) -> dict[str, Any] | None:
    """Content of the newest undamaged checkpoint, as `last_whole` gives it, on every rank.

    Rank 0 reads first, because it may rename a damaged file; the other ranks read after it. No rank goes on before all
    have read.
    """
    if not ranks.is_main:
        ranks.barrier()
    state = last_whole(last)
    if ranks.is_main:
        ranks.barrier()
    ranks.barrier()
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


def restore(state: State, saved: dict[str, Any], path: Path) -> None:
    """Gives a training the content of a checkpoint.

    Raises:
        UserError: they do not belong together; the checkpoint is damaged.
    """
    damaged = f"{path} does not fit this training, it is damaged: start over with ARGS=--force"
    if faults := misfits(saved, STATE_SHAPE):
        raise UserError(f"{damaged} ({'; '.join(faults)})")
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(damaged) from error


def resume_point(state: State) -> str:
    """The batch that a training with this state goes on with: 'epoch 3, batch 120', counted from 1."""
    batch = f", batch {state.batch_in_epoch + 1}" if state.batch_in_epoch else ""
    return f"epoch {state.next_epoch + 1}{batch}"


def log_resume(state: State, config: Config) -> None:
    """Says which epochs and batches are trained: all before `resume_point`."""
    batch = f", batch {state.batch_in_epoch} of the next" if state.batch_in_epoch else ""
    log.info("train %s: continues after epoch %d%s of %d", config.label, state.next_epoch, batch, config.train.epochs)


def state_from_fp16(state: State, config: Config) -> dict[str, Any] | None:
    """State dictionary for a QAT training that begins where the FP16 training stood which quant.warmup_from names.

    None where quant.warmup_from names no checkpoint. Weights, EMA, optimizer, GradScaler, schedule and the rows of
    results.csv go on; the best epoch and the options of `quant` begin anew.

    Raises:
        UserError: the checkpoint is missing, of another recipe or other classes, or of a later epoch than the warm-up's
            last.
    """
    path = config.warmup_from
    if path is None:
        return None
    source = load_checkpoint(path, STATE_SHAPE)
    check_warm_up(config, path, source)
    names = list(state.net.names.values())
    if fault := other_names(source.get("names", names), names):
        raise UserError(f"quant.warmup_from={path} has other classes than this run ({fault})")
    log.info("train %s: the first %d epochs are those of %s", config.label, source["epoch"] + 1, path)
    return {
        **source,
        "model": with_own_scales(state.net, source["model"]),
        "ema": with_own_scales(state.ema.ema, source["ema"]),
        "optimizer": optimizer_state(state.optimizer, source["optimizer"]),
        "stabilisers": [after_warm_up(stabiliser) for stabiliser in state.stabilisers],
        "rows": marked_as_warm_up(source["rows"]),
        "best_fitness": None,
        "best_epoch": 0,
    }


def check_warm_up(config: Config, path: Path, checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint that is not the end of an epoch of this training's own warm-up."""
    source, n_done = config_of(checkpoint, path), checkpoint["epoch"] + 1
    if source.variant != "fp16" or checkpoint["batch_in_epoch"]:
        raise UserError(f"quant.warmup_from={path} is not an epochN.pt of an FP16 training")
    if n_done > config.n_quant_warmup_epochs:
        share = config.quant.warmup_share if config.quant else 0
        raise UserError(
            f"quant.warmup_from={path} has {n_done} epochs, the warm-up {config.n_quant_warmup_epochs} "
            f"(quant.warmup_share={share} of {config.train.epochs})"
        )
    if differences := difference(source, config, ignore=(*WITHOUT_EFFECT, "variant", "quant")):
        raise UserError(f"quant.warmup_from={path} was trained with another recipe ({shown(differences)})")


def after_warm_up(stabiliser: Stabiliser) -> dict[str, Any]:
    """Its state after the warm-up's epochs. All options but WarmUp begin with the low bits."""
    return {"was_warm": True} if isinstance(stabiliser, WarmUp) else stabiliser.state_dict()


def marked_as_warm_up(rows: Rows) -> Rows:
    """Rows whose validated epochs are those of a quant warm-up."""
    return [row | {WARM_UP: 1} if is_validated(row) else row for row in rows]


def with_own_scales(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float weights in `state`, and the learned scales of `model`, which a float network has not."""
    return {**model.state_dict(), **state}


def optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """State of the float network's optimizer for one whose groups may end with more parameters, the learned scales.

    Those keep the state that `optimizer` begins with: fused SGD refuses a parameter without momentum beside others that
    have it.
    """
    own = optimizer.state_dict()
    moved: dict[int, Any] = dict(own["state"])
    groups: list[dict[str, Any]] = []
    for own_group, group in zip(own["param_groups"], state["param_groups"], strict=True):
        own_number = dict(zip(group["params"], own_group["params"], strict=False))
        for number in group["params"]:
            if number in state["state"]:
                moved[own_number[number]] = state["state"][number]
        groups.append({**group, "params": own_group["params"]})
    return {"state": moved, "param_groups": groups}
