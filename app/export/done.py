"""Which ONNX files a run is to have, and whether they are there: read from the run's files, without PyTorch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.core.config import Config, Export, UserError
from app.core.files import read_json, sha256
from app.core.labels import PACKED_BITS, Label
from app.core.run import RunRoot
from app.core.shapes import Shape
from app.data.prepare import prepared

QUANT_CONFIG_SHAPE: Shape = {"layers": list[dict[str, Any]]}
SOURCE_SHAPE: Shape = {"source_sha256": str}
N_PARITY_IMAGES = 8  # for which a file is compared with PyTorch, at most
log = logging.getLogger(__name__)


def is_exported(config: Config, run: RunRoot) -> bool:
    """Whether every file of every finished checkpoint is there and up to date; logs that it is.

    What is wrong with a file is no error here: the stage says it, after it has read the checkpoints.

    Raises:
        UserError: the dataset is not there, or not the one of the run.
    """
    labels = run.finished_labels()
    if not labels:
        return False
    prepared(run, config.data.coco_dir)
    n_files = 0
    try:
        for label in labels:
            wanted = wanted_facts(sha256(run.best(label)), source_of(run, label), config.export)
            for file_label in labels_of_files(label, config.export, has_packed_bits(run, label)):
                if not is_done(run.onnx_dir / file_label.file_name(config.model_name), wanted):
                    return False
                n_files += 1
    except (UserError, FileNotFoundError):
        return False
    log.info("export: done already (%d files in %s)", n_files, run.onnx_dir)
    return True


def source_of(run: RunRoot, label: Label) -> str | None:
    """SHA-256 of the checkpoint that PTQ has quantized; None for a training."""
    if label.method != "ptq":
        return None
    return read_json(run.done(label), "ptq", SOURCE_SHAPE)["source_sha256"]


def has_packed_bits(run: RunRoot, label: Label) -> bool:
    """Whether a checkpoint has a layer of so few bits that two codes share a byte, by its quant_config.json."""
    if not label.is_quantized:
        return False
    quant_config = read_json(run.variant_dir(label) / "quant_config.json", "train", QUANT_CONFIG_SHAPE)
    bits = [layer.get("bits") for layer in quant_config["layers"]]
    return any(isinstance(number, int) and number <= PACKED_BITS for number in bits)


def labels_of_files(label: Label, settings: Export, has_packed_bits: bool) -> list[Label]:
    """Labels of the files of a checkpoint; a repacked file comes after its source.

    A scheme without a layer of 2 to 4 bits has no INT4 file. A PTQ checkpoint has only the QCDQ file of the raw
    contract: it is scored for the comparison with QAT, and its other files would have the same score.
    """
    if label.method == "ptq":
        return [label]
    packed = "int4" if label.is_quantized else "fp16"
    has_packed = not label.is_quantized or has_packed_bits
    labels = []
    for contract in settings.contracts:
        traced = replace(label.traced, contract=contract)
        labels.append(traced)
        if has_packed:
            labels.append(replace(traced, packing=packed))
    return labels


def wanted_facts(checkpoint_sha256: str, source_sha256: str | None, settings: Export) -> dict[str, Any]:
    """The facts that the record of an up-to-date file has."""
    return {
        "checkpoint_sha256": checkpoint_sha256,
        "source_sha256": source_sha256,
        "export": file_settings(settings),
    }


def file_settings(settings: Export) -> dict[str, Any]:
    """The settings on which a single file depends: all but the list of files."""
    return settings.model_dump(exclude={"contracts"})


def is_done(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the file exists and its record has the `wanted` facts.

    A file without a .json is left over from an interrupted export.

    Raises:
        UserError: the file is of another checkpoint or other settings, or has changed since its export.
    """
    record_path = path.with_suffix(".json")
    if not path.exists() or not record_path.exists():
        return False
    record = read_json(record_path, "export", {"sha256": str})
    differs = [key for key, value in wanted.items() if record.get(key) != value]
    if differs:
        raise UserError(f"{path} was made with another {' and '.join(differs)}: overwrite it with --force")
    if record["sha256"] != sha256(path):
        raise UserError(f"{path} is not the file that its .json describes: overwrite it with --force")
    return True
