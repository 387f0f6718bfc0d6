"""The interface of an ONNX file of ours or of Ultralytics: contract, size and batch of the input, class names."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo

from app.coco.annotations import NAMES
from app.core.config import UserError

INPUT = "images"
N_CLASSES = len(NAMES)
# nms: Ultralytics' export of the one2many head, in the layout of raw; its detections need non-maximum suppression.
CONTRACTS = ("raw", "end2end", "nms")


@dataclass(frozen=True)
class Promise:
    """Contract and input of a file: `imgsz` is the side of the square input in px; `batch` is None if it is free."""

    input_name: str
    contract: str
    imgsz: int
    batch: int | None


def refuse_foreign_data(path: Path) -> None:
    """Refuses a model with weights outside its folder, because a file from a stranger could name any path.

    Raises:
        UserError: the file is not ONNX, or has weights outside its folder; weights in files beside it are allowed.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} cannot be loaded, it is no ONNX file: export it again with --force") from error
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            location = ExternalDataInfo(tensor).location
            if not (folder / location).resolve().is_relative_to(folder):
                raise UserError(f"{path}: weights of {tensor.name} lie outside its folder, in {location}: refused")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in a model: in its graph, in subgraphs, and in its functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def read_contract(path: Path, metadata: Mapping[str, str]) -> str:
    """'raw', 'end2end' or 'nms', from our metadata or that of Ultralytics (engine/exporter.py, 8.4.190).

    Raises:
        UserError: the file has no metadata of either kind, or its classes are not COCO's.
    """
    by_ultralytics = "contract" not in metadata and {"task", "stride", "names"} <= metadata.keys()
    if by_ultralytics:
        if metadata["task"] != "detect":
            raise UserError(f"{path} is an Ultralytics model for the task {metadata['task']}: it must be detect")
        names: Any = list(ast.literal_eval(metadata["names"]).values())
        contract = "end2end" if metadata.get("end2end") == "True" or has_nms(metadata) else "nms"
    else:
        names = json.loads(metadata.get("names", "null"))
        contract = metadata.get("contract", "missing")
        if contract not in CONTRACTS:
            raise UserError(
                f"{path}: metadata 'contract' is {contract}, it must be raw or end2end: export it with 'make export'"
            )
    if names is not None and names != NAMES:
        raise UserError(f"{path}: metadata 'names' are not the {N_CLASSES} COCO classes in their order: another model")
    return contract


def has_nms(metadata: Mapping[str, str]) -> bool:
    """Whether Ultralytics' exporter put its own suppression into the graph (nms=True); its output is [N,300,6] too."""
    arguments = ast.literal_eval(metadata.get("args", "{}"))
    return bool(arguments.get("nms"))


def read_promise(path: Path, session: Any, metadata: Mapping[str, str]) -> Promise:
    """Checks that the inputs and outputs of an open session are those of its contract.

    Raises:
        UserError: an input or output differs from the contract.
    """
    contract = read_contract(path, metadata)
    batch, imgsz = read_input(path, session.get_inputs(), metadata)
    outputs = session.get_outputs()
    shapes = [output.shape for output in outputs]
    if len(outputs) != 1 or outputs[0].type != "tensor(float)" or not shape_fits(contract, shapes[0]):
        types = ", ".join(output.type for output in outputs)
        raise UserError(f"{path}: outputs are {shapes} {types}, {wanted_shape(contract)}")
    return Promise(INPUT, contract, imgsz, batch)


def read_input(path: Path, inputs: list[Any], metadata: Mapping[str, str]) -> tuple[int | None, int]:
    """Batch (None if it is free) and side in px of a file's input.

    Raises:
        UserError: there is not exactly one square float input, or its size differs from the metadata's.
    """
    if len(inputs) != 1 or inputs[0].name != INPUT or inputs[0].type != "tensor(float)":
        types = ", ".join(f"{value.name}: {value.type}" for value in inputs)
        raise UserError(
            f"{path}: inputs are {types}; the contract is one input '{INPUT}', tensor(float), also in FP16 files"
        )
    shape = inputs[0].shape
    fixed_sides = {side for side in shape[2:] if isinstance(side, int)}
    sides = fixed_sides | read_imgsz(metadata)
    if len(shape) != 4 or shape[1] != 3 or len(sides) != 1:
        raise UserError(
            f"{path}: input shape {shape}, metadata imgsz {metadata.get('imgsz')}; "
            "the contract is [N,3,imgsz,imgsz], square"
        )
    batch = shape[0] if isinstance(shape[0], int) else None
    return batch, sides.pop()


def read_imgsz(metadata: Mapping[str, str]) -> set[int]:
    """The sides in px that the metadata names: '160' in our files, '[160, 160]' in Ultralytics'; may be empty."""
    parts = metadata.get("imgsz", "").strip("[]").split(",")
    return {int(part) for part in parts if part.strip().isdigit()}


def shape_fits(contract: str, shape: list[Any]) -> bool:
    """Whether an output of this shape can be the contract's; a free dimension (a name or None in ONNX) always fits."""
    axis, size = (2, 6) if contract == "end2end" else (1, 4 + N_CLASSES)
    return len(shape) == 3 and (shape[axis] == size or not isinstance(shape[axis], int))


def wanted_shape(contract: str) -> str:
    """The second half of a message about an output that does not fit."""
    shape = "[N,300,6]" if contract == "end2end" else f"[N,{4 + N_CLASSES},A]"
    return f"the contract '{contract}' is one float32 output {shape}: a model of other classes or another task"
