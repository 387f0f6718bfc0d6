"""The network: built from a configuration, saved to and loaded from plain state_dicts."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from ultralytics.nn.modules import v10Detect
from ultralytics.nn.tasks import DetectionModel

from app.coco.categories import NAMES
from app.core.config import Config, UserError, validate
from app.core.files import write_atomic
from app.core.shapes import Shape, misfits
from app.quant.schemes import assign, convolutions, quantize
from app.quant.weights import Weights, fit

CHECKPOINT_FORMAT = 2
IMPORTED_EPOCH = -1  # of weights that were not trained here; others count from 0
Epoch = Annotated[int, Field(ge=IMPORTED_EPOCH, le=2**53)]
# A checkpoint is torch's ZIP, then the seal and 64 hex digits; torch.load reads the ZIP and ignores what follows it.
SCORED_SHAPE: Shape = {"scored": dict[str, Any], "epoch": Epoch, "names?": list[str]}
SEAL = b"\nsha256:"
SEAL_BYTES = len(SEAL) + 64
ZIP_END, ZIP_END_BYTES = b"PK\5\6", 22  # how a ZIP without a seal ends


def build(
    config: Config, names: Sequence[str] = NAMES, weights: Weights | None = None
) -> tuple[DetectionModel, dict[str, Any] | None]:
    """Builds the network of one variant for the classes `names`, with `weights` or else with random numbers.

    Random numbers are drawn from train.seed, and weights loaded, before any layer is replaced: fp16 and qat start from
    the same numbers.

    Returns:
        the model in training mode on the CPU, and the content of quant_config.json (None for fp16).
    """
    # Ultralytics leaves the kind of the last head that it built on the class Detect (nn/tasks.py parse_model, 8.4.190).
    # v10Detect first builds the layers of a Detect: after a YOLOv8 in the same process it would draw other numbers.
    v10Detect.legacy = False
    torch.manual_seed(config.train.seed)
    model = DetectionModel(config.model, ch=3, nc=len(names), verbose=False)
    model.names = dict(enumerate(names))
    if weights:
        fit(model, weights, config.model)
    return model, quantize(model, config.quant) if config.quant else None


def float_network(config: Config) -> DetectionModel:
    """The network before any layer is quantized, with random weights."""
    model, _ = build(config.model_copy(update={"quant": None}))
    return model


def check_scheme(config: Config) -> None:
    """Checks that the patterns of quant.scheme fit the model.

    Raises:
        UserError: a layer without a pattern, or a pattern without a layer.
    """
    if config.quant:
        assign(list(convolutions(float_network(config))), config.quant.scheme)


def cpu_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """An FP32 copy of the model's state_dict on the CPU, contiguous also after a training in channels_last."""
    state = {}
    for key, value in model.state_dict().items():
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        state[key] = value.detach().to("cpu", dtype, copy=True).contiguous()
    return state


def save_checkpoint(path: Path, config: Config, entries: dict[str, Any], previous: Path | None = None) -> None:
    """Writes a checkpoint atomically: format, configuration and `entries` (tensors and plain values only).

    With `previous` the checkpoint that is replaced is kept under that name.

    Raises:
        OSError: for example no space is left; then the old file is still there, whole.
    """
    checkpoint = {"format": CHECKPOINT_FORMAT, "config": config.model_dump(mode="json"), **entries}
    buffer = io.BytesIO()  # torch's own writer reports a full disk as a RuntimeError without a reason
    torch.save(checkpoint, buffer)
    write_atomic(path, lambda part: write_sealed(part, buffer.getbuffer()), previous)


def write_sealed(path: Path, data: memoryview) -> None:
    """Writes data and its seal, which a thread computes meanwhile: that takes half as long as the writing."""
    with ThreadPoolExecutor(1) as pool, path.open("wb") as file:
        sealing = pool.submit(seal, data)
        file.write(data)
        file.write(sealing.result())


def seal(data: bytes | memoryview) -> bytes:
    return SEAL + hashlib.sha256(data).hexdigest().encode()


def is_whole(data: bytes) -> bool:
    """Whether the checksum in the seal is that of the data. A plain ZIP, as torch.save writes it, counts as whole."""
    plain = data[-ZIP_END_BYTES:].startswith(ZIP_END)
    return plain or data[-SEAL_BYTES:] == seal(memoryview(data)[:-SEAL_BYTES])


def load_checkpoint(path: Path, shape: Shape | None = None) -> dict[str, Any]:
    """Reads a checkpoint without executing any pickle code (weights_only).

    `shape` names the entries that the caller takes.

    Raises:
        UserError: missing, truncated, changed on the disk, or not a checkpoint of this project and version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: train first, for example 'make train-fp16'") from error
    if not is_whole(data):
        raise UserError(f"{path} is not a whole checkpoint: its checksum does not fit, it is cut off or damaged")
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader and unpickler raise whatever a damaged file leads them to
        raise UserError(f"{path} is not a readable checkpoint of this project ({type(error).__name__})") from error
    if misfits(checkpoint, {"format": int}):
        raise UserError(f"{path} is not a checkpoint of this project (it names no format)")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} was written by another version of this program (format {checkpoint['format']}, this version has "
            f"{CHECKPOINT_FORMAT}): go on with that version, or train again"
        )
    if faults := misfits(checkpoint, {"config": dict[str, Any], **(shape or {})}):
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({'; '.join(faults)}): train again")
    return checkpoint


def config_of(checkpoint: dict[str, Any], path: Path) -> Config:
    """The configuration that a checkpoint was trained with.

    Raises:
        UserError: it is not one of this version; the message names the checkpoint.
    """
    try:
        return validate(checkpoint["config"])
    except UserError as error:
        raise UserError(f"{path} was written by another version of this program, or is damaged: {error}") from error


def names_of(checkpoint: dict[str, Any]) -> list[str]:
    """The classes of a checkpoint's network; one without names is of COCO's."""
    return checkpoint.get("names", NAMES)


def other_names(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """How the classes of one network differ from those of another: in number, or the first pair; None where none do."""
    if len(names) != len(wanted):
        return f"{len(names)} classes, not {len(wanted)}"
    for number, (name, other) in enumerate(zip(names, wanted, strict=True)):
        if name != other:
            return f"class {number} is {name}, not {other}"
    return None


def load_scored(path: Path) -> tuple[DetectionModel, Config, dict[str, Any]]:
    """Rebuilds the evaluated model (EMA weights, re-estimated BatchNorm) from a checkpoint file alone.

    Its quantized layers are plain Brevitas layers, also when the training used the fast path: Brevitas is the
    definition.

    Returns:
        the model in eval mode on the CPU, its configuration, and the whole checkpoint.
    """
    checkpoint = load_checkpoint(path, SCORED_SHAPE)
    config = config_of(checkpoint, path)
    plain = config.quant.model_copy(update={"fast_path": False}) if config.quant else None
    model, _ = build(config.model_copy(update={"quant": plain}), names_of(checkpoint))
    try:
        model.load_state_dict(checkpoint["scored"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} does not hold the weights of {config.model} ({config.label}) that it names") from error
    return model.eval(), config, checkpoint
