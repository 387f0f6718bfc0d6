"""The progress line: what it shows at every width, worked by hand."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from app.core import progress
from app.core.progress import COUNT, LOSS, MEMORY, NAME, RATE, AboveBars, Meter, Segment, clock, fitted, line_format

FP16 = Segment("fp16 epoch 3/10", NAME, "fp16 3/10")
LONG = Segment("qat-w4a16-mixed epoch 123/300", NAME, "qat-w4a16-mixed 123/300")


def segments(count: str, rate: str, left: str, job: str, memory: str) -> list[Segment]:
    return [
        Segment(count, COUNT), Segment(rate, RATE), Segment(left), Segment(job), Segment(memory, MEMORY),
        Segment("loss 3.142", LOSS),
    ]  # fmt: skip


SMOKE = segments("144/320", "14.2 images/s", "0:12 left", "job 2:10", "2.1 GiB")
FULL = segments("45,000/118,287", "372 images/s", "12:05 left", "training 1 d 3 h", "12.3 GiB")


@pytest.mark.parametrize(
    ("name", "of", "width", "shown"),
    [
        (FP16, SMOKE, 119, "fp16 epoch 3/10 {bar} 144/320, 14.2 images/s, 0:12 left, job 2:10, 2.1 GiB, loss 3.142"),
        (FP16, SMOKE, 87, "fp16 epoch 3/10: 144/320, 14.2 images/s, 0:12 left, job 2:10, 2.1 GiB, loss 3.142"),
        (FP16, SMOKE, 79, "fp16 epoch 3/10: 14.2 images/s, 0:12 left, job 2:10, 2.1 GiB, loss 3.142"),
        (FP16, SMOKE, 71, "fp16 epoch 3/10: 14.2 images/s, 0:12 left, job 2:10, 2.1 GiB"),
        (FP16, SMOKE, 50, "fp16 3/10: 14.2 images/s, 0:12 left, job 2:10"),
        (FP16, SMOKE, 39, "fp16 3/10: 0:12 left, job 2:10"),
        (LONG, FULL, 79, "qat-w4a16-mixed 123/300: 372 images/s, 12:05 left, training 1 d 3 h, 12.3 GiB"),
    ],
)
def test_what_does_not_fit_goes_bar_first(name: Segment, of: list[Segment], width: int, shown: str) -> None:
    assert line_format(name, of, width) == shown


def test_a_bar_needs_ten_columns() -> None:
    """Beside the name of 15, the segments of 64 and two blanks."""
    assert "{bar}" in line_format(FP16, SMOKE, 81 + 10)
    assert "{bar}" not in line_format(FP16, SMOKE, 81 + 9)


def test_numbers_that_matter_are_on_a_terminal_of_80_columns() -> None:
    for name, of in ((FP16, SMOKE), (LONG, FULL)):
        head, tail = fitted(name, of, 79)
        assert len(f"{head}: {tail}") <= 79
        assert all(segment.text in tail for segment in of if segment.rank <= MEMORY)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_braces_of_a_name_are_no_format(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    logging.getLogger("app").setLevel(logging.INFO)
    meter = Meter("checking {0}", 4, "files")
    meter.update(2)
    meter.close()
    shown = re.split("[\r\n]", terminal.getvalue())
    assert any(line.startswith("checking {0} ") and "2/4, " in line for line in shown), shown
    assert max(map(len, shown)) <= 80


def test_a_log_record_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress line is blanked first: a carriage return and blanks, and drawn again below."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    logging.getLogger("app").setLevel(logging.INFO)
    meter = Meter("fp16 epoch 3/10", 4)
    AboveBars(terminal).emit(logging.makeLogRecord({"msg": "stopping"}))
    before, after = terminal.getvalue().split("stopping\n")
    meter.close()
    assert re.search(r"fp16 epoch 3/10 *\r +\r$", before), before
    assert after.strip() == "fp16 epoch 3/10"


def test_a_log_line_has_80_columns_at_most(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    meter = Meter("qat-w4a16-mixed epoch 123/300", 118_287, short="qat-w4a16-mixed 123/300")
    monkeypatch.setattr(Meter, "seconds", 100.0)
    with caplog.at_level(logging.INFO):
        meter.update(45_000, lambda: FULL[3:])
    assert caplog.messages == ["qat-w4a16-mixed 123/300: 450 images/s, 2:43 left, training 1 d 3 h, 12.3 GiB"]
    assert len(caplog.messages[0]) <= 80


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.6, "1:00"), (3599, "59:59"), (86_399, "23:59:59"), (86_400 * 3 + 4 * 3600, "3 d 4 h")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
