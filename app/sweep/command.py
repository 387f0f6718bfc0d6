"""Command line of the sweep: python -m app sweep."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported when a stage runs: --help answers without it
    from app.core.run import RunRoot


def add_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--schemes", nargs="+", required=True, metavar="SCHEME", help="names or files, as quant.scheme")
    stage.add_argument("--seeds", nargs="+", type=int, required=True, metavar="N", help="train.seed: a run for each")
    stage.add_argument(
        "--force", action="store_true",
        help="start over what was trained with other settings; quantize, export and score all again",
    )  # fmt: skip
    stage.add_argument("--dry-run", action="store_true", help="only list what would run, with the hours of an estimate")


def run(args: argparse.Namespace, run: RunRoot) -> None:
    from app.sweep.plan import Order
    from app.sweep.sweep import dry_run, sweep

    order = Order(args.schemes, args.seeds, args.conf, args.set, args.yes, args.force)
    (dry_run if args.dry_run else sweep)(order, run)
