"""Command line: python -m app STAGE. One process a stage; stages hand over files in the run root and nothing else."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.bench.command import add_bench_arguments, run_bench

if TYPE_CHECKING:  # imported when a stage runs: --help answers without them
    from app.core.config import Config
    from app.core.run import RunRoot

log = logging.getLogger("app")
STAGES = {
    "all": "the main job: data, train fp16, train qat, export, ptq, eval, report",
    "data": "check COCO, make the YOLO view beside the runs, choose a subset",
    "train": "train one variant from random weights; continues an unfinished training",
    "export": "trained checkpoints -> ONNX files, each checked against torch",
    "ptq": "the trained fp16 baseline, quantized without training -> checkpoints and ONNX files beside the others",
    "eval": "ONNX files -> COCO numbers and latency; with --onnx for any file that keeps the contract",
    "report": "JSON and CSV files of the run -> summary.md; --runs merges runs with other seeds",
    "publish": "the report, without weights and photos, -> runs/reports/NAME, and an entry in runs/LOG.md",
    "compare": "two runs or two scored folders -> compare.md: AP by class and size, images where they differ",
    "bench": "what a training step costs, how fast training and eval are, whether QAT is stable: side by side",
    "download-coco": "fetch the official COCO 2017 archives",
}
FULL_DISK_REMEDY = "finished files and the last checkpoint are whole; make room, and the same command goes on"


def main() -> int:
    """Runs one stage. Exit codes: 0 done, 1 a fault of ours, 2 a mistake of the user's."""
    args = parse(sys.argv[1:])
    set_up_terminal()
    from app.core.config import UserError
    from app.train.guard import GuardStop
    from app.train.interrupt import Interrupted, PeerLost

    try:
        run_stage(args)
    except UserError as error:
        log.error("error: %s", error)
        return 2
    except Interrupted as stop:
        log.warning("stopped by %s, everything is saved: the same command goes on from here", stop)
        return 128 + stop.signal
    except GuardStop as stop:
        log.warning("%s", stop)
        return 1
    except PeerLost as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted: the same command starts this stage again, or goes on from the last checkpoint")
        return 128 + signal.SIGINT
    return 0


def set_up_terminal() -> None:
    """Our own lines, and of the libraries only warnings; a training's log.txt has everything.

    Of the processes of one training the first speaks for all; the others only say what went wrong with them.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name.partition(".")[0] == "app" or record.levelno >= logging.WARNING)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format=f"process {rank + 1}: %(message)s" if rank else "%(message)s", handlers=[handler])
    logging.raiseExceptions = False  # a full disk is reported once, by the file that matters, not by every log record
    log.setLevel(logging.ERROR if rank else logging.INFO)
    if rank:
        handler.setLevel(logging.ERROR)
        logging.captureWarnings(True)
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
        default = None if name == "report" else "full"  # beside --runs only a name that was given counts
        stage.add_argument("--run", default=default, help="name of the run, a folder under --runs-dir (default: full)")
        stage.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
        if name == "publish":
            stage.add_argument("--aim", help="for the log: what the run was to find out (default: what it compares)")
            stage.add_argument("--force", action="store_true", help="replace what was published; adds another entry")
            continue
        stage.add_argument("--conf", action="append", type=Path, default=[], help="YAML laid over conf/base.yaml")
        stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
        stage.add_argument("--force", action="store_true", help="do it again, overwriting the finished result")
        if name == "train":
            stage.add_argument("--variant", required=True, choices=("fp16", "qat"))
        if name == "bench":
            add_bench_arguments(stage)
        if name == "report":
            stage.add_argument(
                "--runs", nargs="+", default=[], metavar="NAME",
                help="runs that differ only in seeds: means and spreads, on the page of --run, or else of the first",
            )  # fmt: skip
        if name == "ptq":
            stage.add_argument("--scheme", help="the same as --set quant.scheme=...")
        if name == "eval":
            stage.add_argument("--onnx", type=Path, help="score this file instead of those of the run")
            stage.add_argument("--coco-dir", type=Path, help="with --onnx: COCO folder")
            stage.add_argument("--split", default="val2017", help="with --onnx (default: %(default)s)")
            stage.add_argument("--out", type=Path, help="with --onnx: folder for metrics.json and detections.json")
            stage.add_argument("--max-images", type=int, help="first N of a seeded order; labelled as a subset")
    args = parser.parse_args(argv)
    if args.stage == "report":
        args.run, *args.runs = dict.fromkeys([*([args.run] if args.run else []), *args.runs]) or ["full"]
    return args


def run_stage(args: argparse.Namespace) -> None:
    """Loads the configuration and runs a stage, alone on its run root."""
    if args.stage == "download-coco":
        from app.data.download import download_coco

        return download_coco(args.to, args.keep_archives)
    from app.core.config import load
    from app.core.environment import isolate_libraries
    from app.core.files import explain_full_disk
    from app.core.run import open_run

    if args.stage == "compare":
        isolate_libraries(args.out.parent / ".cache")
        from app.report.compare import compare

        return compare(args.left, args.right, args.out, load("qat", sets=args.set).report)
    run = open_run(args.run, args.runs_dir)
    if args.stage == "publish":
        from app.report.publish import publish

        return publish(run, args.aim, args.force)
    sets = [*args.set, *([f"eval.max_images={args.max_images}"] if args.stage == "eval" and args.max_images else [])]
    sets += [f"quant.scheme={args.scheme}"] if args.stage == "ptq" and args.scheme else []
    config = load(args.variant if args.stage == "train" else "qat", args.conf, sets)
    isolate_libraries(run.cache_dir)
    with explain_full_disk(run.runs_dir, FULL_DISK_REMEDY), alone(args, run):
        run_loaded(args, config, run)


def alone(args: argparse.Namespace, run: RunRoot) -> contextlib.AbstractContextManager[None]:
    """The lock of the run root. `all` and bench leave it to the stages they start, train sees to it by itself."""
    from app.core.run import hold

    free = args.stage in ("all", "bench", "train") or (args.stage == "eval" and args.onnx is not None)
    return contextlib.nullcontext() if free else hold(run, args.stage)


def run_loaded(args: argparse.Namespace, config: Config, run: RunRoot) -> None:
    """Heavy imports happen here."""
    match args.stage:
        case "all":
            run_all(args)
        case "bench":
            run_bench(args, run)
        case "data":
            from app.data.prepare import prepare

            prepare(config, run, args.force)
        case "train":
            run_train(config, run, args.force)
        case "export":
            from app.export.export import export

            export(config, run, args.force)
        case "ptq":
            from app.train.ptq import ptq

            ptq(config, run, args.force)
        case "eval":
            run_eval(args, config, run)
        case "report":
            from app.core.run import open_run
            from app.report.report import report

            report(config, run, args.force, [open_run(name, args.runs_dir) for name in args.runs])


def run_train(config: Config, run: RunRoot, force: bool) -> None:
    """Training makes its dataset ready by itself, so that `make train-qat` is enough on a fresh clone.

    On several devices it starts itself again, once for each, unless torchrun has done so.
    """
    from app.core.run import hold
    from app.data.prepare import prepare
    from app.train.device import check_devices
    from app.train.processes import is_launched, joined

    devices = check_devices(config)
    if len(devices) > 1 and not is_launched():
        return launch_train(len(devices), config, run, force)
    with joined(devices) as ranks, hold(run, "train") if ranks.is_first else contextlib.nullcontext():
        if ranks.is_first:
            prepare(config, run, force=False)
        ranks.wait()
        from app.train.train import train

        train(config, run, force, ranks)


def launch_train(n: int, config: Config, run: RunRoot, force: bool) -> None:
    """Refuses here, once, what can be refused, and starts n processes."""
    from app.core.run import hold
    from app.data.prepare import prepare
    from app.train.processes import launch
    from app.train.train import make_ready

    with hold(run, "train"):  # then the first of them holds it
        prepare(config, run, force=False)
        is_unfinished = make_ready(config, run, force)
    if is_unfinished:
        sys.exit(launch(n, [argument for argument in sys.argv[1:] if argument != "--force"]))


def run_eval(args: argparse.Namespace, config: Config, run: RunRoot) -> None:
    from app.core.config import UserError
    from app.eval.evaluate import evaluate, evaluate_standalone

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
