"""What follows from the evidence: differences, groups measured alike, health, doubts. Written to report.json."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

from app.coco.detail import Metrics
from app.core.config import Report, UserError
from app.core.differences import WITHOUT_EFFECT, difference, flatten, shown
from app.core.labels import FP16
from app.core.results import AP, SCORED, SCORED_AP, STATES, VAL_LOSS, Row, Rows, candidates, column, train_loss
from app.core.start import start_in, told
from app.report.curve import curve
from app.report.evidence import Evidence, Imported, Training, page_order
from app.report.groups import describe_meter, is_baseline, measured_alike, meter, rows_of
from app.report.spread import TELLING_AP, enter_tellings, seed_spread, telling_of_means

Findings = dict[str, Any]  # the content of report.json

FAIR_DIFFERENCES = ("variant", "quant")  # sections in which the configs of the variants may differ
SEEDS = ("train.seed", "data.seed")
# Values of a row that get a mean over runs with other seeds.
MERGED = ("AP", "AP_difference", "AP_frequent", "AP_frequent_difference", "AP_over_ptq")
SCORED_VAL_LOSS = column(VAL_LOSS, SCORED)
COMMON_FACTS = {"code_version": "code", "lock_sha256": "package lock", "device": "device", "gpus": "GPU"}


def derive(evidence: Evidence, settings: Report) -> Findings:
    """Every number of the page that no other file of the run holds, and the sentences of doubt."""
    spread_of_seeds = seed_spread()
    groups = []
    for group in measured_alike(evidence.scored):
        rows = rows_of(group)
        for row in rows:
            enter_tellings(row, rows[0], spread_of_seeds)
        groups.append({"measured": describe_meter(group[0]), "rows": rows})
    trainings = evidence.trainings.items()
    base = evidence.trainings.get(str(FP16))
    compared = [(label, training) for label, training in trainings if base and training is not base]
    return {
        "run": evidence.run.name,
        "settings": settings.model_dump(mode="json"),
        "missing": evidence.missing,
        "seeds": None,
        "curve": curve([evidence]),
        "seed_spread": spread_of_seeds,
        "doubts": doubts(evidence),
        "groups": groups,
        "imported": evidence.imported and evidence.imported.start,
        "starts": {label: start_of(training) for label, training in trainings},
        "health": {label: health(training, settings.min_share_of_best) for label, training in trainings},
        "trainings": {label: speed(training) for label, training in trainings},
        "losses": {label: loss_over(training, base) for label, training in compared if base},
        "configs": {label: training.config for label, training in trainings},
    }


def health(training: Training, min_share: float) -> dict[str, Any]:
    """Whether the scored AP (EMA + re-estimated BN) stayed above `min_share` of its running best.

    Epochs are judged after both warm-ups, that of the learning rate and that of quantization, and once the running best
    is at least TELLING_AP. `lowest_share` is the lowest of AP / running best, first met at `lowest_epoch`. Both are
    None where no epoch could be judged.
    """
    after = math.ceil(training.config["hyp"]["warmup_epochs"])
    shares = shares_of_best(training.history, after)
    lowest, lowest_epoch = None, None
    for epoch, share in shares:
        if lowest is None or not share >= lowest:  # a NaN counts as a fall
            lowest, lowest_epoch = share, epoch
    cells = chain.from_iterable(row.values() for row in training.history)
    is_finite = all(map(math.isfinite, cells))
    stayed = None if lowest is None else lowest >= min_share
    return {
        "healthy": stayed if is_finite else False,
        "finite": is_finite,
        "warmup_epochs": after,
        "epochs_judged": len(shares),
        "lowest_share": None if lowest is None else finite(lowest),
        "lowest_epoch": lowest_epoch,
    }


def shares_of_best(history: Rows, after: int) -> list[tuple[int, float]]:
    """(epoch, scored AP / best AP so far) of the epochs later than `after` whose best AP so far is TELLING_AP."""
    best = 0.0
    shares = []
    for row in candidates(history):
        best = max(best, row[SCORED_AP])
        if row["epoch"] > after and best >= TELLING_AP:
            shares.append((int(row["epoch"]), row[SCORED_AP] / best))
    return shares


def loss_over(training: Training, base: Training) -> dict[str, Any] | None:
    """Train and validation loss less the baseline's, at the last epoch that both have validated; None without one.

    Where the second is much larger than the first, what is scored is not what was trained: the earlier recipe of
    runs/LOG.md had +0.13 and +3.67.
    """
    rows, base_rows = by_epoch(training), by_epoch(base)
    common = [epoch for epoch in rows if epoch in base_rows]
    if not common:
        return None
    row, base_row = rows[common[-1]], base_rows[common[-1]]
    train = train_loss(row) - train_loss(base_row)
    val = row[SCORED_VAL_LOSS] - base_row[SCORED_VAL_LOSS]
    return {"epoch": int(row["epoch"]), "train": finite(train), "val": finite(val)}


def by_epoch(training: Training) -> dict[float, Row]:
    """The validated epochs that are not of a quant warm-up."""
    return {row["epoch"]: row for row in candidates(training.history)}


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def speed(training: Training) -> dict[str, Any]:
    """How many epochs a training had, the best of them, and how long they took."""
    history = training.history
    rates = [row["time/images_per_s"] for row in history]
    seconds = [row["time/epoch_s"] for row in history]
    return {
        "epochs": len(history),
        "epochs_planned": training.config["train"]["epochs"],
        **best_epoch(training),
        "images_per_s": sum(rates) / len(rates),
        "hours": sum(seconds) / 3600,
    }


def best_epoch(training: Training) -> dict[str, Any]:
    """The first of the epochs with the highest scored AP, where NaN counts as 0; None where no epoch was validated."""
    best = max(candidates(training.history), key=lambda row: finite(row[SCORED_AP]) or 0.0, default=None)
    if best is None:
        return {"best_epoch": None, "AP": dict.fromkeys(STATES), "train_loss": None, "val_loss": None}
    return {
        "best_epoch": int(best["epoch"]),
        "AP": {state: finite(best[column(AP, state)]) for state in STATES},
        "train_loss": finite(train_loss(best)),
        "val_loss": finite(best[SCORED_VAL_LOSS]),
    }


def doubts(evidence: Evidence) -> list[str]:
    """Sentences about what makes the comparison of the variants weaker than it looks."""
    trainings = list(evidence.trainings.values())
    return [
        *doubts_of_trainings(trainings),
        *doubts_of_imported(evidence.imported, trainings),
        *doubts_of_files(evidence.records),
        *doubts_of_scores(evidence.scored),
    ]


def doubts_of_trainings(trainings: list[Training]) -> list[str]:
    lines = []
    for training in trainings:
        if training.done and (teacher := training.done.get("distilled")):
            lines.append(f"{training.label} was distilled {teacher}: another recipe than that of the other trainings.")
    for other in trainings[1:]:
        first = trainings[0]
        if keys := difference(first.config, other.config, ignore=(*WITHOUT_EFFECT, *FAIR_DIFFERENCES)):
            lines.append(f"{other.label} was trained with another configuration than {first.label}: {', '.join(keys)}.")
    for key, what in COMMON_FACTS.items():
        values = {str(training.environment.get(key)) for training in trainings}
        if len(values) > 1:
            lines.append(f"The variants were trained with different {what}: see Environment.")
    if any(str(training.environment["code_version"]).endswith("-dirty") for training in trainings):
        lines.append("A training ran on code with uncommitted changes: its revision does not reproduce it.")
    return lines


def start_of(training: Training) -> dict[str, str] | None:
    """File name and sha256 of the checkpoint that a training started from; None for random weights."""
    start = start_in(training.config)
    return start.facts if start else None


def doubts_of_imported(imported: Imported | None, trainings: list[Training]) -> list[str]:
    """A comparison with an imported baseline is fair for what was trained from the same file."""
    if imported is None:
        return []
    lines = []
    for training in trainings:
        start = start_of(training)
        if start is None or start["sha256"] != imported.start["sha256"]:
            lines.append(f"{training.label} was trained {told(start)}, and the baseline is {imported.start['file']}.")
    return lines


def doubts_of_files(records: list[dict[str, Any]]) -> list[str]:
    """Of the ONNX files, by what `export` recorded of each."""
    lines = []
    for record in records:
        parity = record["gates"].get("parity", {})
        if parity.get("magnifies_rounding"):
            off = f"{parity['max_box_px']:.2g} px and {parity['max_score']:.2g} in score"
            lines.append(
                f"{record['file']} is off torch by {off}: its network magnifies rounding, and is hardly trained."
            )
    return lines


def doubts_of_scores(scored: list[Metrics]) -> list[str]:
    lines = []
    base_aps = [metrics["coco"]["AP"] or 0.0 for metrics in scored if is_baseline(metrics)]
    if base_aps and max(base_aps) < TELLING_AP:
        lines.append("The baseline detects next to nothing: differences between such APs say nothing.")
    devices = {(metrics["runtime"]["device"], metrics["runtime"]["provider"]) for metrics in scored}
    if len(devices) > 1:
        lines.append("The files were timed on different devices or providers: do not compare their latencies.")
    return lines


def check_same(first: Evidence, other: Evidence) -> None:
    """Raises a UserError if two runs differ in more than seeds, have the same seed, or were measured differently."""
    names = f"{other.run.name} cannot be merged with {first.run.name}"
    for label in first.finished.keys() & other.finished.keys():
        config = first.finished[label].config
        differences = difference(config, other.finished[label].config, ignore=tuple(WITHOUT_EFFECT))
        if wrong := {key: values for key, values in differences.items() if key not in SEEDS}:
            raise UserError(f"{names}: the settings of {label} differ in more than seeds ({shown(wrong)})")
        if not differences:
            values = flatten(config)
            seeds = ", ".join(f"{key}={values[key]}" for key in SEEDS)
            raise UserError(f"{names}: {label} has the same seeds in both ({seeds}): train with --set train.seed=N")
    for evidence in (first, other):
        if not evidence.scored:
            raise UserError(f"{names}: {evidence.run.name} has no scores, run 'make eval' first")
    own, theirs = (meter(main_group(evidence)[0]) for evidence in (first, other))
    if own != theirs:
        raise UserError(
            f"{names}: their files were measured differently, run 'make eval' for both with the same settings"
        )


def merged(evidences: list[Evidence]) -> Evidence:
    """The first run, with every file that was scored in any run: see `sources_of_rows`.

    Raises:
        UserError: the runs are not the same but for their seeds.
    """
    for one, other in combinations(evidences, 2):
        check_same(one, other)
    first = evidences[0]
    apart = chain.from_iterable(measured_alike(first.scored)[1:])
    sources = sources_of_rows(evidences)
    pooled = []
    for evidence in evidences:
        pooled += [metrics for metrics in main_group(evidence) if sources[metrics["dir"]] is evidence]
    return replace(first, scored=sorted([*pooled, *apart], key=page_order))


def sources_of_rows(evidences: list[Evidence]) -> dict[str, Evidence]:
    """Folder of a row -> the first run that has it, among those with a baseline where one of these has it."""
    sources: dict[str, Evidence] = {}
    for evidence in sorted(evidences, key=lambda evidence: not is_baseline(main_group(evidence)[0])):
        for metrics in main_group(evidence):
            sources.setdefault(metrics["dir"], evidence)
    return sources


def main_group(evidence: Evidence) -> list[Metrics]:
    """The scored files that were measured as the baseline."""
    return measured_alike(evidence.scored)[0]


def enter_seeds(findings: Findings, evidences: list[Evidence]) -> None:
    """Turns the findings of `merged` runs into those of all: `seeds`, `over_runs` of the rows, what the others miss.

    seeds.runs has per run its name, its seeds, whether its trainings were healthy, and by folder AP and its differences
    to baseline and PTQ of the same run; seeds.over_runs has by folder the number of runs, mean and sample standard
    deviation (None for one run) of each. What is no mean in a row is of the run that the row comes from.
    """
    min_share = findings["settings"]["min_share_of_best"]
    runs = [one_run(evidence, min_share) for evidence in evidences]
    over_runs = {}
    for folder in dict.fromkeys(chain.from_iterable(run["AP"] for run in runs)):
        over_runs[folder] = {value: spread([run[value].get(folder) for run in runs]) for value in MERGED}
    findings["seeds"] = {"runs": runs, "over_runs": over_runs}
    findings["curve"] = curve(evidences)
    findings["run"] = ", ".join(run["name"] for run in runs)
    for other in evidences[1:]:
        findings["missing"] = [*findings["missing"], *(f"{other.run.name}: {line}" for line in other.missing)]
    sources, rows = sources_of_rows(evidences), {}
    for evidence in evidences:
        rows |= {row["dir"]: row for row in rows_of(main_group(evidence)) if sources[row["dir"]] is evidence}
    for row in findings["groups"][0]["rows"]:
        row |= rows[row["dir"]]
        row["over_runs"] = over_runs[row["dir"]]
        row["telling_difference"] = telling_of_means(row["over_runs"]["AP_difference"])
        row["telling_frequent"] = telling_of_means(row["over_runs"]["AP_frequent_difference"])


def one_run(evidence: Evidence, min_share: float) -> dict[str, Any]:
    """The entry of a run in seeds.runs."""
    trainings = list(evidence.trainings.values())
    config = flatten(trainings[0].config) if trainings else {}
    rows = rows_of(main_group(evidence))
    return {
        "name": evidence.run.name,
        "seeds": {key: config.get(key) for key in SEEDS},
        **{value: {row["dir"]: row[value] for row in rows} for value in MERGED},
        "healthy": {training.label: health(training, min_share)["healthy"] for training in trainings},
    }


def spread(values: list[float | None]) -> dict[str, Any]:
    """Number, mean and sample standard deviation (n - 1) of the values that are there."""
    measured = [value for value in values if value is not None]
    return {
        "n": len(measured),
        "mean": statistics.fmean(measured) if measured else None,
        "sd": statistics.stdev(measured) if len(measured) > 1 else None,
    }
