"""Ultralytics' loss of both heads on a GPU without a host sync, for batches of any labels.

The definition is Ultralytics' E2ELoss; the CPU and batches with more objects than fit use that. The kernels
compute in float32 from the heads' outputs, where Ultralytics' code under autocast rounds sigmoids, box coordinates and
anchor points to float16.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.tal import make_anchors

from app.train.assign import Assigned, Grid, Objects, assign, decode, objects
from app.train.assign_kernels import COLUMNS
from app.train.loss_kernels import box_gradient, box_sums, class_gradient, class_sum
from app.train.processes import Ranks

OBJECTS_PER_IMAGE = 300  # mean over a batch; a batch with more takes Ultralytics' own loss
REG_MAX = 16
log = logging.getLogger(__name__)


def capacity(n_images: int) -> int:
    """Rows that hold the objects of a batch, padding included."""
    return OBJECTS_PER_IMAGE * n_images


def label_rows(batch: dict[str, Any]) -> torch.Tensor:
    """Labels of a batch as Ultralytics' loader gives them -> float32 [n,6], sorted by image, on their own device.

    Columns: image, class, centre x, y, width and height as shares of the image's sides.
    """
    rows = torch.cat([batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]], 1).float()
    return rows[rows[:, 0].argsort(stable=True)]


def pad_rows(rows: torch.Tensor, padded: torch.Tensor, n_images: int) -> None:
    """Writes label rows into `padded`, float32 [capacity,6], and padding behind them."""
    padded[:, 0].fill_(n_images)
    padded[: len(rows)].copy_(rows, non_blocking=True)


def grid_of(feats: list[torch.Tensor], strides: torch.Tensor) -> Grid:
    """The anchors of feature maps [N,C,H,W]."""
    device = feats[0].device
    sizes_px = strides.tolist()
    points, stride_of = make_anchors(
        [feat.new_zeros(1, 1, *feat.shape[2:], dtype=torch.float32) for feat in feats], strides, 0.5
    )
    first, levels = 0, []
    for feat, stride in zip(feats, sizes_px, strict=True):
        height, width = feat.shape[2:]
        levels.append([first, width, height, int(stride)])
        first += height * width
    table = torch.cat([points, stride_of.to(points)], 1).t().contiguous()
    return Grid(table.to(device), torch.tensor(levels, dtype=torch.int32, device=device), float(sizes_px[1]))


@dataclass(frozen=True)
class Head:
    """What tells the loss of one head from the other's: topk and topk2 of its assigner, and gains of its terms [3]."""

    topk: tuple[int, int]
    gains: torch.Tensor


class HeadLoss:
    """Losses of both heads for objects in padded rows. Every call launches the same kernels, whatever the labels are.

    Args:
        criterion: Ultralytics' loss of the network, which names assigners, gains and strides.
        ranks: the batch is their parts together: sums of target scores and numbers of images are added over them.
    """

    def __init__(self, criterion: E2ELoss, ranks: Ranks) -> None:
        self.ranks = ranks
        self.strides = cast(torch.Tensor, criterion.one2one.stride).cpu()
        self.heads = {
            name: _head(loss) for name, loss in (("one2many", criterion.one2many), ("one2one", criterion.one2one))
        }
        self.grids: dict[tuple[tuple[int, ...], ...], Grid] = {}

    def __call__(
        self, preds: dict[str, Any], rows: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that is trained, a scalar, and box, class and DFL loss of the one2one head, float32 [3], detached.

        Args:
            preds: outputs of both heads in training mode; of the one2many head none, {}, while a model is scored.
            rows: padded label rows, float32 [n,6].
            weights: of the heads one2many and one2one, float32 [2].
        """
        grid = self.grid_of(preds["one2one"]["feats"])
        n_images = preds["one2one"]["boxes"].shape[0]
        height, width = (int(side * self.strides[0]) for side in preds["one2one"]["feats"][0].shape[2:])
        found = objects(rows, n_images, (height, width))
        terms, loss = {}, weights.new_zeros(())
        for (name, head), weight in zip(self.heads.items(), weights, strict=True):
            if preds[name]:
                terms[name] = self._terms(preds[name], found, grid, head)
                loss = loss + terms[name][0].sum() * weight
        n_all_images = n_images if self.ranks.n == 1 else terms["one2one"][1]
        return loss * n_all_images, terms["one2one"][0].detach()

    def _terms(
        self, preds: dict[str, torch.Tensor], found: Objects, grid: Grid, head: Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Box, class and DFL loss of a head [3], times their gains; and the number of images over all ranks.

        An anchor whose box is not finite overlaps nothing, so it would be assigned to no object, and the loss would be
        finite without it. Therefore the factors of all terms, and with them the gradients, are NaN then.
        """
        boxes, scores = preds["boxes"].contiguous(), preds["scores"].contiguous()
        predicted = decode(boxes.detach(), grid)
        assigned = assign(found, predicted, scores.detach(), grid, head.topk)
        sums = torch.stack([assigned.score.sum(), assigned.score.new_full((), boxes.shape[0])])
        score_sum, n_images = self.ranks.all_reduce(sums)
        factors = head.gains / score_sum.clamp(min=1) + predicted.sum() * 0
        return cast(torch.Tensor, _HeadLoss.apply(boxes, scores, (found, assigned, grid), factors)), n_images

    def grid_of(self, feats: list[torch.Tensor]) -> Grid:
        """The anchors, made once for every size of images."""
        sizes = tuple(tuple(feat.shape[2:]) for feat in feats)
        if sizes not in self.grids:
            self.grids[sizes] = grid_of(feats, self.strides)
        return self.grids[sizes]


def _head(loss: Any) -> Head:
    gains = torch.tensor([loss.hyp.box, loss.hyp.cls, loss.hyp.dfl], dtype=torch.float32, device=loss.device)
    return Head((loss.assigner.topk, loss.assigner.topk2), gains)


class _HeadLoss(torch.autograd.Function):
    """Box, class and DFL sums of a head times `factors` [3]."""

    @staticmethod
    def forward(
        ctx: Any, boxes: torch.Tensor, scores: torch.Tensor, targets: tuple[Objects, Assigned, Grid],
        factors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        found, assigned, grid = targets
        box_sum, dfl_sum = box_sums(boxes, found, assigned, grid)
        ctx.save_for_backward(boxes, scores, factors)
        ctx.targets = targets
        return torch.stack([box_sum, class_sum(scores, found, assigned), dfl_sum]) * factors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        boxes, scores, factors = ctx.saved_tensors
        found, assigned, grid = ctx.targets
        factors = grads[0] * factors
        box_factors = torch.stack([factors[0], factors[2]])
        boxes_grad = box_gradient(boxes, found, assigned, grid, box_factors)
        return boxes_grad, class_gradient(scores, found, assigned, factors[1]), None, None


class GpuLoss(E2ELoss):
    """E2ELoss whose training forward on a GPU uses HeadLoss.

    Args:
        net: the network.
        ranks: as for HeadLoss.
        loss: of a head, as for E2ELoss, for what the kernels do not take.
    """

    def __init__(self, net: Any, ranks: Ranks, loss: Any) -> None:
        super().__init__(net, loss)
        self.kernels = HeadLoss(self, ranks)
        self.has_told = False

    def __call__(self, preds: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parsed: Any = self.one2many.parse_output(preds)
        boxes = parsed["one2one"]["boxes"]
        if not (boxes.is_cuda and self.fits(batch, boxes.shape[0])):
            return super().__call__(preds, batch) if parsed["one2many"] else self.one2one.loss(parsed["one2one"], batch)
        n_images = boxes.shape[0]
        padded = torch.zeros(capacity(n_images), COLUMNS, device=boxes.device)
        pad_rows(label_rows(batch), padded, n_images)
        weights = padded.new_empty(2)
        weights[0].fill_(self.o2m)
        weights[1].fill_(self.o2o)
        loss, items = self.kernels(parsed, padded, weights)
        return loss, dict(zip(self.one2one.loss_names, items, strict=True))

    def fits(self, batch: dict[str, torch.Tensor], n_images: int) -> bool:
        """Whether the kernels take this batch; says once that one has too many objects."""
        fits = len(batch["batch_idx"]) <= capacity(n_images)
        if not fits and not self.has_told:
            self.has_told = True
            log.info(
                "a batch with %d boxes on %d images takes Ultralytics' own loss, as all with more than %d an image do",
                len(batch["batch_idx"]), n_images, OBJECTS_PER_IMAGE,
            )  # fmt: skip
        return fits
