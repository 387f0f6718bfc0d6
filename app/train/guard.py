"""Watches the rows of a training for the two ways in which trainings went wrong before: collapse and divergence."""

from __future__ import annotations

import itertools
import logging

from app.core.config import Guard
from app.core.results import SCORED, SCORED_AP, VAL_LOSS, Rows, candidates, column, train_loss

log = logging.getLogger(__name__)


class GuardStop(Exception):
    """The guard has ended a training whose state is saved; the message says what it saw and how to go on."""


def judge(rows: Rows, guard: Guard) -> None:
    """Looks at the validated epochs after a quant warm-up; warns or stops as guard.collapse and guard.divergence say.

    Collapse: the scored AP has been below guard.share of its best for guard.n_validations validations in a row.
    Divergence: over as many validations the validation loss has risen each time while the train loss has fallen.

    Raises:
        GuardStop: with 'stop'.
    """
    validated = candidates(rows)
    if len(validated) <= guard.n_validations or validated[-1] is not rows[-1]:
        return
    aps = [row[SCORED_AP] for row in validated]
    best, last = max(aps), aps[-guard.n_validations :]
    if max(last) < guard.share * best:
        finding = (
            f"collapse: the scored AP was below {guard.share:.0%} of its best ({best:.3f}) in {len(last)} validations, "
            f"{last[-1]:.3f} at the last"
        )
        _act(guard.collapse, finding, "collapse")
    pairs = list(itertools.pairwise(validated[-guard.n_validations - 1 :]))
    loss = column(VAL_LOSS, SCORED)
    val_loss_rises = all(after[loss] > before[loss] for before, after in pairs)
    if val_loss_rises and all(train_loss(after) < train_loss(before) for before, after in pairs):
        finding = f"divergence: for {len(pairs)} validations the validation loss rose while the train loss fell"
        _act(guard.divergence, finding, "divergence")


def _act(action: str, finding: str, key: str) -> None:
    if action == "warn":
        log.warning("guard: %s", finding)
    if action == "stop":
        raise GuardStop(f"guard: {finding}; everything is saved; --set guard.{key}=warn goes on from here")
