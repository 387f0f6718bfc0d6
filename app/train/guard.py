"""Watches a training's rows for the two ways in which it went wrong before: collapse and divergence."""

from __future__ import annotations

import itertools
import logging

from app.core.config import Guard
from app.core.results import candidates

log = logging.getLogger(__name__)


class GuardStop(Exception):
    """The guard has ended a training whose state is saved; the message says what it saw and how to go on."""


def judge(rows: list[dict[str, float]], guard: Guard) -> None:
    """Looks at the validated epochs after a quant warm-up; warns or stops as guard.collapse and guard.divergence say.

    Collapse: the scored AP has been below guard.share of its best for guard.n_validations validations in a row.
    Divergence: over as many validations the validation loss has risen each time while the train loss has fallen.

    Raises:
        GuardStop: with 'stop'.
    """
    validated = candidates(rows)
    last = validated[-guard.n_validations :]
    if not validated or len(validated) <= guard.n_validations or validated[-1] is not rows[-1]:
        return
    best = max(row["AP/ema_bn"] for row in validated)
    if all(row["AP/ema_bn"] < guard.share * best for row in last):
        _act(
            guard.collapse,
            f"collapse: the scored AP was below {guard.share:.0%} of its best ({best:.3f}) in {len(last)} validations, "
            f"{last[-1]['AP/ema_bn']:.3f} at the last",
            "collapse",
        )
    window = validated[-guard.n_validations - 1 :]
    pairs = list(itertools.pairwise(window))
    rises = all(b["val_loss/ema_bn"] > a["val_loss/ema_bn"] for a, b in pairs)
    if rises and all(_train_loss(b) < _train_loss(a) for a, b in pairs):
        _act(
            guard.divergence,
            f"divergence: for {len(pairs)} validations the validation loss rose while the train loss fell",
            "divergence",
        )


def _train_loss(row: dict[str, float]) -> float:
    return sum(value for name, value in row.items() if name.startswith("train/"))


def _act(action: str, finding: str, key: str) -> None:
    if action == "warn":
        log.warning("guard: %s", finding)
    if action == "stop":
        raise GuardStop(f"guard: {finding}; everything is saved; --set guard.{key}=warn goes on from here")
