"""Command lines of report, publish and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from app.core.command_line import job_arguments, not_empty, run_arguments


def report_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage, None)  # beside --runs only a name that was given counts
    stage.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME",
        help="runs that differ only in seeds: means and spreads, on a page beside that of --run, or else of the first",
    )  # fmt: skip


def publish_arguments(stage: argparse.ArgumentParser) -> None:
    run_arguments(stage)
    stage.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="the page merged with these runs")
    stage.add_argument("--aim", help="for the log: what the run was to find out (default: what it compares)")
    stage.add_argument("--force", action="store_true", help="replace what was published; adds another entry")


def compare_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("left", type=not_empty, help="runs/A, or a folder of it such as runs/A/baseline-coco")
    stage.add_argument("right", type=not_empty, help="runs/B, or runs/A/qat-w4a16-coco")
    stage.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="report.gallery_...=...")
