"""The detection loss of one process's part of a batch, so that the parts add up to the loss of the whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from app.training.ranks import Ranks


def criterion_of_part(net: Any, ranks: Ranks) -> E2ELoss:
    """Ultralytics' loss of both heads for one process's part of a batch; its own where that is the whole batch."""
    return E2ELoss(net, cast(Any, partial(PartLoss, ranks))) if ranks.n > 1 else net.init_criterion()


def criterion_after(n_epochs: int, net: Any, ranks: Ranks) -> E2ELoss:
    """The same with the weights of the two heads as they are after so many epochs."""
    criterion = criterion_of_part(net, ranks)
    criterion.updates = n_epochs - 1
    criterion.update()
    return criterion


class PartLoss(v8DetectionLoss):
    """Ultralytics' loss, normalised over all processes.

    It divides sums over a batch by the batch's sum of target scores, and multiplies them by the number of images
    (utils/loss.py v8DetectionLoss, 8.4.190). With a part's own sum, N processes would train on another loss than one
    process: parts with few objects would weigh more. Here both numbers are those of the whole batch: summed over the
    processes, losses and gradients are the whole batch's.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, **assigner: Any) -> None:
        super().__init__(model, **assigner)
        self.ranks = ranks
        self.score_sum = torch.zeros(())
        self.assigner.register_forward_hook(self._note_score_sum)

    def _note_score_sum(self, assigner: nn.Module, args: Any, targets: tuple[torch.Tensor, ...]) -> None:
        self.score_sum = targets[2].sum()

    def loss(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> Any:
        """As v8DetectionLoss.loss: box, class and DFL loss [3] times images, and the same detached, by name."""
        loss, items = self.get_assigned_targets_and_loss(preds, batch)[1:]
        n_images = preds["boxes"].shape[0]
        whole = self.ranks.add(torch.stack([self.score_sum.float(), self.score_sum.new_tensor(n_images).float()]))
        share = self.score_sum.clamp(min=1) / whole[0].clamp(min=1)
        return loss * share * whole[1], {name: value * share for name, value in items.items()}
