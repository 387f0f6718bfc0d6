"""Kernels without a GPU: Triton is told to interpret them before it is imported, so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from app.core.environment import REPO_DIR


def run_script(script: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as a process of its own, with these variables; its kernels are compiled."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**own, "PYTHONPATH": str(REPO_DIR), **environ}
    return subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)


def run_in_interpreter(script: str | Path) -> subprocess.CompletedProcess[str]:
    """As run_script; kernels are interpreted."""
    return run_script(script, TRITON_INTERPRET="1")
