"""What follows from the evidence: differences, groups measured alike, health, doubts. Written to report.json."""

from __future__ import annotations

import math
import statistics
from typing import Any

from app.core.config import MACHINE_KEYS, Report, UserError, difference, flatten, shown
from app.core.curves import STATES
from app.core.results import candidates, train_loss
from app.report.evidence import BASELINE_DIR, REPACKED, Evidence, Training, scheme_of

Metrics = dict[str, Any]
QUANTIZED = ("qat-", "ptq-")  # how labels of quantized variants begin
TELLING_AP = 0.01  # below it an AP is a handful of lucky boxes
FAIR_DIFFERENCES = ("variant", "quant")  # sections in which the configs of the variants may differ


def findings(evidence: Evidence, settings: Report) -> dict[str, Any]:
    """Every number of the page that no other file of the run holds, and the sentences of doubt."""
    groups, base = measured_alike(evidence.scored), evidence.trainings.get("fp16")
    return {
        "run": evidence.run.name,
        "settings": settings.model_dump(mode="json"),
        "missing": evidence.missing,
        "seeds": None,
        "doubts": doubts(evidence),
        "groups": [{"measured": describe_meter(g[0]), "rows": compare(g)} for g in groups],
        "health": {label: health(t, settings.min_share_of_best) for label, t in evidence.trainings.items()},
        "trainings": {label: speed(training) for label, training in evidence.trainings.items()},
        "losses": {label: loss_over(t, base) for label, t in evidence.trainings.items() if base and t is not base},
        "configs": {label: training.config for label, training in evidence.trainings.items()},
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
    groups = [[m for m in scored if meter(m) == key] for key in dict.fromkeys(meter(m) for m in scored)]
    return sorted(groups, key=lambda g: (g[0]["dir"] != BASELINE_DIR, -g[0]["dataset"]["n_images"]))


def is_quantized(label: str) -> bool:
    """Whether a label is a quantized model of its own: not fp16, and no other packing of one."""
    return label.startswith(QUANTIZED) and not label.endswith(REPACKED)


def describe_meter(m: Metrics) -> dict[str, Any]:
    """How a group was measured, for its label."""
    dataset = m["dataset"]
    keys = ("title", "split", "n_images", "n_images_listed", "subset", "complete_coco_val")
    return {
        **{key: dataset[key] for key in keys},
        "annotations": dataset["annotation_sha256"][:12],
        "images": dataset["image_ids_sha256"][:12],
        "imgsz": m["model"]["imgsz"],
        **{key: m["settings"][key] for key in ("conf", "max_det", "evaluator")},
    }


def compare(group: list[Metrics]) -> list[dict[str, Any]]:
    """A row for every file of a group: AP and size against the baseline of the same group, None without one."""
    base = group[0] if group[0]["dir"] == BASELINE_DIR else None
    rows = []
    for m in group:
        ap, base_ap = m["coco"]["AP"], base["coco"]["AP"] if base and m is not base else None
        size = m["model"]["size_bytes"]
        rows.append({
            "dir": m["dir"],
            "label": m["model"]["label"],
            "file": m["model"]["file"],
            "AP": ap,
            "AP_difference": None if ap is None or base_ap is None else ap - base_ap,
            "size_mb": size / 1e6,
            "size_share": size / base["model"]["size_bytes"] if base and m is not base else None,
            "AP_over_ptq": over_ptq(m, group),
            "p50_ms": m["latency_ms"]["p50"],
            "provider": m["runtime"]["provider"].removesuffix("ExecutionProvider"),
            "over_runs": None,
        })  # fmt: skip
    return rows


def over_ptq(m: Metrics, group: list[Metrics]) -> float | None:
    """What QAT gains over the better PTQ of its scheme in the same group; None where there is nothing to compare."""
    label, ap = m["model"]["label"], m["coco"]["AP"]
    rivals = [other["coco"]["AP"] for other in of_scheme(group, "ptq", scheme_of(label))]
    known = [rival for rival in rivals if rival is not None]
    is_qat = is_quantized(label) and label.startswith("qat-")
    return ap - max(known) if is_qat and known and ap is not None else None


def of_scheme(group: list[Metrics], kind: str, scheme: str) -> list[Metrics]:
    """The rows of one kind ('qat' or 'ptq') and scheme, without repacked files."""
    labels = [(m, m["model"]["label"]) for m in group]
    return [m for m, label in labels if is_quantized(label) and label.startswith(kind) and scheme_of(label) == scheme]


def shown_apart(group: list[Metrics]) -> list[Metrics]:
    """The quantized rows that get figures of their own: QAT, and PTQ where its scheme was not trained."""
    quantized = [m for m in group if is_quantized(m["model"]["label"])]
    qat = {scheme_of(m["model"]["label"]) for m in quantized if m["model"]["label"].startswith("qat-")}
    return [m for m in quantized if m["model"]["label"].startswith("qat-") or scheme_of(m["model"]["label"]) not in qat]


def distinct(group: list[Metrics]) -> list[Metrics]:
    """The rows without files that hold the weights of another row."""
    return [m for m in group if not m["model"]["label"].endswith(REPACKED)] or group


def health(training: Training, min_share: float) -> dict[str, Any]:
    """Whether the scored AP (EMA + re-estimated BN) ever fell below `min_share` of its running best after warm-up (that
    of the learning rate and that of quantization), once that best was at least TELLING_AP.

    `lowest_share` is the lowest of AP / running best, first met at `lowest_epoch`; None where no epoch could be judged.
    """
    best, lowest, lowest_epoch = 0.0, None, None
    after = math.ceil(training.config["hyp"]["warmup_epochs"])
    n_judged = 0
    for row in candidates(training.history):
        ap = row["AP/ema_bn"]
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
    of_base = {row["epoch"]: row for row in candidates(base.history)}
    both = [(row, of_base[row["epoch"]]) for row in candidates(training.history) if row["epoch"] in of_base]
    if not both:
        return None
    ours, theirs = both[-1]
    val = finite(ours["val_loss/ema_bn"] - theirs["val_loss/ema_bn"])
    return {"epoch": int(ours["epoch"]), "train": finite(train_loss(ours) - train_loss(theirs)), "val": val}


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def speed(training: Training) -> dict[str, Any]:
    """The best epoch of a training, and how long it took; None where no epoch was validated."""
    history = training.history
    validated = candidates(history)
    scores = [finite(row["AP/ema_bn"]) or 0.0 for row in validated]
    best = validated[scores.index(max(scores))] if scores else None
    return {
        "epochs": len(history),
        "epochs_planned": training.config["train"]["epochs"],
        "best_epoch": int(best["epoch"]) if best else None,
        "AP": {state: finite(best[f"AP/{state}"]) if best else None for state in STATES},
        "train_loss": finite(train_loss(best)) if best else None,
        "val_loss": finite(best["val_loss/ema_bn"]) if best else None,
        "images_per_s": sum(row["time/images_per_s"] for row in history) / len(history),
        "hours": sum(row["time/epoch_s"] for row in history) / 3600,
    }


def doubts(evidence: Evidence) -> list[str]:
    """Sentences about what makes the comparison of the variants weaker than it looks."""
    trainings = list(evidence.trainings.values())
    found = []
    for other in trainings[1:]:
        if keys := difference(trainings[0].config, other.config, ignore=(*MACHINE_KEYS, *FAIR_DIFFERENCES)):
            found.append(
                f"{other.label} was trained with another configuration than {trainings[0].label}: {', '.join(keys)}."
            )
    for key, what in (("code_version", "code"), ("lock_sha256", "package lock"), ("device", "device"), ("gpus", "GPU")):
        values = {str(training.environment.get(key)) for training in trainings}
        if len(values) > 1:
            found.append(f"The variants were trained with different {what}: see Environment.")
    if any(str(t.environment["code_version"]).endswith("-dirty") for t in trainings):
        found.append("A training ran on code with uncommitted changes: its revision does not reproduce it.")
    for record in evidence.records:
        parity = record["gates"].get("parity", {})
        if parity.get("magnifies_rounding"):
            off = f"{parity['max_box_px']:.2g} px and {parity['max_score']:.2g} in score"
            found.append(
                f"{record['file']} is off torch by {off}: its network magnifies rounding, and is hardly trained."
            )
    aps = [m["coco"]["AP"] or 0.0 for m in evidence.scored if m["dir"] == BASELINE_DIR]
    if aps and max(aps) < TELLING_AP:
        found.append("The baseline detects next to nothing: differences between such APs say nothing.")
    devices = {(m["runtime"]["device"], m["runtime"]["provider"]) for m in evidence.scored}
    if len(devices) > 1:
        found.append("The files were timed on different devices or providers: do not compare their latencies.")
    return found


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
