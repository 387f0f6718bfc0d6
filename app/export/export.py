"""The export stage: ONNX files of every checkpoint; each is checked against torch before it gets its name.

Label: what a model is, and how its file is packed. Contract: the layout of the output. Gate: a check of a file against
the truth, which is what torch computes. Packing: none as traced, fp16 (FP16 weights), int4 (INT4 weights).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto
from ultralytics.nn.tasks import DetectionModel

from app.core.config import Config, Export, UserError
from app.core.differences import config_hash
from app.core.environment import code_version
from app.core.files import sha256, write_atomic, write_json
from app.core.labels import PACKED_BITS, Label
from app.core.run import RunRoot, record_stage
from app.data.prepare import prepared
from app.export.done import N_PARITY_IMAGES, file_settings, is_done, labels_of_files, wanted_facts
from app.export.gates import Truth, check_codes, check_file, check_half, check_parity, check_same_output
from app.export.graphs import optimize, set_facts, tidy, to_half, to_int4
from app.export.trace import parity_images, torch_truth, traced_graph
from app.quant.model import load_scored

log = logging.getLogger(__name__)
# Facts that are in the .json and in the file's metadata.
METADATA = (
    "contract", "label", "variant", "scheme", "precision", "model", "imgsz", "config_hash", "code_version",
    "checkpoint_sha256", "start",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run: its model in eval mode, and what the files of that model must compute.

    `source_sha256` is the hash of the FP16 checkpoint that PTQ has quantized; None for a trained checkpoint.
    """

    label: Label
    model: DetectionModel
    config: Config
    epoch: int
    checkpoint_sha256: str
    source_sha256: str | None
    truth: Truth


def export(config: Config, run: RunRoot, force: bool) -> None:
    """Exports every finished checkpoint of the run, of trainings and of PTQ; files that are up to date are kept.

    Raises:
        UserError: nothing is trained, a checkpoint is of another model, or a file is of another checkpoint or other
            settings and `force` is not set.
        RuntimeError: a gate failed; the file was not written.
    """
    labels = run.finished_labels()
    if not labels:
        raise UserError(f"no finished training under {run.root}: run 'make train-fp16 train-qat' first")
    prepared(run, config.data.coco_dir)
    for checkpoint_label in labels:
        log.info("export %s: computing with PyTorch what its files must give", checkpoint_label)
        trained = load_trained(run, checkpoint_label)
        has_packed_bits = any(bits <= PACKED_BITS for bits in trained.truth.layers_by_bits)
        for label in labels_of_files(checkpoint_label, config.export, has_packed_bits):
            export_file(config.export, run, trained, label, force)


def load_trained(run: RunRoot, label: Label, n_images: int = N_PARITY_IMAGES) -> Trained:
    """Loads best.pt of one label and computes with torch what its files must compute, for `n_images` images.

    Raises:
        UserError: the checkpoint cannot be read, or is of another label.
    """
    path = run.best(label)
    model, config, checkpoint = load_scored(path)
    source_sha256 = checkpoint.get("source_sha256")
    trained_as = Label.parse(config.label)
    made_as = replace(trained_as, method="ptq") if source_sha256 else trained_as
    if made_as != replace(label, bn=False):
        raise UserError(f"{path} is a checkpoint of {made_as}, not of {label}: put the right file back or retrain")
    truth = torch_truth(model, parity_images(run, config.train.imgsz, n_images))
    return Trained(label, model, config, checkpoint["epoch"] + 1, sha256(path), source_sha256, truth)


def export_file(settings: Export, run: RunRoot, trained: Trained, label: Label, force: bool) -> None:
    """Writes one ONNX file, unless it exists and is up to date.

    Raises:
        UserError: the existing file is of another checkpoint or other settings, and `force` is not set.
    """
    path = file_path(run, trained, label)
    wanted = wanted_facts(trained.checkpoint_sha256, trained.source_sha256, settings)
    if not force and is_done(path, wanted):
        log.info("export %s: done already (%s)", trained.label, path)
    else:
        write_file(settings, run, trained, label)


def file_path(run: RunRoot, trained: Trained, label: Label) -> Path:
    return run.onnx_dir / label.file_name(trained.config.model_name)


def write_file(settings: Export, run: RunRoot, trained: Trained, label: Label) -> None:
    """Writes one ONNX file and its .json; the file gets its name after it has passed all gates.

    Raises:
        RuntimeError: a gate failed; the file was not written.
    """
    path = file_path(run, trained, label)
    record: dict[str, Any] = describe(trained, label) | {"export": file_settings(settings)}

    def write(part: Path) -> None:
        log.info("export %s: %s", label, "packing the weights" if label.packing else "tracing the network")
        model = make_graph(settings, run, trained, label)
        metadata = {key: record[key] for key in METADATA}
        set_facts(model, metadata | {"names": list(trained.truth.names)})
        onnx.save(model, part)
        log.info("export %s: comparing the file with PyTorch on %d images", label, len(trained.truth.images))
        record["gates"] = check(part, run, trained, label)
        op_types = Counter(node.op_type for node in model.graph.node)
        record["nodes"] = dict(op_types.most_common())
        record["opset"] = model.opset_import[0].version

    for old_path in (path.with_suffix(".json"), path):  # if a gate fails, no older file may stand for the new one
        old_path.unlink(missing_ok=True)
    write_atomic(path, write)
    record |= {"file": path.name, "sha256": sha256(path), "size_bytes": path.stat().st_size}
    write_json(path.with_suffix(".json"), record)
    record_stage(run, f"export {label}", {"file": path.name, "sha256": record["sha256"]})
    log_parity(label, path, record)


def describe(trained: Trained, label: Label) -> dict[str, Any]:
    """The facts about a file that are known before it is written."""
    config = trained.config
    return {
        "label": str(label),
        "variant": trained.label.method,
        "scheme": config.quant.scheme.name if config.quant else None,
        "precision": label.precision,
        "model": trained.config.model_name,
        "contract": label.contract,
        "input": {"name": "images", "layout": "NCHW", "type": "float32", "color": "RGB", "range": [0, 1], "pad": 114},
        "imgsz": config.train.imgsz,
        "n_classes": len(trained.truth.names),
        "config_hash": config_hash(config),
        "code_version": code_version(),
        "checkpoint_sha256": trained.checkpoint_sha256,
        "source_sha256": trained.source_sha256,
        "start": config.train.weights.facts if config.train.weights else None,
        "quantized_layers": {str(bits): n for bits, n in trained.truth.layers_by_bits.items()},
        "epoch": trained.epoch,
    }


def make_graph(settings: Export, run: RunRoot, trained: Trained, label: Label) -> ModelProto:
    """The ONNX model: FP32 and QCDQ are traced from torch, FP16 and INT4 are made from those files."""
    if label.packing:
        source = onnx.load(file_path(run, trained, replace(label, packing="")))
        return to_half(source) if label.packing == "fp16" else to_int4(source)
    graph = traced_graph(settings, trained.model, label, trained.truth.images, run.onnx_dir / f".{label}.traced")
    tidy(graph)
    return optimize(graph) if settings.optimize else graph


def check(part: Path, run: RunRoot, trained: Trained, label: Label) -> dict[str, Any]:
    """Runs all gates on one file; returns what they measured.

    Raises:
        RuntimeError: a gate failed.
    """
    gates: dict[str, Any] = {"checker": check_file(part)}
    if label.is_quantized:
        gates["codes"] = check_codes(part, trained.truth.layers_by_bits, trained.truth.full_by_bits)
    if label.packing == "fp16":
        gates["half"] = check_half(part)
    if label.packing == "int4":
        reference_path = file_path(run, trained, replace(label, packing=""))
        gates["bit_equal"] = check_same_output(part, reference_path, trained.truth.images)
    gates["parity"] = check_parity(part, trained.truth, label)
    return gates


def log_parity(label: Label, path: Path, record: dict[str, Any]) -> None:
    """Logs the file's size and difference from torch, and warns of a network that magnifies rounding."""
    parity = record["gates"]["parity"]
    log.info(
        "export %s: %s, %.2f MB, off torch by at most %.1e px and %.1e in score on %d images",
        label, path, record["size_bytes"] / 1e6, parity["max_box_px"], parity["max_score"], parity["n_images"],
    )  # fmt: skip
    if parity["magnifies_rounding"]:
        log.warning(
            "export %s: that is more than in any trained network; this one magnifies rounding, and what the file "
            "scores says little about its format: train longer", label,
        )  # fmt: skip
