"""Triton kernels of assign.py: one program an object, each of them independent of how many objects there are."""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

FILLERS = 32  # the first anchors, among which an object finds those of align 0 that it selects
SLOTS = 16  # of an object's list of anchors; topk at most
COLUMNS = 6  # of Objects.table
BLOCK = 1024  # anchors that a program looks at together
N_PREDICTED = 5  # of `decode`: x1, y1, x2, y2, angle

_SLOTS: Any = tl.constexpr(SLOTS)
_FILLERS: Any = tl.constexpr(FILLERS)
_COLUMNS: Any = tl.constexpr(COLUMNS)
_N_PREDICTED: Any = tl.constexpr(N_PREDICTED)
_N_BINS: Any = tl.constexpr(16)
_NO_ANCHOR: Any = tl.constexpr(2**31 - 1)
_EPS: Any = tl.constexpr(1e-7)  # of bbox_iou
_INSIDE: Any = tl.constexpr(1e-9)  # of select_candidates_in_gts, and of the target score
_V_FACTOR: Any = tl.constexpr(0.4052847345693511)  # 4 / pi**2
_HALF_PI: Any = tl.constexpr(1.5707963267948966)
_QUARTER_PI: Any = tl.constexpr(0.7853981633974483)


@triton.jit
def arctangent(x):
    """atan(x) for x >= 0, to 2e-7: Cephes' atanf."""
    high = x > 2.414213562373095
    middle = (x > 0.4142135623730950) & (x <= 2.414213562373095)
    reduced = tl.where(high, -1.0 / tl.where(high, x, 1.0), tl.where(middle, (x - 1.0) / (x + 1.0), x))
    base = tl.where(high, _HALF_PI, tl.where(middle, _QUARTER_PI, 0.0))
    z = reduced * reduced
    poly = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    return base + (poly * z * reduced + reduced)


@triton.jit
def bins_of(logits, offset, n_anchors, anchor, mask):
    """Of one side's 16 bins: the largest logit, the sum of exp(logit - largest), and the mean bin; [BLOCK] each."""
    most = tl.full(anchor.shape, float("-inf"), tl.float32)
    for i in range(_N_BINS):
        value = tl.load(logits + offset + i * n_anchors + anchor, mask=mask, other=0.0).to(tl.float32)
        most = tl.maximum(most, value)
    total = tl.zeros(anchor.shape, tl.float32)
    weighted = tl.zeros(anchor.shape, tl.float32)
    for i in range(_N_BINS):
        value = tl.load(logits + offset + i * n_anchors + anchor, mask=mask, other=0.0).to(tl.float32)
        exp = tl.exp(value - most)
        total += exp
        weighted += exp * i
    return most, total, weighted / total


@triton.jit
def decode_kernel(boxes, points, out, n_anchors, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    anchor = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = anchor < n_anchors
    x = tl.load(points + anchor, mask=mask, other=0.0)
    y = tl.load(points + n_anchors + anchor, mask=mask, other=0.0)
    stride = tl.load(points + 2 * n_anchors + anchor, mask=mask, other=1.0)
    side = _N_BINS * n_anchors
    offset = image * 4 * side
    _, _, left = bins_of(boxes, offset, n_anchors, anchor, mask)
    _, _, top = bins_of(boxes, offset + side, n_anchors, anchor, mask)
    _, _, right = bins_of(boxes, offset + 2 * side, n_anchors, anchor, mask)
    _, _, bottom = bins_of(boxes, offset + 3 * side, n_anchors, anchor, mask)
    x1, y1, x2, y2 = (x - left) * stride, (y - top) * stride, (x + right) * stride, (y + bottom) * stride
    angle = arctangent((x2 - x1) / (y2 - y1 + _EPS))
    place = out + image * _N_PREDICTED * n_anchors + anchor
    tl.store(place, x1, mask=mask)
    tl.store(place + n_anchors, y1, mask=mask)
    tl.store(place + 2 * n_anchors, x2, mask=mask)
    tl.store(place + 3 * n_anchors, y2, mask=mask)
    tl.store(place + 4 * n_anchors, angle, mask=mask)


@triton.jit
def _box_of(table, row):
    entry = table + row * _COLUMNS
    return tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def _searched(low, high, smallest_px):
    """The interval of a side whose anchors are searched: at least smallest_px long."""
    centre, size = (low + high) / 2, high - low
    size = tl.where(size < smallest_px, smallest_px, size)
    return centre - size / 2, centre + size / 2


@triton.jit
def _inside(x1, y1, x2, y2, points, anchor, mask, n_anchors, smallest_px):  # noqa: PLR0913
    """Which anchors have their centre in the box."""
    stride = tl.load(points + 2 * n_anchors + anchor, mask=mask, other=0.0)
    x = tl.load(points + anchor, mask=mask, other=0.0) * stride
    y = tl.load(points + n_anchors + anchor, mask=mask, other=0.0) * stride
    left, right = _searched(x1, x2, smallest_px)
    top, bottom = _searched(y1, y2, smallest_px)
    return mask & (x - left > _INSIDE) & (y - top > _INSIDE) & (right - x > _INSIDE) & (bottom - y > _INSIDE)


@triton.jit
def _overlap(x1, y1, x2, y2, predicted, points, image, anchor, mask, n_anchors, smallest_px):  # noqa: PLR0913
    """max(CIoU, 0) of an object's box and the predicted boxes of anchors; 0 for an anchor outside the box."""
    inside = _inside(x1, y1, x2, y2, points, anchor, mask, n_anchors, smallest_px)
    place = predicted + image.to(tl.int64) * _N_PREDICTED * n_anchors + anchor
    px1 = tl.load(place, mask=inside, other=0.0)
    py1 = tl.load(place + n_anchors, mask=inside, other=0.0)
    px2 = tl.load(place + 2 * n_anchors, mask=inside, other=0.0)
    py2 = tl.load(place + 3 * n_anchors, mask=inside, other=0.0)
    angle = tl.load(place + 4 * n_anchors, mask=inside, other=0.0)
    width, height = x2 - x1, y2 - y1 + _EPS
    inter_w = tl.maximum(tl.minimum(x2, px2) - tl.maximum(x1, px1), 0.0)
    inter = inter_w * tl.maximum(tl.minimum(y2, py2) - tl.maximum(y1, py1), 0.0)
    union = width * height + (px2 - px1) * (py2 - py1 + _EPS) - inter + _EPS
    iou = inter / union
    hull_w = tl.maximum(x2, px2) - tl.minimum(x1, px1)
    hull_h = tl.maximum(y2, py2) - tl.minimum(y1, py1)
    diagonal = hull_w * hull_w + hull_h * hull_h + _EPS
    dx, dy = px1 + px2 - x1 - x2, py1 + py2 - y1 - y2
    turn = angle - arctangent(width / height)
    v = _V_FACTOR * turn * turn
    ciou = iou - ((dx * dx + dy * dy) / 4 / diagonal + v * (v / (1.0 - iou + v + _EPS)))
    return tl.where(inside & (ciou > 0.0), ciou, 0.0)


@triton.jit
def _align(overlap, scores, row, anchor):
    """sigmoid(score)**0.5 * overlap**6; `row` is the first score of the object's image and class."""
    logit = tl.load(scores + row + anchor, mask=overlap > 0.0, other=0.0).to(tl.float32)
    cube = overlap * overlap * overlap
    return tl.sqrt(tl.sigmoid(logit)) * (cube * cube)


@triton.jit
def _rows_of(levels, level, y1, y2, smallest_px):
    """First anchor and end of the rows of a level that the box reaches, with one row to spare."""
    entry = levels + level * 4
    start, width, height = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    stride = tl.load(entry + 3).to(tl.float32)
    top, bottom = _searched(y1, y2, smallest_px)
    first = tl.minimum(tl.maximum(tl.floor(top / stride - 1.0), 0.0), 1e6).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.ceil(bottom / stride + 1.0), 0.0), 1e6).to(tl.int32)
    return start + tl.minimum(first, height) * width, start + tl.minimum(end, height) * width


@triton.jit
def select_kernel(  # noqa: PLR0913 - a kernel takes pointers
    table, images, predicted, scores, points, levels, chosen, n_anchors, n_classes, smallest_px, topk,
    N_LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step 1: one program an object finds its topk anchors, one after the other; equal aligns by number of anchor."""
    row = tl.program_id(0)
    slots = tl.arange(0, _SLOTS)
    result = tl.full([_SLOTS], -1, tl.int32)
    if tl.load(table + row * _COLUMNS + 5) > 0.0:
        image = tl.load(images + row)
        x1, y1, x2, y2 = _box_of(table, row)
        label = tl.load(table + row * _COLUMNS).to(tl.int32)
        first_score = (image.to(tl.int64) * n_classes + label) * n_anchors
        lanes = tl.arange(0, BLOCK)
        last, last_anchor, k = float("inf"), -1, 0
        while k < topk:
            best = tl.zeros([BLOCK], tl.float32)
            best_anchor = tl.full([BLOCK], _NO_ANCHOR, tl.int32)
            for level in tl.static_range(N_LEVELS):
                i, end = _rows_of(levels, level, y1, y2, smallest_px)
                while i < end:
                    anchor = i + lanes
                    overlap = _overlap(
                        x1, y1, x2, y2, predicted, points, image, anchor, anchor < end, n_anchors, smallest_px
                    )
                    align = _align(overlap, scores, first_score, anchor)
                    is_next = (align < last) | ((align == last) & (anchor > last_anchor))
                    is_better = is_next & (align > best)
                    best = tl.where(is_better, align, best)
                    best_anchor = tl.where(is_better, anchor, best_anchor)
                    i += BLOCK
            last = tl.max(best, axis=0)
            last_anchor = tl.min(tl.where(best == last, best_anchor, _NO_ANCHOR), axis=0)
            last_anchor = tl.where(last > 0.0, last_anchor, -1)
            result = tl.where(slots == k, last_anchor, result)
            k = tl.where(last > 0.0, k + 1, topk)  # no further anchor has align > 0
        filler = tl.arange(0, _FILLERS)
        is_free = (tl.sum((result[:, None] == filler[None, :]).to(tl.int32), axis=0) == 0).to(tl.int32)
        slot = tl.sum((result >= 0).to(tl.int32), axis=0) + tl.cumsum(is_free, axis=0) - is_free
        exists = (is_free == 1) & (slot < topk) & (filler < n_anchors)
        counts = _inside(x1, y1, x2, y2, points, filler, exists, n_anchors, smallest_px)
        fills = (slots[:, None] == slot[None, :]) & counts[None, :]
        result = tl.maximum(result, tl.max(tl.where(fills, filler[None, :], -1), axis=1))
    tl.store(chosen + row * _SLOTS + slots, result)


@triton.jit
def resolve_kernel(table, images, starts, predicted, points, chosen, owner, n_anchors, smallest_px):  # noqa: PLR0913
    """Step 2: every object finds the owner of the anchors it selected. Objects that share an anchor find the same."""
    row = tl.program_id(0)
    slots = tl.arange(0, _SLOTS)
    anchor = tl.load(chosen + row * _SLOTS + slots)
    is_chosen = anchor >= 0
    if tl.max(anchor, axis=0) >= 0:
        image = tl.load(images + row)
        other, end = tl.load(starts + image), tl.load(starts + image + 1)
        count = tl.zeros([_SLOTS], tl.int32)
        best = tl.zeros([_SLOTS], tl.float32)
        winner = tl.full([_SLOTS], -1, tl.int32)
        while other < end:
            theirs = tl.load(chosen + other * _SLOTS + slots)
            count += tl.sum((anchor[:, None] == theirs[None, :]).to(tl.int32), axis=1)
            is_valid = tl.where(tl.load(table + other * _COLUMNS + 5) > 0.0, anchor, -1) >= 0
            x1, y1, x2, y2 = _box_of(table, other)
            overlap = _overlap(x1, y1, x2, y2, predicted, points, image, anchor, is_valid, n_anchors, smallest_px)
            winner = tl.where(overlap > best, other, winner)
            best = tl.maximum(best, overlap)
            other += 1
        tl.store(owner + image.to(tl.int64) * n_anchors + anchor, tl.where(count > 1, winner, row), mask=is_chosen)


@triton.jit
def score_kernel(  # noqa: PLR0913, PLR0915
    table, images, predicted, scores, points, levels, owner, out, n_anchors, n_classes, smallest_px,
    KEEPS_ONE: tl.constexpr, N_LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step 3: one program an object writes the target scores of its anchors."""
    row = tl.program_id(0)
    if tl.load(table + row * _COLUMNS + 5) > 0.0:
        image = tl.load(images + row)
        x1, y1, x2, y2 = _box_of(table, row)
        label = tl.load(table + row * _COLUMNS).to(tl.int32)
        first_score = (image.to(tl.int64) * n_classes + label) * n_anchors
        owner_row = owner + image.to(tl.int64) * n_anchors
        lanes = tl.arange(0, BLOCK)
        best = tl.zeros([BLOCK], tl.float32)
        best_anchor = tl.full([BLOCK], _NO_ANCHOR, tl.int32)
        best_overlap = tl.zeros([BLOCK], tl.float32)
        for level in tl.static_range(N_LEVELS):
            i, end = _rows_of(levels, level, y1, y2, smallest_px)
            while i < end:
                anchor = i + lanes
                is_own = tl.load(owner_row + anchor, mask=anchor < end, other=-1) == row
                overlap = _overlap(x1, y1, x2, y2, predicted, points, image, anchor, is_own, n_anchors, smallest_px)
                align = _align(overlap, scores, first_score, anchor)
                is_better = align > best
                best = tl.where(is_better, align, best)
                best_anchor = tl.where(is_better, anchor, best_anchor)
                if KEEPS_ONE:
                    best_overlap = tl.where(is_better, overlap, best_overlap)
                else:
                    best_overlap = tl.maximum(best_overlap, overlap)
                i += BLOCK
        most = tl.max(best, axis=0)
        kept = tl.min(tl.where(best == most, best_anchor, _NO_ANCHOR), axis=0)
        if KEEPS_ONE:
            best_overlap = tl.where(best_anchor == kept, best_overlap, 0.0)
        most_overlap = tl.max(best_overlap, axis=0)
        for level in tl.static_range(N_LEVELS):
            i, end = _rows_of(levels, level, y1, y2, smallest_px)
            while i < end:
                anchor = i + lanes
                is_own = tl.load(owner_row + anchor, mask=anchor < end, other=-1) == row
                if KEEPS_ONE:
                    is_own = is_own & (anchor == kept)
                overlap = _overlap(x1, y1, x2, y2, predicted, points, image, anchor, is_own, n_anchors, smallest_px)
                align = _align(overlap, scores, first_score, anchor)
                value = align * most_overlap / (most + _INSIDE)
                tl.store(out + image.to(tl.int64) * n_anchors + anchor, value, mask=is_own)
                i += BLOCK
