"""bench loader: its table by hand, and a run on drawn images."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from app.bench.loader import ON_GPU, OURS, STOCK, Turn, bench_loader, table
from app.core.files import read_json
from app.core.run import RunRoot
from tests.support.settle import sets_of


def test_ratios_are_those_of_turns_and_a_core_gives_the_inverse_of_the_time() -> None:
    turns = {
        STOCK: [Turn(2.0, 9.0), Turn(4.0, 7.0), Turn(3.0, 8.0)],
        OURS: [Turn(1.0, 5.0), Turn(1.0, 6.0), Turn(1.8, 4.0)],
    }
    assert table(turns)[1:] == [
        [STOCK, "3.00", "2.00", "4.00", "1.00", "333", "8.0"],
        [OURS, "1.00", "1.00", "1.80", "0.50", "1000", "5.0"],
    ]


def test_three_loaders_are_measured_without_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app")
    run = RunRoot(tmp_path, "bench")
    bench_loader(run, [], sets_of({"data.n_train": 24, "data.n_val": 1, "train.batch": 2}), 1)
    result = read_json(run.root / "bench-loader.json", "bench")
    assert (result["imgsz"], result["batch"], result["cache"]) == (64, 2, False)
    assert list(result["turns"]) == [STOCK, OURS, ON_GPU]
    for turns in result["turns"].values():
        assert all(value > 0 for turn in turns for value in turn.values())
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" | ")[0].strip("| ") for line in lines[-3:]] == [STOCK, OURS, ON_GPU]
