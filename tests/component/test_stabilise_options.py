"""The options of `quant`: what each one does to a small network, with the fast path and with plain Brevitas."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from brevitas.nn import QuantConv2d
from torch import nn
from ultralytics.utils.torch_utils import ModelEMA

from app.core.config import Config, Quant, UserError, load
from app.quant import schemes
from app.quant.codes import read_codes
from app.quant.fused import attach
from app.quant.health import scale_ratios
from app.quant.learned import learned_layers, scale_parameter
from app.quant.options import Freezing, Stabiliser, exempt_scales_from_decay, stabilisers
from tests.support.scheme_files import built_in

FLOAT_WARMUP = ["warmup_share=0.25", "warmup_bits=float"]  # one of four epochs
PATHS = ["fast_path=true", "fast_path=false"]


@pytest.fixture(autouse=True)
def toy_schemes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """w4a16 and w4a16-decoupled for networks that have no DFL."""
    folder = tmp_path_factory.mktemp("schemes")
    with built_in(folder, "w4a16", ("*", 4)), built_in(folder, "w4a16-decoupled", ("*", 4, "decoupled")):
        yield


def config_of(*sets: str) -> Config:
    return load("qat", [], ["train.epochs=4", *(f"quant.{item}" for item in sets)])


def toy(config: Config) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 6, 3, groups=2, padding=1)
    )
    assert config.quant is not None
    schemes.quantize(model, config.quant)
    return model


class Toy:
    """Trains the toy network on noise as the trainer does: hooks, optimizer, EMA."""

    def __init__(self, *sets: str, lr: float = 0.05) -> None:
        self.config = config_of(*sets)
        self.model = toy(self.config)
        self.ema = deepcopy(self.model).eval().requires_grad_(False)
        self.hooks = stabilisers(self.config, self.model, self.ema)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)

    def epoch(self, epoch: int, n_steps: int = 4) -> None:
        torch.manual_seed(epoch)
        for hook in self.hooks:
            hook.start_epoch(epoch)
        for _ in range(n_steps):
            self.step(torch.rand(4, 3, 8, 8), torch.rand(4, 6, 8, 8))

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        (self.model(images) - targets).square().mean().backward()
        for hook in self.hooks:
            hook.before_step(1.0)
        self.optimizer.step()
        with torch.no_grad():
            for kept, new in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(new, 0.1)
        for hook in self.hooks:
            hook.after_step()

    def state(self) -> dict[str, Any]:
        states = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        saved = {name: deepcopy(part.state_dict()) for name, part in states.items()}
        return saved | {"hooks": [deepcopy(hook.state_dict()) for hook in self.hooks]}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("model", "ema", "optimizer"):
            vars(self)[name].load_state_dict(state[name])
        for hook, of in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(of)


def scale_of(layer: Any) -> Any:
    """The trained parameter that holds the scales of a layer."""
    return scale_parameter(layer)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def n_levels(model: nn.Module) -> int:
    """Largest number of values that a channel of the first convolution is multiplied with."""
    seen: list[torch.Tensor] = []
    layer: Any = model[0]  # pyright: ignore[reportIndexIssue]
    handle = layer.register_forward_hook(lambda conv, args, out: seen.append(out))
    model(torch.eye(27).view(27, 3, 3, 3))  # the centre of an output is one weight
    handle.remove()
    return max(len(channel.unique()) for channel in seen[0][:, :, 1, 1].T)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_nothing_is_on_by_default() -> None:
    assert stabilisers(config_of(), toy(config_of()), toy(config_of())) == []
    assert stabilisers(load("fp16"), nn.Identity(), nn.Identity()) == []
    hook = Stabiliser()
    assert (hook.start_epoch(0), hook.before_step(1.0), hook.after_step(), hook.state_dict()) == (None, None, None, {})


def test_options_at_their_off_values_change_no_bit() -> None:
    plain, off = Toy(), Toy("dampening=0", "freeze_threshold=0", "warmup_share=0", "learned_scale=false")
    for toy_run in (plain, off):
        toy_run.epoch(0)
    assert same(plain.model.state_dict(), off.model.state_dict())


OPTIONS = [
    FLOAT_WARMUP,
    ["warmup_share=0.25", "warmup_bits=8"],
    ["dampening=0.1"],
    ["freeze_threshold=0.02", "freeze_momentum=0.1"],
    ["learned_scale=true"],
    ["scheme=w4a16-decoupled", "averaged_scales=false"],
    [*FLOAT_WARMUP, "learned_scale=true", "dampening=0.1", "freeze_threshold=0.02", "freeze_momentum=0.1"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_fast_path_and_brevitas_train_to_the_same_bits(options: list[str]) -> None:
    runs = [*(Toy(*options, path) for path in PATHS), Toy()]
    for toy_run in runs:
        for epoch in range(3):
            toy_run.epoch(epoch)
    fast, brevitas, without = (toy_run.model.state_dict() for toy_run in runs)
    assert same(fast, brevitas)
    assert same(runs[0].ema.state_dict(), runs[1].ema.state_dict())
    assert not torch.equal(fast["0.weight"], without["0.weight"])


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_resume_is_exact(options: list[str], after: int) -> None:
    whole, first, second = (Toy(*options) for _ in range(3))
    for epoch in range(3):
        whole.epoch(epoch)
    for epoch in range(after):
        first.epoch(epoch)
    second.load(first.state())
    for epoch in range(after, 3):
        second.epoch(epoch)
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.ema.state_dict(), second.ema.state_dict())


# --- each one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bits", "least", "most"), [("float", 27, 27), ("8", 20, 27)])
def test_warm_up_holds_for_model_ema_and_its_copies(path: str, bits: str, least: int, most: int) -> None:
    toy_run = Toy("warmup_share=0.5", f"warmup_bits={bits}", path)
    for epoch in range(3):
        toy_run.epoch(epoch)
        held_out = deepcopy(toy_run.ema)
        held_out.load_state_dict(toy_run.model.state_dict())
        for model in (toy_run.model.eval(), toy_run.ema, held_out):
            levels = n_levels(model)
            assert least <= levels <= most if epoch < 2 else levels <= 15
        toy_run.model.train()


def test_warm_up_weights_have_no_codes_while_they_are_float() -> None:
    toy_run = Toy(*FLOAT_WARMUP)
    toy_run.epoch(0)
    assert read_codes(toy_run.model) == []
    toy_run.epoch(1)
    assert [of.largest for of in read_codes(toy_run.model)] == [7, 7]


def test_learned_scales_start_anew_after_the_warm_up() -> None:
    toy_run = Toy(*FLOAT_WARMUP, "learned_scale=true")
    toy_run.epoch(0)
    toy_run.epoch(1, n_steps=0)
    for model in (toy_run.model, toy_run.ema):
        for layer in learned_layers(model).values():
            absmax = layer.weight.abs().amax((1, 2, 3), keepdim=True)
            assert torch.equal(scale_of(layer), absmax.log2())


@torch.no_grad()
def distance_from_codes(model: nn.Module) -> float:
    off = [((of.layer.weight - of.codes * of.scale) / of.scale).square().mean() for of in read_codes(model)]
    return float(torch.stack(off).mean())


def test_dampening_pulls_weights_to_the_middle_of_their_codes() -> None:
    plain, damped = Toy(), Toy("dampening=1.0")
    for epoch in range(10):
        plain.epoch(epoch)
        damped.epoch(epoch)
    assert distance_from_codes(damped.model) < 0.5 * distance_from_codes(plain.model)


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0])
def test_dampening_adds_the_gradient_of_its_loss(grad_scale: float) -> None:
    toy_run = Toy("dampening=0.3", "learned_scale=true")
    layer: Any = toy_run.model[0]
    with torch.no_grad():
        scale_of(layer).sub_(0.5)  # so that some weights are clipped
    layer.weight.grad = torch.ones_like(layer.weight)
    toy_run.hooks[-1].before_step(grad_scale)
    of = read_codes(toy_run.model)[0]
    latent = layer.weight.detach().clone().requires_grad_()
    limit = of.largest * of.scale.detach()
    loss = 0.3 * (of.codes * of.scale - latent.clamp(-limit, limit)).square().sum()
    (expected,) = torch.autograd.grad(loss, latent)
    assert (latent.abs() > limit).any()
    torch.testing.assert_close(layer.weight.grad, 1 + grad_scale * expected)


# --- freezing --------------------------------------------------------------------------------------------------------


def one_layer() -> tuple[Any, Quant]:
    """One channel of three weights: 7 (the abs-max, so the scale is 1), 2.4 and 4.0."""
    quant = config_of("freeze_threshold=0.25", "freeze_momentum=0.2").quant
    assert quant is not None
    model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False))
    schemes.quantize(model, quant)
    set_weights(model, 2.4)
    return model, quant


def set_weights(model: nn.Module, second: float) -> None:
    model[0].weight.data = torch.tensor([7.0, second, 4.0]).view(1, 3, 1, 1)  # pyright: ignore


def test_oscillating_weight_is_frozen_at_its_mean_code_and_the_others_move_on() -> None:
    model, quant = one_layer()
    freezing = Freezing(quant, model, 0)
    frozen, expected = [], 0.0
    for step in range(6):
        set_weights(model, 2.6 if step % 2 else 2.4)  # codes 2, 3, 2, 3: an oscillation from the third step on
        freezing.after_step()
        expected = 0.2 * (step >= 2) + 0.8 * expected
        frozen.append(freezing.state["frozen"].tolist())
        if step < 4:
            assert freezing.state["frequency"][1].item() == pytest.approx(expected)
    assert [row[1] for row in frozen] == [False, False, False, True, True, True]  # 0.2, then 0.36 > 0.25
    assert not any(row[0] or row[2] for row in frozen)
    mean = model[0].weight.flatten().tolist()[1]
    assert mean == 2.0  # codes 2, 3, 2, 3 with momentum 0.2: 2.328


def test_frozen_weight_follows_the_scale_and_cannot_set_it() -> None:
    model, quant = one_layer()
    freezing = Freezing(quant, model, 0)
    for step in range(4):
        set_weights(model, 2.6 if step % 2 else 2.4)
        freezing.after_step()
    model[0].weight.data[0, 0], model[0].weight.data[0, 1] = 14.0, 100.0  # the optimizer moved both
    freezing.after_step()
    assert model[0].weight.flatten().tolist() == [14.0, 4.0, 4.0]  # scale 2, code still 2


# --- learned scales --------------------------------------------------------------------------------------------------


def test_learned_scales_are_trained_saved_and_averaged() -> None:
    toy_run = Toy("learned_scale=true")
    keys = [key for key in toy_run.model.state_dict() if key.endswith("scaling_impl.value")]
    assert len(keys) == 2
    before = {key: toy_run.model.state_dict()[key].clone() for key in keys}
    parameters = [id(parameter) for parameter in toy_run.model.parameters()]
    toy_run.epoch(0, n_steps=20)
    for key in keys:
        assert not torch.equal(toy_run.model.state_dict()[key], before[key])
        assert not torch.equal(toy_run.ema.state_dict()[key], before[key])
    copy = Toy("learned_scale=true", "fast_path=false").model
    copy.load_state_dict(toy_run.model.state_dict())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(copy.eval()(images), toy_run.model.eval()(images))
    toy_run.model.load_state_dict(copy.state_dict())
    assert [id(parameter) for parameter in toy_run.model.parameters()] == parameters  # the optimizer's are still used


def test_scale_moves_as_much_as_lsq_moves_it() -> None:
    """One SGD step of v = log2(s Qp) against one of s with g = 1 / sqrt(N Qp): equal to first order in the step."""
    toy_run = Toy("learned_scale=true", lr=1e-6)
    toy_run.optimizer.param_groups[0]["momentum"] = 0.0
    layer: Any = toy_run.model[3]
    value = scale_of(layer)
    scale = (value.detach().exp2() / 7).double()
    torch.manual_seed(1)
    toy_run.optimizer.zero_grad()
    toy_run.model(torch.rand(4, 3, 8, 8)).square().mean().backward()
    of_scale = value.grad.double() / (scale * torch.log(torch.tensor(2.0)))
    lsq = of_scale / (layer.weight[0].numel() * 7) ** 0.5
    toy_run.hooks[0].before_step(1.0)
    ours = value.grad.double() * scale * torch.log(torch.tensor(2.0))  # ds = s ln2 dv
    unclipped = value.grad.abs() < 1.0
    assert unclipped.any()
    torch.testing.assert_close(ours[unclipped], lsq[unclipped], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("grad_scale", [1.0, 65536.0])
def test_scale_gradient_is_cut_at_one_times_the_grad_scale(grad_scale: float) -> None:
    toy_run = Toy("learned_scale=true")
    value = scale_of(toy_run.model[0])
    value.grad = torch.full_like(value, 1e9)
    toy_run.hooks[0].before_step(grad_scale)
    assert (value.grad == grad_scale).all()


def test_learned_scales_have_no_weight_decay() -> None:
    model = toy(config_of("learned_scale=true"))
    scales = [scale_of(layer) for layer in learned_layers(model).values()]
    rest = [parameter for parameter in model.parameters() if all(parameter is not scale for scale in scales)]
    groups = [{"params": [*rest[:2], *scales], "param_group": "weight"}, {"params": rest[2:], "param_group": "bn"}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    exempt_scales_from_decay(optimizer, model)
    decayed, exempt = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert decayed == [id(p) for p in rest[:2]]
    assert exempt == [id(p) for p in (*rest[2:], *scales)]


@pytest.mark.parametrize(
    "option", ["learned_scale=true", "warmup_share=0.25", "dampening=1e-3", "freeze_threshold=0.1"]
)
def test_decoupled_scheme_refuses_options_that_are_not_for_it(option: str) -> None:
    with pytest.raises(UserError, match=f"quant.{option.partition('=')[0]} is not for this scheme"):
        toy(config_of("scheme=w4a16-decoupled", option))


def test_first_use_scales_are_what_ultralytics_ema_leaves_of_brevitas_scales() -> None:
    """Against the real thing: a network that nothing has run before ModelEMA copies it."""
    config = config_of("scheme=w4a16-decoupled", "averaged_scales=false", "fast_path=false")
    models: list[nn.Module] = [toy(config), toy(config)]
    layers: list[Any] = [layer for layer in models[0].modules() if isinstance(layer, QuantConv2d)]
    for layer in layers:
        layer.weight_quant.tensor_quant.scaling_impl.init_done = False
        layer.weight_quant.tensor_quant.scaling_impl.value.data.fill_(1.0)
    emas = [ModelEMA(model, decay=0.9, tau=1) for model in models]
    hooks = stabilisers(config, models[1], emas[1].ema)
    for epoch in range(3):
        for hook in hooks:
            hook.start_epoch(epoch)
        for model, ema in zip(models, emas, strict=True):
            torch.manual_seed(epoch)
            train_with_ema(model, ema, hooks if model is models[1] else [])
            ema.ema(torch.rand(2, 3, 8, 8))  # the validation
        if epoch:  # ours sets them after the first one
            assert same(*(ema.ema.state_dict() for ema in emas))
    key = "0.weight_quant.tensor_quant.scaling_impl.value"
    assert (models[1].state_dict()[key] / emas[1].ema.state_dict()[key] - 1).abs() > 0.001  # it would have followed


def train_with_ema(model: nn.Module, ema: ModelEMA, hooks: list[Stabiliser]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (model(torch.rand(4, 3, 8, 8)) - torch.rand(4, 6, 8, 8)).square().mean().backward()
        optimizer.step()
        ema.update(model)
        for hook in hooks:
            hook.after_step()


def test_training_does_not_see_what_the_average_leaves_out() -> None:
    left_out, averaged = Toy("scheme=w4a16-decoupled", "averaged_scales=false"), Toy("scheme=w4a16-decoupled")
    for of in (left_out, averaged):
        for epoch in range(3):
            of.epoch(epoch)
    assert same(left_out.model.state_dict(), averaged.model.state_dict())
    assert not same(left_out.ema.state_dict(), averaged.ema.state_dict())


@pytest.mark.parametrize("sets", [[], ["learned_scale=true"], ["scheme=w4a16-decoupled"]])
def test_scale_ratio_shows_an_average_that_was_left_behind(sets: list[str]) -> None:
    raw = toy(config_of(*sets))
    averaged = deepcopy(raw)
    assert scale_ratios(raw, averaged) == [1.0, 1.0]
    with torch.no_grad():
        for name, parameter in raw[0].named_parameters():  # half the scale, whatever makes it
            if name.endswith("value"):
                parameter.copy_(parameter - 1 if "learned" in sets[0] else parameter / 2)
            else:
                parameter.div_(2)
    assert scale_ratios(raw, averaged) == [pytest.approx(0.5), 1.0]


def test_scales_are_left_out_of_the_average_with_the_earlier_scheme_alone() -> None:
    with pytest.raises(UserError, match="averaged_scales=false is for scheme w4a16-decoupled"):
        config_of("averaged_scales=false")


def test_attach_again_follows_the_bits() -> None:
    toy_run = Toy("warmup_share=0.25", "warmup_bits=8")
    toy_run.epoch(0, n_steps=0)
    assert {of.largest for of in read_codes(toy_run.model)} == {127}
    attach(toy_run.model)
    assert {of.largest for of in read_codes(deepcopy(toy_run.model))} == {127}
