"""The way back to the last good state after a loss or gradient that is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from app.quant.model import load_checkpoint, save_checkpoint, scored_state
from app.train.checkpoint import restore, save_state
from app.train.guard import GuardStop
from app.train.nonfinite import NO_CAUSE, NonFinite, describe, first_cause, to_keep
from app.train.processes import ALONE
from app.train.step import criterion_after

if TYPE_CHECKING:
    from app.train.trainer import Trainer


log = logging.getLogger(__name__)


def roll_back(trainer: Trainer, fault: NonFinite) -> None:
    """Takes up last.pt again, from where training goes on without the batches of the fault.

    Everything else keeps its place: order and augmentation of the other batches, and the schedule, follow from their
    numbers. The left-out batches are part of last.pt, so a resumed training leaves out the same ones.

    Raises:
        GuardStop: guard.max_rollbacks is used up; last.pt holds the last good state.
    """
    ranks, numbers = trainer.ranks, [number for number, _ in fault.batches]
    where, cause = find_cause(trainer, fault)
    text = f"{fault} at {where}"
    part = "" if ranks.is_first else f"-of-process-{ranks.rank + 1}"
    path = trainer.save_dir / "faults" / f"batch-{numbers[0]}{part}.pt"
    entries = {
        "what": fault.what,
        "cause": cause,
        "batches": to_keep(fault.batches),
        "model": scored_state(trainer.net),
    }
    save_checkpoint(path, trainer.config, entries)
    faults = [*trainer.faults, {"batches": numbers, "what": fault.what, "cause": cause}]
    restore(trainer, load_checkpoint(trainer.last))
    ranks.wait()  # all have read it
    trainer.faults = faults
    trainer.optimizer.zero_grad()
    trainer.watch.clear()
    save_state(trainer)
    most = trainer.config.guard.max_rollbacks
    text = f"guard: {text}, first in: {cause}; kept for study in {path}"
    if len(faults) > most:
        raise GuardStop(
            f"{text}; {most} rollbacks (guard.max_rollbacks) are used up and last.pt holds the last good state: "
            "look at the batch, or lower hyp.lr0 in a new run"
        )
    log.warning("%s; back to the last good state, on without this batch (rollback %d of %d)", text, len(faults), most)


def find_cause(trainer: Trainer, fault: NonFinite) -> tuple[str, str]:
    """Where in the data and where in the network: of the first process whose part of the batches shows it again."""
    trainer.net.criterion = criterion_after(trainer.net.criterion.updates, trainer.net, ALONE)
    found = (describe(fault.batches, len(trainer.train_loader)), first_cause(trainer, fault.batches))
    of_all = trainer.ranks.gather(found)
    return next((pair for pair in of_all if pair[1] != NO_CAUSE), found)
