"""Runs that differ in nothing but their seeds, merged: means and spreads instead of one training each."""

from __future__ import annotations

import statistics
from typing import Any

from app.config import MACHINE_KEYS, UserError, difference, flatten, shown
from app.reporting.evidence import Evidence
from app.reporting.findings import compare, health, measured_alike, meter

SEEDS = ("train.seed", "data.seed")
MERGED = ("AP", "AP_difference", "AP_over_ptq")
LATER_SECTIONS = ("guard", "report")  # change nothing that is trained, exported or scored


def check_same(first: Evidence, other: Evidence) -> None:
    """Refuses two runs that are not the same experiment.

    Raises:
        UserError: a variant of both was trained with other settings than its seed, or with the same seed; or the two
            baselines were measured differently.
    """
    names = f"{other.run.name} cannot be merged with {first.run.name}"
    for label in first.finished.keys() & other.finished.keys():
        a, b = first.finished[label].config, other.finished[label].config
        differences = difference(a, b, ignore=(*MACHINE_KEYS, *LATER_SECTIONS))
        if wrong := {key: of for key, of in differences.items() if key not in SEEDS}:
            raise UserError(f"{names}: the settings of {label} differ in more than seeds ({shown(wrong)})")
        if not any(key in SEEDS for key in differences):
            seeds = ", ".join(f"{key}={flatten(a)[key]}" for key in SEEDS)
            raise UserError(f"{names}: {label} has the same seeds in both ({seeds}): train with --set train.seed=N")
    if not first.scored or not other.scored:
        raise UserError(f"{names}: {(other if first.scored else first).run.name} has no scores, run 'make eval' first")
    if meter(measured_alike(first.scored)[0][0]) != meter(measured_alike(other.scored)[0][0]):
        raise UserError(
            f"{names}: their files were measured differently, run 'make eval' for both with the same settings"
        )


def enter_seeds(found: dict[str, Any], evidences: list[Evidence]) -> None:
    """Turns the findings of the first run into those of all: `seeds`, `over_runs` of the rows, what the others miss.

    seeds.runs has per run its name, its seeds, whether its trainings were healthy, and by folder AP and its differences
    to baseline and PTQ of the same run; seeds.over_runs has by folder the number of runs, mean and sample standard
    deviation (None for one run) of each.

    Raises:
        UserError: the runs are not the same but for their seeds.
    """
    for i, first in enumerate(evidences):
        for other in evidences[i + 1 :]:
            check_same(first, other)
    min_share = found["settings"]["min_share_of_best"]
    runs = [one_run(evidence, min_share) for evidence in evidences]
    dirs = dict.fromkeys(name for run in runs for name in run["AP"])
    over_runs = {name: {what: spread([run[what].get(name) for run in runs]) for what in MERGED} for name in dirs}
    found["seeds"] = {"runs": runs, "over_runs": over_runs}
    found["run"] = ", ".join(evidence.run.name for evidence in evidences)
    others = [f"{e.run.name}: {line}" for e in evidences[1:] for line in e.missing]
    found["missing"] = [*found["missing"], *others]
    for row in found["groups"][0]["rows"]:
        row["over_runs"] = over_runs[row["dir"]]


def one_run(evidence: Evidence, min_share: float) -> dict[str, Any]:
    rows = compare(measured_alike(evidence.scored)[0])
    config = flatten(next(iter(evidence.trainings.values())).config) if evidence.trainings else {}
    return {
        "name": evidence.run.name,
        "seeds": {key: config.get(key) for key in SEEDS},
        **{what: {row["dir"]: row[what] for row in rows} for what in MERGED},
        "healthy": {label: health(t, min_share)["healthy"] for label, t in evidence.trainings.items()},
    }


def spread(values: list[float | None]) -> dict[str, Any]:
    """Number, mean and sample standard deviation (n - 1) of the values that are there."""
    there = [value for value in values if value is not None]
    return {
        "n": len(there),
        "mean": statistics.fmean(there) if there else None,
        "sd": statistics.stdev(there) if len(there) > 1 else None,
    }
