"""The page of the report, as Markdown: verdict first; every number is read from a JSON or CSV of the run."""

from __future__ import annotations

from typing import Any

from app.coco.detail import Metrics
from app.core.labels import BASELINE, scored_name
from app.core.results import AP_FREQUENT, FREQUENT_BOXES
from app.core.start import told
from app.report.appendix import appendix
from app.report.curve import TITLE, curve_lines
from app.report.evidence import Evidence, name_of
from app.report.findings import Findings
from app.report.groups import describe, frequent_line, measured_alike, stats_of
from app.report.tables import markdown_table, number, plain, signed
from app.report.verdict import ap_text, difference_text, health_lines, merged_text, start_lines, telling_lines, verdict

COLUMN_WORDS = {"AP": "AP", "AP_difference": "difference"}
COLUMN_WORDS |= {"AP_frequent": "AP frequent", "AP_frequent_difference": "difference of frequent"}
HEALTH_WORDS = {True: "yes", False: "**no**", None: "?"}
ANOTHER_METER = "Set apart: measured otherwise, not to be compared with the rows above. "


def summary(evidence: Evidence, findings: Findings, figures: list[str], curve: list[str]) -> str:
    """The whole page; `figures` are blocks of Markdown, `curve` that of the curve where there is one."""
    parts = [
        "\n".join(tables(evidence.scored, findings)),
        names_line(evidence),
        *section(TITLE, [*curve_lines(findings["curve"]), *curve]),
        *section("## Seeds", seeds_lines(findings)),
        *section("## Read this before you compare", bullets(caveats(evidence, findings))),
        *section("## Pictures", ["\n\n".join(figures)] if figures else []),
        *section("## All COCO numbers", coco_tables(evidence.scored, findings)),
        *appendix(evidence, findings),
    ]
    top = [
        f"# What 4-bit weights cost: run `{findings['run']}`",
        *verdict(findings),
        *start_lines(findings),
        *telling_lines(findings),
        *health_lines(findings),
        contents(parts),
        *section("## Missing in this run", bullets(findings["missing"])),
    ]
    return "\n\n".join(filter(None, [*top, *parts])) + "\n"


def contents(parts: list[str]) -> str:
    """Links to the sections among the parts of the page, under the names that Git hosts give to headings."""
    titles = [part.partition("\n")[0].removeprefix("## ") for part in parts if part.startswith("## ")]
    links = [f"[{title}](#{title.lower().replace(' ', '-')})" for title in titles]
    return f"**On this page:** {' · '.join(links)}" if links else ""


def names_line(evidence: Evidence) -> str:
    """What the baseline is called, if it was scored."""
    if str(BASELINE) not in map(name_of, evidence.scored):
        return ""
    what = "imported checkpoint" if evidence.imported else "training"
    return (
        f"`fp16` is the {what}, `baseline` its ONNX file with FP32 weights, `baseline-fp16` the same weights in FP16. "
        "A quantized model has one label as training and as file."
    )


def section(title: str, lines: list[str]) -> list[str]:
    return [title, "\n".join(lines)] if lines else []


def bullets(sentences: list[str]) -> list[str]:
    return [f"- {plain(sentence)}" for sentence in sentences]


def tables(scored: list[Metrics], findings: Findings) -> list[str]:
    """One table for every group of rows measured alike, each under a line that says how."""
    lines: list[str] = []
    for group, about in zip(measured_alike(scored), findings["groups"], strict=True):
        how = describe(about["measured"])
        lines += ["", ANOTHER_METER + how, ""] if lines else [how, ""]
        lines += _rows(group, about["rows"])
        if frequent := frequent_line(group):
            lines += ["", frequent]
    return lines


def _rows(group: list[Metrics], rows: list[dict[str, Any]]) -> list[str]:
    columns = {"variant": [row["label"] for row in rows]}
    if any(row["start"] for row in rows):
        columns["weights began"] = [told(row["start"]) for row in rows]
    columns |= {"AP": list(map(ap_text, rows)), "difference": list(map(difference_text, rows))}
    if AP_FREQUENT in stats_of(group):
        columns["AP frequent"] = [merged_text(row, AP_FREQUENT, number) for row in rows]
    columns |= {
        "AP50": [number(metrics["coco"]["AP50"]) for metrics in group],
        "size MB": [number(row["size_mb"], 2) for row in rows],
        "p50 ms": [number(row["p50_ms"], 2) for row in rows],
        "p90 ms": [number(metrics["latency_ms"]["p90"], 2) for metrics in group],
        "provider": [row["provider"] for row in rows],
        "file": [metrics["model"]["file"] for metrics in group],
    }
    return markdown_table([list(columns), *map(list, zip(*columns.values(), strict=True))])


def seeds_lines(findings: Findings) -> list[str]:
    """A row for every merged run, then their means and spreads; nothing for a single run."""
    if findings["seeds"] is None:
        return []
    runs = findings["seeds"]["runs"]
    no_statistics = [""] * 3
    columns = [["run", *(run["name"] for run in runs), "n", "mean", "sd"]]
    for key in runs[0]["seeds"]:
        columns.append([key, *(str(run["seeds"][key]) for run in runs), *no_statistics])
    for (value, words), write in zip(COLUMN_WORDS.items(), (number, signed) * 2, strict=True):
        for folder, merged in findings["seeds"]["over_runs"].items():
            n, mean, sd = merged[value]["n"], merged[value]["mean"], merged[value]["sd"]
            if value == "AP" or n:
                own = [write(run[value].get(folder)) for run in runs]
                columns.append([f"{words} {scored_name(folder)}", *own, str(n), write(mean), write(sd)])
    columns.append(["healthy", *map(healthy_text, runs), *no_statistics])
    cells = list(map(list, zip(*columns, strict=True)))
    note = (
        "sd is the sample standard deviation; the difference is taken within each run, against its own baseline. "
        "Sizes, latencies and all COCO numbers are those of the first run that has the model and a baseline, pictures "
        "and all else that follows are those of the first run."
    )
    return [*markdown_table(cells), "", note]


def healthy_text(run: dict[str, Any]) -> str:
    return ", ".join(f"{label} {HEALTH_WORDS[judgement]}" for label, judgement in run["healthy"].items())


def caveats(evidence: Evidence, findings: Findings) -> list[str]:
    """What the numbers do not say."""
    if not evidence.scored:
        return findings["doubts"]
    lines = list(findings["doubts"])
    if not findings["seeds"]:
        lines.insert(0, "One training each (n=1): a difference smaller than the spread between seeds says nothing.")
    if not all(metrics["dataset"]["complete_coco_val"] for metrics in evidence.scored):
        lines.append("Not measured on the whole of COCO val2017: never compare these numbers with published ones.")
    if all(metrics["dataset"].get("n_frequent_classes") == 0 for metrics in evidence.scored):
        lines.append(f"No class has {FREQUENT_BOXES} objects in the scored images: there is no AP of frequent classes.")
    timed = evidence.scored[0]["latency_ms"]
    device = evidence.scored[0]["runtime"]["device"]
    lines.append(
        f"Latency: one image at a time (batch {timed['batch']}), {timed['runs']} runs after {timed['warmup']} to warm "
        f"up, network only, ONNX Runtime on {device}. The files were timed one after the other, not in turns: whatever "
        "else the machine did shows as a difference. ONNX Runtime turns the integer weights into floats and computes "
        "in float: a quantized file is not faster here, and this says nothing about int4 hardware."
    )
    lines.append(
        "Size is the ONNX file on disk. QCDQ files keep one byte a weight, so their size does not show the 4 bits."
    )
    return lines


def coco_tables(scored: list[Metrics], findings: Findings) -> list[str]:
    """The numbers of `stats_of` of every row, a table for every group of rows measured alike."""
    lines: list[str] = []
    for group, about in zip(measured_alike(scored), findings["groups"], strict=True):
        lines += ["", ANOTHER_METER + describe(about["measured"]), ""] if lines else []
        cells = [["", *(scored_name(metrics["dir"]) for metrics in group)]]
        for stat in stats_of(group):
            cells.append([stat, *(number(metrics["coco"].get(stat)) for metrics in group)])
        lines += markdown_table(cells)
    return lines
