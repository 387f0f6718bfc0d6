"""Validation of a training in three states, and the health of the training that follows from it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from app.core.results import AP, AP50, AP_COMMONEST, AP_FREQUENT, SCORED, STATES, VAL_LOSS, column
from app.quant.batchnorm import variance_ratios
from app.quant.health import Oscillations, flat_codes, scale_ratios, share_of_different, signal_to_noise
from app.train.processes import ALONE
from app.train.state import State
from app.train.step import criterion_of_part
from app.train.validator import HeldOut, tensors_of

# Scores recorded for every state: our name -> key of Ultralytics' validator.
OF_CLASSES = (AP_FREQUENT, AP_COMMONEST)  # numbers that our validator adds under their own names
SCORES = {AP: "metrics/mAP50-95(B)", AP50: "metrics/mAP50(B)", **dict(zip(OF_CLASSES, OF_CLASSES, strict=True))}
UNNAMED = ("fitness", *OF_CLASSES)  # numbers of the last state that are no columns by their own names
LOSSES = ("val/box_loss", "val/cls_loss", "val/dfl_loss")


@dataclass(frozen=True)
class Scores:
    """What a validation gave: its columns of results.csv, and the last of the three states as a model of its own."""

    columns: dict[str, float]
    model: nn.Module


def score_states(
    state: State,
    score: Callable[[HeldOut], dict[str, dict[str, float]]],
    reestimate: Callable[[nn.Module], None],
    kept: nn.Module | None = None,
) -> Scores:
    """Scores raw weights, their EMA, and the EMA with BatchNorm re-estimated.

    Args:
        score: gives the numbers of Ultralytics' validator for every set of weights; AP is that of the one2one head.
        reestimate: replaces BatchNorm's running statistics of a model in place.
        kept: model of the last Scores, with the same bits: it is filled again, because copying the modules of a
            quantized YOLOv10m takes seconds.

    Returns:
        the validator's numbers for the last state, and AP/<state>, AP50/<state>, val_loss/<state> for all three.
    """
    model: Any = kept or deepcopy(state.ema.ema)  # with the bits that are in force, where a warm-up changes them
    model.load_state_dict(state.ema.ema.state_dict())
    if kept is None:
        model.criterion = criterion_of_part(model, ALONE)
    start = time.monotonic()
    reestimate(model)
    reestimation_s = round(time.monotonic() - start, 3)
    scored = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    sources = (tensors_of(state.net), tensors_of(state.ema.ema), scored)
    held_out = HeldOut(model, dict(zip(STATES, sources, strict=True)))
    results = score(held_out)
    held_out.take(SCORED)
    raw, ema, ema_bn = (columns_of(name, results[name]) for name in STATES)
    last = {name: value for name, value in results[SCORED].items() if name not in UNNAMED}
    return Scores({**last, **raw, **ema, "time/bn_reestimation_s": reestimation_s, **ema_bn}, model)


def columns_of(state: str, result: dict[str, float]) -> dict[str, float]:
    """Columns of results.csv of one of the three states, from the validator's numbers."""
    columns = {column(name, state): result[key] for name, key in SCORES.items() if key in result}
    return {**columns, column(VAL_LOSS, state): sum(result[key] for key in LOSSES)}


@dataclass(frozen=True)
class Health:
    """Columns health/* of results.csv, and the quantization SNR of every quantized layer in dB (empty for fp16)."""

    columns: dict[str, float]
    snr_db: dict[str, float]


def examine(state: State, scored: nn.Module, oscillations: Oscillations) -> Health:
    """Health of the state that has just been scored; takes state.codes_before to the codes of now.

    Columns:
        health/bn_ratio_*: re-estimated over averaged running variance, the layers' median and extremes.
        For quantized models also, as shares of the quantized weights: health/flipped since the last validation,
        health/oscillating at the end of the epoch, health/ema_differs from the raw codes.
        Of their layers also health/scale_ratio_*, the raw weights' scale over the EMA's, median and extremes; and
        health/snr_*_db.
    """
    values = extremes("bn_ratio", list(variance_ratios(state.ema.ema, scored).values()))
    codes = flat_codes(state.net)
    snr_db: dict[str, float] = {}
    if len(codes):
        values["flipped"] = share_of_different(codes, state.codes_before.to(codes.device))
        values["oscillating"] = oscillations.share()
        values["ema_differs"] = share_of_different(codes, flat_codes(state.ema.ema))
        values |= extremes("scale_ratio", scale_ratios(state.net, state.ema.ema))
        snr_db = signal_to_noise(scored)
        values |= {"snr_min_db": min(snr_db.values()), "snr_mean_db": statistics.fmean(snr_db.values())}
    state.codes_before = codes.cpu()
    columns = {f"health/{name}": round(value, 6) for name, value in values.items()}
    return Health(columns, snr_db)


def extremes(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_min": min(values), f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
