"""The launcher of several ranks, with stand-ins for them: what it does with signals, and with a rank that fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.train import processes
from app.train.processes import _exit_code, launch

LIMIT_S, SAVE_S = 0.2, 2.0  # of the launcher, patched; of a rank that saves
# A signal is answered as a training answers it: the first one saves, a second one ends the process at once.
RANK = f"""
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
signals = []

def save(number, frame):
    signals.append(number)
    (folder / f"signal-{{rank}}-{{len(signals)}}").touch()
    if len(signals) == 2:
        os._exit(128 + number)
    time.sleep({SAVE_S})
    (folder / f"saved-{{rank}}").touch()
    os._exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
(folder / f"ready-{{rank}}").touch()
time.sleep(60)
"""
FAILING = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    sys.exit(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda code: monkeypatch.setattr(processes, "PROGRAM", ["-c", code])


def wait_for(is_there: Callable[[], bool]) -> None:
    while not is_there():
        time.sleep(0.01)


def launched_with_signals(folder: Path, numbers: list[signal.Signals]) -> int:
    """Exit code of a launcher of two ranks that gets these signals, one after the other."""
    handler = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        wait_for(lambda: len(list(folder.glob("ready-*"))) == 2 and signal.getsignal(signal.SIGTERM) != handler)
        for count, number in enumerate(numbers, 1):
            os.kill(os.getpid(), number)
            wait_for(lambda count=count: len(list(folder.glob(f"signal-*-{count}"))) == 2)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    code = launch(2, [str(folder)])
    sender.join()
    assert signal.getsignal(signal.SIGTERM) == handler
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ranks_save_however_long_that_takes(
    tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stand_in(RANK)
    monkeypatch.setattr(processes, "STOP_S", LIMIT_S)
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    assert launched_with_signals(tmp_path, [number]) == 128 + passed
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert not list(tmp_path.glob("signal-*-2"))


def test_a_second_signal_ends_them_at_once(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in(RANK)
    assert launched_with_signals(tmp_path, [signal.SIGINT, signal.SIGINT]) == 128 + signal.SIGINT
    assert not list(tmp_path.glob("saved-*"))


def test_a_rank_that_goes_on_after_another_has_failed_is_killed(
    stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(FAILING)
    monkeypatch.setattr(processes, "PEERS_S", LIMIT_S)
    monkeypatch.setattr(processes, "STOP_S", LIMIT_S)
    assert launch(2, []) == 2
    assert not caplog.records, "the launcher has killed it, and not the kernel"


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([1, 2], 2), ([143, 1], 143), ([-15, 1], 143), ([-2, -2], 130), ([0, 1], 1)]
)
def test_the_exit_code_is_that_of_the_rank_that_failed(codes: list[int], code: int) -> None:
    assert _exit_code(codes) == code


def test_a_rank_that_a_signal_killed_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert _exit_code([1, -9]) == 1
    assert "process 2 of 2 was killed by SIGKILL (short of memory?), the others were stopped" in caplog.text
