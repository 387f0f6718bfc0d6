"""Command line of compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from app.core.command_line import not_empty


def compare_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("left", type=not_empty, help="runs/A, or a folder of it such as runs/A/baseline-coco")
    stage.add_argument("right", type=not_empty, help="runs/B, or runs/A/qat-w4a16-coco")
    stage.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="report.gallery_...=...")
