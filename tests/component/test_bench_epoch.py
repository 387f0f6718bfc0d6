"""The bench of an epoch: each part is measured on a real training, and medians of its ends count."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.bench.epoch import N_STEPS, EpochCost, TimedLoop, bench_epoch
from app.core.run import RunRoot
from tests.support.settle import sets_of
from tests.support.tiny import tiny_network

N_VAL = 4
SETTINGS = {"data.n_train": 8, "data.n_val": N_VAL, "train.batch": 4}
# Seconds that each call of a part is said to take, in its order; N_ENDS of those of an epoch's end.
SAID: dict[str, list[float]] = {
    "step": [N_STEPS * 0.1], "ahead": [0.0], "loader": [N_STEPS * 0.05], "loop": [N_STEPS * 0.11],
    "score": [3 * N_VAL * seconds for seconds in (9.0, 0.2, 0.1, 0.7)],  # that of the first validation does not count
    "reestimate": [9.0, 2.0, 3.0, 1.0], "validate": [6.4, 5.2, 9.7], "examine": [0.3, 0.1, 0.2],
    "save": [0.6, 0.4, 0.5],
}  # fmt: skip


def test_an_epoch_is_made_of_the_medians_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    n_calls: Counter[str] = Counter()

    def timed(loop: TimedLoop, part: str, work: Callable[[], Any]) -> Any:
        result = work()
        loop.seconds.setdefault(part, []).append(SAID[part][n_calls[part] % len(SAID[part])])
        n_calls[part] += 1
        return result

    monkeypatch.setattr(TimedLoop, "timed", timed)
    run = RunRoot(tmp_path, "epoch")
    with tiny_network(), caplog.at_level(logging.INFO):
        bench_epoch(run, [], sets_of(SETTINGS))
    rows = json.loads((run.root / "bench-epoch.json").read_text())["rows"]
    assert n_calls == {part: 2 * len(seconds) for part, seconds in SAID.items()}
    for variant in ("fp16", "qat"):
        cost = EpochCost(**rows[variant])
        assert (cost.batch, cost.n_val) == (4, N_VAL)
        assert (cost.loader_s, cost.step_s, cost.loop_s) == pytest.approx((0.05, 0.1, 0.11))
        assert cost.score_s == pytest.approx(0.2)
        assert (cost.reestimate_s, cost.examine_s, cost.save_s) == (2.0, 0.2, 0.5)
        assert cost.copy_s == pytest.approx(1.0)  # of 6.4 - 2.4 - 2, 5.2 - 1.2 - 3, 9.7 - 8.4 - 1
        parts = cost.parts(n_train=10, n_val=6)
        assert list(parts.values()) == pytest.approx([3 * 0.11, 3 * 6 * 0.2, 2.0, 1.0, 0.2, 0.5])
    assert sum("all but the steps" in line for line in caplog.messages) == 2
