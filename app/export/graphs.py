"""ONNX graphs without torch: metadata, a simplification that keeps quantized weights, and the FP16 and INT4 files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxslim
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from app.core.labels import PACKED_BITS

INT4_OPSET, INT4_IR = 21, 10  # the first versions with the INT4 type
DESCRIBED_RANGE = re.compile(r"codes (?P<low>-?[0-9]+)\.\.(?P<high>-?[0-9]+)")
PACKED_RANGE = (-7, 7)  # of INT4 codes whose tensor describes no other
FLOAT_INPUTS_OF_RESIZE = (1, 2)  # roi and scales are float32 for data of any type


@dataclass(frozen=True)
class QuantWeight:
    """A quantized weight: its integer codes [out, in, h, w], their range low..high in the file, and its nodes.

    The range is that of the Clip before the codes are dequantized. A packed weight has none; its range is in the
    description of its tensor.
    """

    name: str
    codes: np.ndarray
    low: int
    high: int
    dequantize: NodeProto
    clip: NodeProto | None

    @property
    def bits(self) -> int:
        """Bits of a range: 4 for -7..7 and for -8..7."""
        return int(self.high + 1).bit_length()

    @property
    def is_full(self) -> bool:
        """Whether the range has a code more below zero than above, as -8..7."""
        return self.low == -self.high - 1

    @property
    def output(self) -> str:
        """Name of the dequantized weight."""
        return self.dequantize.output[0]


def set_facts(model: ModelProto, facts: dict[str, Any]) -> None:
    """Replaces the metadata by `facts`; a value that is not a text is written as JSON, None is left out."""
    texts = {}
    for key, value in facts.items():
        if value is not None:
            texts[key] = value if isinstance(value, str) else json.dumps(value)
    del model.metadata_props[:]
    helper.set_model_props(model, texts)


def tidy(model: ModelProto) -> None:
    """Turns Constant nodes into initializers, and removes initializers from the inputs, which a caller may override.

    Identity nodes over initializers become initializers too: with them torch's exporter shares equal initializers, such
    as the biases of a new head.
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
        tensors[tensor.name] = tensor
        graph.node.remove(node)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def optimize(model: ModelProto) -> ModelProto:
    """Shape inference and onnxslim; quantized weights are cut out before and put back unchanged.

    onnxslim 0.1.98 folds the Clip of a QCDQ weight into its codes, and then the file no longer shows the number of
    bits. So onnxslim gets each dequantized weight as a graph input, which it can neither fold nor fuse.
    """
    work = ModelProto()
    work.CopyFrom(model)
    cut_nodes: list[NodeProto] = []
    for weight in quant_weights(model):
        if weight.clip is not None:
            cut_nodes.append(weight.clip)
        cut_nodes.append(weight.dequantize)
        value = helper.make_tensor_value_info(weight.output, TensorProto.FLOAT, weight.codes.shape)
        work.graph.input.append(value)
    constants = inputs_of(cut_nodes, model)
    for node in cut_nodes:
        work.graph.node.remove(node)
    for tensor in constants:
        work.graph.initializer.remove(tensor)
    inferred = onnx.shape_inference.infer_shapes(work, strict_mode=True)
    slim: Any = onnxslim.slim(inferred)
    put_back(slim.graph, cut_nodes, constants)
    return slim


def inputs_of(nodes: list[NodeProto], model: ModelProto) -> list[TensorProto]:
    """The initializers that the nodes read, in the order of the graph."""
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
    return [tensor for tensor in model.graph.initializer if tensor.name in read]


def put_back(graph: GraphProto, cut_nodes: list[NodeProto], constants: list[TensorProto]) -> None:
    """Undoes the cut: the nodes are in the graph again, and their outputs are no longer its inputs."""
    computed: set[str] = set()
    for node in cut_nodes:
        computed.update(node.output)
    for value in list(graph.input):
        if value.name in computed:
            graph.input.remove(value)
    nodes = [*cut_nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in constants if tensor.name not in present)


def quant_weights(model: ModelProto) -> Iterator[QuantWeight]:
    """Every DequantizeLinear over constant codes; between the two there may be a Clip."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    clips = {node.output[0]: node for node in model.graph.node if node.op_type == "Clip"}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        clip = clips.get(node.input[0])
        tensor = tensors[clip.input[0] if clip else node.input[0]]
        if clip:
            low = int(numpy_helper.to_array(tensors[clip.input[1]]))
            high = int(numpy_helper.to_array(tensors[clip.input[2]]))
        else:
            low, high = range_of(tensor)
        codes = numpy_helper.to_array(tensor).astype(np.int32)
        yield QuantWeight(tensor.name, codes, low, high, node, clip)


def range_of(tensor: TensorProto) -> tuple[int, int]:
    """Lowest and highest code of a weight without a Clip: as described, or else INT4's narrow range.

    Other weights without a Clip are those of 8 bits in a full range, which is that of their type, INT8.
    """
    if match := DESCRIBED_RANGE.fullmatch(tensor.doc_string):
        return int(match["low"]), int(match["high"])
    return PACKED_RANGE if tensor.data_type == TensorProto.INT4 else (-128, 127)


def to_int4(model: ModelProto) -> ModelProto:
    """QCDQ -> the same graph with codes of 2, 3 and 4 bits stored two a byte; layers of more bits are not changed.

    A range other than -7..7 is written into the description of its tensor. (ONNX has no type of 3 bits, and
    its INT2 needs a newer opset than ONNX Runtime runs on every device.)

    The Clip is removed: it has no INT4 kernel, and by the gate on the codes it changes no code. The zero point is
    removed too: without one it is 0.
    """
    packed = version_converter.convert_version(model, INT4_OPSET)
    packed.ir_version = INT4_IR
    tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
    for weight in list(quant_weights(packed)):
        if weight.bits > PACKED_BITS or weight.clip is None:
            continue
        node = weight.dequantize
        if len(node.input) > 2 and numpy_helper.to_array(tensors[node.input[2]]).any():
            raise RuntimeError(f"{node.name}: its zero point is not 0, which native INT4 files here do not hold")
        codes = numpy_helper.from_array(weight.codes.astype(ml_dtypes.int4), weight.name)
        if (weight.low, weight.high) != PACKED_RANGE:
            codes.doc_string = f"codes {weight.low}..{weight.high}"
        tensors[weight.name].CopyFrom(codes)
        inputs = [weight.name, node.input[1]]
        del node.input[:]
        node.input.extend(inputs)
        packed.graph.node.remove(weight.clip)
    drop_unused(packed)
    return packed


def to_half(model: ModelProto) -> ModelProto:
    """FP32 -> FP16 up to the last learned convolutions; the box decode after them stays FP32.

    Box coordinates up to 640 px have steps of 0.5 px in FP16. The interface stays FP32 too: the input is cast inside.

    Raises:
        RuntimeError: a weight is too large for FP16.
    """
    half = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = half.graph
    activations = {value.name for value in [*graph.value_info, *graph.input] if is_float(value)}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    half_names = half_nodes(half)
    half_activations: set[str] = set()
    for node in graph.node:
        if node.name in half_names:
            half_activations |= activations.intersection(node.output)
    nodes: list[NodeProto] = []
    casts: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            is_float_input = node.op_type == "Resize" and position in FLOAT_INPUTS_OF_RESIZE
            reads_half = node.name in half_names and not is_float_input
            is_half = name in half_activations
            if reads_half == is_half or not (name in activations or name in weights):
                continue
            if name not in casts:
                casts[name] = f"{name}_{'fp16' if reads_half else 'fp32'}"
                if name in weights:
                    graph.initializer.append(half_tensor(weights[name], casts[name]))
                else:
                    nodes.append(cast_node(name, casts[name], reads_half))
            node.input[position] = casts[name]
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    drop_unused(half)
    return half


def cast_node(name: str, cast_name: str, is_half: bool) -> NodeProto:
    """Casts `name` to FP16 or FP32, under the name `cast_name`."""
    to = TensorProto.FLOAT16 if is_half else TensorProto.FLOAT
    return helper.make_node("Cast", [name], [cast_name], f"cast_{cast_name}", to=to)


def is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT


def half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    """An FP16 copy of a tensor under another name.

    Raises:
        RuntimeError: a value is too large for FP16.
    """
    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise RuntimeError(f"{tensor.name} holds {np.abs(values).max():.3g}, beyond the range of FP16")
    return numpy_helper.from_array(values.astype(np.float16), name)


def half_nodes(model: ModelProto) -> set[str]:
    """Names of all nodes that a learned convolution depends on, the convolutions included."""
    producers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        producers |= dict.fromkeys(node.output, node)
    stack = learned_convolutions(model)
    names: set[str] = set()
    while stack:
        node = stack.pop()
        if node.name not in names:
            names.add(node.name)
            stack += [producers[name] for name in node.input if name in producers]
    return names


def learned_convolutions(model: ModelProto) -> list[NodeProto]:
    """All Conv nodes but DFL's, whose weights are 0, 1, 2, ... for one output channel."""
    fixed = {tensor.name for tensor in model.graph.initializer if is_integral(tensor)}
    return [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] not in fixed]


def is_integral(tensor: TensorProto) -> bool:
    """Whether a tensor is DFL's weight [1, n, 1, 1] = 0, 1, 2, ..."""
    if len(tensor.dims) != 4 or tensor.dims[0] != 1:
        return False
    values = numpy_helper.to_array(tensor).ravel()
    return np.array_equal(values, np.arange(tensor.dims[1]))


def drop_unused(model: ModelProto) -> None:
    """Removes initializers that no node reads."""
    read: set[str] = set()
    for node in model.graph.node:
        read.update(node.input)
    for tensor in list(model.graph.initializer):
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)
