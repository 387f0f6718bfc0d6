"""last.pt: everything that the next step of a training depends on, written and taken up again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from app.model import load_checkpoint, save_checkpoint, scored_state

if TYPE_CHECKING:
    from app.trainer import Trainer

log = logging.getLogger(__name__)


def save_state(trainer: Trainer) -> None:
    """Writes last.pt: the state after the last optimizer step, and the last scored state."""
    save_checkpoint(trainer.last, trainer.config, state_of(trainer))


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
        "accumulate": trainer.accumulate, "codes_before": trainer.codes_before,
    }  # fmt: skip


def continue_from_checkpoint(trainer: Trainer) -> None:
    """Takes up the state of last.pt, if there is one: at the next step, or the next epoch."""
    if not trainer.last.exists():
        return
    state = load_checkpoint(trainer.last)
    restore(trainer, state)
    n_batches = trainer.batch_in_epoch
    where = f", batch {n_batches} of the next" if n_batches else ""
    log.info(
        "train %s: continues after epoch %d%s of %d", trainer.config.label, trainer.start_epoch, where, trainer.epochs
    )


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
    net.criterion = net.init_criterion()
    net.criterion.updates = state["criterion_updates"] - 1
    net.criterion.update()
    trainer.best_fitness, trainer.best_epoch, trainer.rows = state["best_fitness"], state["best_epoch"], state["rows"]
    trainer.codes_before = state["codes_before"]
    trainer.scored, trainer.accumulate, trainer.last_step = state["scored"], state["accumulate"], state["last_step"]
    trainer.loss_names, trainer.batch_in_epoch = tuple(state["loss_names"]), state["batch_in_epoch"]
    if trainer.batch_in_epoch:
        trainer.loss_sum = state["loss_sum"].to(trainer.device)
        trainer.loss_items = dict(zip(trainer.loss_names, trainer.loss_sum, strict=True))
    trainer.start_epoch = state["epoch"] + (trainer.batch_in_epoch == 0)
