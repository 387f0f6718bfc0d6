"""Command line of the sensitivity: python -m app sensitivity. Imports the network when it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from app.core.command_line import job_arguments

if TYPE_CHECKING:  # --help answers without them
    from app.core.config import Config
    from app.core.run import RunRoot


def add_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    budget = stage.add_mutually_exclusive_group()
    same = "or same-as:SCHEME"
    budget.add_argument("--budget", metavar="SIZE", help=f"propose a scheme: bytes in the INT4 file, 3.0MB, {same}")
    budget.add_argument("--budget-bits", metavar="BITS", help=f"propose a scheme: mean bits a weight, 4.3, {same}")
    stage.add_argument(
        "--images", dest="set", action="append", type="sensitivity.images={}".format, metavar="N",
        help="val images to measure on",
    )  # fmt: skip


def run(args: argparse.Namespace, config: Config, run: RunRoot) -> None:
    from app.sensitivity.sensitivity import sensitivity

    kind = "--budget" if args.budget else "--budget-bits"
    text = args.budget or args.budget_bits
    sensitivity(config, run, args.force, (kind, text) if text else None)
