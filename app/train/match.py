"""Which detections of a batch are right, in one kernel: the matching of Ultralytics' validator.

An image's detections come in the order of their confidence. At each IoU threshold a detection takes, among the objects
of its class that none before it has taken at this threshold, the one of largest IoU, the first of equals; the detection
is right if that IoU reaches the threshold. Source: ultralytics/engine/validator.py match_predictions, 8.4.190. IoUs are
those of ultralytics/utils/metrics.py box_iou to the last bit: no division or sum is contracted.
"""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ultralytics.utils.ops import xywh2xyxy

BLOCKS = (64, 1024)  # objects of an image that a kernel is compiled for, least and most; powers of two
ROW = 5  # of an object: class, x1, y1, x2, y2
FIELDS = 6  # of a detection: x1, y1, x2, y2, confidence, class
EPS = 1e-7  # of box_iou

_ROW = tl.constexpr(ROW)
_FIELDS = tl.constexpr(FIELDS)
_EPS = tl.constexpr(EPS)
_THRESHOLDS = tl.constexpr(16)  # at most; a power of two


@dataclass(frozen=True)
class Targets:
    """Objects of a batch: `table` float32 [n,5], class and corners in px, sorted by image; `starts` int32 [n_images +
    1], the first object of each image; `block`, a power of two, is at least the number of objects in any image."""

    table: torch.Tensor
    starts: torch.Tensor
    block: int

    def to(self, device: torch.device) -> Targets:
        """The same on a device; the host does not wait for a GPU."""
        if device.type == "cpu":
            return self
        table, starts = (part.pin_memory().to(device, non_blocking=True) for part in (self.table, self.starts))
        return Targets(table, starts, self.block)


def targets_of(labels: dict[str, torch.Tensor], n_images: int, size_px: tuple[int, int]) -> Targets | None:
    """The objects in a loader's labels; None if an image has more than the kernel takes.

    Args:
        labels: batch_idx [n], cls [n,1], and bboxes [n,4] as centre, width and height in shares of the image, on a CPU.
        n_images: of the batch.
        size_px: height and width of its images.
    """
    images, order = labels["batch_idx"].sort(stable=True)
    sides = torch.tensor(size_px)[[1, 0, 1, 0]]
    boxes = xywh2xyxy(labels["bboxes"][order]) * sides
    table = torch.cat([labels["cls"][order].view(-1, 1), boxes], 1)
    starts = torch.searchsorted(images.contiguous(), torch.arange(n_images + 1, dtype=images.dtype))
    least, most = BLOCKS
    largest = int(starts.diff().max())
    if largest > most:
        return None
    return Targets(table.float(), starts.int(), max(triton.next_power_of_2(largest), least))


def match(
    detections: torch.Tensor, targets: Targets, thresholds: torch.Tensor, least_confidence: float
) -> torch.Tensor:
    """At which thresholds each detection is right.

    Args:
        detections: float32 [N,D,6], contiguous: x1, y1, x2, y2 in px, confidence and class. N is a multiple of the
            targets' images: detections of one network after those of another.
        targets: the objects, on the same device.
        thresholds: of the IoU, float32 [n], rising, at most 16.
        least_confidence: a detection with this confidence or less is not looked at.

    Returns:
        int32 [N,D]: bit t is set where the detection is right at threshold t.
    """
    n, n_detections = detections.shape[:2]
    right = torch.empty(n, n_detections, dtype=torch.int32, device=detections.device)
    with torch.cuda.device_of(detections):  # Triton launches on the current device
        match_kernel[(n,)](
            detections, targets.table, targets.starts, thresholds, right, n_detections, len(targets.starts) - 1,
            len(thresholds), least_confidence, BLOCK=targets.block, num_warps=min(max(targets.block // 64, 1), 8),
            enable_fp_fusion=False,
        )  # fmt: skip
    return right


@triton.jit
def match_kernel(  # noqa: PLR0913 - a kernel takes pointers
    detections, table, starts, thresholds, right, n_detections, n_images, n_thresholds, least_confidence,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an image: its detections in turn, all objects [BLOCK] and thresholds [16] at once."""
    row = tl.program_id(0)
    start = tl.load(starts + row % n_images)
    n_objects = tl.load(starts + row % n_images + 1) - start
    number = tl.arange(0, BLOCK)
    exists = number < n_objects
    place = table + (start + number) * _ROW
    own_class = tl.load(place, mask=exists, other=-1.0)
    x1 = tl.load(place + 1, mask=exists, other=0.0)
    y1 = tl.load(place + 2, mask=exists, other=0.0)
    x2 = tl.load(place + 3, mask=exists, other=0.0)
    y2 = tl.load(place + 4, mask=exists, other=0.0)
    area = (x2 - x1) * (y2 - y1)
    bit = tl.arange(0, _THRESHOLDS)
    threshold = tl.load(thresholds + bit, mask=bit < n_thresholds, other=2.0)  # no IoU reaches 2
    lowest = tl.load(thresholds)
    taken = tl.zeros([BLOCK, _THRESHOLDS], tl.int32)
    i = 0
    while i < n_detections:
        detection = detections + (row * n_detections + i) * _FIELDS
        bits = tl.full((), 0, tl.int32)
        if tl.load(detection + 4) > least_confidence:
            left = tl.load(detection)
            top = tl.load(detection + 1)
            width = tl.load(detection + 2) - left
            height = tl.load(detection + 3) - top
            across = tl.minimum(x2, tl.load(detection + 2)) - tl.maximum(x1, left)
            down = tl.minimum(y2, tl.load(detection + 3)) - tl.maximum(y1, top)
            inner = tl.maximum(across, 0.0) * tl.maximum(down, 0.0)
            iou = tl.math.div_rn(inner, area + width * height - inner + _EPS)
            fits = exists & (own_class == tl.load(detection + 5)) & (iou >= lowest)  # false where the IoU is NaN
            iou = tl.where(fits, iou, 0.0)
            if tl.max(iou, axis=0) > 0.0:
                free = tl.where(taken == 0, iou[:, None], 0.0)
                best, which = tl.max(free, axis=0, return_indices=True)
                is_right = best >= threshold
                taken += ((number[:, None] == which[None, :]) & is_right[None, :]).to(tl.int32)
                bits = tl.sum(is_right.to(tl.int32) << bit, axis=0)
        tl.store(right + row * n_detections + i, bits)
        i += 1
