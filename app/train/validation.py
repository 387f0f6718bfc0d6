"""Validation of a training in three states, and what it says of the training's health."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.torch_utils import autocast

from app.core.files import write_json
from app.core.results import WARM_UP
from app.quant.batchnorm import reestimate_batchnorm, variance_ratios
from app.quant.health import flat_codes, scale_ratios, share_of_different, signal_to_noise

if TYPE_CHECKING:
    from app.train.trainer import Trainer


# The three validated states, in the order they are scored. The last one picks best.pt and is exported.
STATES = ("raw", "ema", "ema_bn")
# Scores recorded for every state: our name -> key of Ultralytics' validator.
SCORES = {"AP": "metrics/mAP50-95(B)", "AP50": "metrics/mAP50(B)"}
LABELS = ("batch_idx", "cls", "bboxes")  # what a validator reads of a batch for every image
LOSSES = ("val/box_loss", "val/cls_loss", "val/dfl_loss")


class Validator(DetectionValidator):
    """Scores the model that the trainer holds out, and keeps the first batch for TensorBoard."""

    def get_model(self, model: Any, trainer: Any = None) -> Any:
        return trainer.held_out

    def gather_stats(self) -> None:
        """Nothing to gather: where a training has several processes, the first one validates alone."""

    def postprocess(self, preds: Any) -> list[dict[str, torch.Tensor]]:
        """Detections on the CPU: matching takes hundreds of tiny operations an image, each a launch and a wait."""
        on_gpu = super().postprocess(preds)
        counts = [len(pred["conf"]) for pred in on_gpu]
        parts = {key: torch.cat([pred[key] for pred in on_gpu]).cpu().split(counts) for key in on_gpu[0]}
        return [{key: parts[key][i] for key in parts} for i in range(len(on_gpu))]

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        if self.batch_i == 0:
            self.first_batch = (preds, batch)
        super().update_metrics(preds, {**batch, **{key: batch[key].cpu() for key in LABELS}})

    def _prepare_batch(self, si: int, batch: dict[str, Any]) -> dict[str, Any]:
        device, self.device = self.device, torch.device("cpu")  # where it makes a tensor for the boxes
        prepared = super()._prepare_batch(si, batch)
        self.device = device
        return prepared


def score_states(trainer: Trainer, bn_images: Iterable[torch.Tensor]) -> dict[str, float]:
    """Scores raw weights, their EMA, and the EMA with BatchNorm re-estimated on `bn_images` ([N,3,H,W], 0..1).

    AP is that of Ultralytics' validator on the one2one head. Afterwards trainer.held_out is the last state.

    Returns:
        the validator's numbers for the last state, and AP/<state>, AP50/<state>, val_loss/<state> for all three.
    """
    metrics: dict[str, float] = {}
    scores: dict[str, float] = {}
    held_out = trainer.held_out = deepcopy(trainer.ema.ema)  # also of its bits, where a warm-up changes them
    for state in STATES:
        source = trainer.net if state == "raw" else trainer.ema.ema
        held_out.load_state_dict(source.state_dict())
        if state == "ema_bn":
            start = time.monotonic()
            with autocast(trainer.amp, device=trainer.device.type):
                reestimate_batchnorm(held_out, bn_images)
            metrics["time/bn_reestimation_s"] = round(time.monotonic() - start, 3)
        scores = trainer.validator(trainer)
        metrics |= {f"{name}/{state}": scores[key] for name, key in SCORES.items()}
        metrics[f"val_loss/{state}"] = sum(scores[key] for key in LOSSES)
    if trainer.epoch < trainer.config.n_warmup_epochs:
        metrics[WARM_UP] = 1
    scores.pop("fitness")
    return {**scores, **metrics}


def examine(trainer: Trainer) -> dict[str, float]:
    """Health of the state that has just been scored; takes trainer.codes_before to the present codes. Where that state
    is the best so far, health.json gets the signal-to-noise ratio of its layers: {"epoch", "snr_db": {layer: dB}}.

    Returns:
        health/bn_ratio_*: re-estimated over averaged running variance, the layers' median and extremes. For quantized
        models also, as shares of the quantized weights: health/flipped since the last validation,
        health/oscillating at the end of the epoch, health/ema_differs from the raw codes. Of their layers also
        health/scale_ratio_*, the raw weights' scale over the EMA's, median and extremes; and health/snr_*_db.
    """
    health = extremes("bn_ratio", list(variance_ratios(trainer.ema.ema, trainer.held_out).values()))
    codes = flat_codes(trainer.net)
    if len(codes):
        health["flipped"] = share_of_different(codes, trainer.codes_before.to(codes.device))
        health["oscillating"] = trainer.oscillations.share()
        health["ema_differs"] = share_of_different(codes, flat_codes(trainer.ema.ema))
        health |= extremes("scale_ratio", scale_ratios(trainer.net, trainer.ema.ema))
        snr = signal_to_noise(trainer.held_out)
        health |= {"snr_min_db": min(snr.values()), "snr_mean_db": statistics.fmean(snr.values())}
        if trainer.best_epoch == trainer.epoch + 1:
            write_json(trainer.save_dir / "health.json", {"epoch": trainer.best_epoch, "snr_db": snr})
    trainer.codes_before = codes.cpu()
    return {f"health/{name}": round(value, 6) for name, value in health.items()}


def extremes(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_min": min(values), f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
