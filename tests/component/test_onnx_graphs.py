"""FP16 and native INT4 files made of graphs of a few numbers, run at both levels of graph optimisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from app.export.graphs import quant_weights, tidy, to_half, to_int4
from tests.support.hand_graphs import OFFSET, detector_graph, qcdq_graph
from tests.support.stand_in_session import OFF, ON

LEVELS = pytest.mark.parametrize("level", [OFF, ON], ids=["off", "on"])
CODES4 = [[1, -1, 7, -7], [0, 2, -2, 3]]
# Two codes a byte, the first in the low half: 1 and -1 (15) give F1, 7 and -7 (9) give 97.
PACKED = bytes([0xF1, 0x97, 0x20, 0x3E])
CODES8 = [[-127, 100, 0, 5]]
# Scales are 0.5 and 1.
WEIGHTS4 = [[0.5, -0.5, 3.5, -3.5], [0.0, 2.0, -2.0, 3.0]]
WEIGHTS8 = [[-63.5, 50.0, 0.0, 2.5]]


def run(model: ModelProto, level: Any, feeds: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, feeds or {})]


def tensors_of(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


# --- tidy ------------------------------------------------------------------------------------------------------------


def test_weights_that_the_exporter_shares_are_initializers_of_their_own() -> None:
    """torch writes equal weights once, and an Identity node for every other layer that has them."""
    model = detector_graph(learned_weight())
    learned = model.graph.node[0]
    learned.input[1] = "again"
    model.graph.node.insert(0, helper.make_node("Identity", ["shared"], ["again"], "second"))
    model.graph.node.insert(0, helper.make_node("Identity", ["weight"], ["shared"], "first"))
    images = {"images": np.array([1.0, 5.0, 5.0], np.float32).reshape(1, 3, 1, 1)}
    expected = run(model, OFF, images)
    tidy(model)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Conv", "Mul", "Add"]
    tensors = tensors_of(model)
    assert tensors["again"].raw_data == tensors["shared"].raw_data == tensors["weight"].raw_data
    assert run(model, OFF, images) == expected


# --- INT4 ------------------------------------------------------------------------------------------------------------


def test_int4_file_packs_the_4_bit_codes_and_leaves_the_others() -> None:
    packed = to_int4(qcdq_graph([(CODES4, 7), (CODES8, 127)]))
    tensors = tensors_of(packed)
    assert (tensors["codes 0"].data_type, tensors["codes 0"].raw_data) == (TensorProto.INT4, PACKED)
    assert tensors["codes 1"].data_type == TensorProto.INT8
    assert tensors.keys() == {"codes 0", "scale 0", "codes 1", "scale 1", "zero 1", "low 1", "high 1"}
    assert [node.op_type for node in packed.graph.node] == ["DequantizeLinear", "Clip", "DequantizeLinear"]
    assert (packed.opset_import[0].version, packed.ir_version) == (21, 10)
    onnx.checker.check_model(packed, full_check=True)


@LEVELS
def test_int4_file_gives_the_weights_of_its_qcdq_file(level: Any) -> None:
    source = qcdq_graph([(CODES4, 7), (CODES8, 127)])
    for model in (source, to_int4(source)):
        weights = [output.reshape(len(output), -1).tolist() for output in run(model, level)]
        assert weights == [WEIGHTS4, WEIGHTS8]


def test_codes_and_bits_are_read_back_from_either_file() -> None:
    source = qcdq_graph([(CODES4, 7), (CODES8, 127)])
    for model in (source, to_int4(source)):
        read = {weight.name: weight for weight in quant_weights(model)}
        assert {name: weight.bits for name, weight in read.items()} == {"codes 0": 4, "codes 1": 8}
        assert {name: (weight.low, weight.high) for name, weight in read.items()} == {
            "codes 0": (-7, 7), "codes 1": (-127, 127)
        }  # fmt: skip
        assert read["codes 0"].codes.reshape(2, 4).tolist() == CODES4
        assert read["codes 1"].codes.reshape(1, 4).tolist() == CODES8


@LEVELS
def test_the_lowest_code_of_a_full_range_is_packed_and_read_back(level: Any) -> None:
    """Two codes a byte, the first in the low half: -8 (8) and 7 give 78, 0 and -7 (9) give 90."""
    source = qcdq_graph([([[-8, 7, 0, -7]], 7)], low=-8)
    packed = to_int4(source)
    tensor = tensors_of(packed)["codes 0"]
    assert (tensor.data_type, tensor.raw_data) == (TensorProto.INT4, bytes([0x78, 0x90]))
    for model in (source, packed):
        assert [output.ravel().tolist() for output in run(model, level)] == [[-4.0, 3.5, 0.0, -3.5]]
        [weight] = quant_weights(model)
        assert (weight.low, weight.high, weight.bits, weight.is_full) == (-8, 7, 4, True)
        assert weight.codes.ravel().tolist() == [-8, 7, 0, -7]


def test_zero_point_that_is_not_zero_is_refused() -> None:
    with pytest.raises(RuntimeError, match="dequantize 0: its zero point is not 0"):
        to_int4(qcdq_graph([(CODES4, 7)], zero_point=1))


# --- FP16 ------------------------------------------------------------------------------------------------------------

# FP16 has 11 bits: 1 + 2**-12 is 1 there, 2**-6 is exact.
HAIR = 2.0**-12


def learned_weight() -> np.ndarray:
    weight = np.zeros((16, 3, 1, 1), np.float32)
    weight[15, 0], weight[13, 0] = 1.0 + HAIR, 2.0**-6
    return weight


@LEVELS
def test_half_file_rounds_the_network_and_not_the_decode(level: Any) -> None:
    """Integral 15 + 13 / 64 = 15.203125, times 32 is 486.5, plus 0.1. In FP16 numbers near 486 are 0.25 apart.

    The pixel is exact in FP16: on a CPU ONNX Runtime computes in FP32 and drops the cast of the input.
    """
    half = to_half(detector_graph(learned_weight()))
    images = np.array([1.0, 5.0, 5.0], np.float32).reshape(1, 3, 1, 1)
    [output] = run(half, level, {"images": images})
    assert output.dtype == np.float32
    assert output.item() == np.float32(486.5) + OFFSET


def test_half_file_holds_the_learned_weight_in_fp16_and_the_decode_in_fp32() -> None:
    half = to_half(detector_graph(learned_weight()))
    kinds = {name: tensor.data_type for name, tensor in tensors_of(half).items()}
    assert kinds == {
        "weight_fp16": TensorProto.FLOAT16, "integral": TensorProto.FLOAT, "stride": TensorProto.FLOAT,
        "offset": TensorProto.FLOAT,
    }  # fmt: skip
    assert [node.op_type for node in half.graph.node] == ["Cast", "Conv", "Cast", "Conv", "Mul", "Add"]
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.checker.check_model(half, full_check=True)
    [weight] = [numpy_helper.to_array(t) for name, t in tensors_of(half).items() if name == "weight_fp16"]
    assert weight[15, 0].item() == 1.0


def test_weight_beyond_the_range_of_fp16_is_refused() -> None:
    weight = learned_weight()
    weight[3, 1] = -65600.0  # the largest is 65504
    with pytest.raises(RuntimeError, match=r"weight holds 6\.56e\+04, beyond the range of FP16"):
        to_half(detector_graph(weight))
