"""Small ONNX graphs whose numbers are worked by hand: quantized weights, and a network with a box decode behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

SCALE = 0.5  # of the first channel; channel c has SCALE * 2**c, so that no product is rounded
STRIDE, OFFSET = np.float32(32.0), np.float32(0.1)
Layer = tuple[Sequence[Sequence[int]], int]  # codes of each channel, and the largest code that the file allows


def qcdq_graph(layers: Sequence[Layer], low: int | None = None, zero_point: int = 0) -> ModelProto:
    """Codes, Clip and DequantizeLinear for each layer; its output `weight 0`, ... is the dequantized weight.

    `low` replaces the smallest code that the files allow, which is minus the largest one.
    """
    nodes: list[NodeProto] = []
    tensors: dict[str, np.ndarray] = {}
    outputs = []
    for i, (codes, largest) in enumerate(layers):
        shape = (len(codes), len(codes[0]), 1, 1)
        tensors[f"codes {i}"] = np.array(codes, np.int8).reshape(shape)
        tensors[f"low {i}"] = np.array(-largest if low is None else low, np.int8)
        tensors[f"high {i}"] = np.array(largest, np.int8)
        tensors[f"scale {i}"] = SCALE * 2 ** np.arange(len(codes), dtype=np.float32)
        tensors[f"zero {i}"] = np.full(len(codes), zero_point, np.int8)
        nodes.append(helper.make_node("Clip", [f"codes {i}", f"low {i}", f"high {i}"], [f"clipped {i}"], f"clip {i}"))
        inputs = [f"clipped {i}", f"scale {i}", f"zero {i}"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"weight {i}"], f"dequantize {i}", axis=0))
        outputs.append(helper.make_tensor_value_info(f"weight {i}", TensorProto.FLOAT, shape))
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    return model_of(helper.make_graph(nodes, "weights", [], outputs, initializers))


def half_graph(kinds: Sequence[int], bias: int) -> ModelProto:
    """What check_half looks at: convolutions of 2 x 3 weights of these types, the first with a bias; DFL, a decode."""
    types: dict[int, Any] = {TensorProto.FLOAT16: np.float16, TensorProto.FLOAT: np.float32}
    tensors = {f"weight {i}": np.ones((2, 3, 1, 1), types[kind]) for i, kind in enumerate(kinds)}
    tensors |= {"bias": np.ones(2, types[bias]), **decode_tensors()}
    nodes = [
        helper.make_node("Conv", ["images", f"weight {i}", *(["bias"] if i == 0 else [])], [f"out {i}"], f"conv {i}")
        for i in range(len(kinds))
    ]
    nodes.append(helper.make_node("Conv", ["distribution", "integral"], ["distance"], "dfl"))
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    return model_of(helper.make_graph(nodes, "half", [], [], initializers))


def decode_tensors() -> dict[str, np.ndarray]:
    integral = np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1)
    return {"integral": integral, "stride": STRIDE.reshape(1), "offset": OFFSET.reshape(1)}


def detector_graph(weight: np.ndarray) -> ModelProto:
    """images [1,3,1,1] -> learned convolution with `weight` [16,3,1,1] -> DFL's integral -> * STRIDE -> + OFFSET."""
    tensors = {"weight": weight.astype(np.float32), **decode_tensors()}
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["distribution"], "learned"),
        helper.make_node("Conv", ["distribution", "integral"], ["distance"], "dfl"),
        helper.make_node("Mul", ["distance", "stride"], ["scaled"], "scale"),
        helper.make_node("Add", ["scaled", "offset"], ["raw"], "shift"),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 1, 1])]
    outputs = [helper.make_tensor_value_info("raw", TensorProto.FLOAT, [1, 1, 1, 1])]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    return model_of(helper.make_graph(nodes, "detector", inputs, outputs, initializers))


def model_of(graph: onnx.GraphProto) -> ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
