"""The curve: AP over the bytes of the file, for a run with several schemes, alone or merged with other seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from app.coco.detail import Metrics
from app.core.curves import COLOURS, NEUTRAL
from app.core.labels import BASELINE, DISTILLED, PACKED_BITS, Label
from app.report.evidence import Evidence, label_of
from app.report.figures import draw, legend_below, literal
from app.report.groups import measured_alike
from app.report.spread import ratio_of_pairs
from app.report.tables import MISSING, markdown_table, number

Point = dict[str, Any]  # an entry of the curve in report.json
FLOAT, PTQ, PTQ_BN, QAT = "not quantized", "PTQ", "PTQ, BN re-estimated", "QAT"
WORDS = {FLOAT: "FP32 and FP16", PTQ: PTQ, PTQ_BN: PTQ_BN, QAT: QAT}
COLOUR_OF = {FLOAT: NEUTRAL, PTQ: COLOURS[0], PTQ_BN: COLOURS[2], QAT: COLOURS[1]}
MARKER_OF = {FLOAT: "D", PTQ: "v", PTQ_BN: "s", QAT: "o"}
PANELS = {"int4_mb": "4 bits and fewer packed (INT4)", "qcdq_mb": "a byte a weight (QCDQ)"}
TICKS_MB = [base * 10.0**power for power in range(-3, 4) for base in (1, 1.5, 2, 3, 5, 7)]
ENOUGH_SCHEMES = 2
DOT_ALPHA = 0.45
SAME_BYTES = 0.01  # share by which files of one size may differ
SIDE_BY_SIDE, MARGIN = 1.07, 1.2  # factors on the axis of the MB
ROUNDING = 1e-9  # of such a factor
PANEL_IN, AROUND_IN, LETTER_IN = 2.6, 1.4, 0.075  # height below the names, of title and legend; length of a letter
TITLE = "## AP over bytes"


def curve(evidences: list[Evidence]) -> list[Point] | None:
    """A point for every scored model but repacked ones; None where fewer than ENOUGH_SCHEMES schemes were scored;
    a distilled one is no other scheme.

    A point has its label and how it was made; AP by run, their number n and mean; share: the ratio of the mean APs of
    the runs that have both this model and the baseline, with its standard error (delta method); and the size of its
    file in MB, with a byte a weight (qcdq_mb) and packed (int4_mb), None where no such file was scored.
    """
    scored = {evidence.run.name: measured_alike(evidence.scored)[0] for evidence in evidences if evidence.scored}
    aps, sizes = aps_by_label(scored), sizes_by_label(scored)
    labels = sorted((label for label in aps if is_point(label)), key=lambda label: label.order)
    schemes = {label.base_scheme for label in labels if label.is_quantized}
    if len(schemes) < ENOUGH_SCHEMES:
        return None
    points = []
    for label in labels:
        size_mb = sizes[label]
        packed_mb = packed_size(label, sizes, evidences) if label.is_quantized else size_mb
        points.append(point(label, aps) | {"qcdq_mb": size_mb, "int4_mb": packed_mb})
    return points


def is_point(label: Label) -> bool:
    is_float = label.method == BASELINE.method
    return label.contract == "raw" and (is_float or (label.is_quantized and not label.packing))


def aps_by_label(scored: dict[str, list[Metrics]]) -> dict[Label, dict[str, float]]:
    """Label -> run -> AP, where one could be measured."""
    aps: dict[Label, dict[str, float]] = {}
    for run, group in scored.items():
        for metrics in group:
            if metrics["coco"]["AP"] is not None:
                aps.setdefault(label_of(metrics), {})[run] = metrics["coco"]["AP"]
    return aps


def sizes_by_label(scored: dict[str, list[Metrics]]) -> dict[Label, float]:
    """Label -> MB of its file in the first run that has it; other seeds change it by bytes."""
    sizes: dict[Label, float] = {}
    for group in scored.values():
        for metrics in group:
            sizes.setdefault(label_of(metrics), metrics["model"]["size_bytes"] / 1e6)
    return sizes


def packed_size(label: Label, sizes: dict[Label, float], evidences: list[Evidence]) -> float | None:
    """MB with the codes of up to PACKED_BITS bits packed: those of the INT4 file that QAT of the scheme has.

    A scheme without such layers has no INT4 file, and the size of its QCDQ file. None where that is not known.
    """
    for scheme in (label.scheme, label.base_scheme, label.base_scheme + DISTILLED):  # of equal size
        packed = Label("qat", scheme, packing="int4")
        if packed in sizes:
            return sizes[packed]
    for evidence in evidences:
        if described := evidence.quantized.get(str(label)):
            bits = [layer["bits"] for layer in described["layers"] if layer["bits"] is not None]
            return sizes[label] if min(bits, default=PACKED_BITS) > PACKED_BITS else None
    return None


def point(label: Label, aps: dict[Label, dict[str, float]]) -> Point:
    """What the APs of a model say, beside those of the baseline."""
    own, base = aps[label], aps.get(BASELINE, {})
    paired = [run for run in own if run in base]
    ratio = ratio_of_pairs([own[run] for run in paired], [base[run] for run in paired])
    return {
        "label": str(label),
        "scheme": label.scheme,
        "how": how_made(label),
        "AP": own,
        "n": len(own),
        "mean": statistics.fmean(own.values()),
        "share": ratio.value if ratio else None,
        "error": ratio.error if ratio else None,
    }


def how_made(label: Label) -> str:
    if label.method == BASELINE.method:
        return FLOAT
    if label.method == "ptq":
        return PTQ_BN if label.bn else PTQ
    return QAT


# --- the page --------------------------------------------------------------------------------------------------------


def curve_lines(points: list[Point] | None) -> list[str]:
    """The table of the curve; nothing where there is none."""
    if points is None:
        return []
    cells = [["model", "n", "AP", "share of FP16's AP", "MB packed", "MB QCDQ"]]
    for each in points:
        sizes = [number(each[key], 2) for key in PANELS]
        cells.append([each["label"], str(each["n"]), number(each["mean"]), share_text(each), *sizes])
    note = (
        "Share: ratio of the mean APs over the paired runs, with its standard error (delta method) from three pairs "
        "on. MB packed: codes of 4 bits and fewer as INT4; PTQ is scored as QCDQ, and packed has the bytes of QAT's "
        "file. Files of floats have one size."
    )
    return [*markdown_table(cells), "", note]


def share_text(each: Point) -> str:
    """'0.931 ± 0.012'."""
    if each["share"] is None:
        return MISSING
    return number(each["share"], 3) + ("" if each["error"] is None else f" ± {number(each['error'], 3)}")


def curve_block(points: list[Point] | None, name: str, figures_dir: Path) -> list[str]:
    """Draws the picture; gives its Markdown, or nothing where there is no curve."""
    if points is None:
        return []
    text = (
        "**AP over the bytes of the file.** A faint mark is a run, a full one the mean of all; lines join the means of "
        "what was made alike. The scale of the bytes is logarithmic, and schemes of equal bytes stand side by side."
    )
    return ["", draw(figures_dir, name, text, lambda: curve_figure(points))]


def curve_figure(points: list[Point]) -> Figure:
    """A panel for each way to store the weights: a mark for each run, and the line of the means."""
    names_in = LETTER_IN * (2 + max(len(name_of(each)) for each in points))
    figure = Figure(figsize=(10, PANEL_IN + names_in + AROUND_IN), layout="constrained")
    for panel, (size, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        shown = [each for each in points if each[size] is not None]
        places = places_of(shown, size)
        for how in WORDS:
            alike = [each for each in shown if each["how"] == how]
            draw_series(panel, sorted(alike, key=lambda each: places[name_of(each)]), places)
        write_names(panel, shown, places)
        set_scales(panel, list(places.values()))
        panel.set_title(title, fontsize=10)
    highest = max(max(each["AP"].values()) for each in points)
    figure.axes[0].set(ylabel="AP", ylim=(0, (highest or 1) * (1 + names_in / PANEL_IN)))
    return legend_below(figure)


def name_of(each: Point) -> str:
    return each["scheme"] or ("FP32" if each["label"] == str(BASELINE) else "FP16")


def places_of(points: list[Point], size: str) -> dict[str, float]:
    """Scheme, FP32 or FP16 -> place on the axis of the MB; those of equal bytes stand side by side."""
    sizes = {name_of(each): each[size] for each in points}
    places: dict[str, float] = {}
    for name, own in sizes.items():
        alike = [other for other in sizes if abs(sizes[other] / own - 1) < SAME_BYTES]
        places[name] = own * SIDE_BY_SIDE ** (alike.index(name) - (len(alike) - 1) / 2)
    return places


def spread(places: dict[str, float]) -> dict[str, float]:
    """Places of names, which are wider than a mark: neighbours that would overlap move apart from their middle."""
    rows: list[dict[str, float]] = []
    for name in sorted(places, key=lambda name: places[name]):
        rows.append({name: places[name]})
        while len(rows) > 1 and max(rows[-2].values()) * SIDE_BY_SIDE > min(rows[-1].values()) * (1 + ROUNDING):
            together = [*rows[-2], *rows[-1]]
            middle = statistics.geometric_mean(places[name] for name in together)
            first = middle / SIDE_BY_SIDE ** ((len(together) - 1) / 2)
            rows[-2:] = [{name: first * SIDE_BY_SIDE**i for i, name in enumerate(together)}]
    return {name: place for row in rows for name, place in row.items()}


def draw_series(panel: Axes, series: list[Point], places: dict[str, float]) -> None:
    """The models that were made alike, in the order of their bytes."""
    if not series:
        return
    how = series[0]["how"]
    colour, marker = COLOUR_OF[how], MARKER_OF[how]
    for each in series:
        aps = list(each["AP"].values())
        if len(aps) > 1:
            panel.plot([places[name_of(each)]] * len(aps), aps, marker, color=colour, alpha=DOT_ALPHA, ms=4, mew=0)
    line = "" if how == FLOAT else "-"
    mbs, means = [places[name_of(each)] for each in series], [each["mean"] for each in series]
    panel.plot(mbs, means, marker, ls=line, color=colour, ms=6, lw=1.2, label=WORDS[how])


def write_names(panel: Axes, points: list[Point], places: dict[str, float]) -> None:
    """Each name on end above its highest mark: those of neighbours are longer than their distance."""
    for name, place in spread(places).items():
        highest = max(max(each["AP"].values()) for each in points if name_of(each) == name)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        panel.annotate(literal(name), (place, highest), rotation=90, fontsize=8, **above)


def set_scales(panel: Axes, mbs: list[float]) -> None:
    """A logarithmic axis with ticks in plain MB, and a grid."""
    panel.set_xscale("log")
    if mbs:  # no file of this packing is known where the panel is empty
        lowest, highest = min(mbs) / MARGIN, max(mbs) * MARGIN
        panel.set_xlim(lowest, highest)
        panel.set_xticks([tick for tick in TICKS_MB if lowest <= tick <= highest])
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("MB")
    panel.grid(alpha=0.3)
