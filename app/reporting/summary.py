"""The page of the report, as Markdown: verdict first; every number is read from a JSON or CSV of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.reporting.appendix import appendix
from app.reporting.evidence import COCO_NAMES, Evidence, scheme_of
from app.reporting.findings import TELLING_AP, Metrics, is_quantized, measured_alike
from app.tables import markdown_table, number, plain, signed

Findings = dict[str, Any]
HEALTH_WORDS = {True: "yes", False: "**no**", None: "?"}
ANOTHER_METER = "Set apart: measured otherwise, not to be compared with the rows above. "


def summary(evidence: Evidence, found: Findings, figures: list[str]) -> str:
    """The whole page; `figures` are blocks of Markdown."""
    parts = [
        f"# What 4-bit weights cost: run `{found['run']}`",
        "\n\n".join([*verdict(found), *health_lines(found)]),
        *section("## Missing in this run", [f"- {plain(line)}" for line in found["missing"]]),
        "\n".join(tables(evidence.scored, found)),
        *section("## Seeds", seeds_lines(found)),
        *section("## Read this before you compare", [f"- {plain(line)}" for line in caveats(evidence, found)]),
        *section("## Pictures", ["\n\n".join(figures)] if figures else []),
        *section("## All COCO numbers", coco_tables(evidence.scored, found)),
        *appendix(evidence, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(lines)] if lines else []


def verdict(found: Findings) -> list[str]:
    """A paragraph for every quantized variant; only rows of one table are ever set against each other."""
    lines = []
    for group in found["groups"]:
        quantized = [row for row in group["rows"] if is_quantized(row["label"])]
        trained = {scheme_of(row["label"]) for row in quantized if row["label"].startswith("qat-")}
        for row in quantized:  # PTQ speaks for itself only where its scheme was not trained
            if row["label"].startswith("qat-") or scheme_of(row["label"]) not in trained:
                lines.append(_sentence(row, group))
    return lines or ["**No verdict:** no quantized variant was scored."]


def _sentence(row: dict[str, Any], group: dict[str, Any]) -> str:
    base, label = group["rows"][0], plain(row["label"])
    if row["AP_difference"] is None:
        return (
            f"**{label}: no verdict**, AP {number(row['AP'])}: there is no FP16 baseline that was measured the "
            f"same way ({describe(group['measured'])})."
        )
    over = row["over_runs"]
    runs = f"; mean ± sample standard deviation over {over['AP_difference']['n']} runs with other seeds" if over else ""
    return (
        f"**{label}: AP {ap_text(row)} against {ap_text(base)} of the FP16 training, {difference_text(row)}** "
        f"({sample(group['measured'])}{runs}).{_without_training(row, group)} The file has {row['size_mb']:.2f} MB "
        f"against {base['size_mb']:.2f} MB, {row['size_share']:.2f} of it.{_packed(row, group)} One image takes "
        f"{row['p50_ms']:.2f} ms against {base['p50_ms']:.2f} ms (p50, {row['provider']}, float arithmetic: see below)."
    )


def _without_training(row: dict[str, Any], group: dict[str, Any]) -> str:
    """What the same scheme reaches by PTQ, where that was scored too."""
    scheme = scheme_of(row["label"])
    ptq = [r for r in group["rows"] if r["label"] in (f"ptq-{scheme}", f"ptq-{scheme}-bn")]
    if not ptq or row["AP_over_ptq"] is None:
        return ""
    names = {f"ptq-{scheme}": "", f"ptq-{scheme}-bn": "with BatchNorm re-estimated "}
    over = _text(row, "AP_over_ptq", signed)
    told = ", ".join(f"{names[r['label']]}{ap_text(r)} ({difference_text(r)})" for r in ptq)
    return f" The baseline quantized without training (PTQ) has AP {told}. QAT against the better PTQ: {over}."


def ap_text(row: dict[str, Any]) -> str:
    return _text(row, "AP", number)


def difference_text(row: dict[str, Any]) -> str:
    return _text(row, "AP_difference", signed)


def _text(row: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    """The value of this run, or mean ± spread where runs were merged."""
    if row["over_runs"] is None:
        return write(row[key])
    over = row["over_runs"][key]
    return write(over["mean"]) + ("" if over["sd"] is None else f" ± {number(over['sd'])}")


def _packed(row: dict[str, Any], group: dict[str, Any]) -> str:
    """The size of the same weights as native INT4, where that file was scored too."""
    for other in group["rows"]:
        if other["label"] == f"{row['label']}-int4":
            return f" Packed as native INT4: {other['size_mb']:.2f} MB, {other['size_share']:.2f} of it."
    return ""


def health_lines(found: Findings) -> list[str]:
    if not found["health"]:
        return []
    share = found["settings"]["min_share_of_best"]
    told = "; ".join(f"{plain(label)} {_health(judged, share)}" for label, judged in found["health"].items())
    return [f"**Training:** {told}.", *losses_lines(found)]


def losses_lines(found: Findings) -> list[str]:
    """Whether what is scored is what was trained, in losses: they differ less from seed to seed than AP does."""
    told = [
        f"at epoch {over['epoch']} {plain(label)}'s differ from fp16's by {signed(over['train'])} on train images and "
        f"{signed(over['val'])} on validation images"
        for label, over in found["losses"].items()
        if over
    ]
    note = (
        "Where the second is larger by whole units, what is scored is not what was trained; tenths are what one short "
        "training differs from the next."
    )
    return [f"**Losses:** {'; '.join(told)}. {note}"] if told else []


def _health(judged: dict[str, Any], share: float) -> str:
    lowest, epoch, after = judged["lowest_share"], judged["lowest_epoch"], judged["warmup_epochs"]
    if not judged["finite"]:
        return "is **not healthy**, results.csv holds NaN or infinity"
    if judged["healthy"] is None:
        return f"cannot be judged: no validation after warm-up with an AP of {TELLING_AP:g} behind it"
    if judged["healthy"]:
        return f"is healthy, its AP stayed above {share:g} of its running best (lowest {lowest:.3f} at epoch {epoch})"
    return f"is **not healthy**, its AP fell to {lowest:.3f} of its running best at epoch {epoch} (warm-up: {after})"


def tables(scored: list[Metrics], found: Findings) -> list[str]:
    """One table for every group of rows measured alike, each under a line that says how."""
    lines: list[str] = []
    for metrics, group in zip(measured_alike(scored), found["groups"], strict=True):
        lines += ["", ANOTHER_METER + describe(group["measured"]), ""] if lines else [describe(group["measured"]), ""]
        lines += _rows(metrics, group["rows"])
    return lines


def sample(measured: dict[str, Any]) -> str:
    """'built-in coco-subset, val2017, 64 images', with SUBSET where images were left out."""
    images = f"{measured['n_images']:,} images"
    if measured["subset"]:
        images = f"SUBSET of {measured['n_images']:,} of {measured['n_images_listed']:,} images"
    return plain(f"{measured['title']}, {measured['split']}, {images}")


def describe(measured: dict[str, Any]) -> str:
    """Everything that makes two rows comparable, in one line."""
    return (
        f"{sample(measured)}, {measured['imgsz']} px, {measured['evaluator']}, score from {measured['conf']:g}, "
        f"at most {measured['max_det']} boxes an image, annotations `{measured['annotations']}`, "
        f"images `{measured['images']}`:"
    )


def _rows(metrics: list[Metrics], rows: list[dict[str, Any]]) -> list[str]:
    cells = [["variant", "AP", "difference", "AP50", "size MB", "p50 ms", "p90 ms", "provider", "file"]]
    for m, row in zip(metrics, rows, strict=True):
        cells.append([
            row["label"], ap_text(row), difference_text(row), number(m["coco"]["AP50"]),
            f"{row['size_mb']:.2f}", f"{row['p50_ms']:.2f}", f"{m['latency_ms']['p90']:.2f}", row["provider"],
            m["model"]["file"],
        ])  # fmt: skip
    return markdown_table(cells)


def seeds_lines(found: Findings) -> list[str]:
    """A row for every merged run, then their means and spreads; nothing for a single run."""
    if found["seeds"] is None:
        return []
    runs, over_runs = found["seeds"]["runs"], found["seeds"]["over_runs"]
    keys, dirs = list(runs[0]["seeds"]), list(over_runs)
    compared = [name for name in dirs if over_runs[name]["AP_difference"]["n"]]
    cells = [["run", *keys, *(f"AP {name}" for name in dirs), *(f"difference {name}" for name in compared), "healthy"]]
    for run in runs:
        aps = [number(run["AP"].get(name)) for name in dirs]
        differences = [signed(run["AP_difference"].get(name)) for name in compared]
        well = ", ".join(f"{label} {HEALTH_WORDS[healthy]}" for label, healthy in run["healthy"].items())
        cells.append([run["name"], *(str(run["seeds"][key]) for key in keys), *aps, *differences, well])
    for what in ("n", "mean", "sd"):
        aps = [_cell(over_runs[name]["AP"][what], number) for name in dirs]
        differences = [_cell(over_runs[name]["AP_difference"][what], signed) for name in compared]
        cells.append([what, *("" for _ in keys), *aps, *differences, ""])
    note = (
        "sd is the sample standard deviation; the difference is taken within each run, against its own baseline. "
        "Sizes, latencies, pictures and all that follows are those of the first run."
    )
    return [*markdown_table(cells), "", note]


def _cell(value: float | None, write: Callable[[float | None], str]) -> str:
    return str(value) if isinstance(value, int) else write(value)


def caveats(evidence: Evidence, found: Findings) -> list[str]:
    """What the numbers do not say."""
    if not evidence.scored:
        return found["doubts"]
    once = "One training each (n=1): a difference smaller than the spread between seeds says nothing."
    lines = [*([] if found["seeds"] else [once]), *found["doubts"]]
    if not all(m["dataset"]["complete_coco_val"] for m in evidence.scored):
        lines.append("Not measured on the whole of COCO val2017: never compare these numbers with published ones.")
    timed = evidence.scored[0]["latency_ms"]
    device = evidence.scored[0]["runtime"]["device"]
    lines.append(
        f"Latency: one image at a time (batch {timed['batch']}), {timed['runs']} runs after {timed['warmup']} to warm "
        f"up, network only, ONNX Runtime on {device}. ONNX Runtime turns the integer weights into floats and computes "
        "in float: a quantized file is not faster here, and this says nothing about int4 hardware."
    )
    lines.append(
        "Size is the ONNX file on disk. QCDQ files keep one byte a weight, so their size does not show the 4 bits."
    )
    return lines


def coco_tables(scored: list[Metrics], found: Findings) -> list[str]:
    lines: list[str] = []
    for metrics, group in zip(measured_alike(scored), found["groups"], strict=True):
        lines += ["", ANOTHER_METER + describe(group["measured"]), ""] if lines else []
        cells = [[name, *(number(m["coco"][name]) for m in metrics)] for name in COCO_NAMES]
        lines += markdown_table([["", *(m["dir"].removesuffix("-coco") for m in metrics)], *cells])
    return lines
