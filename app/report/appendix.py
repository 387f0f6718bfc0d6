"""The second half of the page: how the numbers were made, on what, and how to make them again."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from app.coco.categories import NAMES
from app.coco.dataset import mended_in
from app.core.differences import difference, flatten
from app.core.labels import scored_name
from app.core.mounts import as_known
from app.core.start import told
from app.report.evidence import Evidence
from app.report.findings import Findings
from app.report.groups import N_HASH
from app.report.page_files import PageFiles, ending
from app.report.tables import MISSING, markdown_table, number, plain

ENVIRONMENT_ROWS = (
    "code_version", "lock_sha256", "image", "python", "platform", "cpu_count", "gpus",
    "device", "amp", "deterministic", "seed", "workers",
)  # fmt: skip
ENVIRONMENT_NAMES = {"gpus": "gpus: name, driver, memory, power limit, highest SM clock"}
VARIANT_KEYS = ("variant", "quant")  # the table of differences has them
TRAINING_COLUMNS: tuple[str, ...] = (
    "variant", "epochs", "best epoch", "AP raw", "AP EMA", "AP EMA+BN", "train loss", "val loss", "images/s", "hours",
)  # fmt: skip
SPLIT_COUNTS = {  # key in provenance.json -> title of its column
    "n_images": "images used", "n_listed": "listed", "n_broken": "broken", "n_annotations": "annotations",
    "n_crowd": "crowd", "n_without_objects": "without objects",
}  # fmt: skip
HEADS = (
    "A training has more layers than its file: it has both heads of YOLOv10, one2many, which only helps to train, and "
    "one2one, which is scored. The file has one2one alone."
)
MAX_CLASSES = 100  # whose names the page lists
FILES_OF_TRAINING = (
    "results.csv", "loss_curve.csv", "loss_curve.png", "config.yaml", "args.yaml", "env.json", "log.txt", "health.json",
    "quant_config.json",
)  # fmt: skip
FILES_OF_RUN = {"dataset": "dataset/provenance.json", "the run": "run.json"}


def appendix(evidence: Evidence, findings: Findings) -> list[str]:
    """Sections of Markdown; what has no evidence has no section."""
    trained = {label: training.config for label, training in evidence.trainings.items()}
    sections = {
        "## Training": training_table(evidence, findings),
        "## Quantization": quantization_lines(evidence),
        "## Dataset": dataset_lines(evidence.provenance),
        "## Difference between the variants": difference_table(trained),
        "## Hyper-parameters": settings_block(trained),
        "## Environment": environment_table(evidence),
        "## Where things are": pointers(evidence, findings),
        "## Reproduce": commands(evidence),
    }
    return ["\n".join([title, "", *lines]) for title, lines in sections.items() if lines]


def training_table(evidence: Evidence, findings: Findings) -> list[str]:
    """The best epoch of each training, the three validated states apart."""
    cells = [list(TRAINING_COLUMNS)]
    for label, training in findings["trainings"].items():
        epochs = str(training["epochs"])
        if label not in evidence.finished:
            epochs += f" of {training['epochs_planned']}, unfinished"
        aps = map(number, training["AP"].values())
        losses = [number(training["train_loss"], 3), number(training["val_loss"], 3)]
        times = [number(training["images_per_s"], 1), number(training["hours"], 2)]
        cells.append([label, epochs, _value(training["best_epoch"]), *aps, *losses, *times])
    starts = findings["starts"]
    if any(starts.values()):
        for row, start in zip(cells, ["weights began", *map(told, starts.values())], strict=True):
            row.append(start)
    note = (
        "At the best epoch, by the trainer's own validator, which treats crowds and rounding otherwise than COCO does."
    )
    return [note, "", *markdown_table(cells)] if len(cells) > 1 else []


def quantization_lines(evidence: Evidence) -> list[str]:
    """Layers by bits, in training (both heads) and in the file (one head); the schemes; every exempt layer with why."""
    cells = [["variant", "bits", "layers in training", "in the ONNX file", "weights", "quantizer"]]
    with_codes = [record for record in evidence.records if "codes" in record["gates"]]
    in_file = {record["label"]: record["gates"]["codes"]["layers"] for record in with_codes}
    notes = []
    for label, quant_config in evidence.quantized.items():
        cells += _layer_rows(label, quant_config, in_file.get(label))
        if "scheme_sha256" in quant_config:
            digest = plain(quant_config["scheme_sha256"][:N_HASH])
            notes.append(f"- {plain(label)}: the rules of its scheme have the sha256 `{digest}`")
        for layer in quant_config["layers"]:
            if layer["exempt"]:
                notes.append(f"- {plain(label)}: `{layer['name']}` is not quantized: {plain(layer['why'])}")
    note = [HEADS, ""] if in_file else []
    return [*markdown_table(cells), "", *note, *notes] if len(cells) > 1 else []


def _layer_rows(label: str, quant_config: dict[str, Any], in_file: dict[str, int] | None) -> list[list[str]]:
    """A row for every number of bits; `in_file` are the layers by bits of the ONNX file, None where there is none."""
    by_bits: dict[int, list[dict[str, Any]]] = {}
    for layer in quant_config["layers"]:
        if not layer["exempt"]:
            by_bits.setdefault(layer["bits"], []).append(layer)
    rows = []
    for bits, layers in sorted(by_bits.items()):
        quantizers = {f"{layer['quantizer']}, {layer['granularity']}" for layer in layers}
        share = quant_config["share_of_learned_weights"].get(str(bits))
        n_in_file = MISSING if in_file is None else str(in_file.get(str(bits), 0))
        weights = MISSING if share is None else f"{share:.3f} of all"
        rows.append([label, str(bits), str(len(layers)), n_in_file, weights, "; ".join(sorted(quantizers))])
    return rows


def dataset_lines(provenance: dict[str, Any] | None) -> list[str]:
    if provenance is None:
        return []
    cells = [["split", *SPLIT_COUNTS.values(), "annotation sha256"]]
    splits = provenance["splits"].values()
    for split in splits:
        counts = [f"{split[name]:,}" for name in SPLIT_COUNTS]
        cells.append([split["name"], *counts, f"`{split['annotation_sha256'][:N_HASH]}`"])
    choice = ""
    if any(split["subset"] for split in splits):
        choice = f" A seeded choice (seed {provenance['seed']}); the ids are in dataset/provenance.json."
    place = as_known(provenance["coco_dir"])
    title = f"{plain(provenance['title'])} in `{place}`.{choice}{_classes(provenance)}"
    return [title, "", *markdown_table(cells), *_mended(provenance)]


def _classes(provenance: dict[str, Any]) -> str:
    """The classes of a dataset that has its own."""
    names = provenance.get("names", NAMES)
    if names == NAMES:
        return ""
    more = ", ..." if len(names) > MAX_CLASSES else ""
    return f" {len(names):,} classes: {', '.join(map(plain, names[:MAX_CLASSES]))}{more}."


def _mended(provenance: dict[str, Any]) -> list[str]:
    """A line for every split whose annotations were mended before they were used."""
    lines = []
    for split in provenance["splits"].values():
        if counts := mended_in(split):
            told = ", ".join(f"{n:,} {plain(what)}" for what, n in counts.items())
            lines.append(f"- {split['name']}: {told}")
    return ["", *lines] if lines else []


def difference_table(trained: dict[str, dict[str, Any]]) -> list[str]:
    """Every key in which the trained variants differ: `variant` and `quant.*`, or the comparison is not fair."""
    labels = list(trained)
    if len(labels) < 2:
        return []
    first, *others = trained.values()
    keys = chain.from_iterable(difference(first, other) for other in others)
    flats = list(map(flatten, trained.values()))
    cells = [["key", *labels]]
    for key in sorted(set(keys)):
        cells.append([f"`{key}`", *[_value(flat.get(key)) for flat in flats]])
    return markdown_table(cells)


def _value(value: Any) -> str:
    return MISSING if value is None else str(value)


def settings_block(trained: dict[str, dict[str, Any]]) -> list[str]:
    """All settings of the first variant: the others differ only as the table above says."""
    if not trained:
        return []
    config = next(iter(trained.values()))
    shown = {name: values for name, values in config.items() if name not in VARIANT_KEYS}
    return ["```yaml", as_known(yaml.safe_dump(shown, sort_keys=False)) + "```"]


def environment_table(evidence: Evidence) -> list[str]:
    """Machine and software: one value where all stages agree, else each with its stages."""
    environments = {f"train {label}": training.environment for label, training in evidence.trainings.items()}
    for metrics in evidence.scored:
        environments[f"eval {scored_name(metrics['dir'])}"] = metrics["environment"]
    if not environments:
        return []
    cells = [["", "value"]]
    for key in ENVIRONMENT_ROWS:
        values = {stage: facts[key] for stage, facts in environments.items() if key in facts}
        cells.append([ENVIRONMENT_NAMES.get(key, key), _by_stage(values)])
    packages = chain.from_iterable(facts["packages"] for facts in environments.values())
    for package in sorted(set(packages)):
        versions = {stage: facts["packages"].get(package) for stage, facts in environments.items()}
        cells.append([package, _by_stage(versions)])
    return markdown_table(cells, text_columns=2)


def _by_stage(values: dict[str, Any]) -> str:
    """The value of all stages, or each value with the stages that have it."""
    stages: dict[str, list[str]] = {}
    for stage, value in values.items():
        stages.setdefault(_short(value), []).append(stage)
    if len(stages) == 1:
        return next(iter(stages))
    told = [f"{value} ({', '.join(names)})" for value, names in stages.items()]
    return "; ".join(told) or MISSING


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    is_hash = isinstance(value, str) and len(value) == 64
    return f"`{value[:N_HASH]}`" if is_hash else _value(value)


def pointers(evidence: Evidence, findings: Findings) -> list[str]:
    """Paths relative to the run root, so that the folder can be moved."""
    lines = []
    for label in evidence.trainings:
        folder = evidence.run.variant_dir(label)
        links = [f"[{name}]({label}/{name})" for name in FILES_OF_TRAINING if (folder / name).exists()]
        lines.append(
            f"- {plain(label)}: {', '.join(links)}, TensorBoard `{label}/tensorboard/`, checkpoints `{label}/weights/`"
        )
    for metrics in evidence.scored:
        model, folder = metrics["model"], Path(os.path.relpath(metrics["path"], evidence.run.root))  # ../ where merged
        links = f"[metrics.json]({folder}/metrics.json), [detections.json]({folder}/detections.json)"
        where = f"`{folder.parent / 'onnx' / model['file']}`, sha256 `{model['sha256'][:N_HASH]}`"
        lines.append(f"- {plain(model['label'])}: {where}, {links}")
    merged = findings["seeds"]["runs"][1:] if findings["seeds"] else []
    numbers = PageFiles(evidence.run, ending([run["name"] for run in merged])).numbers
    files = {**FILES_OF_RUN, "numbers of this page": numbers.name}.items()
    if links := [f"{what}: [{path}]({path})" for what, path in files if (evidence.run.root / path).exists()]:
        lines.append(f"- {'; '.join(links)}")
    return lines


def commands(evidence: Evidence) -> list[str]:
    """The commands that made these numbers, as they were run."""
    each_once = dict.fromkeys(environment["command"] for environment in evidence.environments)
    note = "As they were run; between training and eval stands `export`, with the options of eval."
    return [note, "", "```", *each_once, "```"] if each_once else []
