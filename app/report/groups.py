"""Groups of scored files that were measured alike, and what each file has against the baseline of its group."""

from __future__ import annotations

from typing import Any

from app.coco.detail import Metrics
from app.coco.score import STATS
from app.core.labels import BASELINE, Label
from app.core.results import AP_FREQUENT, FREQUENT_BOXES
from app.report.evidence import label_of
from app.report.tables import plain

N_HASH = 12  # hex digits of a hash on the page; the whole one is in the JSON
DATASET_KEYS = ("title", "split", "n_images", "n_images_listed", "subset", "complete_coco_val")


def meter(metrics: Metrics) -> tuple[Any, ...]:
    """What must be equal for two rows to share a table: images, annotations, input size, thresholds, evaluator."""
    dataset, settings = metrics["dataset"], metrics["settings"]
    return (
        dataset["annotation_sha256"],
        dataset["image_ids_sha256"],
        metrics["model"]["imgsz"],
        settings["conf"],
        settings["max_det"],
        settings["evaluator"],
    )


def describe_meter(metrics: Metrics) -> dict[str, Any]:
    """How a group was measured, for the line above its table."""
    dataset, settings = metrics["dataset"], metrics["settings"]
    return {
        **{key: dataset[key] for key in DATASET_KEYS},
        "annotations": dataset["annotation_sha256"][:N_HASH],
        "images": dataset["image_ids_sha256"][:N_HASH],
        "imgsz": metrics["model"]["imgsz"],
        "conf": settings["conf"],
        "max_det": settings["max_det"],
        "evaluator": settings["evaluator"],
        "n_frequent_classes": dataset.get("n_frequent_classes"),  # None: scored before there was this number
    }


def stats_of(group: list[Metrics]) -> list[str]:
    """The names of the numbers that rows have: the twelve, and AP_FREQUENT where one has it."""
    return [*STATS, AP_FREQUENT] if any(AP_FREQUENT in metrics["coco"] for metrics in group) else list(STATS)


def frequent_line(group: list[Metrics]) -> str:
    """What AP_FREQUENT of rows measured alike is; empty where none has it."""
    counts = [metrics["dataset"]["n_frequent_classes"] for metrics in group if AP_FREQUENT in metrics["coco"]]
    if not counts:
        return ""
    return f"AP frequent: mean AP of the {counts[0]} classes with at least {FREQUENT_BOXES} objects in these images."


def sample(measured: dict[str, Any]) -> str:
    """'drawn shapes (not COCO), val2017, 64 images', with SUBSET where images were left out."""
    return plain(f"{measured['title']}, {measured['split']}, {amount(measured, 'images')}")


def amount(measured: dict[str, Any], what: str) -> str:
    """'64 images', or 'SUBSET of 20 of 64 images'; `what` is the last word."""
    n = f"{measured['n_images']:,}"
    return f"SUBSET of {n} of {measured['n_images_listed']:,} {what}" if measured["subset"] else f"{n} {what}"


def describe(measured: dict[str, Any]) -> str:
    """Everything that makes two rows comparable, in one line."""
    return (
        f"{sample(measured)}, {measured['imgsz']} px, {measured['evaluator']}, score from {measured['conf']:g}, "
        f"at most {measured['max_det']} boxes an image, annotations `{measured['annotations']}`, "
        f"images `{measured['images']}`:"
    )


def measured_alike(scored: list[Metrics]) -> list[list[Metrics]]:
    """Groups of equal meter; the group with the baseline first, then those with more images."""
    groups: dict[tuple[Any, ...], list[Metrics]] = {}
    for metrics in scored:
        groups.setdefault(meter(metrics), []).append(metrics)
    return sorted(groups.values(), key=lambda group: (not is_baseline(group[0]), -group[0]["dataset"]["n_images"]))


def is_baseline(metrics: Metrics) -> bool:
    return metrics["dir"] == BASELINE.scores_dir


def rows_of(group: list[Metrics]) -> list[dict[str, Any]]:
    """A row for every file of a group: AP and size against the baseline of the same group, None without one."""
    return [_row(metrics, group) for metrics in group]


def _row(metrics: Metrics, group: list[Metrics]) -> dict[str, Any]:
    model, ap, frequent = metrics["model"], metrics["coco"]["AP"], metrics["coco"].get(AP_FREQUENT)
    base = group[0]
    ap_difference, frequent_difference, size_share = None, None, None
    if is_baseline(base) and metrics is not base:
        ap_difference = change(base["coco"]["AP"], ap)
        frequent_difference = change(base["coco"].get(AP_FREQUENT), frequent)
        size_share = model["size_bytes"] / base["model"]["size_bytes"]
    return {
        "dir": metrics["dir"],
        "label": model["label"],
        "file": model["file"],
        "start": model.get("start"),
        "AP": ap,
        "AP_difference": ap_difference,
        "AP_frequent": frequent,
        "AP_frequent_difference": frequent_difference,
        "size_mb": model["size_bytes"] / 1e6,
        "size_share": size_share,
        "AP_over_ptq": over_ptq(metrics, group),
        "p50_ms": metrics["latency_ms"]["p50"],
        "provider": metrics["runtime"]["provider"].removesuffix("ExecutionProvider"),
        "over_runs": None,
    }


def change(old: float | None, new: float | None) -> float | None:
    """new - old, where both could be measured."""
    return None if old is None or new is None else new - old


def over_ptq(metrics: Metrics, group: list[Metrics]) -> float | None:
    """What QAT gains over the better PTQ of its scheme in the same group; None where there is nothing to compare.

    PTQ knows no distillation: a distilled QAT is set against the PTQ of the same scheme.
    """
    label, ap = label_of(metrics), metrics["coco"]["AP"]
    if label.method != "qat" or label.is_repacked or ap is None:
        return None
    ptq = [Label("ptq", label.base_scheme, bn) for bn in (False, True)]
    aps = [rival["coco"]["AP"] for rival in group if label_of(rival) in ptq]
    measured = [rival_ap for rival_ap in aps if rival_ap is not None]
    return ap - max(measured) if measured else None


def judged_labels(labels: list[Label]) -> list[Label]:
    """The quantized models that get a verdict and figures of their own: QAT, and PTQ where its scheme was not trained.

    Repacked files are left out, as they hold the weights of another one.
    """
    quantized = [label for label in labels if label.is_quantized and not label.is_repacked]
    trained = {label.base_scheme for label in quantized if label.method == "qat"}
    return [label for label in quantized if label.method == "qat" or label.scheme not in trained]


def shown_apart(group: list[Metrics]) -> list[Metrics]:
    """The rows that get figures of their own, see judged_labels."""
    labels = judged_labels(list(map(label_of, group)))
    return [metrics for metrics in group if label_of(metrics) in labels]


def distinct(group: list[Metrics]) -> list[Metrics]:
    """The rows without files that hold the weights of another row."""
    originals = [metrics for metrics in group if not label_of(metrics).is_repacked]
    return originals or group
