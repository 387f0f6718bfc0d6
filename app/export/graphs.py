"""ONNX graphs: metadata, simplification that spares quantized weights, the FP16 and the native INT4 file. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxslim
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

INT4_OPSET, INT4_IR = 21, 10  # the first that know the INT4 type
FLOAT_INPUTS_OF_RESIZE = (1, 2)  # roi and scales stay float32 whatever the data is


@dataclass(frozen=True)
class QuantWeight:
    """A quantized weight: integer codes [out, in, h, w], the range that the file allows, bits, and its nodes."""

    name: str
    codes: np.ndarray
    low: int
    high: int
    dequantize: NodeProto
    clip: NodeProto | None

    @property
    def bits(self) -> int:
        """Narrow symmetric range: -7..7 is 4 bits."""
        return int(self.high + 1).bit_length()

    @property
    def output(self) -> str:
        """Name of the dequantized weight."""
        return self.dequantize.output[0]


def set_facts(model: ModelProto, facts: dict[str, Any]) -> None:
    """Replaces the metadata; what is no text is written as JSON, None is left out."""
    texts = {}
    for key, value in facts.items():
        if value is not None:
            texts[key] = value if isinstance(value, str) else json.dumps(value)
    del model.metadata_props[:]
    helper.set_model_props(model, texts)


def tidy(model: ModelProto) -> None:
    """Weights are constants and not inputs that a caller may override; Constant nodes become initializers.

    So do the Identity nodes by which torch's exporter shares equal initializers, such as the biases of a new head.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            value = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in tensors:
            value = tensors[node.input[0]]
        else:
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        graph.node.remove(node)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def optimize(model: ModelProto) -> ModelProto:
    """Shape inference and onnxslim; quantized weights are cut out first and put back untouched.

    onnxslim 0.1.98 folds the Clip of a QCDQ weight into its codes, and the file no longer says how many bits it has.
    So each dequantized weight is a graph input while onnxslim works, which can neither fold nor fuse it.
    """
    weights = list(quant_weights(model))
    work = ModelProto()
    work.CopyFrom(model)
    held: list[NodeProto] = []
    for weight in weights:
        held += [node for node in (weight.clip, weight.dequantize) if node is not None]
        shape = weight.codes.shape
        work.graph.input.append(helper.make_tensor_value_info(weight.output, TensorProto.FLOAT, shape))
    constants = inputs_of(held, model)
    for node in held:
        work.graph.node.remove(node)
    for tensor in constants:
        work.graph.initializer.remove(tensor)
    slim: Any = onnxslim.slim(onnx.shape_inference.infer_shapes(work, strict_mode=True))
    put_back(slim.graph, held, constants)
    return slim


def inputs_of(nodes: list[NodeProto], model: ModelProto) -> list[TensorProto]:
    """The initializers that the nodes read, in the order of the graph."""
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
    return [tensor for tensor in model.graph.initializer if tensor.name in read]


def put_back(graph: GraphProto, held: list[NodeProto], constants: list[TensorProto]) -> None:
    """Undoes the cut: the held nodes compute what was an input of the graph meanwhile."""
    computed: set[str] = set()
    for node in held:
        computed.update(node.output)
    for value in list(graph.input):
        if value.name in computed:
            graph.input.remove(value)
    nodes = [*held, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in constants if tensor.name not in kept)


def quant_weights(model: ModelProto) -> Iterator[QuantWeight]:
    """Every DequantizeLinear over constant codes, with or without a Clip between."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    clips = {node.output[0]: node for node in model.graph.node if node.op_type == "Clip"}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        clip = clips.get(node.input[0])
        tensor = tensors[clip.input[0] if clip else node.input[0]]
        if clip:
            low, high = (int(numpy_helper.to_array(tensors[name])) for name in clip.input[1:3])
        else:
            low, high = (-7, 7) if tensor.data_type == TensorProto.INT4 else (-127, 127)
        codes = numpy_helper.to_array(tensor).astype(np.int32)
        yield QuantWeight(tensor.name, codes, low, high, node, clip)


def to_int4(model: ModelProto) -> ModelProto:
    """QCDQ -> the same graph with 4-bit codes stored two a byte; layers of other widths stay as they are.

    The Clip goes: it has no INT4 kernel, and the gate on the codes has shown that it does nothing. The zero point goes
    too, as absent means 0.
    """
    packed = version_converter.convert_version(model, INT4_OPSET)
    packed.ir_version = INT4_IR
    tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
    for weight in list(quant_weights(packed)):
        if weight.bits != 4 or weight.clip is None:
            continue
        node = weight.dequantize
        if len(node.input) > 2 and numpy_helper.to_array(tensors[node.input[2]]).any():
            raise RuntimeError(f"{node.name}: its zero point is not 0, which native INT4 files here do not hold")
        codes = numpy_helper.from_array(weight.codes.astype(ml_dtypes.int4), weight.name)
        tensors[weight.name].CopyFrom(codes)
        inputs = [weight.name, node.input[1]]
        del node.input[:]
        node.input.extend(inputs)
        packed.graph.node.remove(weight.clip)
    drop_unused(packed)
    return packed


def to_half(model: ModelProto) -> ModelProto:
    """FP32 -> FP16 up to the last learned convolutions; what comes behind them, the box decode, stays FP32.

    So does the interface: the input is cast after it enters. Box coordinates up to 640 px have steps of 0.5 px in FP16.

    Raises:
        RuntimeError: a weight is too large for FP16.
    """
    half = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = half.graph
    floats = {value.name for value in [*graph.value_info, *graph.input] if is_float(value)}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    inside = half_nodes(half)
    made_half: set[str] = set()
    for node in graph.node:
        if node.name in inside:
            made_half |= floats.intersection(node.output)
    nodes: list[NodeProto] = []
    casts: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            is_half = node.name in inside and not (node.op_type == "Resize" and position in FLOAT_INPUTS_OF_RESIZE)
            if name not in (floats | weights.keys()) or is_half == (name in made_half):
                continue
            if name not in casts:
                casts[name] = f"{name}_{'fp16' if is_half else 'fp32'}"
                if name in weights:
                    graph.initializer.append(half_tensor(weights[name], casts[name]))
                else:
                    to = TensorProto.FLOAT16 if is_half else TensorProto.FLOAT
                    nodes.append(helper.make_node("Cast", [name], [casts[name]], f"cast_{casts[name]}", to=to))
            node.input[position] = casts[name]
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    drop_unused(half)
    return half


def is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT


def half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise RuntimeError(f"{tensor.name} holds {np.abs(values).max():.3g}, beyond the range of FP16")
    return numpy_helper.from_array(values.astype(np.float16), name)


def half_nodes(model: ModelProto) -> set[str]:
    """Names of all nodes that a learned convolution depends on, the convolutions included."""
    makers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        makers |= dict.fromkeys(node.output, node)
    waiting = learned_convolutions(model)
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in names:
            names.add(node.name)
            waiting += [makers[name] for name in node.input if name in makers]
    return names


def learned_convolutions(model: ModelProto) -> list[NodeProto]:
    """All Conv nodes but DFL's, which is known by its fixed weights 0, 1, 2, ... for one output channel."""
    fixed = {tensor.name for tensor in model.graph.initializer if is_integral(tensor)}
    return [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] not in fixed]


def is_integral(tensor: TensorProto) -> bool:
    """Whether a tensor is DFL's weight [1, n, 1, 1]."""
    if len(tensor.dims) != 4 or tensor.dims[0] != 1:
        return False
    return np.array_equal(numpy_helper.to_array(tensor).ravel(), np.arange(tensor.dims[1]))


def drop_unused(model: ModelProto) -> None:
    """Initializers that no node reads any more."""
    read: set[str] = set()
    for node in model.graph.node:
        read.update(node.input)
    for tensor in list(model.graph.initializer):
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)
