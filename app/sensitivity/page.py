"""The stage's pages: sensitivity.md with its figure, and that of a proposal."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from app.core.curves import COLOURS
from app.core.run import RunRoot
from app.report.figures import draw, legend_below
from app.report.layer_figures import MARKERS, mark_blocks
from app.report.tables import MISSING, markdown_table
from app.sensitivity.changes import MAIN_BITS, MEASURED_BITS

N_TOP = 10
MAIN = str(MAIN_BITS)


def whole(run: RunRoot, result: dict[str, Any]) -> str:
    """The page of a result; draws its figure beside it."""
    n_few = result["layers"][0]["bits"][str(MEASURED_BITS[0])]["n_images"]
    caption = (
        "**Every layer alone, from the input to the heads.** Above the shift of the outputs, below the loss at "
        f"{MAIN_BITS} bits over that of the float network, with one standard error."
    )
    picture = draw(run.root / "sensitivity" / "figures", "layers.png", caption, lambda: layer_figure(result["layers"]))
    by_shift = sorted(result["layers"], key=lambda layer: -layer["bits"][MAIN]["shift"])
    parts = [
        f"# What each layer of {run.name} cannot do without",
        f"{result['model']}, {result['classes']} classes, {result['imgsz']} px, {result['dataset']}: the trained FP16 "
        f"checkpoint, one layer quantized at a time, without training. {result['n_images']} val images at {MAIN_BITS} "
        f"bits, {n_few} of them at the others. Loss of the one2one head in float: {result['float_loss']:.4f}. "
        "Shift: KL divergence of the outputs from the float network's, nats an image. The layer's own BatchNorm is "
        "corrected on train images.",
        picture,
        f"## The {min(N_TOP, len(by_shift))} layers with the largest shift at {MAIN_BITS} bits",
        *table_of(by_shift[:N_TOP]),
        "## Do single layers add up?",
        *additivity(result),
        "## Groups, all their layers at once",
        *table_of(result["groups"]),
        "## All layers",
        *table_of(result["layers"]),
    ]
    return "\n\n".join(parts) + "\n"


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """A table of layers or groups."""
    shifts = [f"shift at {bits}" for bits in MEASURED_BITS]
    cells = [["layer", "weights", f"loss at {MAIN_BITS}", *shifts]]
    for row in rows:
        numbers = [f"{row['bits'][str(bits)]['shift']:.2g}" for bits in MEASURED_BITS]
        n_weights = f"{row['n_weights']:,}" if "n_weights" in row else f"{len(row['layers'])} layer(s)"
        cells.append([row["name"], n_weights, with_error(row["bits"][MAIN]), *numbers])
    return ["\n".join(markdown_table(cells))]


def with_error(measured: dict[str, Any]) -> str:
    """A difference of losses with its standard error."""
    error = measured["loss_se"]
    return f"{measured['loss']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def additivity(result: dict[str, Any]) -> list[str]:
    """Sums of single layers beside whole schemes, and their rank correlations."""
    cells = [["scheme", "sum of losses", "its loss", "sum of shifts", "its shift"]]
    for scheme in result["schemes"]:
        sums = [f"{scheme['loss_sum']:+.4f}", with_error(scheme["measured"]), f"{scheme['shift_sum']:.3g}"]
        cells.append([scheme["name"], *sums, f"{scheme['measured']['shift']:.3g}"])
    return ["\n".join(markdown_table(cells)), correlation_text(result["rank_correlation"])]


def correlation_text(numbers: dict[str, float | None]) -> str:
    """What the rank correlations say."""

    def told(name: str) -> str:
        number, alike = numbers[name], numbers[f"{name}, random"]
        shown = [MISSING if value is None else f"{value:.2f}" for value in (number, alike)]
        return f"{shown[0]} over all schemes, {shown[1]} over the random ones"

    return (
        "Rank correlation (Spearman) of what the layers of a scheme cost alone, added up, with what the scheme costs: "
        f"loss {told('loss')}; shift {told('shift')}; sum of shifts with the scheme's loss {told('shift to loss')}. "
        "The random schemes are of nearly one size, so only the choice of layers ranks them: a search can be trusted "
        "as far as that number goes, and its proposal has to be scored."
    )


def layer_figure(layers: list[dict[str, Any]]) -> Figure:
    """Shift by depth for every number of bits, and the loss at 4 bits."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    shift, loss = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = range(len(layers))
    for bits, marker, colour in zip(MEASURED_BITS, MARKERS, COLOURS, strict=True):
        shifts = [layer["bits"][str(bits)]["shift"] for layer in layers]
        size = 5 if bits == MAIN_BITS else 3
        shift.plot(places, shifts, marker, ms=size, alpha=0.85, color=colour, label=f"{bits} bits")
    shift.set(yscale="log", ylabel="shift of the outputs, nats an image")
    losses = [layer["bits"][MAIN]["loss"] for layer in layers]
    errors = [layer["bits"][MAIN]["loss_se"] or 0 for layer in layers]
    colour = COLOURS[MEASURED_BITS.index(MAIN_BITS)]
    loss.errorbar(places, losses, errors, fmt=MARKERS[MEASURED_BITS.index(MAIN_BITS)], ms=4, lw=1, color=colour)
    loss.set(ylabel=f"loss at {MAIN_BITS} bits over float's", xlabel="layer, by the number of its block")
    for axes in (shift, loss):
        axes.grid(axis="y", alpha=0.3)
    mark_blocks([layer["name"] for layer in layers], (shift, loss))
    return legend_below(figure)


def proposal(facts: dict[str, Any]) -> str:
    """The page of a proposal."""
    cells = [["scheme", "bytes, INT4", "bits a weight", "loss over fp32", "shift", "AP"]]
    for row in facts["rows"]:
        ap = MISSING if row["ap"] is None else f"{row['ap']:.3f}"
        if "bytes" not in row:
            cells.append([row["name"], *[MISSING] * 4, ap])
            continue
        sizes = [f"{row['bytes']:,.0f}", f"{row['bits']:.3f}"]
        cells.append([row["name"], *sizes, with_error(row), f"{row['shift']:.3g}", ap])
    lines = [duel_text(duel) for duel in facts["duels"]]
    parts = [
        f"# {facts['scheme']}",
        f"Least sum of {'shifts' if facts['measure'] == 'shift' else 'losses'} within the budget, by "
        "integer programming. PTQ with corrected BatchNorm, scored on "
        f"{facts['n_images']} val images that the search has not seen, in {facts['n_batches']} batches:",
        "\n".join(markdown_table(cells)),
        "\n".join(lines),
        "One wins by the loss of the batches, where Student's t test finds less than 5 % for chance.",
        "The file stores 2 to 4 bits in half a byte and 5 to 8 bits in a byte. Bytes are what this file has, mean bits "
        "what a format without such steps would have.",
        f"Train it: `--set quant.scheme={facts['file']}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def duel_text(duel: dict[str, Any]) -> str:
    """Whether a found scheme wins against a given one of the same size."""
    pair = f"- `{duel['found']}` against `{duel['against']}` at the same budget: **{duel['verdict']}**"
    if duel["found"] == duel["against"]:
        return f"- `{duel['against']}` is what the search finds for its own size."
    error = "" if duel["error"] is None else f" ± {duel['error']:.4f}"
    return f"{pair}, loss {duel['loss']:+.4f}{error}"
