"""The sentences at the top of the page: AP against AP, what that says, and whether the trainings were healthy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from app.core.labels import Label
from app.core.results import AP_FREQUENT
from app.core.start import told
from app.report.findings import Findings
from app.report.groups import amount, describe, judged_labels, sample
from app.report.spread import ENOUGH_RUNS, TELLING_AP
from app.report.tables import number, plain, signed

DRAWN = "drawn"  # a word in the title of every dataset that this program has drawn
ONCE_IN_TWENTY = "which chance exceeds once in twenty"


def verdict(findings: Findings) -> list[str]:
    """A paragraph for every judged model; only rows of one table are ever set against each other."""
    lines = []
    for group in findings["groups"]:
        labels = [Label.parse(row["label"]) for row in group["rows"]]
        judged = judged_labels(labels)
        for row, label in zip(group["rows"], labels, strict=True):
            if label in judged:
                lines.append(_sentence(row, group))
    return lines or ["**No verdict:** no quantized variant was scored."]


def _sentence(row: dict[str, Any], group: dict[str, Any]) -> str:
    base, label = group["rows"][0], plain(row["label"])
    if row["AP_difference"] is None:
        has_baseline = row["size_share"] is not None
        reason = "there is no FP16 baseline that was measured the same way"
        if has_baseline:
            reason = "the images have no object that counts"
        return f"**{label}: no verdict**, AP {number(row['AP'])}: {reason} ({describe(group['measured'])})."
    whose = "baseline" if base["start"] else "training"
    aps = f"AP {ap_text(row)} against {ap_text(base)} of the FP16 {whose}"
    if _mean(base, "AP") < TELLING_AP:
        return (
            f"**{label}: cannot be judged**, {aps} ({_data(row, group)}): below {TELLING_AP:g} an AP rests on a "
            "handful of boxes. Train longer or on more images."
        )
    return (
        f"**{label}: {aps}, {difference_text(row)}** ({_data(row, group)}).{_telling(row)}"
        f"{_frequent(row, group)}{_without_training(row, group)}"
        f" The file has {row['size_mb']:.2f} MB against {base['size_mb']:.2f} MB, "
        f"{row['size_share']:.2f} of it.{_packed(row, group)}"
    )


def start_lines(findings: Findings) -> list[str]:
    """Which networks did not begin with random weights; nothing where all did."""
    parts = []
    if findings["imported"]:
        file = plain(told(findings["imported"])).removeprefix("from ")
        parts.append(f"the baseline is {file}, imported and not trained here")
    for label, start in findings["starts"].items():
        if start:
            parts.append(f"{plain(label)} was trained {plain(told(start))}")
        elif any([findings["imported"], *findings["starts"].values()]):
            parts.append(f"{plain(label)} was trained {told(None)}")
    return [f"**Start:** {'; '.join(parts)}."] if parts else []


def _mean(row: dict[str, Any], key: str) -> Any:
    """The value of this run, or the mean where runs were merged; None where no run has both models."""
    return row[key] if row["over_runs"] is None else row["over_runs"][key]["mean"]


def _data(row: dict[str, Any], group: dict[str, Any]) -> str:
    """'n=1, 64 drawn images: says nothing about COCO': how many trainings, and what they were scored on."""
    measured, n_runs, spread = group["measured"], 1, ""
    if row["over_runs"]:
        n_runs = row["over_runs"]["AP_difference"]["n"]
        spread = f"; mean ± sample standard deviation over {n_runs} runs with other seeds"
    data = sample(measured)
    if DRAWN in measured["title"].split():
        data = f"{amount(measured, 'drawn images')}: says nothing about COCO"
    return f"n={n_runs}, {data}{spread}"


def _telling(row: dict[str, Any]) -> str:
    """Whether the difference is larger than chance makes it."""
    limit = row["telling_difference"]
    if limit is None:
        is_merged = row["over_runs"] is not None
        return f" Too few runs for a spread: merge {ENOUGH_RUNS} or more." if is_merged else ""
    side = "more" if abs(_mean(row, "AP_difference")) > limit else "less"
    if row["over_runs"]:
        return f" That is {side} than {number(limit)}, {ONCE_IN_TWENTY}."
    return f" That is {side} than about {limit:.2g}, by which two single trainings may differ by chance (see below)."


def _frequent(row: dict[str, Any], group: dict[str, Any]) -> str:
    """The same of AP_FREQUENT, which differs less from seed to seed; nothing where no class is frequent."""
    base, difference = group["rows"][0], f"{AP_FREQUENT}_difference"
    if row[difference] is None:
        return ""
    aps = f"AP {merged_text(row, AP_FREQUENT, number)} against {merged_text(base, AP_FREQUENT, number)}"
    limit, told = row["telling_frequent"], ""
    if limit is not None:
        side = "beyond" if abs(_mean(row, difference)) > limit else "within"
        by_chance = f"{number(limit)}, {ONCE_IN_TWENTY}"
        told = f", {side} {by_chance if row['over_runs'] else f'about {limit:.2g} that chance may make'}"
    n_classes = group["measured"]["n_frequent_classes"]
    return f" Over the {n_classes} frequent classes: {aps}, {merged_text(row, difference, signed)}{told}."


def telling_lines(findings: Findings) -> list[str]:
    """Where the limit of `_telling` comes from; nothing where no verdict names it, or where runs were merged."""
    rows = list(chain.from_iterable(group["rows"] for group in findings["groups"]))
    is_named = any(row["telling_difference"] is not None for row in rows)
    if findings["seeds"] or not is_named:
        return []
    spread = findings["seed_spread"]
    model = Path(spread["model"]).stem
    text = (
        f"**How large a difference means something:** one above about {spread['telling_share']:.2f} of the AP, with "
        f"one training each. That is {spread['rule']} the spread between seeds, {spread['share']:.2f} of the AP "
        f"(standard deviation of {spread['n']} FP16 trainings, {spread['source']}). It was measured with {model} at "
        f"{spread['imgsz']} px on a small part of COCO, at an AP of {spread['mean']:.3f} after {spread['epoch']} "
        "epochs: anywhere else it is only an orientation."
    )
    if any(row["telling_frequent"] is not None for row in rows):
        frequent = spread["frequent"]
        text += (
            f" For the AP of frequent classes it is about {frequent['telling_share']:.2f} of that AP, as FP16 "
            f"trainings spread by {frequent['share']:.3f} of it (n={frequent['n']}, at an AP of {frequent['mean']:.3f} "
            f"after {frequent['epoch']} epochs)."
        )
    text += " The spread of this run shows when it is repeated with `--set train.seed=1` and more, and merged: "
    return [text + '`make report RUN=A ARGS="--runs B C"`.']


def _without_training(row: dict[str, Any], group: dict[str, Any]) -> str:
    """What the same scheme reaches by PTQ, where that was scored too."""
    if _mean(row, "AP_over_ptq") is None:
        return ""
    plain_ptq = Label("ptq", Label.parse(row["label"]).base_scheme)
    prefixes = {str(plain_ptq): "", str(replace(plain_ptq, bn=True)): "with BatchNorm re-estimated "}
    rivals = [other for other in group["rows"] if other["label"] in prefixes]
    ptq = ", ".join(f"{prefixes[rival['label']]}{ap_text(rival)} ({difference_text(rival)})" for rival in rivals)
    over = merged_text(row, "AP_over_ptq", signed)
    return f" The baseline quantized without training (PTQ) has AP {ptq}. QAT against the better PTQ: {over}."


def ap_text(row: dict[str, Any]) -> str:
    return merged_text(row, "AP", number)


def difference_text(row: dict[str, Any]) -> str:
    return merged_text(row, "AP_difference", signed)


def merged_text(row: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    """The value of this run, or mean ± spread where runs were merged."""
    if row["over_runs"] is None:
        return write(row[key])
    mean, sd = row["over_runs"][key]["mean"], row["over_runs"][key]["sd"]
    return write(mean) if sd is None else f"{write(mean)} ± {number(sd)}"


def _packed(row: dict[str, Any], group: dict[str, Any]) -> str:
    """The size of the same weights as native INT4, where that file was scored too."""
    packed = str(replace(Label.parse(row["label"]), packing="int4"))
    for other in group["rows"]:
        if other["label"] == packed:
            return f" Packed as native INT4: {other['size_mb']:.2f} MB, {other['size_share']:.2f} of it."
    return ""


def health_lines(findings: Findings) -> list[str]:
    """Whether each training was healthy; where runs were merged, the others than the first in a word."""
    share, of_run = findings["settings"]["min_share_of_best"], _of_first_run(findings)
    sentences = [f"{plain(label)}{of_run} {_health(judged, share)}" for label, judged in findings["health"].items()]
    for run in findings["seeds"]["runs"][1:] if findings["seeds"] else []:
        sentences += _health_of_other(run)
    return [f"**Training:** {'; '.join(sentences)}.", *losses_lines(findings)] if sentences else []


def _of_first_run(findings: Findings) -> str:
    """Whose the findings are that no other run has changed, where runs were merged."""
    return f" of {plain(findings['seeds']['runs'][0]['name'])}" if findings["seeds"] else ""


def _health_of_other(run: dict[str, Any]) -> list[str]:
    """Which trainings of a merged run are not healthy; `run` is an entry of seeds.runs."""
    name = plain(run["name"])
    sentences = []
    for label, is_healthy in run["healthy"].items():
        if not is_healthy:
            judgement = "cannot be judged" if is_healthy is None else "is **not healthy**"
            sentences.append(f"{plain(label)} of {name} {judgement}")
    return sentences or [f"all of {name} are healthy"] if run["healthy"] else []


def losses_lines(findings: Findings) -> list[str]:
    """Whether what is scored is what was trained, in losses: they differ less from seed to seed than AP does."""
    of_run = _of_first_run(findings)
    parts = []
    for label, differences in findings["losses"].items():
        if differences:
            train, val = signed(differences["train"]), signed(differences["val"])
            parts.append(
                f"at epoch {differences['epoch']} {plain(label)}'s{of_run} differ from fp16's by {train} on train "
                f"images and {val} on validation images"
            )
    note = (
        "Where the second is larger by whole units, what is scored is not what was trained; tenths are what one short "
        "training differs from the next."
    )
    return [f"**Losses:** {'; '.join(parts)}. {note}"] if parts else []


def _health(judged: dict[str, Any], share: float) -> str:
    lowest, epoch, after = judged["lowest_share"], judged["lowest_epoch"], judged["warmup_epochs"]
    if not judged["finite"]:
        return "is **not healthy**, results.csv holds NaN or infinity"
    if judged["healthy"] is None:
        return f"cannot be judged: no validation after warm-up with an AP of {TELLING_AP:g} behind it"
    if judged["healthy"] and lowest >= 1:
        return "is healthy, its AP never fell below its running best"
    if judged["healthy"]:
        return f"is healthy, its AP stayed above {share:g} of its running best (lowest {lowest:.3f} at epoch {epoch})"
    return f"is **not healthy**, its AP fell to {lowest:.3f} of its running best at epoch {epoch} (warm-up: {after})"
