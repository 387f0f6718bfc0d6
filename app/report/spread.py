"""How large a difference of two APs says something: more than trainings differ that differ in their seed alone."""

from __future__ import annotations

import math
import statistics
from typing import Any

from app.core.environment import REPO_DIR
from app.core.files import read_json
from app.core.labels import Label
from app.core.results import AP, SCORED

SOURCE = "docs/stability.json"  # rows of the stability bench: a part of the repository, and of the image
ROWS = REPO_DIR / SOURCE
ARM = "fp16"
N_SIGMA = 2  # two standard deviations: by chance one comparison in twenty lies beyond
RULE = "2 x sqrt(2) x"  # the difference of two trainings has sqrt(2) times the deviation of one
TELLING_AP = 0.01  # below it an AP rests on a handful of boxes
ENOUGH_RUNS = 3  # the spread of two says nothing yet


def seed_spread() -> dict[str, Any]:
    """What trainings of one recipe differ by, from the FP16 trainings of the stability bench.

    The scored AP of every seed at the last epoch that all seeds have validated.

    Returns:
        source; model, imgsz and epoch of the trainings; n of them, mean AP and its sample standard deviation sd;
        share: sd / mean; rule, and telling_share: what two single trainings differ by at most, to their AP.
    """
    bench = read_json(ROWS, "bench ARGS=stability")
    curves = []
    for row in bench["rows"]:
        if row["arm"] == ARM:
            curves.append(dict(zip(row["epoch"], row[AP][SCORED], strict=True)))
    epoch = max(set.intersection(*map(set, curves)))
    aps = [curve[epoch] for curve in curves]
    mean, sd = statistics.fmean(aps), statistics.stdev(aps)
    facts = {"source": SOURCE, "model": bench["config"]["model"], "imgsz": bench["config"]["train.imgsz"]}
    numbers = {"epoch": epoch, "n": len(aps), "mean": mean, "sd": sd, "share": sd / mean}
    return {**facts, **numbers, "rule": RULE, "telling_share": N_SIGMA * math.sqrt(2) * sd / mean}


def telling_of_single(row: dict[str, Any], base: dict[str, Any], share: float) -> float | None:
    """What the AP of one training must differ by from that of another, the baseline; None where nothing can be said.

    PTQ has the weights of the baseline's own training: what seeds differ by is not what it differs by.
    """
    is_trained = Label.parse(row["label"]).method == "qat"
    is_known = row["AP_difference"] is not None and base["AP"] >= TELLING_AP
    return share * base["AP"] if is_trained and is_known else None


def telling_of_means(over_runs: dict[str, Any]) -> float | None:
    """What a mean of differences must exceed: two standard errors of it; None where there are too few runs."""
    n, sd = over_runs["n"], over_runs["sd"]
    return N_SIGMA * sd / math.sqrt(n) if n >= ENOUGH_RUNS else None
