"""The page of the report, as Markdown: verdict first; every number is read from a JSON or CSV of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from app.coco.detail import Metrics
from app.coco.score import STATS
from app.core.labels import Label, scored_name
from app.report.appendix import appendix
from app.report.evidence import Evidence
from app.report.findings import TELLING_AP, Findings
from app.report.groups import judged_labels, measured_alike
from app.report.tables import markdown_table, number, plain, signed

COLUMN_WORDS = {"AP": "AP", "AP_difference": "difference"}
HEALTH_WORDS = {True: "yes", False: "**no**", None: "?"}
ANOTHER_METER = "Set apart: measured otherwise, not to be compared with the rows above. "


def summary(evidence: Evidence, findings: Findings, figures: list[str]) -> str:
    """The whole page; `figures` are blocks of Markdown."""
    parts = [
        f"# What 4-bit weights cost: run `{findings['run']}`",
        "\n\n".join([*verdict(findings), *health_lines(findings)]),
        *section("## Missing in this run", bullets(findings["missing"])),
        "\n".join(tables(evidence.scored, findings)),
        *section("## Seeds", seeds_lines(findings)),
        *section("## Read this before you compare", bullets(caveats(evidence, findings))),
        *section("## Pictures", ["\n\n".join(figures)] if figures else []),
        *section("## All COCO numbers", coco_tables(evidence.scored, findings)),
        *appendix(evidence, findings),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def section(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(lines)] if lines else []


def bullets(sentences: list[str]) -> list[str]:
    return [f"- {plain(sentence)}" for sentence in sentences]


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
    runs = ""
    if row["over_runs"]:
        n_runs = row["over_runs"]["AP_difference"]["n"]
        runs = f"; mean ± sample standard deviation over {n_runs} runs with other seeds"
    return (
        f"**{label}: AP {ap_text(row)} against {ap_text(base)} of the FP16 training, {difference_text(row)}** "
        f"({sample(group['measured'])}{runs}).{_without_training(row, group)} The file has {row['size_mb']:.2f} MB "
        f"against {base['size_mb']:.2f} MB, {row['size_share']:.2f} of it.{_packed(row, group)} One image takes "
        f"{row['p50_ms']:.2f} ms against {base['p50_ms']:.2f} ms (p50, {row['provider']}, float arithmetic: see below)."
    )


def _without_training(row: dict[str, Any], group: dict[str, Any]) -> str:
    """What the same scheme reaches by PTQ, where that was scored too."""
    if row["AP_over_ptq"] is None:
        return ""
    plain_ptq = Label("ptq", Label.parse(row["label"]).scheme)
    prefixes = {str(plain_ptq): "", str(replace(plain_ptq, bn=True)): "with BatchNorm re-estimated "}
    results = []
    for other in group["rows"]:
        if other["label"] in prefixes:
            results.append(f"{prefixes[other['label']]}{ap_text(other)} ({difference_text(other)})")
    over = _text(row, "AP_over_ptq", signed)
    ptq = ", ".join(results)
    return f" The baseline quantized without training (PTQ) has AP {ptq}. QAT against the better PTQ: {over}."


def ap_text(row: dict[str, Any]) -> str:
    return _text(row, "AP", number)


def difference_text(row: dict[str, Any]) -> str:
    return _text(row, "AP_difference", signed)


def _text(row: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
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
    if not findings["health"]:
        return []
    share = findings["settings"]["min_share_of_best"]
    sentences = []
    for label, judged in findings["health"].items():
        sentences.append(f"{plain(label)} {_health(judged, share)}")
    return [f"**Training:** {'; '.join(sentences)}.", *losses_lines(findings)]


def losses_lines(findings: Findings) -> list[str]:
    """Whether what is scored is what was trained, in losses: they differ less from seed to seed than AP does."""
    parts = []
    for label, differences in findings["losses"].items():
        if differences:
            train, val = signed(differences["train"]), signed(differences["val"])
            parts.append(
                f"at epoch {differences['epoch']} {plain(label)}'s differ from fp16's by {train} on train images and "
                f"{val} on validation images"
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
    if judged["healthy"]:
        return f"is healthy, its AP stayed above {share:g} of its running best (lowest {lowest:.3f} at epoch {epoch})"
    return f"is **not healthy**, its AP fell to {lowest:.3f} of its running best at epoch {epoch} (warm-up: {after})"


def tables(scored: list[Metrics], findings: Findings) -> list[str]:
    """One table for every group of rows measured alike, each under a line that says how."""
    lines: list[str] = []
    for group, about in zip(measured_alike(scored), findings["groups"], strict=True):
        how = describe(about["measured"])
        lines += ["", ANOTHER_METER + how, ""] if lines else [how, ""]
        lines += _rows(group, about["rows"])
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


def _rows(group: list[Metrics], rows: list[dict[str, Any]]) -> list[str]:
    cells = [["variant", "AP", "difference", "AP50", "size MB", "p50 ms", "p90 ms", "provider", "file"]]
    for metrics, row in zip(group, rows, strict=True):
        cells.append(
            [
                row["label"],
                ap_text(row),
                difference_text(row),
                number(metrics["coco"]["AP50"]),
                f"{row['size_mb']:.2f}",
                f"{row['p50_ms']:.2f}",
                f"{metrics['latency_ms']['p90']:.2f}",
                row["provider"],
                metrics["model"]["file"],
            ]
        )
    return markdown_table(cells)


@dataclass(frozen=True)
class Column:
    """A column of the table of seeds: one value (AP or AP_difference) of one scored folder."""

    value: str
    folder: str
    write: Callable[[float | None], str]

    @property
    def title(self) -> str:
        return f"{COLUMN_WORDS[self.value]} {self.folder}"

    def of_run(self, run: dict[str, Any]) -> str:
        return self.write(run[self.value].get(self.folder))

    def of_all_runs(self, over_runs: dict[str, Any], statistic: str) -> str:
        """The number of runs (n), the mean or the standard deviation (sd)."""
        result = over_runs[self.folder][self.value][statistic]
        return str(result) if statistic == "n" else self.write(result)


def seeds_lines(findings: Findings) -> list[str]:
    """A row for every merged run, then their means and spreads; nothing for a single run."""
    if findings["seeds"] is None:
        return []
    runs, over_runs = findings["seeds"]["runs"], findings["seeds"]["over_runs"]
    columns = [Column("AP", folder, number) for folder in over_runs]
    for folder, merged in over_runs.items():
        if merged["AP_difference"]["n"]:
            columns.append(Column("AP_difference", folder, signed))
    cells = [["run", *runs[0]["seeds"], *(column.title for column in columns), "healthy"]]
    for run in runs:
        seeds = map(str, run["seeds"].values())
        values = [column.of_run(run) for column in columns]
        healthy = [f"{label} {HEALTH_WORDS[judgement]}" for label, judgement in run["healthy"].items()]
        cells.append([run["name"], *seeds, *values, ", ".join(healthy)])
    no_seeds = [""] * len(runs[0]["seeds"])
    for statistic in ("n", "mean", "sd"):
        values = [column.of_all_runs(over_runs, statistic) for column in columns]
        cells.append([statistic, *no_seeds, *values, ""])
    note = (
        "sd is the sample standard deviation; the difference is taken within each run, against its own baseline. "
        "Sizes, latencies, pictures and all that follows are those of the first run."
    )
    return [*markdown_table(cells), "", note]


def caveats(evidence: Evidence, findings: Findings) -> list[str]:
    """What the numbers do not say."""
    if not evidence.scored:
        return findings["doubts"]
    lines = list(findings["doubts"])
    if not findings["seeds"]:
        lines.insert(0, "One training each (n=1): a difference smaller than the spread between seeds says nothing.")
    if not all(metrics["dataset"]["complete_coco_val"] for metrics in evidence.scored):
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


def coco_tables(scored: list[Metrics], findings: Findings) -> list[str]:
    """The twelve numbers of every row, a table for every group of rows measured alike."""
    lines: list[str] = []
    for group, about in zip(measured_alike(scored), findings["groups"], strict=True):
        lines += ["", ANOTHER_METER + describe(about["measured"]), ""] if lines else []
        names = [scored_name(metrics["dir"]) for metrics in group]
        cells = [["", *names]]
        for stat in STATS:
            values = [number(metrics["coco"][stat]) for metrics in group]
            cells.append([stat, *values])
        lines += markdown_table(cells)
    return lines
