"""The page of the report, as Markdown: verdict first; every number is read from a JSON or CSV of the run."""

from __future__ import annotations

from typing import Any

from app.appendix import appendix
from app.evidence import COCO_NAMES, Evidence
from app.findings import Metrics, is_quantized, measured_alike
from app.tables import markdown_table, number, plain, signed

Findings = dict[str, Any]
ANOTHER_METER = "Set apart: measured otherwise, not to be compared with the rows above. "


def summary(evidence: Evidence, found: Findings, figures: list[str]) -> str:
    """The whole page; `figures` are blocks of Markdown."""
    parts = [
        f"# What 4-bit weights cost: run `{evidence.run.name}`",
        "\n\n".join([*verdict(found), *health_lines(found)]),
        *section("## Missing in this run", [f"- {plain(line)}" for line in evidence.missing]),
        "\n".join(tables(evidence.scored, found)),
        *section("## Read this before you compare", [f"- {line}" for line in caveats(evidence, found)]),
        *section("## Pictures", ["\n\n".join(figures)] if figures else []),
        *section("## All COCO numbers", coco_tables(evidence.scored, found)),
        *appendix(evidence, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(lines)] if lines else []


def verdict(found: Findings) -> list[str]:
    """A sentence for every quantized variant; only rows of one table are ever set against each other."""
    lines = []
    for group in found["groups"]:
        for row in group["rows"]:
            if is_quantized(row["label"]):
                lines.append(_sentence(row, group))
    return lines or ["**No verdict:** no quantized variant was scored."]


def _sentence(row: dict[str, Any], group: dict[str, Any]) -> str:
    base = group["rows"][0]
    if row["AP_difference"] is None:
        return (
            f"**{row['label']}: no verdict**, AP {number(row['AP'])}: there is no FP16 baseline that was measured the "
            f"same way ({describe(group['measured'])})."
        )
    return (
        f"**{row['label']}: AP {number(row['AP'])} against {number(base['AP'])} of the FP16 training, "
        f"{signed(row['AP_difference'])}** ({sample(group['measured'])}). The file has {row['size_mb']:.2f} MB "
        f"against {base['size_mb']:.2f} MB, {row['size_share']:.2f} of it.{_packed(row, group)}"
    )


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
    told = "; ".join(f"{label} {_health(judged, share)}" for label, judged in found["health"].items())
    return [f"**Training:** {told}."]


def _health(judged: dict[str, Any], share: float) -> str:
    lowest, epoch, after = judged["lowest_share"], judged["lowest_epoch"], judged["warmup_epochs"]
    if not judged["finite"]:
        return "is **not healthy**, results.csv holds NaN or infinity"
    if judged["healthy"] is None:
        return "cannot be judged, too few epochs after warm-up"
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
    return f"{measured['title']}, {measured['split']}, {images}"


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
            row["label"], number(row["AP"]), signed(row["AP_difference"]), number(m["coco"]["AP50"]),
            f"{row['size_mb']:.2f}", f"{m['latency_ms']['p50']:.2f}", f"{m['latency_ms']['p90']:.2f}",
            m["runtime"]["provider"].removesuffix("ExecutionProvider"), m["model"]["file"],
        ])  # fmt: skip
    return markdown_table(cells)


def caveats(evidence: Evidence, found: Findings) -> list[str]:
    """What the numbers do not say."""
    if not evidence.scored:
        return found["doubts"]
    lines = [
        "One training each (n=1): a difference smaller than the spread between seeds says nothing.",
        *found["doubts"],
    ]
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
        lines += markdown_table([["", *(m["dir"] for m in metrics)], *cells])
    return lines
