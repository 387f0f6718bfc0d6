"""The estimate stage: pieces of the job, measured in about a minute -> estimate.json, the price of the whole job."""

from __future__ import annotations

import contextlib
import importlib
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.core.config import Config, load
from app.core.environment import REPO_DIR, environment
from app.core.files import write_json
from app.core.memory import available_bytes
from app.core.progress import clock
from app.core.run import RunRoot, hold
from app.estimate.cost import Budget, Cost, Stopwatch

# Modules of the stages, in an order in which each adds what the ones before have not imported.
MODULES = {
    "data": "app.data.prepare", "eval": "app.eval.evaluate", "report": "app.report.report",
    "train": "app.train.train", "ptq": "app.train.ptq", "export": "app.export.export",
}  # fmt: skip
# What a stage imports, by the stages whose modules it shares; to a second, of the eight that torch takes with what is
# built on it. Where torch comes into eval or report, the contract "the evaluator knows ONNX and COCO, nothing else" of
# pyproject.toml fails; where a lighter package moves, nothing does.
IMPORTED = {
    "data": ("data",), "eval": ("data", "eval"), "report": ("data", "eval", "report"),
    "train": ("data", "report", "train"), "ptq": ("data", "report", "train", "ptq"),
    "export": ("data", "report", "train", "ptq", "export"),
}  # fmt: skip
SPEAKING = ("app.estimate", "app.core.answers")  # what is heard while the pilot works
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """The settings of the command line: overlays and --set; and the seconds that the estimate may take."""

    overlays: list[Path]
    sets: list[str]
    for_s: float

    def config(self, variant: str, *sets: str) -> Config:
        return load(variant, self.overlays, [*self.sets, *sets])


def estimate(command: Command, run: RunRoot) -> None:
    """Measures pieces of the job beside the run and writes the run's estimate.json; nothing of the pilot stays.

    The run may be in use meanwhile: the estimate has a lock of its own.

    Raises:
        UserError: the job would fail with it too, or another estimate of this name is at work.
    """
    with hold(RunRoot(run.runs_dir, f"{run.name}-estimate"), "estimate"):
        measure(command, run)


def measure(command: Command, run: RunRoot) -> None:
    budget = Budget(command.for_s)
    process = command_line()
    available = available_bytes()
    log.info("estimate: measures pieces of every stage, for about %s", clock(command.for_s))
    with quiet(), scratch(run, "data") as whole, scratch(run, "sample") as sampled, scratch(run, "pilot") as pilot:
        starts = import_costs(process)
        from app.estimate.pilot import Places, measure_job
        from app.estimate.summary import shown, summary

        measured = measure_job(command, Places(whole, sampled, pilot), budget)
        facts = summary(command, measured, starts, available, run)
    facts |= {"environment": environment(), "pilot": facts["pilot"] | {"all_s": budget.passed.wall_s}}
    write_json(run.root / "estimate.json", facts)
    for line in shown(facts):
        log.info("%s", line)
    log.info("estimate: %s, in %s", run.root / "estimate.json", clock(budget.passed.wall_s))


def command_line() -> Cost:
    """What a process costs that answers --help: Python and the command line. This one may have been a shell before."""
    words = [sys.executable, "-m", "app", "--help"]
    return Stopwatch().cost(lambda: subprocess.run(words, cwd=REPO_DIR, stdout=subprocess.DEVNULL, check=True))


def import_costs(process: Cost) -> dict[str, Cost]:
    """What the start of a stage's process costs until its function begins, by stage."""
    own = {stage: Stopwatch().cost(lambda name=name: importlib.import_module(name)) for stage, name in MODULES.items()}
    starts = {}
    for stage, parts in IMPORTED.items():
        starts[stage] = process
        for part in parts:
            starts[stage] += own[part]
    return starts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which the stages say nothing but errors: what they say is of the pilot."""
    levels = {name: logging.getLogger(name).level for name in ("app", *SPEAKING)}
    logging.getLogger("app").setLevel(logging.ERROR)
    for name in SPEAKING:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def scratch(run: RunRoot, what: str) -> Iterator[RunRoot]:
    """A run root of the estimate's own, which is deleted."""
    own = RunRoot(run.runs_dir, f"{run.name}-estimate-{what}")
    shutil.rmtree(own.root, ignore_errors=True)
    own.root.mkdir(parents=True)
    try:
        yield own
    finally:
        shutil.rmtree(own.root, ignore_errors=True)
