"""The page of the report: every number on it is read from a JSON or CSV of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from app.config import Config, difference, flatten
from app.curves import read_rows, train_loss
from app.run import RunRoot, read_json

COCO_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
ENVIRONMENT_KEYS = (
    "code_version", "lock_sha256", "image", "python", "platform", "cpu_count", "gpus",
    "device", "amp", "deterministic", "seed", "workers",
)  # fmt: skip
MISSING = "-"


def summary(run: RunRoot, scored: list[dict[str, Any]], trained: dict[str, Config], figures: list[str]) -> str:
    """The whole Markdown page."""
    provenance = read_json(run.provenance, "data")
    parts = [
        f"# What 4-bit weights cost: run `{run.name}`",
        "\n\n".join(verdict(scored)), "\n".join(table(scored)),
        *caveats(scored, provenance),
        *(f"![{Path(name).stem}](figures/{name})" for name in figures),
        "## All COCO numbers", "\n".join(coco_table(scored)),
        "## Training", "\n".join(training_table(run, list(trained))),
        "## Dataset", "\n".join(dataset_lines(provenance)),
        "## Difference between the variants", "\n".join(difference_table(trained)),
        "## Hyper-parameters", settings_block(trained),
        "## Environment", "\n".join(environment_table(run, trained, scored)),
        "## Where things are", "\n".join(pointers(run, list(trained), scored)),
        "## Reproduce", "```\n" + "\n".join(commands(run, list(trained), scored)) + "\n```",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def verdict(scored: list[dict[str, Any]]) -> list[str]:
    """Sentences that answer the question, from rows of one meter only."""
    base = next((m for m in scored if m["model"]["label"] == "fp16"), None)
    lines = []
    for m in (m for m in scored if m["model"]["label"] != "fp16"):
        if base is None or meter(m) != meter(base) or m["coco"]["AP"] is None or base["coco"]["AP"] is None:
            lines.append(
                f"**{m['model']['label']}: no verdict**, there is no FP16 baseline measured on the same images."
            )
            continue
        ap, ap0 = m["coco"]["AP"], base["coco"]["AP"]
        ratio = m["model"]["size_bytes"] / base["model"]["size_bytes"]
        lines.append(
            f"**{m['model']['label']}: AP {ap:.4f} against {ap0:.4f} of the FP16 training, {ap - ap0:+.4f}** "
            f"({sample(m)}). The file has {megabytes(m)} MB against {megabytes(base)} MB, {ratio:.2f} of it."
        )
    return lines or ["**No verdict:** only one variant was scored; train and score the other one too."]


def meter(metrics: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal for two rows to share a table: same images, same annotations, same thresholds."""
    dataset, settings = metrics["dataset"], metrics["settings"]
    return (
        dataset["annotation_sha256"],
        dataset["image_ids_sha256"],
        settings["conf"],
        settings["max_det"],
        settings["evaluator"],
    )


def table(scored: list[dict[str, Any]]) -> list[str]:
    """One Markdown table for every group of rows that were measured alike, each under a line that says what it is."""
    lines: list[str] = []
    for key in dict.fromkeys(meter(m) for m in scored):
        group = [m for m in scored if meter(m) == key]
        lines += ["", f"{sample(group[0])}:", "", *rows(group)] if lines else [f"{sample(group[0])}:", "", *rows(group)]
    return lines


def sample(metrics: dict[str, Any]) -> str:
    """'built-in coco-subset, val2017, 64 images' with SUBSET where it is not the whole split."""
    dataset = metrics["dataset"]
    whole = (
        f"SUBSET of {dataset['n_images']:,} of {dataset['n_images_listed']:,} images"
        if dataset["subset"]
        else f"{dataset['n_images']:,} images"
    )
    return f"{dataset['title']}, {dataset['split']}, {whole}, {metrics['settings']['evaluator']}"


def rows(group: list[dict[str, Any]]) -> list[str]:
    cells = [["variant", "AP", "AP50", "size MB", "latency p50 ms", "provider"]]
    for m in group:
        latency = m["latency_ms"]["p50"]
        cells.append([
            m["model"]["label"], number(m["coco"]["AP"]), number(m["coco"]["AP50"]), megabytes(m),
            f"{latency:.2f}", m["runtime"]["provider"].removesuffix("ExecutionProvider"),
        ])  # fmt: skip
    return markdown_table(cells)


def markdown_table(cells: list[list[str]]) -> list[str]:
    """Aligned, so that it reads well on a terminal too; the first column is text, the others are right-aligned."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in [cells[0], rule, *cells[1:]]:
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("| " + " | ".join(padded) + " |")
    return lines


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def megabytes(metrics: dict[str, Any]) -> str:
    return f"{metrics['model']['size_bytes'] / 1e6:.2f}"


def caveats(scored: list[dict[str, Any]], provenance: dict[str, Any]) -> list[str]:
    """What the numbers do not say."""
    lines = ["One training each (n=1): a difference smaller than the spread between seeds says nothing."]
    if not all(m["dataset"]["complete_coco_val"] for m in scored):
        lines.append(
            f"Measured on {provenance['title']}, not on the 5,000 images of COCO val2017: compare the rows with each "
            "other, never with published numbers."
        )
    lines.append(
        "Latency is batch 1 in ONNX Runtime on the machine below. It dequantizes integer weights and computes in "
        "float, so it says nothing about int4 hardware."
    )
    return ["\n".join(f"- {line}" for line in lines)]


def coco_table(scored: list[dict[str, Any]]) -> list[str]:
    return markdown_table(
        [
            ["", *(m["dir"] for m in scored)],
            *([name, *(number(m["coco"][name]) for m in scored)] for name in COCO_NAMES),
        ]
    )


def training_table(run: RunRoot, labels: list[str]) -> list[str]:
    """Last and best epoch of each training, the three validated states apart."""
    cells = [
        [
            "variant",
            "epochs",
            "best epoch",
            "AP raw",
            "AP EMA",
            "AP EMA+BN",
            "train loss",
            "val loss",
            "images/s",
            "hours",
        ]
    ]
    for label in labels:
        history = read_rows(run.variant_dir(label) / "results.csv")
        best = max(history, key=lambda row: row["AP/ema_bn"])
        hours = sum(row["time/epoch_s"] for row in history) / 3600
        cells.append([
            label, str(len(history)), str(int(best["epoch"])), number(best["AP/raw"]), number(best["AP/ema"]),
            number(best["AP/ema_bn"]), f"{train_loss(best):.3f}", f"{best['val_loss/ema_bn']:.3f}",
            f"{sum(row['time/images_per_s'] for row in history) / len(history):.1f}", f"{hours:.2f}",
        ])  # fmt: skip
    note = (
        "At the best epoch, by the trainer's own validator, which treats crowds and rounding otherwise than COCO does."
    )
    return [note, "", *markdown_table(cells)]


def dataset_lines(provenance: dict[str, Any]) -> list[str]:
    cells = [
        [
            "split",
            "images used",
            "listed",
            "skipped as broken",
            "annotations",
            "crowd",
            "without objects",
            "annotation sha256",
        ]
    ]
    for split in provenance["splits"].values():
        counts = ("n_images", "n_listed", "n_broken", "n_annotations", "n_crowd", "n_without_objects")
        cells.append([split["name"], *(f"{split[name]:,}" for name in counts), split["annotation_sha256"][:16]])
    subset = any(split["subset"] for split in provenance["splits"].values())
    choice = f" A seeded choice (seed {provenance['seed']}); the ids are in dataset/provenance.json." if subset else ""
    return [f"{provenance['title']} in `{provenance['coco_dir']}`.{choice}", "", *markdown_table(cells)]


def difference_table(trained: dict[str, Config]) -> list[str]:
    """Every key in which two trained variants differ: `variant` and `quant.*`, or the comparison is not fair."""
    labels = list(trained)
    if len(labels) < 2:
        return ["Only one variant was trained."]
    keys = sorted({key for label in labels[1:] for key in difference(trained[labels[0]], trained[label])})
    flats = {label: flatten(config) for label, config in trained.items()}
    return markdown_table(
        [["key", *labels], *([key, *(str(flats[label].get(key, MISSING)) for label in labels)] for key in keys)]
    )


def settings_block(trained: dict[str, Config]) -> str:
    if not trained:
        return "Nothing was trained in this run."
    config = next(iter(trained.values())).model_dump(mode="json")
    shown = {name: config[name] for name in ("model", "data", "train", "hyp")}
    return "```yaml\n" + yaml.safe_dump(shown, sort_keys=False) + "```"


def environment_table(run: RunRoot, trained: dict[str, Config], scored: list[dict[str, Any]]) -> list[str]:
    """Machine and software of each training and scoring."""
    columns = {f"train {label}": read_json(run.variant_dir(label) / "env.json", "train") for label in trained}
    columns |= {f"eval {m['model']['label']}": m["environment"] for m in scored}
    keys = (
        "code_version",
        "lock_sha256",
        "image",
        "python",
        "platform",
        "cpu_count",
        "gpus",
        "device",
        "amp",
        "deterministic",
        "seed",
        "workers",
    )
    cells = [["", *columns]]
    cells += [[key, *(str(env.get(key, MISSING)) for env in columns.values())] for key in keys]
    packages = list(next(iter(columns.values()))["packages"])
    cells += [[name, *(str(env["packages"].get(name, MISSING)) for env in columns.values())] for name in packages]
    return markdown_table(cells)


def pointers(run: RunRoot, labels: list[str], scored: list[dict[str, Any]]) -> list[str]:
    """Paths relative to the run root, so that the folder can be moved."""
    lines = []
    files = ("results.csv", "loss_curve.csv", "loss_curve.png", "config.yaml", "env.json", "log.txt")
    for label in labels:
        links = ", ".join(f"[{name}]({label}/{name})" for name in files)
        lines.append(f"- {label}: {links}, TensorBoard `{label}/tensorboard/`, checkpoints `{label}/weights/`")
    for m in scored:
        file, digest = m["model"]["file"], m["model"]["sha256"]
        metrics = f"[metrics.json]({m['dir']}/metrics.json)"
        lines.append(f"- {m['model']['label']}: `onnx/{file}`, sha256 `{digest}`, {metrics}")
    return [*lines, "- dataset: [provenance.json](dataset/provenance.json); the run: [run.json](run.json)"]


def commands(run: RunRoot, labels: list[str], scored: list[dict[str, Any]]) -> list[str]:
    """The commands that made these numbers, as they were run."""
    made = [read_json(run.variant_dir(label) / "env.json", "train")["command"] for label in labels]
    return list(dict.fromkeys([*made, *(m["environment"]["command"] for m in scored)]))
