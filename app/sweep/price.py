"""What of a sweep is still to be done, and the hours that takes by the estimate of one job on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.core.labels import FP16, Label
from app.core.run import RunRoot
from app.core.shapes import Number, Shape
from app.eval.evaluate import METRICS
from app.report.tables import markdown_table
from app.sweep.plan import Lane, Training
from app.train.done import ptq_labels

ESTIMATE_SHAPE: Shape = {f"hours.{stage}": Number for stage in ("train fp16", "train qat", "ptq", "export", "eval")}
PILOT_CHECKPOINTS = 4  # that the estimate exports and scores: FP16, QAT, and PTQ's two


def training_hours(training: Training, hours: dict[str, float]) -> float:
    """Of the epochs that are still to come."""
    variant = "fp16" if training.config.label == str(FP16) else "qat"
    left = training.epochs_left / training.config.train.epochs
    return 0.0 if training.is_done else hours[f"train {variant}"] * left


def after_hours(lane: Lane, hours: dict[str, float]) -> float:
    """Of PTQ, export and eval of the checkpoints that are not made or not scored; of the others they take seconds."""
    labels = [Label.parse(training.config.label) for training in lane.trainings]
    n_to_quantize = 0
    for quant in (training.config.quant for training in lane.trainings):
        if quant:
            pair = ptq_labels(quant)
            n_to_quantize += lane.force or not all(lane.run.done(label).exists() for label in pair)
            labels += pair
    n_to_score = sum(lane.force or not has_score(lane.run, label) for label in labels)
    scoring = n_to_score / PILOT_CHECKPOINTS * (hours["export"] + hours["eval"])
    return n_to_quantize * hours["ptq"] + scoring


def has_score(run: RunRoot, label: Label) -> bool:
    """Whether the file that is traced from a checkpoint is scored."""
    return (run.root / label.traced.scores_dir / METRICS).exists()


def listing(lanes: list[Lane], hours: dict[str, float], places: Sequence[Any]) -> list[str]:
    """A table of all trainings with the hours that are left, and the sum; `places` are the GPUs."""
    cells = [["run", "training", "state", "hours left"]]
    of_lanes = []
    for lane in lanes:
        of_lane = 0.0
        for training in lane.trainings:
            left = training_hours(training, hours)
            of_lane += left
            cells.append([lane.run.name, training.config.label, training.state(), f"{left:.2f}"])
        after = after_hours(lane, hours)
        cells.append([lane.run.name, "ptq, export, eval", "", f"{after:.2f}"])
        of_lanes.append(of_lane + after)
    wall = finished_after(of_lanes, len(places))
    at_once = min(len(places), len(lanes))
    how = f"{at_once} seeds at a time" if at_once > 1 else "one training after the other"
    return [
        *markdown_table(cells, text_columns=3),
        f"{sum(of_lanes):.2f} hours of training and scoring, {how}: done after {wall:.2f} h",
    ]


def finished_after(of_lanes: list[float], n_places: int) -> float:
    """Hours until the last lane has ended, where each begins at the place that is free first."""
    places = [0.0] * n_places
    for hours in of_lanes:
        first = places.index(min(places))
        places[first] += hours
    return max(places)
