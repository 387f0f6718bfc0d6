"""Watches the rows of a training for the two ways in which trainings went wrong before: collapse and divergence."""

from __future__ import annotations

import itertools
import logging

from app.core.config import Guard
from app.core.results import Rows, candidates, train_loss

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
    last = validated[-guard.n_validations :]
    best = max(row["AP/ema_bn"] for row in validated)
    if all(row["AP/ema_bn"] < guard.share * best for row in last):
        finding = (
            f"collapse: the scored AP was below {guard.share:.0%} of its best ({best:.3f}) in {len(last)} validations, "
            f"{last[-1]['AP/ema_bn']:.3f} at the last"
        )
        _act(guard.collapse, finding, "collapse")
    pairs = list(itertools.pairwise(validated[-guard.n_validations - 1 :]))
    val_loss_rises = all(after["val_loss/ema_bn"] > before["val_loss/ema_bn"] for before, after in pairs)
    if val_loss_rises and all(train_loss(after) < train_loss(before) for before, after in pairs):
        finding = f"divergence: for {len(pairs)} validations the validation loss rose while the train loss fell"
        _act(guard.divergence, finding, "divergence")


def _act(action: str, finding: str, key: str) -> None:
    if action == "warn":
        log.warning("guard: %s", finding)
    if action == "stop":
        raise GuardStop(f"guard: {finding}; everything is saved; --set guard.{key}=warn goes on from here")
