"""Command line of the schemes: python -m app schemes. Imports the network when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--scheme", metavar="FILE", help="list its layers: a scheme file, or the name of a built-in one")
    stage.add_argument("--model", help="e.g. yolov10n.yaml (default: that of conf/base.yaml)")
    stage.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Shows the scheme that `args.scheme` names layer by layer, or else all built-in schemes side by side."""
    from app.core.config import load
    from app.core.environment import isolate_libraries

    sets = [f"model={args.model}"] if args.model else []
    sets += [f"quant.scheme={args.scheme}"] if args.scheme else []
    config = load("qat", sets=sets)
    isolate_libraries(args.runs_dir / ".cache")
    from app.schemes.listing import list_layers, list_schemes

    if args.scheme and config.quant:
        list_layers(config, config.quant.scheme)
    else:
        list_schemes(config)
