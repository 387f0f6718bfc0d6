"""Ultralytics' validator for several sets of weights of one network: every batch is read once and scored with each."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.metrics import DetMetrics
from ultralytics.utils.torch_utils import autocast, smart_inference_mode

from app.core.results import AP_COMMONEST, AP_FREQUENT, FREQUENT_BOXES
from app.train.batches import LABELS
from app.train.match import Targets, match, targets_of

N_AHEAD = 2  # batches that the GPU may not have finished when the host fetches the next: each keeps pinned memory
Weights = dict[str, torch.Tensor]


def tensors_of(model: nn.Module) -> Weights:
    """Parameters and buffers by name, those of the model themselves."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


class HeldOut(nn.Module):
    """A network that is scored with one set of weights after the other. Validation sees it as one model.

    A copy of a quantized network for each set would take seconds to make; the weights of one are copied in no time.

    Args:
        model: a DetectionModel without gradients; its weights are overwritten.
        sets: weights by name, for every name in `tensors_of(model)`; the last one is what TensorBoard shows.
    """

    def __init__(self, model: nn.Module, sets: dict[str, Weights]) -> None:
        super().__init__()
        self.model: Any = model
        own = tensors_of(model)
        self.by_dtype: dict[str, list[tuple[list[torch.Tensor], list[torch.Tensor]]]] = {}
        for name, weights in sets.items():
            self.by_dtype[name] = []
            for dtype in {tensor.dtype for tensor in own.values()}:  # a foreach operation takes one type
                keys = [key for key, tensor in own.items() if tensor.dtype == dtype]
                self.by_dtype[name].append(([own[key] for key in keys], [weights[key] for key in keys]))

    @property
    def set_names(self) -> list[str]:
        return list(self.by_dtype)

    @torch.no_grad()
    def take(self, name: str) -> None:
        """Gives the model a set of weights."""
        for own, weights in self.by_dtype[name]:
            cast(Any, torch)._foreach_copy_(own, weights)
        torch.clear_autocast_cache()  # it may hold the last set in float16

    def forward(self, images: torch.Tensor) -> dict[str, Any]:
        """Outputs of the model in eval mode, by set of weights."""
        outputs = {}
        for name in self.set_names:
            self.take(name)
            outputs[name] = self.model(images)
        return outputs

    def loss(self, batch: dict[str, Any], outputs: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
        """Terms of the loss by set of weights and name."""
        terms = {}
        for name, output in outputs.items():
            for term, value in self.model.loss(batch, output)[1].items():
                terms[name, term] = value
        return terms

    # --- what Ultralytics' validator asks a model for ---

    @property
    def names(self) -> dict[int, str]:
        return self.model.names

    @property
    def end2end(self) -> bool:
        return self.model.end2end

    @end2end.setter
    def end2end(self, value: bool) -> None:
        self.model.end2end = value

    def set_head_attr(self, **attributes: Any) -> None:
        self.model.set_head_attr(**attributes)


@contextmanager
def without_one2many(model: Any) -> Iterator[None]:
    """Inside, the one2many head does not run. Validation reads the one2one head alone.

    Ultralytics' head does without it since the fusing of a network for inference sets it to None too.
    """
    head = model.model[-1]
    kept = head.cv2, head.cv3
    head.cv2 = head.cv3 = None
    try:
        yield
    finally:
        head.cv2, head.cv3 = kept


class Validator(DetectionValidator):
    """Scores every set of weights that the trainer holds out.

    Attributes:
        metrics_of: Ultralytics' metrics by set, with the AP of every class, after a validation.
        first_batch: detections of the last set on the first batch, and that batch, for TensorBoard.
    """

    device: Any
    dataloader: Any
    metrics_of: dict[str, DetMetrics]
    first_batch: tuple[list[dict[str, torch.Tensor]], dict[str, Any]]

    @smart_inference_mode()
    def score(self, held_out: HeldOut, after_batch: Callable[[], None]) -> dict[str, dict[str, float]]:
        """Numbers of Ultralytics' validator, with five decimals, by set of weights; losses are named val/*.

        It computes what BaseValidator.__call__ does in a training (engine/validator.py, 8.4.190). That one times four
        parts of every batch, for which the host waits for the GPU eight times, and launches nothing meanwhile.

        Args:
            held_out: what is scored, on the validator's device.
            after_batch: is called after each batch.
        """
        held_out.eval()
        held_out.end2end = self.args.nms is False
        self.init_metrics(held_out)
        sums: defaultdict[tuple[str, str], torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        scored: deque[torch.cuda.Event] = deque()
        for number, loaded in enumerate(self.dataloader):
            self.batch_i = number
            batch = self.preprocess(loaded)
            with autocast(self.args.quantize == 16, device=self.device.type):
                preds = held_out(batch["img"])
                for key, value in held_out.loss(batch, preds).items():
                    sums[key] += value
            self.update_metrics(self.postprocess(preds), batch)
            if self.device.type == "cuda":
                keep_pace(scored, self.device)
            after_batch()
        results = self.get_stats()
        self.print_results()
        for (name, term), total in sums.items():
            results[name][f"val/{term}"] = float(total.cpu() / len(self.dataloader))
        return {name: {key: round(value, 5) for key, value in numbers.items()} for name, numbers in results.items()}

    def init_metrics(self, model: Any) -> None:
        super().init_metrics(model)
        self.metrics_of = {name: DetMetrics(model.names) for name in model.set_names}

    def postprocess(self, preds: dict[str, Any]) -> dict[str, list[dict[str, torch.Tensor]]]:
        return {name: self.detections(output) for name, output in preds.items()}

    def detections(self, output: Any) -> list[dict[str, torch.Tensor]]:
        """Detections on the CPU: matching takes hundreds of tiny operations an image, each a launch and a wait."""
        on_device = super().postprocess(output)
        counts = [len(pred["conf"]) for pred in on_device]
        on_cpu: list[dict[str, torch.Tensor]] = [{} for _ in on_device]
        for key in on_device[0]:
            all_images = torch.cat([pred[key] for pred in on_device]).cpu()
            for pred, part in zip(on_cpu, all_images.split(counts), strict=True):
                pred[key] = part
        return on_cpu

    def update_metrics(self, preds: dict[str, list[dict[str, torch.Tensor]]], batch: dict[str, Any]) -> None:
        if self.batch_i == 0:
            self.first_batch = (preds[list(preds)[-1]], batch)
        labels = {key: batch[key].cpu() for key in LABELS}
        n_before = self.seen
        for name, detections in preds.items():
            self.seen, self.metrics = n_before, self.metrics_of[name]
            super().update_metrics(detections, {**batch, **labels})

    def _prepare_batch(self, si: int, batch: dict[str, Any]) -> dict[str, Any]:
        device, self.device = self.device, torch.device("cpu")  # where it makes a tensor for the boxes
        prepared = super()._prepare_batch(si, batch)
        self.device = device
        return prepared

    def get_stats(self) -> dict[str, dict[str, float]]:
        """Numbers by set. The sets' precision-recall curves are independent, and NumPy lets go of the lock."""
        with ThreadPoolExecutor(len(self.metrics_of)) as pool:
            list(pool.map(DetMetrics.process, self.metrics_of.values()))
        stats = {}
        for name, metrics in self.metrics_of.items():
            metrics.clear_stats()
            numbers = {**metrics.results_dict, **class_aps(metrics)}
            stats[name] = {key: float(value) for key, value in numbers.items()}
        return stats

    def print_results(self) -> None:
        for metrics in self.metrics_of.values():
            self.metrics = metrics
            super().print_results()


def keep_pace(scored: deque[torch.cuda.Event], device: torch.device) -> None:
    """Marks the end of a batch's work for the GPU, and waits until it has passed the mark of N_AHEAD batches before."""
    mark = torch.cuda.Event()
    mark.record(torch.cuda.current_stream(device))
    scored.append(mark)
    if len(scored) > N_AHEAD:
        scored.popleft().synchronize()


def class_aps(metrics: DetMetrics) -> dict[str, float]:
    """AP_FREQUENT and AP_COMMONEST of processed metrics; empty where no class has enough objects."""
    counts, aps = cast(Any, metrics.nt_per_class)[metrics.ap_class_index], cast(Any, metrics.box.ap)
    is_frequent = counts >= FREQUENT_BOXES
    if not is_frequent.any():
        return {}
    return {AP_FREQUENT: float(aps[is_frequent].mean()), AP_COMMONEST: float(aps[counts.argmax()])}


@dataclass(frozen=True)
class _Matched:
    """Of a batch: `found` float32 [sets,images * D,3], confidence, class and bits of every detection, which may still
    be on its way from the GPU; the classes of its objects [n], and of each image every class once."""

    found: torch.Tensor
    classes: np.ndarray
    once_an_image: np.ndarray


class KernelValidator(Validator):
    """Matches the detections of a whole batch and all sets of weights on the GPU, without waiting for the result.

    An image with more objects than the kernel takes sends its batch to Ultralytics' own matching.
    """

    thresholds: torch.Tensor  # of the IoU, on the device
    labels: dict[str, torch.Tensor]  # of the batch, on the CPU
    targets: Targets | None  # of the batch, on the device
    matched: list[_Matched]

    def init_metrics(self, model: Any) -> None:
        super().init_metrics(model)
        self.thresholds = self.iouv.to(self.device)
        self.matched = []

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.labels = {key: batch[key] for key in LABELS}
        n_images, _, height, width = batch["img"].shape
        targets = targets_of(self.labels, n_images, (height, width))
        self.targets = targets and targets.to(self.device)
        batch = super().preprocess(batch)
        batch["img"] = batch["img"].contiguous(memory_format=torch.channels_last)  # the layout of the convolutions
        return batch

    def postprocess(self, preds: dict[str, Any]) -> dict[str, Any]:
        if self.targets is None:
            return super().postprocess(preds)
        return {name: output[0] for name, output in preds.items()}

    def update_metrics(self, preds: dict[str, Any], batch: dict[str, Any]) -> None:
        if self.targets is None:
            super().update_metrics(preds, batch)
            return
        if self.batch_i == 0:
            self.first_batch = (self.detections(preds[list(preds)[-1]]), batch)
        self.seen += len(batch["img"])
        every = torch.cat(list(preds.values())).float()
        right = match(every, self.targets, self.thresholds, self.args.conf)
        found = torch.cat([every[..., 4:], right[..., None]], 2)  # float32 holds ten bits exactly
        by_set = found.view(len(preds), -1, found.shape[-1])
        classes, images = self.labels["cls"].view(-1).numpy(), self.labels["batch_idx"].numpy()
        once_an_image = np.unique(np.stack([images, classes], 1), axis=0)[:, 1]
        self.matched.append(_Matched(by_set.to("cpu", non_blocking=True), classes, once_an_image))

    def get_stats(self) -> dict[str, dict[str, float]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last copies
        for batch in self.matched:
            for name, rows in zip(self.metrics_of, batch.found.numpy(), strict=True):
                kept = rows[rows[:, 0] > self.args.conf]
                right = kept[:, 2:].astype(np.int32) >> np.arange(self.niou) & 1
                stats = {"tp": right.astype(bool), "conf": kept[:, 0], "pred_cls": kept[:, 1]}
                stats |= {"target_cls": batch.classes, "target_img": batch.once_an_image}
                for key, value in stats.items():
                    self.metrics_of[name].stats[key].append(value)
        return super().get_stats()
