"""The last step of a training with quant.correction_epochs: its best state, corrected in one epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import autocast

from app.curves import write_rows
from app.model import load_checkpoint, save_checkpoint, scored_state
from app.progress import track
from app.quant.correct import correct
from app.training.loader import train_loader
from app.training.loss import criterion_after
from app.training.ranks import ALONE
from app.training.validation import SCORES

if TYPE_CHECKING:
    from app.training.trainer import Trainer

log = logging.getLogger(__name__)


def correct_best(trainer: Trainer) -> None:
    """Corrects the state in best.pt on one epoch of train images (see app.quant.correct); replaces it if its AP is not
    lower. results.csv gets AP/corrected in its last row. Does nothing where the option is off or all is done.
    """
    quant = trainer.config.quant
    if quant is None or not quant.correction_epochs or "AP/corrected" in trainer.rows[-1]:
        return
    best = load_checkpoint(trainer.best)
    held_out: Any = deepcopy(trainer.ema.ema)
    trainer.held_out = held_out
    held_out.load_state_dict(best["scored"])
    held_out.criterion = criterion_after(trainer.net.criterion.updates, held_out, ALONE)

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with autocast(trainer.amp, device=trainer.device.type):
            return model(batch)[0].sum()

    correct(held_out, _one_epoch(trainer), loss_of, quant.correction_lr)
    scores = trainer.validator(trainer)
    ap = scores[SCORES["AP"]]
    is_better = ap >= best["fitness"]
    if is_better:
        save_checkpoint(trainer.best, trainer.config, {**best, "scored": scored_state(held_out), "fitness": ap})
    log.info("correction: AP %.3f -> %.3f, best.pt %s", best["fitness"], ap, "replaced" if is_better else "kept")
    trainer.rows[-1]["AP/corrected"] = ap
    write_rows(trainer.save_dir / "results.csv", trainer.rows)
    trainer.monitor.writer.add_scalar("AP/corrected", ap, trainer.epochs)
    trainer.save_model()


def _one_epoch(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """The epoch after the last one, augmented as the last one was; whole batches, whatever the number of processes."""
    trainer.train_loader.close()
    dataset, pin_memory = trainer.train_loader.dataset, trainer.device.type == "cuda"
    loader = train_loader(dataset, trainer.args.workers, pin_memory, start=(trainer.epochs, 0))
    for batch in track(loader, "correction", len(loader), "batches"):
        yield trainer.preprocess_batch(batch)
    loader.close()
