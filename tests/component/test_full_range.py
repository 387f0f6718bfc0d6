"""Codes -8..7: values and gradients by hand for every number of bits, and a scheme from QAT to its ONNX files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from brevitas.nn import QuantConv2d
from onnx import TensorProto, numpy_helper
from torch import nn

from app.core.config import UserError, load
from app.core.files import read_json
from app.core.run import RunRoot
from app.core.scheme import find_scheme
from app.export.export import export
from app.quant.codes import read_codes
from app.quant.fused import FastQuantConv2d, attach
from app.quant.model import build, load_checkpoint
from app.quant.options import Dampening, set_bits
from app.quant.schemes import QUANTIZERS, full_range, quantize
from app.sensitivity.changes import scheme_change
from tests.support.export_run import N_TINY, TINY, TINY_SETS, config_of, make_run, network
from tests.support.hand_layers import set_weights, weight_of
from tests.support.scheme_files import scheme_of, write_rules

BITS = range(2, 9)


def conv(rows: list[list[float]], bits: int, fast: bool) -> nn.Sequential:
    """A 1x1 convolution of full range; `rows` holds the weights of each output channel."""
    layer_class = FastQuantConv2d if fast else QuantConv2d
    layer = layer_class(len(rows[0]), len(rows), 1, bias=False, weight_quant=full_range(QUANTIZERS[bits]))
    model = nn.Sequential(layer)
    set_weights(model, rows)
    attach(model)
    return model


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
@pytest.mark.parametrize("bits", BITS)
def test_codes_scales_and_gradients_by_hand(bits: int, fast: bool) -> None:
    """With n = 2**(bits-1): of a channel -2n, 2.5, 0 the scale is 2 and the codes are -n, 1, 0; of n, -0.75, 0 it is 1,
    and the n is clipped to n - 1.

    Upstream ones: the gradient of the scale is the sum of code - weight / scale. 1.25 rounds to 1: -0.25; beside it
    n - 1 - n and -1 + 0.75: -1.25. An n-th of it goes to the abs-max, by its sign, beside the 1 of the straight-through
    estimator, which a clipped weight gets too.
    """
    n = 2 ** (bits - 1)
    model = conv([[-2.0 * n, 2.5, 0.0], [float(n), -0.75, 0.0]], bits, fast)
    [found] = read_codes(model)
    assert found.codes.flatten(1).tolist() == [[-n, 1, 0], [n - 1, -1, 0]]
    assert found.scale.flatten().tolist() == [2.0, 1.0]
    assert (found.lowest, found.largest) == (-n, n - 1)
    out = model(torch.eye(3).view(3, 3, 1, 1))
    assert out.flatten(1).T.tolist() == [[-2.0 * n, 2.0, 0.0], [n - 1.0, -1.0, 0.0]]
    out.sum().backward()
    gradient: Any = weight_of(model).grad
    expected = [[1 + 0.25 / n, 1.0, 1.0], [1 - 1.25 / n, 1.0, 1.0]]
    torch.testing.assert_close(gradient.flatten(1), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
def test_a_warm_up_at_8_bits_has_the_full_range_too(fast: bool) -> None:
    model = conv([[-128.0, 100.0]], 4, fast)
    set_bits(model, 8)
    [found] = read_codes(model)
    assert (found.codes.flatten().tolist(), found.lowest, found.largest) == ([-128.0, 100.0], -128, 127)


def test_a_weight_at_the_lowest_code_is_dampened_and_a_clipped_one_is_not() -> None:
    """Scale 1; lambda 0.5 adds w - w_hat: of -7.75 that is 0.25, of 1.25 too; 7.5 is beyond 7, and clipped."""
    model = conv([[-8.0, -7.75, 1.25, 7.5]], 4, fast=True)
    weight = weight_of(model)
    weight.grad = torch.zeros_like(weight)
    quant = load("qat", sets=["quant.dampening=0.5"]).quant
    assert quant is not None
    Dampening(quant, model, 0).before_step(1.0)
    assert weight.grad.flatten().tolist() == [0.0, 0.25, 0.25, 0.0]


def test_what_does_not_take_a_full_range_says_so(tmp_path: Path) -> None:
    file = write_rules(tmp_path / "wide.yaml", ("*", 4, "channel", "full"))
    with pytest.raises(UserError, match=r"scheme wide: quant\.learned_scale is not for this scheme"), network(TINY):
        build(load("qat", [], [f"quant.scheme={file}", "quant.learned_scale=true"]))
    with network(TINY):
        model, _ = build(load("fp16"))
    with pytest.raises(UserError, match="sensitivity: scheme wide has a layer with range full"):
        scheme_change(model, find_scheme(str(file)))


# --- a scheme in a run -----------------------------------------------------------------------------------------------

# Layer of the backbone: bits, granularity, and n = 2**(bits-1). All else is narrow, at 5 bits.
BACKBONE = {
    0: (2, "channel", 2),
    1: (3, "tensor", 4),
    2: (4, "channel", 8),
    3: (6, "channel", 32),
    4: (8, "channel", 128),
}
RULES = [*((f"model.{i}.conv", bits, kind, "full") for i, (bits, kind, _) in BACKBONE.items()), ("*", 5)]
PLAIN, PACKED = "yolov10n-wide-qcdq-qat", "yolov10n-wide-int4-qat"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRoot]:
    with network(TINY):
        file = write_rules(tmp_path_factory.mktemp("files") / "wide.yaml", *RULES)
        sets = (*TINY_SETS, f"quant.scheme={file}")
        run = make_run(tmp_path_factory.mktemp("runs"), *sets, variants=("qat",))
        export(config_of(run, "qat", *sets), run, force=False)
        yield run


def codes_of(run: RunRoot, stem: str, place: int) -> onnx.TensorProto:
    graph = onnx.load(run.onnx_dir / f"{stem}.onnx").graph
    clips = {clip.output[0]: clip.input[0] for clip in graph.node if clip.op_type == "Clip"}
    [node] = [
        node for node in graph.node if node.name.startswith(f"/model.{place}/conv/") and "Dequant" in node.op_type
    ]
    name = clips.get(node.input[0], node.input[0])
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def test_codes_of_the_files_are_those_of_the_checkpoint(run: RunRoot) -> None:
    """Worked out with NumPy: scale = abs-max over n; a code is at least -n and at most n - 1."""
    state = load_checkpoint(run.best("qat-wide"))["scored"]
    for place, (bits, granularity, n) in BACKBONE.items():
        weight = state[f"model.{place}.conv.weight"].numpy()
        scale = np.abs(weight).max(axis=None if granularity == "tensor" else (1, 2, 3), keepdims=True) / np.float32(n)
        expected = np.minimum(np.rint(weight / scale), n - 1)
        for stem in (PLAIN, PACKED):
            tensor = codes_of(run, stem, place)
            np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(int), expected)
            is_packed = stem == PACKED and bits <= 4
            assert tensor.data_type == (TensorProto.INT4 if is_packed else TensorProto.INT8)
            assert tensor.doc_string == (f"codes {-n}..{n - 1}" if is_packed else "")
        assert expected.min() == -n or granularity == "tensor"


@pytest.mark.parametrize("stem", [PLAIN, PACKED])
def test_the_gates_name_the_layers_of_full_range(run: RunRoot, stem: str) -> None:
    gates = read_json(run.onnx_dir / f"{stem}.json", "export")["gates"]
    of_backbone = {str(bits): 1 for bits, _, _ in BACKBONE.values()}
    assert gates["codes"]["full_range"] == of_backbone
    assert gates["codes"]["layers"] == {**of_backbone, "5": N_TINY - len(BACKBONE)}
    assert gates["parity"]["magnifies_rounding"] is False


def test_onnx_runtime_gives_both_files_the_same_output(run: RunRoot) -> None:
    images = np.random.default_rng(0).random((1, 3, 96, 96), np.float32)
    outputs = []
    for stem in (PLAIN, PACKED):
        session = ort.InferenceSession(run.onnx_dir / f"{stem}.onnx", providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"images": images})[0])
    np.testing.assert_array_equal(*outputs)


def test_the_description_of_a_layer_says_its_range() -> None:
    with network(TINY):
        model, _ = build(load("fp16"))
        quant = load("qat").quant
        assert quant is not None
        layers = quantize(model, quant.model_copy(update={"scheme": scheme_of(*RULES)}))["layers"]
    described = {layer["name"]: (layer["range"], layer["quantizer"]) for layer in layers}
    assert described["model.2.conv"] == ("full", "Int4WeightPerChannelFullRange")
    assert described["model.1.conv"] == ("full", "Int3WeightPerTensorFullRange")
    assert described["model.5.cv2.0.0.conv"] == ("narrow", "Int5WeightPerChannel")
    assert described["model.5.dfl.conv"] == (None, None)
