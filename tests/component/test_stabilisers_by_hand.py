"""Freezing, dampening, learned scales and BatchNorm re-estimation against numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from app.core.config import Quant, load
from app.quant.batchnorm import reestimate_batchnorm
from app.quant.learned import scale_parameter
from app.quant.options import Dampening, Freezing, LearnedScale
from tests.support.hand_layers import hand_conv, set_weights, weight_of, weights

# Float32 has 1.2e-7; no sum here has more than ten terms.
RTOL = 1e-6
# 2**log2(7) is 7 but for the last bits, and a difference such as 2.4 - 2 loses a digit.
LOG_RTOL = 1e-5


def quant_with(**options: float) -> Quant:
    quant = load("qat", sets=[f"quant.{name}={value}" for name, value in options.items()]).quant
    assert quant is not None
    return quant


# --- freezing --------------------------------------------------------------------------------------------------------

# Momentum 0.2 and threshold 0.1: the first oscillation, 0.2, freezes a weight.
FREEZE = {"freeze_threshold": 0.1, "freeze_momentum": 0.2}
# A weight a row: where the optimizer would leave it after each of four steps, beside an abs-max of 7.
STEPS = [
    [2.1, 2.9, 3.1, 2.4],  # codes 2, 3, 3, 2: the last change is an oscillation
    [3.4, 2.4, 2.3, 2.6],  # codes 3, 2, 2, 3: the same the other way
    [2.1, 2.9, 4.1, 4.9],  # codes 2, 3, 4, 5: one direction
    [2.1, 2.9, 3.1, 3.4],  # codes 2, 3, 3, 3: one change
    [2.1, 4.9, 5.1, 4.4],  # codes 2, 5, 5, 4: an oscillation, whose mean is not the last code
]
START = [7.0, *(path[0] for path in STEPS)]
# Means of the codes with momentum 0.2: 2, 2.2, 2.36, 2.288 and 3, 2.8, 2.64, 2.712 and 2, 2.6, 3.08, 3.264.
HELD = [2.0, 3.0, 4.9, 3.4, 3.0]


def run_steps(freezing: Freezing, model: nn.Sequential, steps: range) -> None:
    for step in steps:
        set_weights(model, [[7.0, *(path[step] for path in STEPS)]])
        freezing.after_step()


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
def test_a_weight_that_rests_between_two_flips_is_frozen_at_its_rounded_mean(fast: bool) -> None:
    model = hand_conv([START], fast=fast)
    run_steps(Freezing(quant_with(**FREEZE), model, 0), model, range(4))
    assert weights(model)[0] == pytest.approx([7.0, *HELD], rel=RTOL)


def test_no_weight_is_frozen_before_the_second_flip() -> None:
    model = hand_conv([START])
    run_steps(Freezing(quant_with(**FREEZE), model, 0), model, range(3))
    assert weights(model)[0] == pytest.approx([7.0, *(path[2] for path in STEPS)], rel=RTOL)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_direction_frequency_and_mean_outlive_a_resume(stop: int) -> None:
    model = hand_conv([START])
    first, second = (Freezing(quant_with(**FREEZE), model, 0) for _ in range(2))
    run_steps(first, model, range(stop))
    second.load_state_dict(first.state_dict())
    run_steps(second, model, range(stop, 4))
    assert weights(model)[0] == pytest.approx([7.0, *HELD], rel=RTOL)


def test_an_oscillation_is_forgotten_at_the_rate_of_the_momentum() -> None:
    """Codes 2, 3, 2 give 0.3, a rest 0.21, the flip after it 0.447 > 0.4; after three rests the flip gives 0.372."""
    options = {"freeze_threshold": 0.4, "freeze_momentum": 0.3}
    frozen: list[bool] = []
    for path in ([2.1, 2.9, 2.1, 2.1, 2.9], [2.1, 2.9, 2.1, 2.1, 2.1, 2.1, 2.9]):
        model = hand_conv([[7.0, path[0]]])
        freezing = Freezing(quant_with(**options), model, 0)
        for value in path:
            set_weights(model, [[7.0, value]])
            freezing.after_step()
        frozen.append(weights(model)[0][1] != pytest.approx(2.9, rel=RTOL))
    assert frozen == [True, False]


def test_freezing_begins_with_the_bits_of_the_scheme() -> None:
    model = hand_conv([START])
    freezing = Freezing(quant_with(**FREEZE), model, 2)
    freezing.start_epoch(1)
    run_steps(freezing, model, range(4))
    assert weights(model)[0] == pytest.approx([7.0, *(path[3] for path in STEPS)], rel=RTOL)
    freezing.start_epoch(2)
    run_steps(freezing, model, range(4))
    assert weights(model)[0] == pytest.approx([7.0, *HELD], rel=RTOL)


# --- dampening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
@pytest.mark.parametrize("grad_scale", [1.0, 8.0])
def test_dampening_adds_twice_lambda_times_the_distance_from_the_code(fast: bool, grad_scale: float) -> None:
    """Scales 1 and 2: distances 0, 0.4, -0.3 and 0, 0.5, -1 (-5 / 2 rounds to -2, whose middle is -4)."""
    model = hand_conv([[7.0, 2.4, 3.7], [-14.0, 4.5, -5.0]], fast=fast)
    weight = weight_of(model)
    weight.grad = torch.full_like(weight, 10.0)
    Dampening(quant_with(dampening=0.25), model, 0).before_step(grad_scale)
    distances = [0.0, 0.4, -0.3, 0.0, 0.5, -1.0]
    expected = [10.0 + 2 * 0.25 * grad_scale * distance for distance in distances]
    assert weight.grad.flatten().tolist() == pytest.approx(expected, rel=RTOL)


def test_dampening_leaves_clipped_weights_and_the_warm_up_alone() -> None:
    """The trained limit is 4, so the scale is 4/7: 5 is clipped; 1 is code 2 (1.75), whose middle is 8/7."""
    model = hand_conv([[5.0, 1.0]], learned=True)
    layer, weight = model[0], weight_of(model)
    parameter: Any = scale_parameter(layer)  # pyright: ignore[reportArgumentType]
    parameter.data.fill_(2.0)
    weight.grad = torch.zeros_like(weight)
    dampening = Dampening(quant_with(dampening=0.5), model, 1)
    dampening.start_epoch(0)
    dampening.before_step(1.0)
    assert weight.grad.flatten().tolist() == [0.0, 0.0]
    dampening.start_epoch(1)
    dampening.before_step(1.0)
    assert weight.grad.flatten().tolist() == pytest.approx([0.0, 1.0 - 8 / 7], rel=LOG_RTOL)


# --- learned scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
def test_gradient_of_a_learned_scale(fast: bool) -> None:
    """Scale 1: codes 7, 2, -7 (clipped from -9), 3. dL/ds = 1*0 + 2*(2 - 2.4) - 3*7 + 4*(3 - 3.2), ds/dv = s ln 2."""
    model = hand_conv([[7.0, 2.4, -9.0, 3.2]], fast=fast, learned=True)
    parameter: Any = scale_parameter(model[0])  # pyright: ignore[reportArgumentType]
    parameter.data.fill_(math.log2(7.0))
    images = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)  # so that dL/dq of the four weights is 1, 2, 3, 4
    model(images).sum().backward()
    assert parameter.grad.item() == pytest.approx(-22.6 * math.log(2), rel=LOG_RTOL)
    gradient: Any = weight_of(model).grad
    assert gradient.flatten().tolist() == pytest.approx([1.0, 2.0, 0.0, 4.0], rel=LOG_RTOL)


def test_step_of_a_learned_scale_is_that_of_lsq() -> None:
    """Channels of N = 4 weights with limits 8 and 2, Qp = 7, g = 1 / sqrt(28).

    dL/dv becomes g dL/dv / (s ln 2)**2, with s = 8/7 and 2/7.
    """
    model = hand_conv([[8.0, 1.0, 2.0, 3.0], [2.0, 1.0, 0.5, 0.1]], learned=True)
    parameter: Any = scale_parameter(model[0])  # pyright: ignore[reportArgumentType]
    parameter.grad = torch.tensor([0.5, -0.25]).view_as(parameter)
    LearnedScale(model).before_step(1.0)
    g = 1 / math.sqrt(28)
    expected = [0.5 * g / (8 / 7 * math.log(2)) ** 2, -0.25 * g / (2 / 7 * math.log(2)) ** 2]  # 0.151 and -1.205
    assert parameter.grad.flatten().tolist() == pytest.approx([expected[0], -1.0], rel=LOG_RTOL)


def test_learned_scale_starts_at_the_absmax() -> None:
    model = hand_conv([[8.0, -1.0], [0.25, -0.5]], learned=True)
    parameter: Any = scale_parameter(model[0])  # pyright: ignore[reportArgumentType]
    assert parameter.flatten().tolist() == [3.0, -1.0]


# --- BatchNorm re-estimation -----------------------------------------------------------------------------------------

# One channel, four pixels: means 3 and 11; unbiased variances 20/3 and 4 (biased: 5 and 3).
BATCHES = [[0.0, 2.0, 4.0, 6.0], [10.0, 10.0, 10.0, 14.0]]
MEAN, VARIANCE = 7.0, (20 / 3 + 4) / 2
EPS = 1e-12  # so small that float32 does not see it beside a variance of 1


def images(pixels: list[float]) -> torch.Tensor:
    return torch.tensor(pixels).view(2, 1, 1, 2)


def two_norms() -> nn.Sequential:
    """The second BatchNorm sees what the first one gives; statistics and momenta are not PyTorch's initial ones."""
    net = nn.Sequential(nn.BatchNorm2d(1, eps=EPS, momentum=0.03), nn.BatchNorm2d(1, eps=EPS, momentum=0.5))
    for norm, (mean, variance, count) in zip(net, ((100.0, 50.0, 7), (-3.0, 0.1, 9)), strict=True):
        norm.running_mean.fill_(mean)  # pyright: ignore
        norm.running_var.fill_(variance)  # pyright: ignore
        norm.num_batches_tracked.fill_(count)  # pyright: ignore
    return net.eval()


def statistics_of(norm: nn.Module) -> list[float]:
    state = norm.state_dict()
    return [state["running_mean"].item(), state["running_var"].item()]


def test_reestimated_statistics_are_means_over_batches_without_what_was_there() -> None:
    net = two_norms()
    assert reestimate_batchnorm(net, [images(pixels) for pixels in BATCHES]) == 2
    assert statistics_of(net[0]) == pytest.approx([MEAN, VARIANCE], rel=RTOL)
    # Each batch is normalised by its own statistics: mean 0, biased variance 1, so 4/3 unbiased.
    assert statistics_of(net[1]) == pytest.approx([0.0, 4 / 3], rel=RTOL, abs=RTOL)
    assert [int(norm.state_dict()["num_batches_tracked"]) for norm in net] == [2, 2]


class AsAKernel(nn.BatchNorm2d):
    """Moves its variance as norm_kernels.py does: old + momentum * (new - old)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.running_var is not None and self.momentum is not None
        self.running_var += self.momentum * (input.var() - self.running_var)
        return input


def test_a_variance_that_is_small_beside_1_is_kept() -> None:
    net = nn.Sequential(AsAKernel(1))
    reestimate_batchnorm(net, [images([0.0, 0.0, 2e-5, 2e-5])])
    assert statistics_of(net[0])[1] == pytest.approx(4e-10 / 3, rel=RTOL)


def test_second_reestimation_knows_nothing_of_the_first() -> None:
    net = two_norms()
    reestimate_batchnorm(net, [images([50.0, 60.0, 70.0, 80.0])] * 3)
    reestimate_batchnorm(net, [images(pixels) for pixels in BATCHES])
    assert statistics_of(net[0]) == pytest.approx([MEAN, VARIANCE], rel=RTOL)


@pytest.mark.parametrize("training", [True, False])
def test_momenta_modes_weights_and_biases_are_those_of_before(training: bool) -> None:
    net = two_norms().train(training)
    reestimate_batchnorm(net, [images(pixels) for pixels in BATCHES])
    assert [norm.momentum for norm in net] == [0.03, 0.5]  # pyright: ignore
    assert [norm.training for norm in (net, *net)] == [training] * 3
    assert [norm.weight.item() for norm in net] == [1.0, 1.0]  # pyright: ignore
    assert not any(parameter.grad is not None for parameter in net.parameters())


def test_reestimated_model_normalises_with_the_new_statistics() -> None:
    net = two_norms()[:1].eval()
    reestimate_batchnorm(net, [images(pixels) for pixels in BATCHES])
    with torch.no_grad():
        out = net(images([MEAN, MEAN + math.sqrt(VARIANCE), 0.0, 0.0])).flatten().tolist()
    assert out[:2] == pytest.approx([0.0, 1.0], abs=RTOL)
