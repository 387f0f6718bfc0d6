"""Command line: python -m app STAGE. One process a stage; stages hand over files in the run root and nothing else."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.bench import command as benches
from app.core.command_line import Parser, job_arguments, run_arguments, seconds, settings_arguments
from app.data import command as datasets
from app.eval import command as evals
from app.job import Job, after_training, is_done, set_up, start_over
from app.report import command as reports
from app.schemes import command as schemes
from app.sensitivity import command as layers_alone
from app.sweep import command as sweeps

FP16_TRAINING = "train --variant fp16"
ORDER = ("data", FP16_TRAINING, "train --variant qat", "ptq", "export", "eval", "report")


def stages() -> dict[str, Stage]:
    """Every command: what it does, its arguments, its function."""
    return {
        "all": Stage("the whole job: data, both trainings, ptq, export, eval, report", whole_arguments, whole_job),
        "data": Stage("check COCO, make the YOLO view beside the runs, choose a subset", job_arguments, data),
        "train": Stage("train one variant, from random weights or train.weights; resumes", train_arguments, train),
        "import-weights": Stage("a trained network of anybody -> the FP16 baseline", import_arguments, import_weights),
        "ptq": Stage("quantize the trained fp16 baseline without training -> checkpoints", ptq_arguments, ptq),
        "export": Stage("checkpoints -> ONNX files, each checked against torch", job_arguments, export),
        "eval": Stage("ONNX files -> COCO numbers and latency; --onnx: any file", eval_arguments, evaluate),
        "report": Stage("JSON and CSV of the run -> summary.md; --runs merges seeds", reports.report_arguments, report),
        "publish": Stage("the report without weights and photos -> runs/reports", reports.publish_arguments, publish),
        "compare": Stage("two runs or scored folders -> compare.md, differences", reports.compare_arguments, compare),
        "sweep": Stage("several schemes and seeds, each as by `all`, and one report", sweep_arguments, sweep),
        "schemes": Stage("bits, share and bytes of every layer under a scheme", schemes.add_arguments, schemes.run),
        "sensitivity": Stage("what each layer alone costs; fits a scheme", layers_alone.add_arguments, sensitivity),
        "bench": Stage("step times, loops, eval and QAT's stability, side by side", bench_arguments, bench),
        "estimate": Stage("hours, memory and disk of the whole job here", estimate_arguments, estimate),
        "draw": Stage("draw images in COCO's layout, to rehearse a full run", datasets.draw_arguments, datasets.draw),
        "download-coco": Stage("fetch the official COCO 2017 archives", datasets.download_arguments, datasets.download),
    }


@dataclass(frozen=True)
class Stage:
    """A command. Heavy imports belong into the function, so that --help and a wrong setting answer at once."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    function: Callable[[argparse.Namespace], None]


log = logging.getLogger("app")
FULL_DISK_REMEDY = "finished files and the last checkpoint are whole; make room, and {} goes on"


def main() -> int:
    """Runs one stage.

    Returns:
        exit code: 0 done; 1 a fault of ours, the guard or a lost rank; 2 a mistake of the user's; 128 + the signal's
        number after a signal.
    """
    args = parse(sys.argv[1:])
    from app.core.answers import answered, command_that_goes_on
    from app.core.config import UserError
    from app.core.environment import check_is_alone
    from app.core.files import printable
    from app.core.os_errors import explain_os_errors
    from app.core.progress import set_up_terminal
    from app.train.guard import GuardStop
    from app.train.interrupt import Interrupted, PeerLost

    set_up_terminal()
    is_forced = bool(vars(args).get("force")) and args.stage != "sweep"  # which starts nothing over twice
    again = command_that_goes_on(is_forced)
    try:
        if args.stage != "train":
            check_is_alone(args.stage)
        with answered(is_forced), explain_os_errors(output_folder(args), FULL_DISK_REMEDY.format(again)):
            args.function(args)
    except UserError as error:
        log.error("error: %s", printable(error))
        return 2
    except Interrupted as stop:
        log.warning("stopped by %s, everything is saved: %s goes on from here", stop, again)
        return 128 + stop.signal
    except GuardStop as stop:
        log.warning("%s", stop)
        return 1
    except PeerLost as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def output_folder(args: argparse.Namespace) -> Path:
    """Where the command writes: what --out or --to names, else the runs."""
    folders = [vars(args).get(name) for name in ("out", "to", "runs_dir")]
    return next(folder for folder in folders if folder)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m app", description=__doc__)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, stage in stages().items():
        command = commands.add_parser(name, help=stage.help, description=stage.help)
        command.set_defaults(function=stage.function)
        stage.arguments(command)
    return parser.parse_args(argv)


# --- arguments -------------------------------------------------------------------------------------------------------


def yes_argument(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--yes", action="store_true", help="train without a GPU, whatever memory and time that takes")


def whole_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    yes_argument(stage)


def train_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    stage.add_argument("--variant", required=True, choices=("fp16", "qat"))
    yes_argument(stage)
    stage.add_argument("--then", nargs=2, type=int, help=argparse.SUPPRESS)  # of a job: see job.after_training


def import_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    stage.add_argument("--weights", type=Path, required=True, metavar="FILE", help="best.pt of ours, or a YOLOv10's")
    stage.set_defaults(variant="fp16")


def ptq_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    stage.add_argument("--scheme", dest="set", action="append", type="quant.scheme={}".format, help="quant.scheme")


def estimate_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    stage.add_argument("--for-s", type=seconds, default=60, help="seconds that it may take, more or less (60)")


def eval_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage)
    evals.add_arguments(stage)


def sweep_arguments(stage: argparse.ArgumentParser) -> None:
    run_arguments(stage, "sweep")
    settings_arguments(stage)
    yes_argument(stage)
    sweeps.add_arguments(stage)


def bench_arguments(stage: argparse.ArgumentParser) -> None:
    job_arguments(stage, "bench")  # its trainings overwrite those of the run
    benches.add_arguments(stage)


# --- stages ----------------------------------------------------------------------------------------------------------


def data(args: argparse.Namespace) -> None:
    with set_up(args) as job:
        from app.data.prepare import prepare

        prepare(job.config, job.run, args.force)


def train(args: argparse.Namespace) -> None:
    """Prepares the dataset too, so that `make train-qat` is enough on a fresh clone.

    On several devices this process checks what can be refused, releases the lock, and starts one process for each
    device, unless torchrun has done so. There rank 0 takes the lock and prepares; the other ranks wait for it.
    """
    from app.core.environment import launched_as

    is_launched = launched_as() is not None
    if not is_launched and is_done(args):
        return
    with set_up(args, lock=False) as job:
        from app.core.run import hold
        from app.data.prepare import prepare

        log.info("train %s: loading PyTorch and Ultralytics", job.config.label)
        from app.train.device import check_devices
        from app.train.done import After
        from app.train.estimate import check_affordable
        from app.train.processes import process_group
        from app.train.train import train

        devices = check_devices(job.config)
        if len(devices) > 1 and not is_launched:
            return launch_train(len(devices), job, args.force)
        with process_group(devices) as ranks, hold(job.run, "train") if ranks.is_main else contextlib.nullcontext():
            if ranks.is_main:
                prepare(job.config, job.run, force=False, says_done=False)
            if devices == ["cpu"] and not is_launched:
                check_affordable(job.config, job.run, args.force, args.yes)
            ranks.barrier()
            train(job.config, job.run, args.force, ranks, After(*args.then) if args.then else None)


def launch_train(n: int, job: Job, force: bool) -> None:
    """Checks once what can be refused, and starts n processes, which wait for each other."""
    from app.core.run import hold
    from app.data.prepare import prepare
    from app.train.done import make_ready
    from app.train.processes import launch

    with hold(job.run, "train"):  # then rank 0 holds it
        prepare(job.config, job.run, force=False, says_done=False)
        is_unfinished = make_ready(job.config, job.run, force)
    if is_unfinished:
        sys.exit(launch(n, [argument for argument in sys.argv[1:] if argument != "--force"]))


def import_weights(args: argparse.Namespace) -> None:
    with set_up(args) as job:
        log.info("import-weights: loading PyTorch and Ultralytics")
        from app.train.import_weights import import_weights

        import_weights(job.config, job.run, args.weights, args.force)


def ptq(args: argparse.Namespace) -> None:
    if is_done(args):
        return
    with set_up(args) as job:
        log.info("ptq: loading PyTorch and Brevitas")
        from app.train.ptq import ptq

        ptq(job.config, job.run, args.force)


def export(args: argparse.Namespace) -> None:
    if is_done(args):
        return
    with set_up(args) as job:
        log.info("export: loading PyTorch, Brevitas and ONNX")
        from app.export.export import export

        export(job.config, job.run, args.force)


def evaluate(args: argparse.Namespace) -> None:
    with set_up(args, lock=args.onnx is None) as job:
        from app.coco.score import standalone_dataset
        from app.data.prepare import find, follow
        from app.eval.contract import Said
        from app.eval.evaluate import evaluate, evaluate_standalone, scores_folder
        from app.eval.metadata import read_names

        if args.onnx is None:
            follow(job.run, job.config.data.coco_dir)
            return evaluate(job.config, job.run, args.force)
        said = Said(args.contract, read_names(args.names) if args.names else None, args.imgsz)
        out_dir = args.out or scores_folder(args.onnx, args.runs_dir, args.force)
        coco_dir = args.coco_dir or find(job.config.data.coco_dir, job.run.cache_dir)
        dataset = standalone_dataset(coco_dir, args.split, job.config.data.skip_broken, job.config.data)
        evaluate_standalone(job.config, args.onnx, dataset, out_dir, said)


def report(args: argparse.Namespace) -> None:
    from app.report.page_files import scored_runs

    given: list[str] = [args.run, *args.runs] if args.run is not None else args.runs
    (first, *others), left_out = scored_runs(given or ["full"], args.runs_dir)
    args.run = first.name
    with set_up(args) as job:
        from app.report.report import report

        report(job.config, job.run, others, left_out)


def publish(args: argparse.Namespace) -> None:
    from app.report.page_files import scored_runs
    from app.report.publish import publish

    (run, *others), _ = scored_runs([args.run, *args.runs], args.runs_dir)
    publish(run, args.aim, args.force, others)


def compare(args: argparse.Namespace) -> None:
    from app.core.config import load
    from app.core.environment import isolate_libraries

    isolate_libraries(args.out.parent / ".cache")
    from app.report.compare import compare

    config = load("qat", sets=args.set)
    compare(Path(args.left), Path(args.right), args.out, config.report, config.data.coco_dir)


def sweep(args: argparse.Namespace) -> None:
    from app.core.environment import isolate_libraries
    from app.core.run import hold, open_run

    run = open_run(args.run, args.runs_dir)
    isolate_libraries(run.cache_dir)
    with hold(run, args.stage):  # its runs have the configurations, and what they keep of files that are gone
        sweeps.run(args, run)


def sensitivity(args: argparse.Namespace) -> None:
    with set_up(args) as job:
        layers_alone.run(args, job.config, job.run)


def bench(args: argparse.Namespace) -> None:
    with set_up(args, lock=False) as job:
        benches.run(args, job.run)


def estimate(args: argparse.Namespace) -> None:
    with set_up(args, lock=False) as job:
        from app.estimate.estimate import Command, estimate

        estimate(Command(args.conf, args.set, args.for_s), job.run)


def whole_job(args: argparse.Namespace) -> None:
    """Runs every stage that is not done, each in a process of its own; one that fails ends the job with its code."""
    from app.core.child import job_words, run_stage

    common = [*job_words(args.run, args.runs_dir, args.conf, args.set), *(["--force"] if args.force else [])]
    with set_up(args, lock=False) as job:  # a wrong setting is refused before the first stage
        for command in ORDER:
            if is_done(parse([*command.split(), *common])):
                continue
            if command == FP16_TRAINING:  # so is a scheme that does not fit the network, before hours of training
                from app.quant.model import check_scheme

                check_scheme(job.config)
                if args.force:
                    start_over(job)
            own = [*(["--yes"] if args.yes else []), *after_training(job, command)] if "train" in command else []
            if code := run_stage(command, [*own, *common]):
                sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
