"""The guard sees a collapse and a divergence, and does what its settings say."""

from __future__ import annotations

import logging

import pytest

from app.core.config import Guard
from app.train.guard import GuardStop, judge

HEALTHY = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]


def guard(action: str) -> Guard:
    values = {"collapse": action, "share": 0.5, "divergence": action, "n_validations": 3, "max_rollbacks": 0}
    return Guard.model_validate(values)


def rows(aps: list[float], val: list[float] | None = None, train: list[float] | None = None) -> list[dict[str, float]]:
    """Validated epochs; without losses the train loss rises, so that nothing diverges."""
    n = len(aps)
    losses = zip(val or [1.0] * n, train or range(n), strict=True)
    return [
        {"epoch": i + 1, "train/box_loss": of_train, "val_loss/ema_bn": of_val, "AP/ema_bn": ap}
        for i, (ap, (of_val, of_train)) in enumerate(zip(aps, losses, strict=True))
    ]


@pytest.mark.parametrize(
    ("aps", "stops"),
    [
        (HEALTHY, False),
        ([0.1, 0.4, 0.19, 0.19, 0.19], True),
        ([0.1, 0.4, 0.19, 0.19], False),  # two in a row are not three
        ([0.1, 0.4, 0.19, 0.21, 0.19, 0.19], False),
        ([0.1, 0.4, 0.2, 0.2, 0.2], False),  # exactly the share
        ([0.0] * 6, False),
    ],
)
def test_collapse(aps: list[float], stops: bool) -> None:
    if not stops:
        judge(rows(aps), guard("stop"))
        return
    with pytest.raises(GuardStop, match=r"collapse: .* below 50% of its best \(0\.400\) in 3 .*guard\.collapse=warn"):
        judge(rows(aps), guard("stop"))


@pytest.mark.parametrize(
    ("val", "train", "stops"),
    [
        ([5, 4, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4], True),
        ([5, 4, 3, 4, 5, 6], [9, 8, 7, 6, 7, 4], False),
        ([5, 4, 3, 4, 3, 6], [9, 8, 7, 6, 5, 4], False),
    ],
)
def test_divergence(val: list[float], train: list[float], stops: bool) -> None:
    if not stops:
        judge(rows(HEALTHY, val, train), guard("stop"))
        return
    with pytest.raises(GuardStop, match=r"divergence: for 3 validations .*guard\.divergence=warn"):
        judge(rows(HEALTHY, val, train), guard("stop"))


@pytest.mark.parametrize(("action", "n_lines"), [("warn", 1), ("off", 0)])
def test_without_stopping(action: str, n_lines: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judge(rows([0.1, 0.4, 0.1, 0.1, 0.1]), guard(action))
    assert len(caplog.records) == n_lines


def test_an_epoch_without_validation_is_not_judged() -> None:
    judge([*rows([0.1, 0.4, 0.1, 0.1, 0.1]), {"epoch": 6, "train/box_loss": 1.0}], guard("stop"))


def test_the_quant_warm_up_is_no_best_to_fall_from() -> None:
    collapsed = rows([0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1])
    warm = [row | {"quant/warm_up": 1} for row in collapsed[:2]]
    judge([*warm, *collapsed[2:]], guard("stop"))
    with pytest.raises(GuardStop):
        judge(collapsed, guard("stop"))
