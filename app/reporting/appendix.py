"""The second half of the page: how the numbers were made, on what, and how to make them again."""

from __future__ import annotations

from typing import Any

import yaml

from app.config import difference, flatten
from app.reporting.evidence import Evidence
from app.tables import MISSING, markdown_table, number, plain

ENVIRONMENT_ROWS = (
    "code_version", "lock_sha256", "image", "python", "platform", "cpu_count", "gpus",
    "device", "amp", "deterministic", "seed", "workers",
)  # fmt: skip
ENVIRONMENT_NAMES = {"gpus": "gpus: name, driver, memory, power limit, highest SM clock"}
VARIANT_KEYS = ("variant", "quant")  # the table of differences has them
N_HASH = 12  # hex digits of a hash on the page; the whole one is in the JSON


def appendix(evidence: Evidence, found: dict[str, Any]) -> list[str]:
    """Sections of Markdown; what has no evidence has no section."""
    trained = {label: training.config for label, training in evidence.trainings.items()}
    sections = {
        "## Training": training_table(evidence, found),
        "## Quantization": quantization_lines(evidence),
        "## Dataset": dataset_lines(evidence.provenance),
        "## Difference between the variants": difference_table(trained),
        "## Hyper-parameters": settings_block(trained),
        "## Environment": environment_table(evidence),
        "## Where things are": pointers(evidence),
        "## Reproduce": commands(evidence),
    }
    return [f"{title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines]


def training_table(evidence: Evidence, found: dict[str, Any]) -> list[str]:
    """The best epoch of each training, the three validated states apart."""
    cells = [["variant", "epochs", "best epoch", "AP raw", "AP EMA", "AP EMA+BN", "train loss", "val loss"]]
    cells[0] += ["images/s", "hours"]
    for label, t in found["trainings"].items():
        unfinished = "" if label in evidence.finished else f" of {t['epochs_planned']}, unfinished"
        cells.append([
            label, f"{t['epochs']}{unfinished}", _value(t["best_epoch"]), *(number(ap) for ap in t["AP"].values()),
            number(t["train_loss"], 3), number(t["val_loss"], 3), f"{t['images_per_s']:.1f}", f"{t['hours']:.2f}",
        ])  # fmt: skip
    note = (
        "At the best epoch, by the trainer's own validator, which treats crowds and rounding otherwise than COCO does."
    )
    return [note, "", *markdown_table(cells)] if len(cells) > 1 else []


def quantization_lines(evidence: Evidence) -> list[str]:
    """Layers by number of bits, in training (both heads) and in the file (one head); every exempt layer with why."""
    cells = [["variant", "bits", "layers in training", "in the ONNX file", "weights", "quantizer"]]
    in_file = {r["label"]: r["gates"]["codes"]["layers"] for r in evidence.records if "codes" in r["gates"]}
    exempt = []
    for label, quant_config in evidence.quantized.items():
        layers = quant_config["layers"]
        for bits in sorted({layer["bits"] for layer in layers if not layer["exempt"]}):
            same = [layer for layer in layers if layer["bits"] == bits and not layer["exempt"]]
            quantizers = sorted({f"{layer['quantizer']}, {layer['granularity']}" for layer in same})
            share = f"{quant_config['share_of_learned_weights'][str(bits)]:.3f} of all"
            n_in_file = str(in_file[label].get(str(bits), 0)) if label in in_file else MISSING
            cells.append([label, str(bits), str(len(same)), n_in_file, share, "; ".join(quantizers)])
        exempt += [
            f"- {plain(label)}: `{layer['name']}` is not quantized: {plain(layer['why'])}"
            for layer in layers
            if layer["exempt"]
        ]
    return [*markdown_table(cells), "", *exempt] if len(cells) > 1 else []


def dataset_lines(provenance: dict[str, Any] | None) -> list[str]:
    if provenance is None:
        return []
    cells = [
        ["split", "images used", "listed", "broken", "annotations", "crowd", "without objects", "annotation sha256"]
    ]
    for split in provenance["splits"].values():
        counts = ("n_images", "n_listed", "n_broken", "n_annotations", "n_crowd", "n_without_objects")
        cells.append(
            [split["name"], *(f"{split[name]:,}" for name in counts), f"`{split['annotation_sha256'][:N_HASH]}`"]
        )
    subset = any(split["subset"] for split in provenance["splits"].values())
    choice = f" A seeded choice (seed {provenance['seed']}); the ids are in dataset/provenance.json." if subset else ""
    return [f"{plain(provenance['title'])} in `{provenance['coco_dir']}`.{choice}", "", *markdown_table(cells)]


def difference_table(trained: dict[str, dict[str, Any]]) -> list[str]:
    """Every key in which the trained variants differ: `variant` and `quant.*`, or the comparison is not fair."""
    labels = list(trained)
    if len(labels) < 2:
        return []
    keys = sorted({key for label in labels[1:] for key in difference(trained[labels[0]], trained[label])})
    flats = {label: flatten(config) for label, config in trained.items()}
    cells = [[f"`{key}`", *(_value(flats[label].get(key)) for label in labels)] for key in keys]
    return markdown_table([["key", *labels], *cells])


def _value(value: Any) -> str:
    return MISSING if value is None else str(value)


def settings_block(trained: dict[str, dict[str, Any]]) -> list[str]:
    """All settings of the first variant: the others differ only as the table above says."""
    if not trained:
        return []
    config = next(iter(trained.values()))
    shown = {name: values for name, values in config.items() if name not in VARIANT_KEYS}
    return ["```yaml", yaml.safe_dump(shown, sort_keys=False) + "```"]


def environment_table(evidence: Evidence) -> list[str]:
    """Machine and software: one value where all stages agree, else each with its stages."""
    columns = {f"train {label}": training.environment for label, training in evidence.trainings.items()}
    columns |= {f"eval {m['dir'].removesuffix('-coco')}": m["environment"] for m in evidence.scored}
    cells = [["", "value"]]
    for key in ENVIRONMENT_ROWS:
        cells.append(
            [
                ENVIRONMENT_NAMES.get(key, key),
                _by_stage({name: env[key] for name, env in columns.items() if key in env}),
            ]
        )
    packages = {package for env in columns.values() for package in env["packages"]}
    for package in sorted(packages):
        cells.append([package, _by_stage({name: env["packages"].get(package) for name, env in columns.items()})])
    return markdown_table(cells, text_columns=2) if columns else []


def _by_stage(values: dict[str, Any]) -> str:
    stages: dict[str, list[str]] = {}
    for stage, value in values.items():
        stages.setdefault(_short(value), []).append(stage)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in stages.items()) or MISSING


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    is_hash = isinstance(value, str) and len(value) == 64
    return f"`{value[:N_HASH]}`" if is_hash else _value(value)


def pointers(evidence: Evidence) -> list[str]:
    """Paths relative to the run root, so that the folder can be moved."""
    lines = []
    files = (
        "results.csv",
        "loss_curve.csv",
        "loss_curve.png",
        "config.yaml",
        "args.yaml",
        "env.json",
        "log.txt",
        "health.json",
    )
    for label in evidence.trainings:
        there = [name for name in (*files, "quant_config.json") if (evidence.run.variant_dir(label) / name).exists()]
        links = ", ".join(f"[{name}]({label}/{name})" for name in there)
        lines.append(f"- {plain(label)}: {links}, TensorBoard `{label}/tensorboard/`, checkpoints `{label}/weights/`")
    for m in evidence.scored:
        file, digest = m["model"]["file"], m["model"]["sha256"][:N_HASH]
        results = ", ".join(f"[{name}]({m['dir']}/{name})" for name in ("metrics.json", "detections.json"))
        lines.append(f"- {plain(m['model']['label'])}: `onnx/{file}`, sha256 `{digest}`, {results}")
    rest = {"dataset": "dataset/provenance.json", "the run": "run.json", "numbers of this page": "report.json"}
    there = [f"{what}: [{path}]({path})" for what, path in rest.items() if (evidence.run.root / path).exists()]
    return [*lines, *([f"- {'; '.join(there)}"] if there else [])]


def commands(evidence: Evidence) -> list[str]:
    """The commands that made these numbers, as they were run."""
    made = [training.environment["command"] for training in evidence.trainings.values()]
    made = list(dict.fromkeys([*made, *(m["environment"]["command"] for m in evidence.scored)]))
    note = "As they were run; between training and eval stands `export`, with the options of eval."
    return [note, "", "```", *made, "```"] if made else []
