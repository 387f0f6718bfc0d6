"""Runs the lanes of a sweep: one training a GPU at a time, or one after the other."""

from __future__ import annotations

import logging
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from app.core.child import signal_name
from app.core.config import UserError
from app.core.progress import clock
from app.core.results import SCORED_AP, is_validated, read_rows
from app.sweep.children import Children
from app.sweep.plan import Lane, Training
from app.train.done import check_images

POLL_S = 0.2
TOLD_EVERY_S = 600.0  # how far a training is
AFTER = ("export", "eval")  # stages that take the trainings there are
OF_THE_USER = 2  # exit code of a mistake that every other training would meet too
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A stage of a lane; `training` is None for the stages before and after."""

    lane: Lane
    words: list[str]
    training: Training | None = None

    @property
    def command(self) -> list[str]:
        """The words to begin with."""
        return self.training.command if self.training else self.words

    @property
    def name(self) -> str:
        return self.training.name if self.training else f"seed {self.lane.seed}, {self.words[0]}"

    @property
    def can_begin(self) -> bool:
        """Whether the trainings that it needs are done: others of its lane may have failed."""
        fp16 = self.lane.trainings[0]
        quant = self.training.config.quant if self.training else None
        if self.words[0] == "ptq" or (quant and quant.distill):
            return fp16.is_done
        return self.words[0] not in AFTER or any(training.is_done for training in self.lane.trainings)


@dataclass
class AtWork:
    """A step, its process, and the GPU that it has; the steps of the lane that are still to come."""

    step: Step
    process: subprocess.Popen[bytes]
    gpu: str | None
    to_come: deque[Step]
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)


def run_lanes(lanes: list[Lane], gpus: list[str | None], logs_dir: Path) -> list[str]:
    """Runs the lanes, each on one of the `gpus`, until all have ended; gives the names of the steps that failed.

    A training that fails, as the guard stops it, does not keep the others of its lane from going on.

    Raises:
        Interrupted: a signal came; all have saved and ended.
        UserError: a step ended with the exit code of a user's mistake; the message is its last line.
    """
    waiting = deque(steps_of(lane) for lane in lanes)
    free, at_work, failed = list(gpus), list[AtWork](), list[str]()
    with Children() as children:
        while (waiting or at_work) and not children.signal:
            while waiting and free:
                at_work.append(begin(children, waiting.popleft(), free.pop(0), logs_dir))
            time.sleep(POLL_S)
            still = []
            for one in at_work:
                code = one.process.poll()
                if code is None:
                    tell_progress(one)
                    still.append(one)
                    continue
                if code == 0:
                    tell_end(one)
                    check_finished(one.step)
                elif not children.signal:
                    failed.append(tell_failure(one, code, log_of(one.step, logs_dir)))
                leave_out(one.to_come)
                if one.to_come and not children.signal:
                    still.append(begin(children, one.to_come, one.gpu, logs_dir))
                else:
                    free.append(one.gpu)
            at_work = still
    children.leave()
    return failed


def steps_of(lane: Lane) -> deque[Step]:
    """The steps of a lane that are not known to be done; a stage that finds nothing to do ends at once.

    With `force` that is none: a distilled training starts over once its teacher has.
    """
    trainings = [Step(lane, each.words, each) for each in lane.trainings if lane.force or not each.is_done]
    after = [Step(lane, words) for words in lane.after]
    return deque([Step(lane, lane.data), *trainings, *after])


def begin(children: Children, steps: deque[Step], gpu: str | None, logs_dir: Path) -> AtWork:
    step, path = steps[0], log_of(steps[0], logs_dir)
    steps.popleft()
    if step.training:
        on = f" on GPU {gpu}" if gpu else ""
        log.info("%s: begins (%s)%s, its lines are in %s", step.name, step.training.state(), on, path)
    return AtWork(step, children.start(step.command, gpu, path), gpu, steps)


def leave_out(steps: deque[Step]) -> None:
    """Removes the first steps as long as they cannot begin, and says so."""
    while steps and not steps[0].can_begin:
        log.warning("%s: left out, because a training that it needs has failed", steps.popleft().name)


def log_of(step: Step, logs_dir: Path) -> Path:
    return logs_dir / f"seed{step.lane.seed}.log"


def tell_end(one: AtWork) -> None:
    """A line for every training, and for the scores of a lane."""
    took = clock(time.monotonic() - one.began)
    if one.step.training:
        log.info("%s: done in %s, best AP %.3f", one.step.name, took, one.step.training.best_ap)
    elif one.step.words[0] == "eval":
        log.info(
            "seed %d: what there is is scored: %s",
            one.step.lane.seed,
            one.step.lane.run.root,
        )


def check_finished(step: Step) -> None:
    """After the data stage: refuses a finished training on other images or annotations than the run has now."""
    if step.words[0] != "data":
        return
    for training in step.lane.trainings:
        if training.is_done:
            check_images(training.config, training.run)


def tell_failure(one: AtWork, code: int, path: Path) -> str:
    """Logs how a step failed.

    Raises:
        UserError: by a mistake of the user's.
    """
    last = last_line(path)
    if code == OF_THE_USER:
        raise UserError(f"{one.step.name}: {last.removeprefix('error: ')}{beyond_force(one.step, last)}")
    how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}: {last}"
    log.error("%s: %s (%s)", one.step.name, how, path)
    return one.step.name


def beyond_force(step: Step, message: str) -> str:
    """The remedy for a training that --force of a sweep keeps, because its settings are these: a damaged one."""
    training = step.training
    if training is None or not training.force or "--force" not in message:
        return ""
    folder = training.run.variant_dir(training.config.label)
    return f" (--force of a sweep keeps what has its settings: delete {folder})"


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def tell_progress(one: AtWork) -> None:
    """From time to time how far a training is, by its results.csv."""
    now = time.monotonic()
    training = one.step.training
    if training is None or now - one.told < TOLD_EVERY_S:
        return
    one.told = now
    path = training.run.variant_dir(training.config.label) / "results.csv"
    rows = [row for row in read_rows(path) if is_validated(row)] if path.exists() else []
    if rows:
        log.info("%s: %s, AP %.3f", training.name, training.state(), rows[-1][SCORED_AP])
