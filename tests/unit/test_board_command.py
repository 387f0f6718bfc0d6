"""TensorBoard over all runs: what it prints, how it ends, and a port that is taken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from app.core.environment import REPO_DIR

TOLD_PORT = 7
TIMEOUT_S = 120  # a guard against hangs: it starts within 3 s


def start(folder: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "app.train.board", "--port", str(port)]
    env = os.environ | {"PYTHONPATH": str(REPO_DIR), "TMPDIR": str(folder)}
    return subprocess.Popen(
        [*command, "--told-port", str(TOLD_PORT)], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_it_says_its_address_and_nothing_else_and_leaves_nothing_behind(tmp_path: Path, port: int) -> None:
    board = start(tmp_path, port)
    try:
        assert board.stderr is not None
        assert board.stderr.readline() == f"http://localhost:{TOLD_PORT}\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=TIMEOUT_S) as answer:
            assert answer.status == 200
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGTERM,
        ):  # make, a terminal and an engine may all send one
            board.send_signal(number)
        rest = board.communicate(timeout=TIMEOUT_S)
    finally:
        board.kill()
    assert board.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert rest == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, port: int) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        board = start(tmp_path, port)
        said = board.communicate(timeout=TIMEOUT_S)
    assert board.returncode == 2
    remedy = f"make tensorboard TENSORBOARD_PORT={port + 1} takes another"
    assert said == ("", f"error: TensorBoard could not bind to port {port}, it was already in use: {remedy}\n")
