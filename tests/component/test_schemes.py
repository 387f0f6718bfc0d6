"""Schemes on the real networks: who gets how many bits, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.nn import QuantConv2d
from torch import nn

from app.core.config import UserError, load
from app.core.scheme import find_scheme
from app.quant.codes import read_codes
from app.quant.learned import learned_layers
from app.quant.model import build, cpu_state_dict, float_network, load_scored, save_checkpoint
from app.quant.schemes import assign, convolutions, quantize
from tests.support.export_run import EVERY_BLOCK, network
from tests.support.scheme_files import scheme_of

SIZES = ["n", "m"]
LOG_ROUNDING = 2e-6  # 2**log2(x) in float32, for x down to 1e-3
SUM_TOLERANCE = 1e-5  # float32 sums of at most 27 products of size 1, in another order


def config(variant: str, size: str, *sets: str):
    return load(variant, [], [f"model=yolov10{size}.yaml", "quant.fast_path=false", *sets])


def test_nothing_is_quantized_in_fp16() -> None:
    model, quant_config = build(config("fp16", "n"))
    assert quant_config is None
    assert not any(isinstance(layer, QuantConv2d) for layer in model.modules())


@pytest.mark.parametrize("size", SIZES)
def test_w4a16_quantizes_every_learned_convolution_and_exempts_dfl(size: str) -> None:
    model, quant_config = build(config("qat", size))
    plain = [name for name, layer in model.named_modules() if type(layer) is nn.Conv2d]
    assert plain == ["model.23.dfl.conv"]
    assert quant_config is not None
    assert quant_config["share_of_learned_weights"] == {"4": 1.0}
    exempt = [layer for layer in quant_config["layers"] if layer["exempt"]]
    assert [layer["name"] for layer in exempt] == plain
    assert "fixed integral" in exempt[0]["why"]


@pytest.mark.parametrize("size", SIZES)
def test_mixed_keeps_first_and_last_convolutions_at_8_bits(size: str) -> None:
    _, quant_config = build(config("qat", size, "quant.scheme=w4a16-mixed"))
    assert quant_config is not None
    eight = {layer["name"] for layer in quant_config["layers"] if layer["bits"] == 8}
    heads = ("cv2", "cv3", "one2one_cv2", "one2one_cv3")
    branches = [f"model.23.{head}.{level}.2" for head in heads for level in range(3)]
    assert eight == {"model.0.conv", *branches}
    assert 0.9 < quant_config["share_of_learned_weights"]["4"] < 1.0


@pytest.mark.parametrize("size", tuple("nsmblx"))
def test_mixed_dw_keeps_every_depthwise_convolution_at_8_bits_too(size: str) -> None:
    convs = convolutions(float_network(config("qat", size)))
    depthwise = set()
    for name, layer in convs.items():
        if layer.groups > 1:
            assert layer.groups == layer.in_channels
            depthwise.add(name)
    mixed, found = (at_8_bits(convs, scheme) for scheme in ("w4a16-mixed", "w4a16-mixed-dw"))
    assert found == mixed | depthwise
    assert not mixed & depthwise


@pytest.mark.parametrize("size", tuple("nsmblx"))
def test_full_keeps_the_narrow_range_on_depthwise_convolutions_alone(size: str) -> None:
    convs = convolutions(float_network(config("qat", size)))
    rules = assign(list(convs), find_scheme("w4a16-full"))
    assert {rule.bits for rule in rules.values()} == {4, "float"}
    narrow = {name for name, rule in rules.items() if rule.bits == 4 and rule.range == "narrow"}
    assert narrow == {name for name, layer in convs.items() if layer.groups > 1}


def at_8_bits(names: Iterable[str], scheme: str) -> set[str]:
    rules = assign(list(names), find_scheme(scheme))
    assert {rule.bits for rule in rules.values()} == {4, 8, "float"}
    return {name for name, rule in rules.items() if rule.bits == 8}


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_weights_take_at_most_2_to_the_bits_minus_1_values_a_channel(scheme: str) -> None:
    model, _ = build(config("qat", "n", f"quant.scheme={scheme}"))
    levels = {"w4a16": 15, "w8a16": 255}[scheme]
    for layer in (layer for layer in model.modules() if isinstance(layer, QuantConv2d)):
        quantized = layer.quant_weight()
        codes = (quantized.value / quantized.scale).round().flatten(1)
        assert codes.abs().max() == levels // 2  # the largest weight of a layer uses the last code
        assert max(len(channel.unique()) for channel in codes) <= levels


def test_both_variants_start_from_the_same_weights_under_the_same_names() -> None:
    fp16, _ = build(config("fp16", "n"))
    qat, _ = build(config("qat", "n"))
    a, b = fp16.state_dict(), qat.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    other, _ = build(config("fp16", "n", "train.seed=1"))
    assert not torch.equal(a["model.0.conv.weight"], other.state_dict()["model.0.conv.weight"])


def test_decoupled_is_the_earlier_recipe_on_every_convolution() -> None:
    model, quant_config = build(config("qat", "n", "quant.scheme=w4a16-decoupled"))
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert quant_config is not None
    assert {layer["quantizer"] for layer in quant_config["layers"]} == {"Int4WeightPerTensorFloatDecoupled"}
    assert {layer["granularity"] for layer in quant_config["layers"]} == {"per tensor"}
    scales = [key for key in model.state_dict() if key.endswith("scaling_impl.value")]
    assert len(scales) == len(convolutions)  # from the start, so that an EMA copy averages them
    layers: Any = model.model
    dfl = layers[23].dfl.conv
    assert not torch.equal(dfl.quant_weight().value.flatten(), torch.arange(16.0))


def test_learned_scales_start_as_abs_max_and_survive_a_checkpoint(tmp_path: Path) -> None:
    settings = config("qat", "n", "quant.learned_scale=true")
    with network(EVERY_BLOCK):
        model, quant_config = build(settings)
        plain, _ = build(config("qat", "n"))
    for name, layer in learned_layers(model).items():
        same_layer: Any = plain.get_submodule(name)
        scale, absmax = layer.quant_weight().scale, same_layer.quant_weight().scale
        torch.testing.assert_close(scale, absmax, rtol=LOG_ROUNDING, atol=0.0)
    assert quant_config is not None
    names = {layer["quantizer"] for layer in quant_config["layers"]}
    assert names == {"LearnedInt4WeightPerChannel", None}
    for layer in learned_layers(model).values():
        scaled: Any = layer
        scaled.weight_quant.tensor_quant.scaling_impl.value.data.sub_(0.3)
    save_checkpoint(tmp_path / "best.pt", settings, {"scored": cpu_state_dict(model), "epoch": 0})
    with network(EVERY_BLOCK):
        loaded, _, _ = load_scored(tmp_path / "best.pt")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images)[0], model.eval()(images)[0], rtol=0, atol=0)


def test_learned_scales_export_to_qcdq(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
    quant = config("qat", "n", "quant.learned_scale=true").quant
    assert quant is not None
    quantize(model, quant)
    for layer in learned_layers(model).values():
        scaled: Any = layer
        scaled.weight_quant.tensor_quant.scaling_impl.value.data.sub_(0.7)  # many weights are clipped
    images = torch.rand(1, 3, 8, 8)
    path = tmp_path / "learned.onnx"
    export_onnx_qcdq(model.eval(), args=images, export_path=str(path), opset_version=17, dynamo=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = model(images).detach()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


NAMES = ["model.0.conv", "model.10.conv", "model.23.cv2.0.2", "model.23.dfl.conv"]


def test_the_first_rule_that_matches_wins_and_dfl_is_exempt_unless_it_is_named() -> None:
    rules = assign(NAMES, scheme_of(("model.0.conv", 8), ("model.1*", "float"), ("*", 3, "tensor")))
    assert [(rule.bits, rule.granularity) for rule in rules.values()] == [
        (8, "channel"), ("float", None), (3, "tensor"), ("float", None)
    ]  # fmt: skip
    assert rules["model.23.dfl.conv"].why.startswith("not a learned weight")
    named = assign(NAMES, scheme_of(("*.dfl.conv", 5), ("*", 4)))
    assert [rule.bits for rule in named.values()] == [4, 4, 4, 5]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            [("model.0.cnov", 8), ("*", 4)],
            "scheme toy: pattern 'model.0.cnov' matches no layer; nearest: model.0.conv, model.10.conv, ",
        ),
        ([("xyz", 8), ("*", 4)], "'xyz' matches no layer; nearest: none, make schemes ARGS='--scheme w4a16' lists all"),
        (
            [("model.0.conv", 8), ("model.1?.conv", 4)],
            "scheme toy: no pattern matches layer model.23.cv2.0.2; nearest: model.1?.conv, model.0.conv; '*' m",
        ),
        (
            [("*", 4), ("model.?.conv", 8)],
            "pattern 'model.?.conv' comes too late, entries above it take all its layers (model.0.conv): move it up",
        ),
        ([("*", 4), ("*", 4)], "pattern '*' comes too late, entries above it take all its layers (model.0.conv, "),
    ],
)  # fmt: skip
def test_a_pattern_without_a_layer_and_a_layer_without_a_pattern(rules: list[Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        assign(NAMES, scheme_of(*rules))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_quant_config_of_every_number_of_bits_by_hand() -> None:
    """Layers 0 to 7 with 1, 2, ... 8 of 36 weights, at 2 to 8 bits and in float; even ones have one scale."""
    model = nn.Sequential(*(nn.Conv2d(n, 1, 1) for n in range(1, 9)))
    granularity = ["tensor", "channel"]
    rules: list[Any] = [(str(place), place + 2, granularity[place % 2]) for place in range(7)]
    quant = config("qat", "n").quant
    assert quant is not None
    found = quantize(model, quant.model_copy(update={"scheme": scheme_of(*rules, ("7", "float"))}))
    assert found["scheme"] == "toy"
    shares = {str(bits): (bits - 1) / 36 for bits in range(2, 9)}
    assert found["share_of_learned_weights"] == pytest.approx({**shares, "float": 8 / 36})
    assert [layer["bits"] for layer in found["layers"]] == [2, 3, 4, 5, 6, 7, 8, None]
    assert [layer["granularity"] for layer in found["layers"]] == [
        *["per tensor", "per output channel"] * 3,
        "per tensor",
        None,
    ]
    assert [layer["quantizer"] for layer in found["layers"]] == [
        "Int2WeightPerTensor", "Int3WeightPerChannel", "Int4WeightPerTensor", "Int5WeightPerChannel",
        "Int6WeightPerTensor", "Int7WeightPerChannel", "Int8WeightPerTensorFloat", None,
    ]  # fmt: skip
    assert (found["layers"][7]["exempt"], found["layers"][7]["why"]) == (True, "a test's 7")
    largest = [int(codes.largest) for codes in read_codes(model)]
    assert largest == [1, 3, 7, 15, 31, 63, 127]


def test_a_trained_scale_for_a_layer_of_one_scale_is_refused() -> None:
    quant = config("qat", "n", "quant.learned_scale=true").quant
    assert quant is not None
    with pytest.raises(UserError, match=r"scheme toy: quant\.learned_scale is not for this scheme"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)), quant.model_copy(update={"scheme": scheme_of(("*", 4, "tensor"))}))
