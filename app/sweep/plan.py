"""What a sweep consists of: a run for each seed, in it FP16 and a training for each scheme, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.core.child import job_words
from app.core.config import Config, UserError, load, parse_set, read_yaml
from app.core.files import read_json
from app.core.run import SEED_OF_SWEEP, SWEEP_FILE, SWEEP_SHAPE, RunRoot, open_run
from app.core.scheme import SCHEME
from app.core.shapes import value_at
from app.export.done import file_settings
from app.train.done import DONE_SHAPE, OTHER_RUN, check_images, check_snapshot, epochs_left

SEED = "train.seed"
NOT_GIVEN = object()
TAKEN = {SCHEME: "--schemes", SEED: "--seeds"}  # settings that a sweep gives each training itself


@dataclass(frozen=True)
class Order:
    """What the user asks for: schemes and seeds, and the settings of all trainings."""

    schemes: Sequence[str]
    seeds: Sequence[int]
    overlays: list[Path]
    sets: list[str]
    accepts_cpu: bool = False
    force: bool = False


@dataclass(frozen=True)
class Training:
    """FP16 or a scheme with one seed."""

    config: Config
    run: RunRoot
    words: list[str]  # of its command line
    force: bool = False

    @property
    def command(self) -> list[str]:
        """The words to begin with."""
        return [*self.words, "--force"] if self.starts_over else self.words

    @property
    def starts_over(self) -> bool:
        """Whether it begins anew: with `force`, if what is there was trained with other settings or on other images."""
        if not self.force:
            return False
        try:
            self.check()
            check_images(self.config, self.run)
        except UserError:
            return True
        return False

    def check(self) -> None:
        """Raises: UserError: what is there was trained with other settings."""
        check_snapshot(self.config, self.run.variant_dir(self.config.label) / "config.yaml")

    @property
    def name(self) -> str:
        return f"seed {self.config.train.seed}, {self.config.label}"

    @property
    def is_done(self) -> bool:
        return self.run.done(self.config.label).exists() and not self.starts_over

    @property
    def epochs_left(self) -> int:
        return self.config.train.epochs if self.starts_over else epochs_left(self.config, self.run)

    @property
    def best_ap(self) -> float:
        return read_json(self.run.done(self.config.label), "train", DONE_SHAPE)["best_ap"]

    def state(self) -> str:
        """'done', 'starts over', 'not begun', or 'epoch 3 of 10'."""
        n_epochs, left = self.config.train.epochs, self.epochs_left
        if self.is_done:
            return "done"
        if self.starts_over:
            return "starts over"
        return "not begun" if left == n_epochs else f"epoch {n_epochs - left} of {n_epochs}"


@dataclass(frozen=True)
class Lane:
    """The run of one seed: its trainings, and the stages before and after them, one after the other."""

    seed: int
    run: RunRoot
    trainings: list[Training]
    common: list[str]  # words of every stage
    ptq: list[list[str]]
    force: bool = False

    @property
    def data(self) -> list[str]:
        return ["data", *self.common]

    @property
    def after(self) -> list[list[str]]:
        """The stages after the trainings."""
        stages = [*self.ptq, ["export", *self.common], ["eval", *self.common]]
        return [[*words, "--force"] for words in stages] if self.force else stages


def lanes_of(order: Order, run: RunRoot) -> list[Lane]:
    """A lane for every seed; checks all that can be refused before the first training.

    Raises:
        UserError: a wrong setting or scheme, a run root of trainings with other settings, or a name that is taken.
    """
    check_settings(order)
    check_name(run)
    lanes = [lane_of(order, run, seed) for seed in dict.fromkeys(order.seeds)]
    check_labels(order, lanes[0])
    for lane in lanes:
        if not order.force:
            check_lane(lane)
    for seed in earlier_runs(run).values():
        if seed not in order.seeds:
            check_earlier(lane_of(order, run, seed))
    return lanes


def check_settings(order: Order) -> None:
    given = [(f"--set {item}", parse_set(item)) for item in order.sets]
    given += [(f"--conf {file}", read_yaml(file)) for file in order.overlays]
    for where, tree in given:
        for key, option in TAKEN.items():
            if value_at(tree, key, NOT_GIVEN) is not NOT_GIVEN:
                raise UserError(f"{where}: a sweep gives each training its own {key}: name them with {option}")


def check_lane(lane: Lane) -> None:
    """Refuses a run whose trainings or ONNX files were made with other settings."""
    for training in lane.trainings:
        training.check()
    wanted = file_settings(lane.trainings[0].config.export)
    for record in sorted(lane.run.onnx_dir.glob("*.json")):
        if read_json(record, "export").get("export", wanted) != wanted:
            raise UserError(f"{record.with_suffix('.onnx')} was made with other settings of export: {OTHER_RUN}")


def check_earlier(lane: Lane) -> None:
    """Refuses a seed of an earlier call that has other settings: one report has them all."""
    try:
        check_lane(lane)
    except UserError as error:
        raise UserError(
            f"seed {lane.seed}, of an earlier call of this sweep: {error}, with it among the seeds"
        ) from error


def check_name(run: RunRoot) -> None:
    if run.run_json.exists():
        raise UserError(f"{run.root} is a run of its own: give the sweep another RUN=name")


def check_labels(order: Order, lane: Lane) -> None:
    """Two schemes of one name would share a folder."""
    labels = [training.config.label for training in lane.trainings]
    if len(set(labels)) < len(labels):
        raise UserError(f"--schemes {' '.join(order.schemes)}: two of them have the same name, rename a file")


def lane_of(order: Order, run: RunRoot, seed: int) -> Lane:
    own = open_run(f"{run.name}{SEED_OF_SWEEP}{seed}", run.runs_dir)
    sets = [*order.sets, f"{SEED}={seed}"]
    yes = ["--yes"] if order.accepts_cpu else []
    common = job_words(own.name, own.runs_dir, order.overlays, sets)
    config = load("fp16", order.overlays, sets, own.root)
    fp16 = Training(config, own, ["train", "--variant", "fp16", *common, *yes], order.force)
    trainings, ptq = [fp16], []
    for scheme in dict.fromkeys(order.schemes):
        of_scheme = [*sets, f"{SCHEME}={scheme}"]
        words = job_words(own.name, own.runs_dir, order.overlays, of_scheme)
        config = load("qat", order.overlays, of_scheme, own.root)
        trainings.append(Training(config, own, ["train", "--variant", "qat", *words, *yes], order.force))
        ptq.append(["ptq", *words])
    return Lane(seed, own, trainings, common, ptq, order.force)


def sweep_facts(lanes: list[Lane], run: RunRoot) -> dict[str, object]:
    """The content of SWEEP_FILE: name of each run and its seed, those of earlier calls too."""
    return {"runs": earlier_runs(run) | {lane.run.name: lane.seed for lane in lanes}}


def earlier_runs(run: RunRoot) -> dict[str, int]:
    """The runs of earlier calls in which a training has begun, and their seeds."""
    path = sweep_path(run)
    runs = read_json(path, "sweep", SWEEP_SHAPE)["runs"] if path.exists() else {}
    return {name: seed for name, seed in runs.items() if any((run.runs_dir / name).glob("*/config.yaml"))}


def sweep_path(run: RunRoot) -> Path:
    return run.root / SWEEP_FILE
