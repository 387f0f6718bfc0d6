"""Reads a checkpoint to start from: our best.pt or last.pt, or a YOLOv10 as Ultralytics or its authors publish it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from app.core.config import UserError
from app.core.start import Start
from app.quant.model import load_checkpoint
from app.quant.pickles import Inert, mapping, tensors_of, unpickle
from app.quant.weights import Weights, not_finite, without_prefix

# Where a checkpoint keeps its network; the first that is there and not empty counts. The EMA is what was scored.
ENTRIES = ("ema", "model", "state_dict", "model_state_dict", "module")
OWN_ENTRIES = ("scored", "ema")  # a last.pt from before the first validation has nothing scored
MAX_DEPTH = 4  # dictionaries around a network
NORM = ".bn."  # part of the names of Ultralytics' BatchNorm
OF_QUANTIZER = ".weight_quant."  # part of the names of Brevitas' own state
DETECTION = ("DetectionModel", "YOLOv10DetectionModel")


def read_start(start: Start) -> Weights:
    """Reads the weights of a checkpoint without executing anything of it.

    Raises:
        UserError: the file is gone, has changed since it was named, cannot be read, or holds no network for detection.
    """
    path = Path(start.path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): train.weights names it") from error
    if hashlib.sha256(data).hexdigest() != start.sha256:
        raise UserError(f"{path} is another file than when this run began (its sha256 was {start.sha256})")
    content = unpickle(data, path)
    is_own = {"format", "config"} <= mapping(content).keys()
    weights = _own(start) if is_own else _published(start, content)
    if not weights.tensors:
        raise UserError(f"{path} holds no network: name a checkpoint such as best.pt")
    if not any(NORM in name for name in weights.tensors):
        raise UserError(f"{path} holds a network without BatchNorm, it was folded (fuse): name the one of its training")
    if name := not_finite(weights.tensors):
        raise UserError(f"{path} holds NaN or infinity in {name}: its training went wrong, take another checkpoint")
    return weights


def _own(start: Start) -> Weights:
    """Of this project. The scored weights of a last.pt are those of its last validation."""
    checkpoint = load_checkpoint(Path(start.path))
    config = checkpoint["config"]
    states = [checkpoint[entry] for entry in OWN_ENTRIES if checkpoint.get(entry)]
    state = mapping(states[0]) if states else {}
    return Weights(
        start,
        tensors={name: tensor for name, tensor in state.items() if OF_QUANTIZER not in name},
        names=_names(checkpoint.get("names")),
        imgsz=_size(mapping(config.get("train"))),
        architecture=config.get("model"),
        is_quantized=config.get("variant") == "qat",
    )


def _published(start: Start, content: Any) -> Weights:
    """Of another program: a pickled network, or a state_dict, in any of the usual entries."""
    network = _network_in(content)
    arguments = mapping(mapping(content).get("train_args")) if isinstance(content, dict) else {}
    if not isinstance(network, Inert):
        tensors = {str(name): value for name, value in network.items() if isinstance(value, torch.Tensor)}
        names = _names(mapping(content).get("names"))
        return Weights(start, without_prefix(tensors), names, _size(arguments))
    attributes = mapping(network)
    _check_task(start, network, {**arguments, **mapping(attributes.get("args"))})
    yaml = mapping(attributes.get("yaml"))
    return Weights(
        start,
        tensors=without_prefix(tensors_of(network)),
        names=_names(attributes.get("names")),
        imgsz=_size(arguments),
        architecture=_text(yaml.get("yaml_file")),
    )


def _network_in(content: Any) -> Any:
    """The pickled network, or the dictionary of tensors; an empty dictionary where there is none."""
    for _ in range(MAX_DEPTH):
        if isinstance(content, Inert) or any(isinstance(value, torch.Tensor) for value in mapping(content).values()):
            return content
        entries = [mapping(content)[entry] for entry in ENTRIES if entry in mapping(content)]
        inner = [entry for entry in entries if isinstance(entry, Inert) or mapping(entry)]
        content = inner[0] if inner else {}
    return {}


def _check_task(start: Start, network: Inert, arguments: dict[Any, Any]) -> None:
    kind = network.kind.rpartition(".")[2]
    task = _text(arguments.get("task"))
    if kind.endswith("Model") and kind not in DETECTION:
        raise UserError(f"{start.path} holds a {kind} ({task or 'of another task'}): a network for detection is needed")
    if task not in (None, "detect"):
        raise UserError(f"{start.path} holds a network for the task {task}: one for detect is needed")


def _names(value: Any) -> list[str] | None:
    """Class names of a list, or of a dictionary by number; None for anything else."""
    if isinstance(value, dict):
        value = [value.get(number) for number in range(len(value))]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    return list(value) or None


def _size(arguments: dict[Any, Any]) -> int | None:
    size = arguments.get("imgsz")
    return size if type(size) is int else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
