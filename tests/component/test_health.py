"""Figures of a quantized training's health, on weights whose scale and codes are worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from app.quant.batchnorm import variance_ratios
from app.quant.health import Oscillations, flat_codes, scale_ratios, share_of_different, signal_to_noise
from tests.support.hand_layers import hand_conv, set_weights

# Float32 has 1.2e-7; the sums here have fewer than ten terms.
RTOL = 1e-6
PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
# A weight a row, at the start and after each of three steps, beside an abs-max of 7 that makes the scale 1.
PATHS_OF_CODES = [
    [2.1, 2.9, 2.2, 2.1],  # 2, 3, 2, 2: up, then down
    [2.1, 2.9, 3.1, 2.2],  # 2, 3, 3, 2: up, rest, then down
    [3.4, 2.4, 2.3, 2.6],  # 3, 2, 2, 3: down, rest, then up
    [2.1, 2.9, 4.1, 4.9],  # 2, 3, 4, 5: up all the way
    [2.1, 2.9, 3.1, 3.2],  # 2, 3, 3, 3: one change
    [1.6, 1.9, 2.2, 2.4],  # 2, 2, 2, 2: moves inside its code
    [-2.1, -2.9, -4.1, -4.9],  # -2, -3, -4, -5: down all the way
]
N_OSCILLATING, N_WEIGHTS = 3, 8


def weights_at(step: int) -> list[list[float]]:
    return [[7.0, *(path[step] for path in PATHS_OF_CODES)]]


# --- oscillating -----------------------------------------------------------------------------------------------------


@PATHS
def test_a_weight_oscillates_that_changes_its_code_back_also_after_a_rest(fast: bool) -> None:
    model = hand_conv(weights_at(0), fast=fast)
    window = Oscillations(model)
    for step in (1, 2, 3):
        window.open(0)
        set_weights(model, weights_at(step))
        window.after_step()
    assert window.share() == N_OSCILLATING / N_WEIGHTS


def test_a_window_that_is_saved_and_loaded_goes_on() -> None:
    model = hand_conv(weights_at(0))
    first, second = Oscillations(model), Oscillations(model)
    for step, window in ((1, first), (2, second), (3, second)):
        if step == 2:
            second.load_state_dict(first.state_dict())
            second.start_epoch(4)
        window.open(4)
        set_weights(model, weights_at(step))
        window.after_step()
    assert second.share() == N_OSCILLATING / N_WEIGHTS


def test_steps_outside_the_window_and_other_epochs_count_nothing() -> None:
    model = hand_conv(weights_at(0))
    window = Oscillations(model)
    for step in (1, 2, 3):  # never opened
        set_weights(model, weights_at(step))
        window.after_step()
    assert window.share() == 0.0
    set_weights(model, weights_at(0))
    window.open(0)
    set_weights(model, weights_at(1))
    window.after_step()
    window.start_epoch(1)  # the upward changes were those of epoch 0
    for step in (2, 3):
        window.open(1)
        set_weights(model, weights_at(step))
        window.after_step()
    assert window.share() == 0.0


def test_a_window_is_closed_once_it_is_read() -> None:
    model = hand_conv(weights_at(0))
    window = Oscillations(model)
    for step in (1, 2, 3):
        window.open(0)
        set_weights(model, weights_at(step))
        window.after_step()
    assert window.share() > 0.0
    assert window.share() == 0.0


# --- flipped, ema_differs --------------------------------------------------------------------------------------------


@PATHS
def test_codes_are_weights_over_scale_halves_to_even(fast: bool) -> None:
    """Scales are 1 and 2: 2.5 and 3.5 are halves, and 5 / 2 and -7 / 2 too."""
    model = hand_conv([[7.0, 2.5, 3.5, -0.4], [5.0, -14.0, -7.0, 1.1]], fast=fast)
    assert flat_codes(model).tolist() == [7, 2, 4, 0, 2, -7, -4, 1]


def test_different_codes_are_counted_as_a_share_of_all() -> None:
    before = flat_codes(hand_conv([[7.0, 2.4, -3.0, 0.2]]))
    after = flat_codes(hand_conv([[7.0, 2.6, -3.3, 0.4]]))  # only 2.4 -> 2.6 crosses a border
    assert share_of_different(after, before) == 0.25
    assert share_of_different(before, before) == 0.0


def test_float_weights_have_no_codes_to_compare() -> None:
    codes, none = flat_codes(hand_conv([[7.0, 1.0]])), flat_codes(nn.Sequential(nn.Conv2d(2, 1, 1)))
    assert len(none) == 0
    assert share_of_different(codes, none) == share_of_different(none, none) == 0.0


# --- ratios ----------------------------------------------------------------------------------------------------------


def norm_with(variances: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(variances))
    norm.running_var = torch.tensor(variances)
    return norm


def test_bn_ratio_is_after_over_before_and_a_geometric_mean() -> None:
    """Ratios 4 and 1 have the geometric mean 2 (the arithmetic one is 2.5); 1/8 and 1/2 have 1/4."""
    before = nn.Sequential(norm_with([1.0, 4.0]), nn.ReLU(), norm_with([8.0, 2.0]))
    after = nn.Sequential(norm_with([4.0, 4.0]), nn.ReLU(), norm_with([1.0, 1.0]))
    ratios = variance_ratios(before, after)
    assert list(ratios) == ["0", "2"]
    assert ratios["0"] == pytest.approx(2.0, rel=RTOL)
    assert ratios["2"] == pytest.approx(0.25, rel=RTOL)


@PATHS
def test_scale_ratio_is_raw_over_averaged(fast: bool) -> None:
    """Scales 2 and 1 over 1 and 1: 1.5 in the mean; the other way round it would be 0.75."""
    raw = hand_conv([[14.0, 1.0], [-7.0, 2.0]], fast=fast)
    averaged = hand_conv([[7.0, 1.0], [7.0, 3.0]], fast=fast)
    assert scale_ratios(raw, averaged) == [pytest.approx(1.5, rel=RTOL)]


# --- signal to noise -------------------------------------------------------------------------------------------------


@PATHS
def test_signal_to_noise_in_decibels(fast: bool) -> None:
    """Scale 1 and codes 7, 2, -4 leave 0, 0.4, -0.3; scale 2 and codes 7, 2, -4 (4.5 / 2, -8 / 2) leave 0, 0.5, 0."""
    model = hand_conv([[7.0, 2.4, -4.3], [14.0, 4.5, -8.0]], fast=fast)
    signal = 7.0**2 + 2.4**2 + 4.3**2 + 14.0**2 + 4.5**2 + 8.0**2
    noise = 0.4**2 + 0.3**2 + 0.5**2
    expected = 10 * math.log10(signal / noise)  # 28.7 dB
    assert signal_to_noise(model) == {"0": pytest.approx(expected, rel=RTOL * 10)}  # w - w_hat cancels one digit


def test_a_hundredth_of_the_power_as_noise_is_20_decibels() -> None:
    """Two weights of sqrt(49 / 198) < 1/2 have code 0: noise 49 / 99, signal 49 + 49 / 99."""
    lost = math.sqrt(49 / 198)
    assert signal_to_noise(hand_conv([[7.0, lost, -lost]])) == {"0": pytest.approx(20.0, rel=RTOL)}


def test_layers_without_signal_or_noise_give_zero_and_float_layers_nothing() -> None:
    assert signal_to_noise(hand_conv([[0.0, 0.0]])) == {"0": 0.0}
    assert signal_to_noise(hand_conv([[7.0, -3.0]])) == {"0": 0.0}
    assert signal_to_noise(nn.Sequential(nn.Conv2d(2, 1, 1))) == {}
