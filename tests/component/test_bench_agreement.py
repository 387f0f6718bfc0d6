"""The agreement bench's trainings: one that fails ends the others, and the start has the dataset's classes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.bench import agreement
from app.bench.agreement import Trained, bench_agreement, run_together
from app.core.config import UserError
from app.core.files import write_json
from app.core.run import RunRoot
from tests.support.tiny import tiny_network


def test_the_first_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    def start(*args: Any, **more: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(*args, **more))
        return started[-1]

    monkeypatch.setattr(agreement, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    failing = [sys.executable, "-c", "import sys; sys.exit('no such GPU')"]
    with pytest.raises(UserError, match=r"the training 'kernels' .* exit code 1: no such GPU"):
        run_together({"kernels": failing, "graph": ["sleep", "60"]})
    assert [process.returncode for process in started] == [1, -signal.SIGTERM]


def test_weights_are_compared_with_a_start_of_the_datasets_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three classes: an output of 3 in the head."""
    run, starts = RunRoot(tmp_path, "agreement"), []

    def compare(variant: str, trained: dict[str, Trained], start: dict[str, Any]) -> list[Any]:
        starts.append({len(bias) for name, bias in start.items() if ".cv3." in name and name.endswith("2.bias")})
        return []

    data = {"names": ["a", "b", "c"], "splits": {"train": {"n_images": 4}}}
    monkeypatch.setattr(agreement, "prepare", lambda config, run, force: write_json(run.provenance, data))
    monkeypatch.setattr(agreement, "train_arms", lambda *_: {})
    monkeypatch.setattr(agreement, "compare", compare)
    with tiny_network():
        bench_agreement(run, [], [], ["fp16", "qat"], 1)
    assert starts == [{3}, {3}]
