"""The fast path against Brevitas, which is the definition: equal to the last bit on the CPU, gradients too."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from brevitas.nn import QuantConv2d
from brevitas.quant import (
    Int4WeightPerTensorFloatDecoupled,
    Int8WeightNormL2PerChannelFixedPoint,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.core.config import UserError
from app.quant.codes import read_codes
from app.quant.fused import FastQuantConv2d, attach, detach
from app.quant.learned import reset_scales, scale_parameter
from app.quant.schemes import LEARNED, PER_TENSOR, full_range
from app.quant.schemes import QUANTIZERS as PER_CHANNEL
from tests.support.hand_layers import exactly, small_weights

PX = 64


class Int4PerChannel(Int8WeightPerChannelFloat):
    bit_width = 4


class Int4PerTensor(Int8WeightPerTensorFloat):
    bit_width = 4


QUANTIZERS = {
    "4 channel": Int4PerChannel,
    "8 channel": Int8WeightPerChannelFloat,
    "4 tensor": Int4PerTensor,
    "8 tensor": Int8WeightPerTensorFloat,
    "4 channel learned": LEARNED[4],
    "8 channel learned": LEARNED[8],
    "4 tensor decoupled": Int4WeightPerTensorFloatDecoupled,
    "4 channel full": full_range(Int4PerChannel),
}


class Weights(nn.Module):
    """A model whose forward gives what its layers would convolve with."""

    def __init__(self, weights: list[torch.Tensor], quantizer: Any) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList()
        for weight in weights:
            n_out, n_in, height, width = weight.shape
            layer = FastQuantConv2d(n_in, n_out, (height, width), bias=False, weight_quant=quantizer)
            layer.weight.data = weight.detach().clone()
            self.layers.append(layer)
            if (scale := scale_parameter(layer)) is not None:
                reset_scales(layer)
                scale.data[::2] -= 1.0  # every other channel is clipped at half its abs-max
            layer.quant_weight()  # a decoupled scale is made at its first use
            proxy: Any = layer.weight_quant
            if quantizer is Int4WeightPerTensorFloatDecoupled:
                proxy.tensor_quant.scaling_impl.value.data *= 0.6 if len(self.layers) % 2 else -1.7
        attach(self)

    def forward(self) -> list[torch.Tensor]:
        return [layer._fast_weight for layer in self.layers]


def compare(model: Weights, dtype: torch.dtype = torch.float32) -> None:
    """Weights, codes and gradients of the fast path and of Brevitas must be equal."""
    torch.manual_seed(0)
    latent = list(model.parameters())
    quantized = [layer.quant_weight() for layer in model.layers]
    plain = [tensor.value.to(dtype) for tensor in quantized]
    fast = model()
    upstream = [torch.randn_like(value) for value in plain]
    for ours, theirs, of, codes in zip(fast, plain, quantized, read_codes(model), strict=True):
        exactly(ours, theirs)
        exactly(codes.scale.flatten(), of.scale.detach().flatten())
        exactly((codes.codes * codes.scale).to(dtype), theirs.detach())
        assert ours.dtype == dtype
        for order in (torch.contiguous_format, torch.channels_last):
            assert ours.is_contiguous(memory_format=order) == of.value.is_contiguous(memory_format=order)
        if dtype == torch.float32:
            exactly((ours / of.scale).round(), (of.value / of.scale).round())
    exactly(torch.autograd.grad(fast, latent, upstream), torch.autograd.grad(plain, latent, upstream))


def shapes_of(size: str) -> list[torch.Size]:
    from ultralytics.nn.tasks import DetectionModel

    layers = DetectionModel(f"yolov10{size}.yaml", verbose=False).modules()
    return sorted({layer.weight.shape for layer in layers if isinstance(layer, nn.Conv2d)})


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[torch.Size]]:
    return {size: shapes_of(size) for size in "nm"}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("size", ["n", "m"])
def test_every_layer_shape_equals_brevitas(shapes: dict[str, list[torch.Size]], size: str, quantizer: str) -> None:
    torch.manual_seed(0)
    compare(Weights([torch.randn(shape) * 0.1 for shape in shapes[size]], QUANTIZERS[quantizer]))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_ties_dead_channels_and_channels_last_equal_brevitas(quantizer: str) -> None:
    model: Any = Weights(small_weights(), QUANTIZERS[quantizer])
    compare(model)
    assert not model()[0][1].any()
    compare(model.to(memory_format=torch.channels_last))
    assert model()[0].is_contiguous(memory_format=torch.channels_last)
    model.layers[0].weight.data.zero_()
    compare(model)


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (5, 15), (6, 31), (7, 63), (8, 127)])
@pytest.mark.parametrize("of_bits", [PER_CHANNEL, PER_TENSOR, LEARNED], ids=["channel", "tensor", "learned"])
def test_every_number_of_bits_equals_brevitas(of_bits: dict[int, Any], bits: int, largest: int) -> None:
    torch.manual_seed(0)
    model: Any = Weights([*small_weights(), torch.randn(3, 40, 3, 3)], of_bits[bits])
    compare(model)
    compare(model.to(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.float16):
        compare(model, torch.float16)
    for codes in read_codes(model):
        assert codes.largest == codes.codes.abs().max() == largest


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (5, 15), (6, 31), (7, 63), (8, 127)])
@pytest.mark.parametrize("of_bits", [PER_CHANNEL, PER_TENSOR], ids=["channel", "tensor"])
def test_every_full_range_equals_brevitas(of_bits: dict[int, Any], bits: int, largest: int) -> None:
    """Among them channels whose abs-max is negative, and is the lowest code, and positive ones, which are clipped."""
    torch.manual_seed(0)
    model: Any = Weights([*small_weights(), torch.randn(3, 40, 3, 3)], full_range(of_bits[bits]))
    compare(model)
    compare(model.to(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.float16):
        compare(model, torch.float16)
    found = read_codes(model)
    assert {(codes.lowest, codes.largest) for codes in found} == {(-largest - 1, largest)}
    assert min(codes.codes.min() for codes in found) == -largest - 1
    assert max(codes.codes.max() for codes in found) == largest


def test_layers_of_different_bits_and_scales_in_one_model_equal_brevitas() -> None:
    torch.manual_seed(0)
    quantizers = [*PER_CHANNEL.values(), *PER_TENSOR.values(), *map(full_range, PER_CHANNEL.values())]
    model, plain = (
        nn.Sequential(*(layer(4, 4, 3, padding=1, bias=False, weight_quant=quantizer) for quantizer in quantizers))
        for layer in (FastQuantConv2d, QuantConv2d)
    )
    plain.load_state_dict(model.state_dict())
    attach(model)
    batch = torch.rand(2, 4, 6, 6)
    results = []
    for net in (model, plain):
        out = net(batch)
        out.square().sum().backward()
        results.append((out.detach(), [parameter.grad for parameter in net.parameters()]))
    exactly(*results)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_autocast_gives_the_weights_that_the_convolution_would_cast(quantizer: str) -> None:
    model = Weights(small_weights(), QUANTIZERS[quantizer])
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            compare(model, dtype)


NUMBERS = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),  # 1.3e30
    st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 1e-10, 0.5, -0.5, 1e30, float("inf"), -float("inf"), float("nan")]),
)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(NUMBERS, min_size=12, max_size=12), st.sampled_from(sorted(QUANTIZERS)))
def test_any_numbers_equal_brevitas_and_zeros_stay_zeros(numbers: list[float], quantizer: str) -> None:
    weight = torch.tensor(numbers).view(3, 4, 1, 1)
    model = Weights([weight], QUANTIZERS[quantizer])
    compare(model)
    per_channel = model()[0].flatten(1)
    if "channel" in quantizer:
        finite = weight.flatten(1).isfinite().all(1)
        if "learned" in quantizer:  # a NaN or infinite weight at the start has given the scale
            assert not per_channel[~finite].isfinite().all(1).any()
        else:
            assert per_channel[~finite].isnan().all()
        assert per_channel[finite].isfinite().all()  # a bad channel spoils no other one
        assert not per_channel[(weight == 0).flatten(1).all(1)].any()


def test_a_tie_beside_a_channel_of_nan_equals_brevitas() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.5], [2.0, -2.0, 0.1], [0.0, float("nan"), 0.0]]).view(3, 3, 1, 1)
    compare(Weights([weight], Int4PerChannel))


@pytest.mark.parametrize("other", [Int4PerChannel, Int4WeightPerTensorFloatDecoupled])
def test_scales_of_different_kinds_in_one_model_are_refused(other: Any) -> None:
    layers = [FastQuantConv2d(4, 4, 3, weight_quant=quantizer) for quantizer in (LEARNED[4], other)]
    with pytest.raises(UserError, match="scales are made in different ways"):
        attach(nn.Sequential(*layers))


# --- in a model ------------------------------------------------------------------------------------------------------


def network(layer: Any = FastQuantConv2d) -> Any:
    torch.manual_seed(2)
    model = nn.Sequential(
        layer(3, 8, 3, padding=1, bias=False, weight_quant=Int4PerChannel),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        layer(8, 8, 3, groups=8, padding="same", weight_quant=Int8WeightPerChannelFloat),
        layer(8, 4, 1, weight_quant=Int4PerTensor),
    )
    attach(model)
    return model


def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Output, and gradient of its square by parameter name."""
    model.zero_grad()
    out = model(images())
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("scheme", "learned"), [
    ("w4a16-mixed", "false"), ("w4a16-mixed", "true"), ("w4a16-decoupled", "false")
])  # fmt: skip
def test_yolov10n_step_equals_brevitas(scheme: str, learned: str) -> None:
    from app.core.config import load
    from app.quant.model import build

    results = []
    for fast_path in ("true", "false"):
        sets = ["model=yolov10n.yaml", f"quant.scheme={scheme}", f"quant.fast_path={fast_path}"]
        sets += [f"quant.learned_scale={learned}"]
        model, _ = build(load("qat", [], sets))
        assert any(isinstance(layer, FastQuantConv2d) for layer in model.modules()) == (fast_path == "true")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".dfl" not in name)  # as in Ultralytics' trainer
        out = model(torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(0)))
        loss: Any = sum(branch["scores"].square().sum() + branch["boxes"].square().sum() for branch in out.values())
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((out["one2one"]["scores"], out["one2many"]["boxes"], gradients, list(model.state_dict())))
    exactly(results[0][:3], results[1][:3])
    assert results[0][3] == results[1][3]


def test_state_dict_attach_and_detach() -> None:
    model, plain = network(), network(QuantConv2d)
    assert list(model.state_dict()) == list(plain.state_dict())
    attach(model)  # a second time
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    exactly(step(model), step(plain))
    detach(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    exactly(step(model), step(plain))


def test_deepcopy_has_its_own_fast_path() -> None:
    model = network()
    before = step(model)
    ema = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    exactly(step(ema), before)
    assert not torch.equal(step(model)[0], before[0])
    assert vars(ema)["_fast_path"].layers[0] is ema[0]
    detach(ema)
    assert len(model._forward_pre_hooks) == 1


def test_eval_follows_weights_changed_in_place() -> None:
    model, plain = network().eval().requires_grad_(False), network(QuantConv2d).eval()
    for factor in (1.0, -0.3):
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.data.mul_(factor)
        exactly(model(images()), plain(images()).detach())


def test_no_weight_outlives_the_forward() -> None:
    model = network()
    model(images())
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.rand(1, 5, 8, 8))
    assert all(layer._fast_weight is None for layer in model if isinstance(layer, FastQuantConv2d))
    model[0].weight.data.mul_(2.0)
    exactly(model[0](images()), QuantConv2d.forward(model[0], images()))


def test_quantizer_switched_off_is_float() -> None:
    model = network()
    model[4].weight_quant.disable_quant = True
    seen: list[torch.Tensor] = []
    model[4].register_forward_hook(lambda layer, args, out: seen.extend((args[0], out)))
    model(images())
    exactly(seen[1], nn.functional.conv2d(seen[0], model[4].weight, model[4].bias))


def test_layer_without_part_in_the_loss_gets_no_gradient() -> None:
    model = Weights(small_weights(), Int4PerChannel)
    model()[1].sum().backward()
    assert [layer.weight.grad is None for layer in model.layers] == [True, False, True]


def test_compiled_model_equals_eager() -> None:
    expected = step(network())
    model = network()
    model.compile(backend="aot_eager")
    for _ in range(2):
        exactly(step(model), expected)


def test_other_quantizer_is_refused_by_name() -> None:
    layer = FastQuantConv2d(4, 4, 3, weight_quant=Int8WeightNormL2PerChannelFixedPoint)
    with pytest.raises(UserError, match=r"layer 0: .*quant\.fast_path=false"):
        attach(nn.Sequential(layer))
