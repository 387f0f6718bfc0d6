"""The stability bench's table: equal epochs are compared, and what is not there yet is a dash."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from app.bench.stability import ARMS, at, lowest_share, root_of, share_of_fp16, show
from app.config import load
from app.curves import STATES
from app.run import RunRoot


def row(arm: str, seed: int, curve: dict[int, float]) -> dict[str, Any]:
    """A training whose three states have the same AP, by epoch."""
    aps = list(curve.values())
    return {
        "arm": arm, "seed": seed, "epochs": max(curve), "of_epochs": 120, "epoch": list(curve),
        "AP": dict.fromkeys(STATES, aps), "lowest_share_of_best": dict.fromkeys(STATES, lowest_share(aps)),
        "val_loss": [7 - ap for ap in aps],
    }  # fmt: skip


def test_every_arm_can_be_configured_and_has_a_folder_of_its_own(tmp_path: Any) -> None:
    roots = {root_of(RunRoot(tmp_path, "stability"), arm, 0).root for arm in ARMS}
    assert len(roots) == len(ARMS)
    for variant, sets in ARMS.values():
        assert load(variant, [], sets).variant == variant


def test_the_share_compares_the_last_epoch_that_all_have() -> None:
    fp16 = [row("fp16", 0, {6: 0.1, 12: 0.2, 18: 0.4}), row("fp16", 1, {6: 0.1, 12: 0.2})]
    assert share_of_fp16([row("w4a16", 0, {6: 0.05, 12: 0.15, 18: 0.4})], fp16) == "0.750 at 12"


def test_no_share_before_the_first_validation_that_counts() -> None:
    """After a warm-up of two thirds that is late."""
    warm = row("8-bit warm-up", 0, {84: 0.2, 120: 0.3})
    assert share_of_fp16([warm], [row("fp16", 0, {6: 0.1, 36: 0.2})]) == "-"
    assert at(warm, warm["AP"]["ema_bn"], 90) == 0.2


def test_table(caplog: pytest.LogCaptureFixture) -> None:
    fell = row("w4a16", 0, {6: 0.1, 12: 0.2, 18: 0.4, 24: 0.2})
    with caplog.at_level(logging.INFO):
        show([row("fp16", 0, {6: 0.1, 12: 0.2}), row("fp16", 1, {6: 0.1, 12: 0.4}), fell])
    _, _, fp16, w4a16 = ([cell.strip() for cell in line.strip("| ").split("|")] for line in caplog.messages)
    assert fp16[:4] == ["fp16", "2", "12", "0.3000 ± 0.1000"]
    assert fp16[7:] == ["6.7000 ± 0.1000", "-", "-", "-"]  # two validations only: the running best does not count yet
    assert w4a16[6:] == ["0.667 at 12", "6.8000", "0.50", "0.50", "0.50"]
