"""A stage that is looked at: what its processes keep, what it trains, how it answers SIGTERM; numbers by hand."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.bench import observe as observe_module
from app.bench.every_second import WIDTH
from app.bench.observe import Look, Observed, counts, described, observe, rates, thirds
from app.core import progress
from app.core.config import UserError

MIB = 2**20
LINE = "fp16 epoch 2/300: 12,864/118,287, 741 images/s, 2:22 left, training 1 d 3 h, 22.1 GiB, loss 9.113"
# Two processes that it has started hold a file open and 60 MB each; it says what a training says, and ends after TERM.
PROGRAM = """
import os, signal, subprocess, sys, time
hold = "import sys, time; kept = bytearray(60_000_000); file = open(sys.executable); print(flush=True); time.sleep(60)"
children = [subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) for _ in range(2)]
for child in children:
    child.stdout.readline()
def end(*_):
    for child in children:
        child.kill()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
time.sleep(1.5)
done = 0
while True:
    done += 10
    print(f"fp16 epoch 1/1: {done:,}/99,999, 1 images/s", flush=True)
    time.sleep(0.02)
"""


def test_a_stage_is_stopped_after_its_first_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "PROGRAM", ["-c", PROGRAM])
    monkeypatch.setattr(observe_module, "EVERY_S", 0.1)
    observed = observe(["train"], tmp_path / "said" / "train.txt", stop_after_s=1.0)
    assert observed.code == 128 + signal.SIGTERM and observed.answer_s is not None
    assert observed.progress[0][1:] == (1, 10)
    at_work = [seconds for seconds, *_ in observed.progress]
    assert at_work[0] >= 1.5 and at_work[-1] - at_work[0] > 0.8, "the start does not count"
    assert [images for _, _, images in observed.progress] == list(range(10, 10 * len(observed.progress) + 1, 10))
    seen = [look for look in observed.looks if look.loader_files == [4, 4]]  # three streams, and a file of its own
    assert seen, observed.looks
    assert [60e6 < size < 120e6 for size in seen[0].loader_bytes] == [True, True]
    assert seen[0].main_bytes > MIB and seen[0].main_files == 5, "three streams and two pipes"


def test_a_stage_that_ends_before_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "PROGRAM", ["-c", f"print('{LINE}')"])
    observed = observe([], tmp_path / "said.txt", stop_after_s=0.0)
    assert (observed.code, observed.answer_s) == (0, None)


def test_a_stage_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "PROGRAM", ["-c", "import sys; print('error: no GPU'); sys.exit(2)"])
    with pytest.raises(UserError, match="'export' of this bench ended with exit code 2: error: no GPU"):
        observe(["export"], tmp_path / "said.txt")


def test_lines_of_a_training() -> None:
    said = f"train fp16: yolov10m, 118,287 images\n{LINE}\nfp16 epoch 2/300: loss 9.100, AP raw 0.001\n"
    assert list(counts(said)) == [(2, 12864)]


def test_the_line_of_a_meter_is_read_whole(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As long as the product's, and longer than the width that would cost its count."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    monkeypatch.setattr(progress, "LOG_WIDTH", WIDTH)
    meter = progress.Meter("fp16 epoch 1/300", 118_287, short="fp16 1/300")
    meter.update(12_800, lambda: [progress.Segment("training 1 d 3 h"), progress.Segment("x" * 60, progress.LOSS)])
    assert list(counts(caplog.text)) == [(1, 12_800)]


def test_a_stage_is_found_in_app() -> None:
    command = [sys.executable, "-m", "app.bench.every_second", "draw", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--n-train" in result.stdout


def test_images_per_second_are_those_within_an_epoch() -> None:
    lines = [(10.0, 1, 100), (12.0, 1, 300), (13.0, 1, 350), (20.0, 2, 40), (20.5, 2, 90)]
    assert rates(lines) == [100.0, 50.0, 100.0]


def test_thirds_are_medians() -> None:
    assert thirds([9.0, 1.0, 3.0, 5.0, 7.0, 6.0, 8.0]) == (5.0, 5.0, 7.0)  # of 9 1, 3 5 7 and 6 8
    assert thirds([1.0, 2.0]) is None


def test_what_is_described_is_the_time_in_which_it_trains() -> None:
    """Loaders that grow from 100 to 130 MiB while it trains; before and after that the main process is smaller."""
    looks = [Look(0.5, MIB, 3, [], []), Look(9.0, MIB, 3, [], [])]
    for second in range(1, 7):
        grown = (100 + 5 * second) * MIB
        looks.insert(second, Look(float(second), 900 * MIB, 40, [grown, 90 * MIB], [20, 21]))
    lines = [(float(second), 1, 64 * second) for second in range(1, 7)]
    gpu_use = [(0.5, 0.0), (2.0, 0.9), (3.0, 0.8), (4.0, 0.7), (9.0, 0.0)]
    facts = described(Observed(12.0, 143, 0.7, looks, gpu_use, lines))
    points = facts.pop("over_time")
    assert len(points) == 8
    middle = {"second": 2.0, "main_mib": 900, "loaders_mib": 200, "main_files": 40, "loader_files": 41, "images": 128}
    assert points[2] == middle
    assert facts == {
        "seconds": 12.0, "exit_code": 143, "answer_s": 0.7, "first_images_s": 1.0, "images": 384,
        "images_per_s": (64.0, 64.0, 64.0), "gpu_use": (0.9, 0.8, 0.7), "main_mib": (900.0, 900.0, 900.0),
        "n_loaders": 2, "largest_loader_mib": (107.5, 117.5, 127.5), "main_files": (40, 40, 40),
        "loader_files": (21, 21, 21),
    }  # fmt: skip
