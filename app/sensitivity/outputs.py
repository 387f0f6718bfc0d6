"""How far a network's outputs are from those of the float network, and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

SIDES = 4  # of a box: the distances to them are distributions over bins


class Reference:
    """The float network's outputs for a batch, to which others are compared.

    The shift of an image is a Kullback-Leibler divergence in nats, of the float network's outputs from the others':

        sum over anchors of [ sum over classes KL(Bernoulli(p), Bernoulli(q)) + max(p) * sum over sides KL(d, e) ]

    with the class probabilities p, q and the distributions d, e of the distances to a box's sides. Weighted by the
    best p, boxes count where there is an object. It needs no labels, is never negative, and of small independent
    changes the shifts add up. ZeroQ measures layers by such a divergence (Cai et al., CVPR 2020, section 3.2).

    Args:
        heads: outputs of the one2one head, as Graph.heads has them.
    """

    def __init__(self, heads: dict[str, Any]) -> None:
        scores = heads["scores"]
        self.scores, self.p, self.no = scores, scores.sigmoid(), softplus(scores)
        self.best = self.p.amax(dim=1)
        self.sides = _sides(heads["boxes"])

    def shift(self, heads: dict[str, Any]) -> float:
        """Mean shift of the images of the batch.

        With p and q as sigmoids of a and b, KL(Bernoulli(p), Bernoulli(q)) is p (a - b) + log(1 + e^b) - log(1 + e^a).
        """
        scores = heads["scores"]
        classes = (self.p * (self.scores - scores) + softplus(scores) - self.no).sum(dtype=torch.float64)
        sides = (self.sides.exp() * (self.sides - _sides(heads["boxes"]))).sum(dim=(1, 2))
        boxes = (self.best * sides).sum(dtype=torch.float64)
        return float(classes + boxes) / len(scores)


def _sides(boxes: torch.Tensor) -> torch.Tensor:
    """Logits [N,4*bins,A] -> logarithms of probabilities [N,4,bins,A]."""
    n_images, n_rows, n_anchors = boxes.shape
    return boxes.view(n_images, SIDES, n_rows // SIDES, n_anchors).log_softmax(dim=2)


def loss_of(criterion: Any, heads: dict[str, Any], labels: dict[str, torch.Tensor]) -> float:
    """Box, class and DFL loss of the one2one head together, as val_loss/* of results.csv has it."""
    _, terms = criterion.one2one.loss(heads, labels)
    return float(sum(terms.values()))
