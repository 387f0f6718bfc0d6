"""Triton kernels of a detection head's loss: class, box and DFL terms, and their gradients.

Every anchor a has a target score s(a), 0 where it has no object, and the box and class of its object. With D the sum
of all target scores, at least 1 (ultralytics/utils/loss.py v8DetectionLoss, 8.4.190):
    class   sum over anchors and classes of BCE(logit, s(a) at the object's class, else 0) / D
    box     sum over anchors of (1 - CIoU(predicted box, object's box)) * s(a) / D
    DFL     sum over anchors of s(a) / D * mean over four sides of
            -(log p[floor d] * (1 - (d - floor d)) + log p[floor d + 1] * (d - floor d))
p are the 16 bins of a side and d the distance of the object's side from the anchor in cells, 0..14.99; the predicted
distance is the mean of the bins. Everything is computed in float32; sums have a fixed order.
"""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from app.train.assign import Assigned, Grid, Objects
from app.train.assign_kernels import arctangent, bins_of

BLOCK_C, BLOCK_A = 16, 256  # classes and anchors of a program of the class term
BLOCK_BOX = 256  # anchors of a program of the box terms

_N_BINS: Any = tl.constexpr(16)
_COLUMNS: Any = tl.constexpr(6)
_EPS: Any = tl.constexpr(1e-7)  # of bbox_iou
_V_FACTOR: Any = tl.constexpr(0.4052847345693511)  # 4 / pi**2
_FARTHEST: Any = tl.constexpr(14.99)  # reg_max - 1 - 0.01


def class_sum(scores: torch.Tensor, found: Objects, assigned: Assigned) -> torch.Tensor:
    """Sum of the class term, a scalar, before the division by D; `scores` are logits [N,classes,A]."""
    grid = _class_grid(scores)
    partial = torch.empty(grid, dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):
        _class_sum[grid](
            scores, found.table, assigned.owner, assigned.score, partial, *_sizes(scores), **_class_blocks()
        )
    return partial.sum()


def class_gradient(scores: torch.Tensor, found: Objects, assigned: Assigned, factor: torch.Tensor) -> torch.Tensor:
    """Gradient of `factor` (a scalar tensor) times class_sum, like `scores`."""
    out = torch.empty_like(scores)
    with torch.cuda.device_of(scores):
        _class_gradient[_class_grid(scores)](
            scores, found.table, assigned.owner, assigned.score, factor, out, *_sizes(scores), **_class_blocks()
        )
    return out


def box_sums(boxes: torch.Tensor, found: Objects, assigned: Assigned, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the box and the DFL term, scalars, before the division by D; `boxes` are logits [N,64,A]."""
    shape = _box_grid(boxes)
    partial = torch.empty(2, *shape, dtype=torch.float32, device=boxes.device)
    with torch.cuda.device_of(boxes):
        _box_sums[shape](
            boxes, found.table, assigned.owner, assigned.score, grid.points, partial, boxes.shape[2],
            BLOCK=BLOCK_BOX, num_warps=4,
        )  # fmt: skip
    sums = partial.flatten(1).sum(1)
    return sums[0], sums[1]


def box_gradient(
    boxes: torch.Tensor, found: Objects, assigned: Assigned, grid: Grid, factors: torch.Tensor
) -> torch.Tensor:
    """Gradient of factors[0] times the box sum plus factors[1] times the DFL sum, like `boxes`."""
    out = torch.empty_like(boxes)
    with torch.cuda.device_of(boxes):
        _box_gradient[_box_grid(boxes)](
            boxes, found.table, assigned.owner, assigned.score, grid.points, factors, out, boxes.shape[2],
            BLOCK=BLOCK_BOX, num_warps=4,
        )  # fmt: skip
    return out


def _sizes(scores: torch.Tensor) -> tuple[int, int]:
    return scores.shape[1], scores.shape[2]


def _class_grid(scores: torch.Tensor) -> tuple[int, int, int]:
    n_images, n_classes, n_anchors = scores.shape
    return n_images, triton.cdiv(n_anchors, BLOCK_A), triton.cdiv(n_classes, BLOCK_C)


def _class_blocks() -> dict[str, Any]:
    return {"BLOCK_C": BLOCK_C, "BLOCK_A": BLOCK_A, "num_warps": 4}


def _box_grid(boxes: torch.Tensor) -> tuple[int, int]:
    return boxes.shape[0], triton.cdiv(boxes.shape[2], BLOCK_BOX)


@triton.jit
def _targets(  # noqa: PLR0913 - a kernel takes pointers
    scores, table, owner, target, n_classes, n_anchors, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr
):  # fmt: skip
    """A tile of logits, their targets, their places, and which exist."""
    image = tl.program_id(0).to(tl.int64)
    anchor = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    label = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = anchor < n_anchors
    row = tl.load(owner + image * n_anchors + anchor, mask=exists, other=-1)
    own = tl.load(table + row * _COLUMNS, mask=row >= 0, other=-1.0).to(tl.int32)
    score = tl.load(target + image * n_anchors + anchor, mask=exists, other=0.0)
    mask = (label < n_classes)[:, None] & exists[None, :]
    place = image * n_classes * n_anchors + label[:, None] * n_anchors + anchor[None, :]
    logit = tl.load(scores + place, mask=mask, other=0.0).to(tl.float32)
    return logit, tl.where(label[:, None] == own[None, :], score[None, :], 0.0), place, mask


@triton.jit
def _class_sum(  # noqa: PLR0913
    scores, table, owner, target, partial, n_classes, n_anchors, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr
):  # fmt: skip
    logit, wanted, _, mask = _targets(scores, table, owner, target, n_classes, n_anchors, BLOCK_C, BLOCK_A)
    small = tl.exp(-tl.abs(logit))
    one_more = 1.0 + small
    # log1p(small): the rounding of 1 + small would cost most of the loss of a logit far from 0.
    log = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
    # Not tl.maximum, which drops NaN.
    loss = tl.where(logit < 0.0, 0.0, logit) - logit * wanted + log
    total = tl.sum(tl.sum(tl.where(mask, loss, 0.0), axis=1), axis=0)
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + block * tl.num_programs(2) + tl.program_id(2), total)


@triton.jit
def _class_gradient(  # noqa: PLR0913
    scores, table, owner, target, factor, out, n_classes, n_anchors, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr
):  # fmt: skip
    logit, wanted, place, mask = _targets(scores, table, owner, target, n_classes, n_anchors, BLOCK_C, BLOCK_A)
    grad = (tl.sigmoid(logit) - wanted) * tl.load(factor)
    tl.store(out + place, grad.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _anchors(table, owner, target, points, n_anchors, BLOCK: tl.constexpr):  # noqa: PLR0913
    """Target scores of a block of anchors, and the sides of their objects' boxes as distances in cells."""
    image = tl.program_id(0).to(tl.int64)
    anchor = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = anchor < n_anchors
    row = tl.load(owner + image * n_anchors + anchor, mask=exists, other=-1)
    score = tl.load(target + image * n_anchors + anchor, mask=exists, other=0.0)
    stride = tl.load(points + 2 * n_anchors + anchor, mask=exists, other=1.0)
    x = tl.load(points + anchor, mask=exists, other=0.0)
    y = tl.load(points + n_anchors + anchor, mask=exists, other=0.0)
    entry = table + row * _COLUMNS
    has_box = row >= 0
    left = x - tl.load(entry + 1, mask=has_box, other=0.0) / stride
    top = y - tl.load(entry + 2, mask=has_box, other=0.0) / stride
    right = tl.load(entry + 3, mask=has_box, other=0.0) / stride - x
    bottom = tl.load(entry + 4, mask=has_box, other=0.0) / stride - y
    return anchor, exists, score, left, top, right, bottom


@triton.jit
def _neighbours(wanted):
    """The bin below a wanted distance, and the weight of the bin above it."""
    wanted = tl.minimum(tl.maximum(wanted, 0.0), _FARTHEST)
    lower = tl.floor(wanted)
    return lower.to(tl.int32), wanted - lower


@triton.jit
def _side(logits, offset, n_anchors, anchor, mask, wanted):  # noqa: PLR0913
    """Mean distance and DFL of one side, [BLOCK] each."""
    most, total, mean = bins_of(logits, offset, n_anchors, anchor, mask)
    lower, upper_weight = _neighbours(wanted)
    place = logits + offset + lower * n_anchors + anchor
    value = tl.load(place, mask=mask, other=0.0).to(tl.float32) * (1.0 - upper_weight)
    value += tl.load(place + n_anchors, mask=mask, other=0.0).to(tl.float32) * upper_weight
    return mean, most + tl.log(total) - value


@triton.jit
def _shape_terms(left, top, right, bottom, wl, wt, wr, wb):  # noqa: PLR0913
    """What CIoU and its gradient need, of boxes around the same anchor given by the distances of their sides."""
    width, height = left + right, top + bottom + _EPS
    width_w, height_w = wl + wr, wt + wb + _EPS
    inter_w = tl.minimum(right, wr) + tl.minimum(left, wl)
    inter_h = tl.minimum(bottom, wb) + tl.minimum(top, wt)
    overlaps = (inter_w > 0.0) & (inter_h > 0.0)
    inter = tl.where(overlaps, inter_w * inter_h, 0.0)
    union = width * height + width_w * height_w - inter + _EPS
    hull_w = tl.maximum(right, wr) + tl.maximum(left, wl)
    hull_h = tl.maximum(bottom, wb) + tl.maximum(top, wt)
    diagonal = hull_w * hull_w + hull_h * hull_h + _EPS
    dx, dy = wr - wl - right + left, wb - wt - bottom + top
    turn = arctangent(width_w / height_w) - arctangent(width / height)
    v = _V_FACTOR * turn * turn
    iou = inter / union
    alpha = v / (1.0 - iou + v + _EPS)
    return width, height, inter_w, inter_h, overlaps, inter, union, hull_w, hull_h, diagonal, dx, dy, turn, v, alpha


@triton.jit
def _box_sums(boxes, table, owner, target, points, partial, n_anchors, BLOCK: tl.constexpr):  # noqa: PLR0913
    # Triton gives a name one type, also `_`: every value has a name of its own.
    anchor, exists, score, wl, wt, wr, wb = _anchors(table, owner, target, points, n_anchors, BLOCK)  # noqa: RUF059
    box_sum, dfl_sum = 0.0, 0.0
    if tl.max(score, axis=0) > 0.0:
        side = _N_BINS * n_anchors
        offset = tl.program_id(0).to(tl.int64) * 4 * side
        mask = score > 0.0
        left, dfl_left = _side(boxes, offset, n_anchors, anchor, mask, wl)
        top, dfl_top = _side(boxes, offset + side, n_anchors, anchor, mask, wt)
        right, dfl_right = _side(boxes, offset + 2 * side, n_anchors, anchor, mask, wr)
        bottom, dfl_bottom = _side(boxes, offset + 3 * side, n_anchors, anchor, mask, wb)
        width, height, inter_w, inter_h, overlaps, inter, union, hull_w, hull_h, diagonal, dx, dy, turn, v, alpha = (  # noqa: RUF059
            _shape_terms(left, top, right, bottom, wl, wt, wr, wb)
        )
        ciou = inter / union - ((dx * dx + dy * dy) / 4 / diagonal + v * alpha)
        box_sum = tl.sum(tl.where(mask, (1.0 - ciou) * score, 0.0), axis=0)
        dfl = (dfl_left + dfl_top + dfl_right + dfl_bottom) / 4
        dfl_sum = tl.sum(tl.where(mask, dfl * score, 0.0), axis=0)
    n_programs = tl.num_programs(0) * tl.num_programs(1)
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + block, box_sum)
    tl.store(partial + n_programs + block, dfl_sum)


@triton.jit
def _store_side(boxes, out, offset, n_anchors, anchor, masks, box_grad, dfl_grad, wanted):  # noqa: PLR0913
    """Gradient of the 16 logits of one side: through the mean of the bins, and of the DFL term."""
    exists, mask = masks
    most, total, mean = bins_of(boxes, offset, n_anchors, anchor, mask)
    lower, upper_weight = _neighbours(wanted)
    for i in range(_N_BINS):
        place = offset + i * n_anchors + anchor
        share = tl.exp(tl.load(boxes + place, mask=mask, other=0.0).to(tl.float32) - most) / total
        weight = tl.where(lower == i, 1.0 - upper_weight, tl.where(lower + 1 == i, upper_weight, 0.0))
        grad = share * (i - mean) * box_grad + (share - weight) * dfl_grad
        tl.store(out + place, tl.where(mask, grad, 0.0).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _box_gradient(boxes, table, owner, target, points, factors, out, n_anchors, BLOCK: tl.constexpr):  # noqa: PLR0913
    anchor, exists, score, wl, wt, wr, wb = _anchors(table, owner, target, points, n_anchors, BLOCK)
    side = _N_BINS * n_anchors
    offset = tl.program_id(0).to(tl.int64) * 4 * side
    if tl.max(score, axis=0) > 0.0:
        mask = score > 0.0
        _, _, left = bins_of(boxes, offset, n_anchors, anchor, mask)
        _, _, top = bins_of(boxes, offset + side, n_anchors, anchor, mask)
        _, _, right = bins_of(boxes, offset + 2 * side, n_anchors, anchor, mask)
        _, _, bottom = bins_of(boxes, offset + 3 * side, n_anchors, anchor, mask)
        width, height, inter_w, inter_h, overlaps, inter, union, hull_w, hull_h, diagonal, dx, dy, turn, _, alpha = (
            _shape_terms(left, top, right, bottom, wl, wt, wr, wb)
        )
        # d CIoU of inter, of the predicted area, of the hull's sides, of the centre, of the sides' ratio
        of_inter = 1.0 / union + inter / (union * union)
        of_area = -inter / (union * union)
        distance = (dx * dx + dy * dy) / 4
        of_hull_w = 2.0 * hull_w * distance / (diagonal * diagonal)
        of_hull_h = 2.0 * hull_h * distance / (diagonal * diagonal)
        of_dx, of_dy = -dx / 2 / diagonal, -dy / 2 / diagonal
        of_ratio = alpha * 2.0 * _V_FACTOR * turn / (width * width + height * height)
        of_width = of_area * height + of_ratio * height
        of_height = of_area * width - of_ratio * width
        of_inter_w = tl.where(overlaps, of_inter * inter_h, 0.0)
        of_inter_h = tl.where(overlaps, of_inter * inter_w, 0.0)
        left_grad = of_width + tl.where(left < wl, of_inter_w, of_hull_w) + of_dx
        right_grad = of_width + tl.where(right < wr, of_inter_w, of_hull_w) - of_dx
        top_grad = of_height + tl.where(top < wt, of_inter_h, of_hull_h) + of_dy
        bottom_grad = of_height + tl.where(bottom < wb, of_inter_h, of_hull_h) - of_dy
        box_factor = -tl.load(factors) * score  # of 1 - CIoU
        dfl_factor = tl.load(factors + 1) * score / 4
        masks = (exists, mask)
        _store_side(boxes, out, offset, n_anchors, anchor, masks, box_factor * left_grad, dfl_factor, wl)
        _store_side(boxes, out, offset + side, n_anchors, anchor, masks, box_factor * top_grad, dfl_factor, wt)
        _store_side(boxes, out, offset + 2 * side, n_anchors, anchor, masks, box_factor * right_grad, dfl_factor, wr)
        _store_side(boxes, out, offset + 3 * side, n_anchors, anchor, masks, box_factor * bottom_grad, dfl_factor, wb)
    else:
        zeros = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
        for i in range(4 * _N_BINS):
            tl.store(out + offset + i * n_anchors + anchor, zeros, mask=exists)
