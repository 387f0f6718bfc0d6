"""python -m app.bench.every_second STAGE ...: a stage of app whose progress line is logged every second, and whole."""

from __future__ import annotations

import runpy

from app.core import progress

EVERY_S, WIDTH = 1.0, 1000  # as long as it may be: elsewhere a log line gives up its count first

if __name__ == "__main__":
    progress.LOG_EVERY_S, progress.LOG_WIDTH = EVERY_S, WIDTH
    runpy.run_module("app", run_name="__main__", alter_sys=True)
