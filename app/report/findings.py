"""What follows from the evidence: differences, groups measured alike, health, doubts. Written to report.json."""

from __future__ import annotations

import math
import statistics
from typing import Any

from app.coco.detail import Metrics
from app.core.config import MACHINE_KEYS, Report, UserError, difference, flatten, shown
from app.core.labels import BASELINE, Label
from app.core.results import AP, SCORED, SCORED_AP, STATES, VAL_LOSS, Row, candidates, column, train_loss
from app.report.evidence import Evidence, Training, label_of

TELLING_AP = 0.01  # below it an AP is a handful of lucky boxes
FAIR_DIFFERENCES = ("variant", "quant")  # sections in which the configs of the variants may differ
SEEDS = ("train.seed", "data.seed")
MERGED = ("AP", "AP_difference", "AP_over_ptq")  # values of a row that get a mean over runs with other seeds
SCORED_VAL_LOSS = column(VAL_LOSS, SCORED)
LATER_SECTIONS = ("guard", "report")  # change nothing that is trained, exported or scored


def findings(evidence: Evidence, settings: Report) -> dict[str, Any]:
    """Every number of the page that no other file of the run holds, and the sentences of doubt."""
    trainings = evidence.trainings
    base = trainings.get(str(BASELINE))
    groups = []
    for group in measured_alike(evidence.scored):
        groups.append({"measured": describe_meter(group[0]), "rows": compare(group)})
    losses = {}
    for label, training in trainings.items():
        if base and training is not base:
            losses[label] = loss_over(training, base)
    return {
        "run": evidence.run.name,
        "settings": settings.model_dump(mode="json"),
        "missing": evidence.missing,
        "seeds": None,
        "doubts": doubts(evidence),
        "groups": groups,
        "health": {label: health(training, settings.min_share_of_best) for label, training in trainings.items()},
        "trainings": {label: speed(training) for label, training in trainings.items()},
        "losses": losses,
        "configs": {label: training.config for label, training in trainings.items()},
    }


def meter(metrics: Metrics) -> tuple[Any, ...]:
    """What must be equal for two rows to share a table: images, annotations, input size, thresholds, evaluator."""
    dataset, settings = metrics["dataset"], metrics["settings"]
    return (
        dataset["annotation_sha256"], dataset["image_ids_sha256"], metrics["model"]["imgsz"],
        settings["conf"], settings["max_det"], settings["evaluator"],
    )  # fmt: skip


def measured_alike(scored: list[Metrics]) -> list[list[Metrics]]:
    """Groups of equal meter; the group with the baseline first, then those with more images."""
    groups: dict[tuple[Any, ...], list[Metrics]] = {}
    for metrics in scored:
        groups.setdefault(meter(metrics), []).append(metrics)
    return sorted(groups.values(), key=lambda group: (not is_baseline(group[0]), -group[0]["dataset"]["n_images"]))


def is_baseline(metrics: Metrics) -> bool:
    return metrics["dir"] == BASELINE.scores_dir


def describe_meter(metrics: Metrics) -> dict[str, Any]:
    """How a group was measured, for the line above its table."""
    dataset, settings = metrics["dataset"], metrics["settings"]
    keys = ("title", "split", "n_images", "n_images_listed", "subset", "complete_coco_val")
    return {
        **{key: dataset[key] for key in keys},
        "annotations": dataset["annotation_sha256"][:12],
        "images": dataset["image_ids_sha256"][:12],
        "imgsz": metrics["model"]["imgsz"],
        "conf": settings["conf"],
        "max_det": settings["max_det"],
        "evaluator": settings["evaluator"],
    }


def compare(group: list[Metrics]) -> list[dict[str, Any]]:
    """A row for every file of a group: AP and size against the baseline of the same group, None without one."""
    base = group[0] if is_baseline(group[0]) else None
    rows = []
    for metrics in group:
        other = base if metrics is not base else None
        ap, size = metrics["coco"]["AP"], metrics["model"]["size_bytes"]
        base_ap = other["coco"]["AP"] if other else None
        rows.append({
            "dir": metrics["dir"],
            "label": metrics["model"]["label"],
            "file": metrics["model"]["file"],
            "AP": ap,
            "AP_difference": None if ap is None or base_ap is None else ap - base_ap,
            "size_mb": size / 1e6,
            "size_share": size / other["model"]["size_bytes"] if other else None,
            "AP_over_ptq": over_ptq(metrics, group),
            "p50_ms": metrics["latency_ms"]["p50"],
            "provider": metrics["runtime"]["provider"].removesuffix("ExecutionProvider"),
            "over_runs": None,
        })  # fmt: skip
    return rows


def over_ptq(metrics: Metrics, group: list[Metrics]) -> float | None:
    """What QAT gains over the better PTQ of its scheme in the same group; None where there is nothing to compare."""
    label, ap = label_of(metrics), metrics["coco"]["AP"]
    if label.method != "qat" or label.is_repacked or ap is None:
        return None
    rivals = []
    for other in group:
        rival, rival_ap = label_of(other), other["coco"]["AP"]
        if rival.method == "ptq" and rival.scheme == label.scheme and not rival.is_repacked and rival_ap is not None:
            rivals.append(rival_ap)
    return ap - max(rivals) if rivals else None


def judged_labels(labels: list[Label]) -> list[Label]:
    """The quantized models that get a verdict and figures of their own: QAT, and PTQ where its scheme was not trained.

    Repacked files are left out, as they hold the weights of another one.
    """
    quantized = [label for label in labels if label.is_quantized and not label.is_repacked]
    trained = {label.scheme for label in quantized if label.method == "qat"}
    return [label for label in quantized if label.method == "qat" or label.scheme not in trained]


def shown_apart(group: list[Metrics]) -> list[Metrics]:
    """The rows that get figures of their own, see judged_labels."""
    labels = judged_labels([label_of(metrics) for metrics in group])
    return [metrics for metrics in group if label_of(metrics) in labels]


def distinct(group: list[Metrics]) -> list[Metrics]:
    """The rows without files that hold the weights of another row."""
    return [metrics for metrics in group if not label_of(metrics).is_repacked] or group


def health(training: Training, min_share: float) -> dict[str, Any]:
    """Whether the scored AP (EMA + re-estimated BN) stayed above `min_share` of its running best.

    Epochs are judged after both warm-ups, that of the learning rate and that of quantization, and once the running best
    is at least TELLING_AP. `lowest_share` is the lowest of AP / running best, first met at `lowest_epoch`. Both are
    None where no epoch could be judged.
    """
    best, lowest, lowest_epoch, n_judged = 0.0, None, None, 0
    after = math.ceil(training.config["hyp"]["warmup_epochs"])
    for row in candidates(training.history):
        ap = row[SCORED_AP]
        best = max(best, ap)
        if row["epoch"] > after and best >= TELLING_AP:
            n_judged += 1
            if lowest is None or not ap / best >= lowest:  # a NaN counts as a fall
                lowest, lowest_epoch = ap / best, int(row["epoch"])
    all_finite = all(math.isfinite(value) for row in training.history for value in row.values())
    judged = None if lowest is None else lowest >= min_share
    return {
        "healthy": judged if all_finite else False,
        "finite": all_finite,
        "warmup_epochs": after,
        "epochs_judged": n_judged,
        "lowest_share": None if lowest is None else finite(lowest),
        "lowest_epoch": lowest_epoch,
    }


def loss_over(training: Training, base: Training) -> dict[str, Any] | None:
    """Train and validation loss less the baseline's, at the last epoch that both have validated; None without one.

    Where the second is much larger than the first, what is scored is not what was trained: the earlier recipe of
    runs/LOG.md had +0.13 and +3.67.
    """
    base_rows = {row["epoch"]: row for row in candidates(base.history)}
    common = [row for row in candidates(training.history) if row["epoch"] in base_rows]
    if not common:
        return None
    row = common[-1]
    base_row = base_rows[row["epoch"]]
    train = train_loss(row) - train_loss(base_row)
    val = row[SCORED_VAL_LOSS] - base_row[SCORED_VAL_LOSS]
    return {"epoch": int(row["epoch"]), "train": finite(train), "val": finite(val)}


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def speed(training: Training) -> dict[str, Any]:
    """The best epoch of a training, and how long it took; None where no epoch was validated."""
    history = training.history
    best = best_row(training)
    return {
        "epochs": len(history),
        "epochs_planned": training.config["train"]["epochs"],
        "best_epoch": int(best["epoch"]) if best else None,
        "AP": {state: finite(best[column(AP, state)]) if best else None for state in STATES},
        "train_loss": finite(train_loss(best)) if best else None,
        "val_loss": finite(best[SCORED_VAL_LOSS]) if best else None,
        "images_per_s": sum(row["time/images_per_s"] for row in history) / len(history),
        "hours": sum(row["time/epoch_s"] for row in history) / 3600,
    }


def best_row(training: Training) -> Row | None:
    """The first of the epochs with the highest scored AP, where NaN counts as 0."""
    return max(candidates(training.history), key=lambda row: finite(row[SCORED_AP]) or 0.0, default=None)


def doubts(evidence: Evidence) -> list[str]:
    """Sentences about what makes the comparison of the variants weaker than it looks."""
    lines = doubts_of_trainings(list(evidence.trainings.values()))
    for record in evidence.records:
        parity = record["gates"].get("parity", {})
        if parity.get("magnifies_rounding"):
            off = f"{parity['max_box_px']:.2g} px and {parity['max_score']:.2g} in score"
            lines.append(
                f"{record['file']} is off torch by {off}: its network magnifies rounding, and is hardly trained."
            )
    base_aps = [metrics["coco"]["AP"] or 0.0 for metrics in evidence.scored if is_baseline(metrics)]
    if base_aps and max(base_aps) < TELLING_AP:
        lines.append("The baseline detects next to nothing: differences between such APs say nothing.")
    devices = {(metrics["runtime"]["device"], metrics["runtime"]["provider"]) for metrics in evidence.scored}
    if len(devices) > 1:
        lines.append("The files were timed on different devices or providers: do not compare their latencies.")
    return lines


def doubts_of_trainings(trainings: list[Training]) -> list[str]:
    lines = []
    for other in trainings[1:]:
        first = trainings[0]
        if keys := difference(first.config, other.config, ignore=(*MACHINE_KEYS, *FAIR_DIFFERENCES)):
            lines.append(f"{other.label} was trained with another configuration than {first.label}: {', '.join(keys)}.")
    for key, what in (("code_version", "code"), ("lock_sha256", "package lock"), ("device", "device"), ("gpus", "GPU")):
        values = {str(training.environment.get(key)) for training in trainings}
        if len(values) > 1:
            lines.append(f"The variants were trained with different {what}: see Environment.")
    versions = [str(training.environment["code_version"]) for training in trainings]
    if any(version.endswith("-dirty") for version in versions):
        lines.append("A training ran on code with uncommitted changes: its revision does not reproduce it.")
    return lines


def check_same(first: Evidence, other: Evidence) -> None:
    """Refuses two runs that are not the same experiment.

    Raises:
        UserError: a variant of both was trained with other settings than its seed, or with the same seed; or the two
            baselines were measured differently.
    """
    names = f"{other.run.name} cannot be merged with {first.run.name}"
    for label in first.finished.keys() & other.finished.keys():
        config = first.finished[label].config
        differences = difference(config, other.finished[label].config, ignore=(*MACHINE_KEYS, *LATER_SECTIONS))
        if wrong := {key: values for key, values in differences.items() if key not in SEEDS}:
            raise UserError(f"{names}: the settings of {label} differ in more than seeds ({shown(wrong)})")
        if not differences:
            values = flatten(config)
            seeds = ", ".join(f"{key}={values[key]}" for key in SEEDS)
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
    dirs: dict[str, None] = {}
    for run in runs:
        dirs |= dict.fromkeys(run["AP"])
    over_runs = {folder: over_all(runs, folder) for folder in dirs}
    found["seeds"] = {"runs": runs, "over_runs": over_runs}
    found["run"] = ", ".join(evidence.run.name for evidence in evidences)
    for other in evidences[1:]:
        found["missing"] = [*found["missing"], *(f"{other.run.name}: {line}" for line in other.missing)]
    for row in found["groups"][0]["rows"]:
        row["over_runs"] = over_runs[row["dir"]]


def one_run(evidence: Evidence, min_share: float) -> dict[str, Any]:
    """The entry of a run in seeds.runs."""
    first = next(iter(evidence.trainings.values()), None)
    config = flatten(first.config) if first else {}
    entry: dict[str, Any] = {"name": evidence.run.name, "seeds": {key: config.get(key) for key in SEEDS}}
    rows = compare(measured_alike(evidence.scored)[0])
    for what in MERGED:
        entry[what] = {row["dir"]: row[what] for row in rows}
    judged = {label: health(training, min_share) for label, training in evidence.trainings.items()}
    entry["healthy"] = {label: judgement["healthy"] for label, judgement in judged.items()}
    return entry


def over_all(runs: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """Number, mean and spread of every merged value of a scored folder."""
    merged = {}
    for what in MERGED:
        merged[what] = spread([run[what].get(folder) for run in runs])
    return merged


def spread(values: list[float | None]) -> dict[str, Any]:
    """Number, mean and sample standard deviation (n - 1) of the values that are there."""
    there = [value for value in values if value is not None]
    return {
        "n": len(there),
        "mean": statistics.fmean(there) if there else None,
        "sd": statistics.stdev(there) if len(there) > 1 else None,
    }
