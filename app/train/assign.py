"""Which anchor learns which object: Ultralytics' TaskAlignedAssigner in kernels of fixed size, without a host sync.

Objects of a batch are one list, sorted by image and padded to a fixed length: a CUDA graph can hold the kernels.
For an object t of image b and an anchor a whose centre lies in t's box (its sides raised to the second stride):
    overlap(t, a) = max(CIoU(box t, predicted box a), 0)
    align(t, a)   = sigmoid(score[b, class t, a])**0.5 * overlap**6
1. Each object selects its `topk` anchors of largest align.
2. An anchor that several objects selected goes to the object of its image with the largest overlap.
3. Where `topk2` is 1, an object keeps the anchor of largest align alone. The target score of an anchor is
   align * (largest overlap) / (largest align + 1e-9), both over the anchors of its object.
Source: ultralytics/utils/tal.py, 8.4.190. An object with fewer than `topk` anchors of align > 0 also selects anchors of
align 0, as torch.topk does on a GPU: those of the lowest numbers, of which only those in its box count. Their target
score is 0, but they take part in step 2. (On a CPU torch.topk takes others.)
"""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from ultralytics.utils.ops import xywh2xyxy

from app.train import assign_kernels
from app.train.assign_kernels import BLOCK, N_PREDICTED, SLOTS


@dataclass(frozen=True)
class Grid:
    """The anchors of a head: `points` float32 [3,A] are x, y (in cells) and stride (px); `levels` int32 [L,4] are the
    first anchor, width, height and stride of every level; `smallest_px` is the least side of a box that is searched."""

    points: torch.Tensor
    levels: torch.Tensor
    smallest_px: float

    @property
    def n_anchors(self) -> int:
        return self.points.shape[1]


@dataclass(frozen=True)
class Objects:
    """The objects of a batch.

    `table` float32 [n,6] holds class, x1, y1, x2, y2 in px, and 1 or, in padding and for a box that Ultralytics
    ignores, 0; `images` int32 [n] and `starts` int32 [n_images + 1] say which image they are of.
    """

    table: torch.Tensor
    images: torch.Tensor
    starts: torch.Tensor


def objects(rows: torch.Tensor, n_images: int, size_px: tuple[int, int]) -> Objects:
    """The objects of padded label rows.

    Args:
        rows: float32 [n,6], sorted by image: image, class, and centre x, y, width, height as shares of the image's
            sides; padding has n_images as its image.
        n_images: of the batch.
        size_px: height and width of its images.
    """
    height, width = size_px
    images = rows[:, 0].contiguous()
    sides = torch.stack([torch.full_like(images, side) for side in (width, height, width, height)], 1)
    boxes = xywh2xyxy(rows[:, 2:] * sides)
    valid = (boxes.sum(1) > 0) & (images < n_images)
    table = torch.cat([rows[:, 1:2], boxes, valid[:, None].float()], 1)
    starts = torch.searchsorted(images, torch.arange(n_images + 1, dtype=torch.float32, device=rows.device))
    return Objects(table, images.int(), starts.int())


def decode(boxes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Predicted boxes float32 [N,5,A] from their distributions [N,64,A]: x1, y1, x2, y2 in px, and atan(w / h)."""
    n_images, _, n_anchors = boxes.shape
    out = torch.empty(n_images, N_PREDICTED, n_anchors, dtype=torch.float32, device=boxes.device)
    block = 512
    with torch.cuda.device_of(boxes):
        assign_kernels.decode_kernel[(n_images, triton.cdiv(n_anchors, block))](
            boxes, grid.points, out, n_anchors, BLOCK=block, num_warps=4
        )
    return out


@dataclass(frozen=True)
class Assigned:
    """For every anchor [N,A]: `owner` int32, its object's row, or -1; `score` float32, its target score, or 0."""

    owner: torch.Tensor
    score: torch.Tensor


@torch.no_grad()
def assign(
    found: Objects, predicted: torch.Tensor, scores: torch.Tensor, grid: Grid, topk: tuple[int, int]
) -> Assigned:
    """Assigns anchors to objects; the steps are at the top of the file.

    Args:
        found: the objects.
        predicted: of `decode`, float32 [N,5,A].
        scores: class logits [N,classes,A], contiguous.
        grid: the anchors.
        topk: topk and topk2 of Ultralytics' assigner; topk2 is topk or 1.
    """
    n_images, n_classes, n_anchors = scores.shape
    n_objects = len(found.table)
    chosen = torch.empty(n_objects, SLOTS, dtype=torch.int32, device=scores.device)
    owner = torch.full((n_images, n_anchors), -1, dtype=torch.int32, device=scores.device)
    score = torch.zeros(n_images, n_anchors, dtype=torch.float32, device=scores.device)
    data = (found.table, found.images, predicted, scores, grid.points, grid.levels)
    sizes = (n_anchors, n_classes, grid.smallest_px)
    blocks: Any = {"N_LEVELS": len(grid.levels), "BLOCK": BLOCK, "num_warps": 4}
    with torch.cuda.device_of(scores):
        assign_kernels.select_kernel[(n_objects,)](*data, chosen, *sizes, topk[0], **blocks)
        assign_kernels.resolve_kernel[(n_objects,)](
            found.table, found.images, found.starts, predicted, grid.points, chosen, owner, n_anchors,
            grid.smallest_px, num_warps=1,
        )  # fmt: skip
        assign_kernels.score_kernel[(n_objects,)](*data, owner, score, *sizes, KEEPS_ONE=topk[1] == 1, **blocks)
    return Assigned(owner, score)
