"""Command line: python -m app STAGE. One process a stage; stages hand over files in the run root and nothing else."""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported when a stage runs: --help answers without them
    from app.config import Config
    from app.run import RunRoot

log = logging.getLogger("app")
STAGES = {
    "all": "the main job: data, train fp16, train qat, export, ptq, eval, report",
    "data": "check COCO, make the YOLO view beside the runs, choose a subset",
    "train": "train one variant from random weights; continues an unfinished training",
    "export": "trained checkpoints -> ONNX files, each checked against torch",
    "ptq": "the trained fp16 baseline, quantized without training -> checkpoints and ONNX files beside the others",
    "eval": "ONNX files -> COCO numbers and latency; with --onnx for any file that keeps the contract",
    "report": "JSON and CSV files of the run -> summary.md",
    "compare": "two runs or two scored folders -> compare.md: AP by class and size, images where they differ",
    "bench": "what a training step costs, how fast training and eval are, whether QAT is stable: side by side",
    "download-coco": "fetch the official COCO 2017 archives",
}


def main() -> int:
    """Runs one stage. Exit codes: 0 done, 1 a fault of ours, 2 a mistake of the user's."""
    args = parse(sys.argv[1:])
    set_up_terminal()
    from app.config import UserError
    from app.guard import GuardStop
    from app.interrupt import Interrupted

    try:
        run_stage(args)
    except UserError as error:
        log.error("error: %s", error)
        return 2
    except Interrupted as stop:
        log.error("stopped by %s, everything is saved: the same command goes on from here", stop)
        return 128 + stop.signal
    except GuardStop as stop:
        log.error("%s", stop)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted: the same command starts this stage again, or goes on from the last checkpoint")
        return 128 + signal.SIGINT
    return 0


def set_up_terminal() -> None:
    """Our own lines, and of the libraries only warnings; a training's log.txt has everything."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name.partition(".")[0] == "app" or record.levelno >= logging.WARNING)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    log.setLevel(logging.INFO)
    # Imported by Brevitas; without a GPU it warns that there is none, which is no news to whoever has none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text)
        if name == "download-coco":
            stage.add_argument(
                "--to", type=Path, default=Path("data/coco"), help="target folder (default: %(default)s)"
            )
            stage.add_argument("--keep-archives", action="store_true", help="leave the ZIP files there")
            continue
        if name == "compare":
            stage.add_argument("left", type=Path, help="runs/A, or a folder of it such as runs/A/baseline-coco")
            stage.add_argument("right", type=Path, help="runs/B, or runs/A/qat-w4a16-coco")
            stage.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
            stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="report.gallery_...=...")
            continue
        stage.add_argument("--run", default="full", help="name of the run, a folder under --runs-dir (default: full)")
        stage.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
        stage.add_argument("--conf", action="append", type=Path, default=[], help="YAML laid over conf/base.yaml")
        stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
        stage.add_argument("--force", action="store_true", help="do it again, overwriting the finished result")
        if name == "train":
            stage.add_argument("--variant", required=True, choices=("fp16", "qat"))
        if name == "bench":
            stage.add_argument(
                "what", nargs="?", choices=("step", "train", "eval", "profile", "stability"), default="step"
            )
            stage.add_argument("--device", help="the same as --set train.device=...; cuda means GPU 0")
            stage.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64], help="default: 16 32 64")
            stage.add_argument("--rounds", type=int, help="step, train, eval: turns of every arm (default: 7, 2, 3)")
            stage.add_argument("--steps", type=int, default=5, help="step: steps of a turn (default: %(default)s)")
            stage.add_argument("--epochs", type=int, default=3, help="train: epochs of a turn (default: %(default)s)")
            stage.add_argument("--onnx", type=Path, help="eval: this file instead of the run's baseline")
            stage.add_argument("--arms", nargs="+", help="stability: some of its arms (default: all)")
            stage.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="stability (default: 0 1)")
            stage.add_argument("--for-s", type=float, default=86400, help="stability: seconds until it saves and ends")
            stage.add_argument("--jobs", type=int, default=4, help="stability: trainings at a time (default: 4)")
        if name == "ptq":
            stage.add_argument("--scheme", help="the same as --set quant.scheme=...")
        if name == "eval":
            stage.add_argument("--onnx", type=Path, help="score this file instead of those of the run")
            stage.add_argument("--coco-dir", type=Path, help="with --onnx: COCO folder")
            stage.add_argument("--split", default="val2017", help="with --onnx (default: %(default)s)")
            stage.add_argument("--out", type=Path, help="with --onnx: folder for metrics.json and detections.json")
            stage.add_argument("--max-images", type=int, help="first N of a seeded order; labelled as a subset")
    return parser.parse_args(argv)


def run_stage(args: argparse.Namespace) -> None:
    """Loads configuration and stage, and runs it; heavy imports happen here."""
    if args.stage == "download-coco":
        from app.download import download_coco

        return download_coco(args.to, args.keep_archives)
    from app.config import load
    from app.run import isolate_libraries, open_run

    if args.stage == "compare":
        isolate_libraries(args.out.parent / ".cache")
        from app.compare import compare

        return compare(args.left, args.right, args.out, load("qat", sets=args.set).report)
    run = open_run(args.run, args.runs_dir)
    sets = [*args.set, *([f"eval.max_images={args.max_images}"] if args.stage == "eval" and args.max_images else [])]
    sets += [f"quant.scheme={args.scheme}"] if args.stage == "ptq" and args.scheme else []
    config = load(args.variant if args.stage == "train" else "qat", args.conf, sets)
    isolate_libraries(run.cache_dir)
    match args.stage:
        case "all":
            run_all(args)
        case "bench":
            run_bench(args, run)
        case "data":
            from app.data import prepare

            prepare(config, run, args.force)
        case "train":
            run_train(config, run, args.force)
        case "export":
            from app.export import export

            export(config, run, args.force)
        case "ptq":
            from app.ptq import ptq

            ptq(config, run, args.force)
        case "eval":
            run_eval(args, config, run)
        case "report":
            from app.report import report

            report(config, run, args.force)


def run_bench(args: argparse.Namespace, run: RunRoot) -> None:
    sets = [*args.set, *([f"train.device={'0' if args.device == 'cuda' else args.device}"] if args.device else [])]
    match args.what:
        case "step":
            from app.bench.step import Sizes, bench_step

            bench_step(run, args.conf, sets, Sizes(args.batch, args.rounds or 7, args.steps))
        case "train":
            from app.bench.train import Turns, bench_train

            bench_train(run, args.conf, sets, Turns(args.rounds or 2, args.epochs))
        case "eval":
            from app.bench.eval import bench_eval

            bench_eval(run, args.conf, sets, args.onnx, args.rounds or 3)
        case "profile":
            from app.bench.profile import bench_profile

            bench_profile(run, args.conf, sets)
        case "stability":
            from app.bench.stability import ARMS, Plan, bench_stability
            from app.config import CONF_DIR

            overlays = [CONF_DIR / "stability.yaml", *args.conf]
            bench_stability(run, overlays, sets, Plan(args.arms or list(ARMS), args.seeds, args.for_s, args.jobs))


def run_train(config: Config, run: RunRoot, force: bool) -> None:
    """Training makes its dataset ready by itself, so that `make train-qat` is enough on a fresh clone."""
    from app.data import prepare

    prepare(config, run, force=False)
    from app.train import train

    train(config, run, force)


def run_eval(args: argparse.Namespace, config: Config, run: RunRoot) -> None:
    from app.config import UserError
    from app.evaluate import evaluate, evaluate_standalone

    if args.onnx is None:
        return evaluate(config, run, args.force)
    if args.coco_dir is None or args.out is None:
        raise UserError("eval --onnx FILE also needs --coco-dir PATH and --out DIR")
    evaluate_standalone(config, args.onnx, args.coco_dir, args.split, args.out)


def run_all(args: argparse.Namespace) -> None:
    """Every stage in a process of its own; the first that fails ends the job with its exit code."""
    common = ["--run", args.run, "--runs-dir", str(args.runs_dir)]
    common += [part for file in args.conf for part in ("--conf", str(file))]
    common += [part for item in args.set for part in ("--set", item)]
    common += ["--force"] if args.force else []
    variants = [["train", "--variant", variant] for variant in ("fp16", "qat")]
    for stage in (["data"], *variants, ["export"], ["ptq"], ["eval"], ["report"]):
        code = run_process([sys.executable, "-m", "app", *stage, *common])
        if code:
            sys.exit(code)


def run_process(command: list[str]) -> int:
    """Runs a stage to its end; signals are passed on to it, once each, and it decides what to save.

    Returns:
        its exit code; 128 + signal where it was killed.
    """
    child = subprocess.Popen(command, start_new_session=True)  # else a terminal's Ctrl-C would reach it a second time
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        passed = signal.SIGTERM if number == signal.SIGHUP else number
        signal.signal(number, lambda *_, passed=passed: child.send_signal(passed))
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
