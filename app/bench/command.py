"""Command line of the benches: python -m app bench WHAT. Imports a bench when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from app.core.command_line import count, seconds, seconds_or_0

if TYPE_CHECKING:  # --help answers without it
    from app.core.run import RunRoot

BENCHES = ("step", "train", "epoch", "loader", "agreement", "eval", "profile", "stability", "soak", "rehearsal")


def add_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("what", nargs="?", choices=BENCHES, default="step")
    stage.add_argument("--device", help="the same as --set train.device=...; cuda means GPU 0")
    stage.add_argument("--batch", type=count, nargs="+", default=[16, 32, 64], help="default: 16 32 64")
    stage.add_argument("--rounds", type=count, help="step, train, loader, eval: turns of an arm (default: 7, 2, 5, 3)")
    stage.add_argument("--steps", type=count, help="step: steps of a turn (default: 5); agreement: of a training (300)")
    stage.add_argument("--epochs", type=count, default=3, help="train: epochs of a turn (default: %(default)s)")
    stage.add_argument("--onnx", type=Path, help="eval: this file instead of the run's baseline")
    stage.add_argument("--images", type=count, help="eval: repeat images to so many; rehearsal: score so many")
    of_arms = "train, agreement, stability: some of its arms (stability: scheme files too); rehearsal: parts"
    stage.add_argument("--arms", nargs="+", help=of_arms)
    stage.add_argument("--seeds", type=int, nargs="+", help="stability (default: 0 1, and all of --with)")
    until_end = "stability: seconds until it saves and ends, 0 shows"
    stage.add_argument("--for-s", type=seconds_or_0, default=86400, help=until_end)
    stage.add_argument("--until", type=count, help="stability: show the arms as of this epoch (default: their last)")
    stage.add_argument("--with", dest="files", type=Path, nargs="+", default=[], help="stability: rows of other calls")
    stage.add_argument("--jobs", type=count, default=4, help="stability: trainings at a time (default: 4)")
    stage.add_argument("--kills", type=count, default=50, help="soak: kill -9 at random times (default: 50)")
    stage.add_argument("--seed", type=int, default=0, help="soak: of these times (default: 0)")
    stage.add_argument("--draw-s", type=seconds, default=60, help="rehearsal: seconds to draw in (default: 60)")
    stage.add_argument("--train-s", type=seconds, default=240, help="rehearsal: of training FP16 (default: 240)")
    stage.add_argument("--n-train", type=count, help="rehearsal: images to draw at most (default: COCO's 118,287)")
    stage.add_argument("--n-val", type=count, help="rehearsal: val images to draw (default: COCO's 5,000)")


def run(args: argparse.Namespace, run: RunRoot) -> None:
    """Runs the bench that `args.what` names."""
    sets = [*args.set, *([f"train.device={'0' if args.device == 'cuda' else args.device}"] if args.device else [])]
    match args.what:
        case "step":
            from app.bench.step import Sizes, bench_step

            bench_step(run, args.conf, sets, Sizes(args.batch, args.rounds or 7, args.steps or 5))
        case "train":
            from app.bench.train import ARMS, Turns, bench_train

            bench_train(run, args.conf, sets, Turns(args.rounds or 2, args.epochs, args.arms or list(ARMS)))
        case "epoch":
            from app.bench.epoch import bench_epoch

            bench_epoch(run, args.conf, sets)
        case "loader":
            from app.bench.loader import bench_loader

            bench_loader(run, args.conf, sets, args.rounds or 5)
        case "agreement":
            from app.bench.agreement import VARIANTS, bench_agreement

            bench_agreement(run, args.conf, sets, args.arms or list(VARIANTS), args.steps or 300)
        case "eval":
            from app.bench.eval import Amount, bench_eval

            bench_eval(run, args.conf, sets, args.onnx, Amount(args.rounds or 3, args.images))
        case "profile":
            from app.bench.profile import bench_profile

            bench_profile(run, args.conf, sets)
        case "stability":
            from app.bench.stability import ARMS, Plan, bench_stability
            from app.core.config import CONF_DIR

            overlays = [CONF_DIR / "stability.yaml", *args.conf]
            plan = Plan(args.arms or list(ARMS), args.seeds, args.for_s, args.jobs, args.until, tuple(args.files))
            bench_stability(run, overlays, sets, plan)
        case "rehearsal":
            from app.bench.rehearsal import PARTS, Plan, bench_rehearsal

            parts = tuple(args.arms or PARTS)
            plan = Plan(args.draw_s, args.train_s, args.n_train, args.n_val, args.images, parts)
            bench_rehearsal(run, args.conf, sets, plan)
        case "soak":
            from app.bench.soak import Plan, bench_soak
            from app.core.config import CONF_DIR

            bench_soak(run, [CONF_DIR / "soak.yaml", *args.conf], sets, Plan(args.kills, args.seed))
