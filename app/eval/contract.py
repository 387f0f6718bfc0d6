"""The interface of an ONNX file of ours, of Ultralytics or of others: contract and input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import GraphProto, TensorProto

from app.core.config import UserError
from app.eval.metadata import shortened, size_of

# nms: Ultralytics' export of the one2many head, in the layout of raw; its detections need non-maximum suppression.
CONTRACTS = ("raw", "end2end", "nms")
INPUT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,  # 0..255 instead of 0..1
}
N_BOX_ROWS = 4  # of raw and nms: centre, width and height; below them a row for every class
OUTPUT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)")
LARGEST_INPUT = 2**29  # numbers in a batch: 2 GiB in float32
SAY_CONTRACT = (
    "say what its output is with --contract: raw (scores of a head that needs no suppression), "
    "nms (that needs non-maximum suppression) or end2end ([N,K,6])"
)


@dataclass(frozen=True)
class Output:
    """The output of a file: its contract, and the number of classes that its shape shows (None: it shows none)."""

    contract: str
    n_classes: int | None


@dataclass(frozen=True)
class Said:
    """What its user says of a foreign file; None where the file itself says it."""

    contract: str | None = None
    names: list[str] | None = None
    imgsz: int | None = None


@dataclass(frozen=True)
class Input:
    """The input of a file: `size` is height and width in px; `batch` is None if it is free.

    `type` is a key of INPUT_TYPES.
    """

    name: str
    type: str
    size: tuple[int, int]
    batch: int | None

    def feed(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the session takes for images float32 [N,3,*size] RGB 0..1, in the type of the input."""
        kind = INPUT_TYPES[self.type]
        if kind is np.uint8:
            images = np.rint(images * 255)
        return {self.name: images.astype(kind, copy=False)}


def refuse_foreign_data(path: Path) -> None:
    """Refuses a model with weights outside its folder, because a file from a stranger could name any path.

    Raises:
        UserError: the file is not ONNX, takes no images, or has weights outside its folder; weights in files beside it
            are allowed.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded, it is no ONNX file: download or export it again") from error
    _check_ranks(path, model.graph)
    folder = os.path.realpath(path.parent)
    for tensor in _tensors(model):
        entries = tensor.external_data if tensor.data_location == TensorProto.EXTERNAL else ()
        for location in [entry.value for entry in entries if entry.key == "location"]:
            if "\0" in location or not Path(os.path.realpath(Path(folder) / location)).is_relative_to(folder):
                weights = f"weights of {shortened(tensor.name)}"
                raise UserError(f"{path}: {weights} lie outside its folder, in {shortened(location)}: refused")


def _check_ranks(path: Path, graph: GraphProto) -> None:
    """Refuses an input that is no batch of images, before ONNX Runtime (1.26.0) ends the process over its shape."""
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        n_axes = len(value.type.tensor_type.shape.dim)
        if value.name not in constants and n_axes != 4:
            name = shortened(value.name)
            raise UserError(f"{path}: input {name} has {n_axes} axes, the contract is [N,3,H,W], RGB: another model")


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor stored anywhere in a model: in its graph, subgraphs and functions, dense or sparse."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def read_input(path: Path, inputs: Sequence[Any], metadata: Mapping[str, str], said: Said) -> Input:
    """The input of an open session; raises a UserError if it differs from the contract, or nobody says its size."""
    if len(inputs) != 1 or inputs[0].type not in INPUT_TYPES:
        types = ", ".join(f"{shortened(value.name)}: {value.type}" for value in inputs)
        raise UserError(f"{path}: inputs are {types}; the contract is one input, {', '.join(INPUT_TYPES)}")
    batch, size = read_shape(path, inputs[0].shape, metadata, said)
    return Input(inputs[0].name, inputs[0].type, size, batch)


def read_contract(
    path: Path, outputs: Sequence[Any], true_shape: Callable[[], list[int]], metadata: Mapping[str, str], said: Said
) -> Output:
    """The output of an open session: its contract as its user, our metadata, its shape or Ultralytics' metadata say.

    The authors of YOLOv10 and Ultralytics 8.2.38 to 8.3 write no `end2end` into the metadata; the shape [N,K,6] says it
    for all files.

    Args:
        outputs: those of the session.
        true_shape: the shape for one image, which costs a run; it is asked where the file declares a free one.

    Raises:
        UserError: the output differs from the contract, or none of them says it.
    """
    shapes = [output.shape for output in outputs]
    types = ", ".join(output.type for output in outputs)
    is_one = len(outputs) == 1 and outputs[0].type in OUTPUT_TYPES
    is_free = is_one and not (shapes[0] and all(isinstance(size, int) for size in shapes[0][1:]))
    if is_free:
        shapes = [true_shape()]
    contract = _contract(path, shapes, metadata, said)
    if not is_one or not shape_fits(contract, shapes[0]):
        raise UserError(f"{path}: outputs are {shortened(shapes)} {types}, {wanted_shape(contract)}")
    return Output(contract, None if contract == "end2end" else shapes[0][1] - N_BOX_ROWS)


def _contract(path: Path, shapes: list[Any], metadata: Mapping[str, str], said: Said) -> str:
    task = metadata.get("task", "detect")
    if task != "detect":
        raise UserError(f"{path} is an Ultralytics model for the task {shortened(task)}: it must be detect")
    stated = metadata.get("contract", "missing")
    if said.contract or stated in CONTRACTS:
        return said.contract or stated
    if len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][2] == 6:
        return "end2end"
    if "contract" not in metadata and {"task", "stride"} <= metadata.keys():  # Ultralytics'
        return "nms"
    raise UserError(
        f"{path}: metadata 'contract' is {shortened(stated)}, and output {shortened(shapes)} does not say it: "
        f"{SAY_CONTRACT}"
    )


def read_shape(
    path: Path, shape: list[Any], metadata: Mapping[str, str], said: Said
) -> tuple[int | None, tuple[int, int]]:
    """Batch (None if it is free), and height and width in px, of a file's input of this shape.

    Raises:
        UserError: the shape is not [N,3,H,W], nobody says a free side, or the metadata or the user say another one.
    """
    stated = size_of(metadata) if said.imgsz is None else (said.imgsz, said.imgsz)
    facts = f"{path}: input shape {shortened(shape)}, "
    if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
        raise UserError(f"{facts}the contract is [N,3,H,W], RGB: export it for that layout")
    fixed = [side if isinstance(side, int) else None for side in shape[2:]]
    sides = [side or known for side, known in zip(fixed, stated or (0, 0), strict=True)]
    if not all(sides):
        raise UserError(f"{facts}and no metadata 'imgsz' that can be read: say the side in px with --imgsz")
    if stated and tuple(sides) != stated:
        source = f"--imgsz {said.imgsz}" if said.imgsz is not None else f"metadata imgsz {shortened(metadata['imgsz'])}"
        raise UserError(f"{facts}{source}; both must be the size that the file takes")
    batch = shape[0] if isinstance(shape[0], int) else None
    n_numbers = (1 if batch is None else batch) * 3 * sides[0] * sides[1]
    if min(sides) < 1 or not 0 < n_numbers <= LARGEST_INPUT:
        raise UserError(f"{facts}{sides[1]} x {sides[0]} px: no batch of images that can be run")
    return batch, (sides[0], sides[1])


def shape_fits(contract: str, shape: list[Any], n_classes: int | None = None) -> bool:
    """Whether an output of this shape is the contract's; `n_classes` None: of any number of classes."""
    if len(shape) != 3:
        return False
    if contract == "end2end":
        return shape[2] == 6
    n_rows = shape[1]
    return isinstance(n_rows, int) and (n_rows > N_BOX_ROWS if n_classes is None else n_rows == N_BOX_ROWS + n_classes)


def wanted_shape(contract: str, n_classes: int | None = None) -> str:
    """The second half of a message about an output that does not fit."""
    n_rows = "4+classes" if n_classes is None else N_BOX_ROWS + n_classes
    shape = "[N,300,6]" if contract == "end2end" else f"[N,{n_rows},A]"
    return f"the contract '{contract}' is one float output {shape}: a model of other classes or another task"
