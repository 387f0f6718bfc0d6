"""Validation of a training in three states, and the health of the training that follows from it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionValidator

from app.core.results import AP, AP50, SCORED, STATES, VAL_LOSS, column
from app.quant.batchnorm import variance_ratios
from app.quant.health import Oscillations, flat_codes, scale_ratios, share_of_different, signal_to_noise
from app.train.state import State

# Scores recorded for every state: our name -> key of Ultralytics' validator.
SCORES = {AP: "metrics/mAP50-95(B)", AP50: "metrics/mAP50(B)"}
LABELS = ("batch_idx", "cls", "bboxes")  # what a validator reads of a batch for every image
LOSSES = ("val/box_loss", "val/cls_loss", "val/dfl_loss")


class Validator(DetectionValidator):
    """Scores the model that the trainer holds out, and keeps the first batch for TensorBoard."""

    def get_model(self, model: Any, trainer: Any = None) -> Any:
        return trainer.held_out

    def gather_stats(self) -> None:
        """Nothing to gather: of several ranks, rank 0 validates alone."""

    def postprocess(self, preds: Any) -> list[dict[str, torch.Tensor]]:
        """Detections on the CPU: matching takes hundreds of tiny operations an image, each a launch and a wait."""
        on_device = super().postprocess(preds)
        counts = [len(pred["conf"]) for pred in on_device]
        on_cpu: list[dict[str, torch.Tensor]] = [{} for _ in on_device]
        for key in on_device[0]:
            all_images = torch.cat([pred[key] for pred in on_device]).cpu()
            for pred, part in zip(on_cpu, all_images.split(counts), strict=True):
                pred[key] = part
        return on_cpu

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        if self.batch_i == 0:
            self.first_batch = (preds, batch)
        labels = {key: batch[key].cpu() for key in LABELS}
        super().update_metrics(preds, {**batch, **labels})

    def _prepare_batch(self, si: int, batch: dict[str, Any]) -> dict[str, Any]:
        device, self.device = self.device, torch.device("cpu")  # where it makes a tensor for the boxes
        prepared = super()._prepare_batch(si, batch)
        self.device = device
        return prepared


@dataclass(frozen=True)
class Scores:
    """What a validation gave: its columns of results.csv, and the last of the three states as a model of its own."""

    columns: dict[str, float]
    model: nn.Module


def score_states(
    state: State, score: Callable[[nn.Module], dict[str, float]], reestimate: Callable[[nn.Module], None]
) -> Scores:
    """Scores raw weights, their EMA, and the EMA with BatchNorm re-estimated.

    Args:
        score: gives the numbers of Ultralytics' validator for a model; AP is that of the one2one head.
        reestimate: replaces BatchNorm's running statistics of a model in place.

    Returns:
        the validator's numbers for the last state, and AP/<state>, AP50/<state>, val_loss/<state> for all three.
    """
    columns: dict[str, float] = {}
    scores: dict[str, float] = {}
    held_out: Any = deepcopy(state.ema.ema)  # with the bits that are in force, where a warm-up changes them
    for name in STATES:
        source = state.net if name == "raw" else state.ema.ema
        held_out.load_state_dict(source.state_dict())
        if name == SCORED:
            start = time.monotonic()
            reestimate(held_out)
            columns["time/bn_reestimation_s"] = round(time.monotonic() - start, 3)
        scores = score(held_out)
        for score_name, key in SCORES.items():
            columns[column(score_name, name)] = scores[key]
        columns[column(VAL_LOSS, name)] = sum(scores[key] for key in LOSSES)
    scores.pop("fitness")
    return Scores({**scores, **columns}, held_out)


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
