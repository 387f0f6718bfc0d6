"""What a stage works on, configuration and run root, and whether it has anything left to do."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported when a stage runs: --help answers without them
    from app.core.config import Config
    from app.core.run import RunRoot

OPTION_KEYS = {"max_images": "eval.max_images"}  # options of a stage that are settings


@dataclass(frozen=True)
class Job:
    """What a stage works on."""

    config: Config
    run: RunRoot


@contextlib.contextmanager
def set_up(args: argparse.Namespace, lock: bool = True) -> Iterator[Job]:
    """Configuration and run root of a stage, which is alone on the run root while the context lasts.

    Args:
        lock: False for a stage that leaves the lock to the stages it starts, or writes nothing into the run root.
    """
    from app.core.config import load
    from app.core.environment import isolate_libraries
    from app.core.run import hold, open_run

    run = open_run(args.run, args.runs_dir)
    options = vars(args)
    sets = [f"{key}={options[name]}" for name, key in OPTION_KEYS.items() if options.get(name) is not None]
    config = load(options.get("variant", "qat"), args.conf, [*args.set, *sets], run.root)
    isolate_libraries(run.cache_dir)
    with hold(run, args.stage) if lock else contextlib.nullcontext():
        yield Job(config, run)


def is_done(args: argparse.Namespace) -> bool:
    """Whether a stage has nothing left to do; logs it then. Imports nothing heavy: no PyTorch.

    A stage asks this first where it would import PyTorch; the whole job asks it before it starts a stage's process.
    """
    if args.force:
        return False
    with set_up(args) as job:
        match args.stage:
            case "train":
                from app.train.done import is_trained as question
            case "ptq":
                from app.train.done import is_ptq_done as question
            case "export":
                from app.export.done import is_exported as question
            case "eval":
                from app.eval.evaluate import is_scored as question
            case "report":
                from app.report.report import is_reported as question
            case _:
                return False
        return question(job.config, job.run)


def start_over(job: Job) -> None:
    """Deletes what the whole job makes anew with --force: without it the job then goes on where this one is stopped."""
    from app.core.labels import FP16
    from app.core.run import hold
    from app.train.done import ptq_labels

    quantized = ptq_labels(job.config.quant) if job.config.quant else ()
    with hold(job.run, "all"):
        for label in (FP16, job.config.label, *quantized):
            shutil.rmtree(job.run.variant_dir(label), ignore_errors=True)
        shutil.rmtree(job.run.onnx_dir, ignore_errors=True)  # export makes the files of other schemes too


def after_training(job: Job, command: str) -> list[str]:
    """What the whole job, whose configuration is that of qat, has to do after a training: as arguments of its stage."""
    from app.core.labels import FP16, Label
    from app.export.done import labels_of_files
    from app.train.done import epochs_left, ptq_labels

    quant = job.config.quant
    if quant is None:
        return []
    n_epochs = epochs_left(job.config, job.run) if "fp16" in command else 0
    n_files = 0
    for label in (FP16, Label.parse(job.config.label), *ptq_labels(quant)):
        n_files += len(labels_of_files(label, job.config.export, has_packed_bits=True))
    return ["--then", str(n_epochs), str(n_files)]
