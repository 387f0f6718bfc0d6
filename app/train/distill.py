"""Distillation: outputs of the run's FP16 training as further targets of its QAT training (quant.distill).

For a head, with the teacher's class probabilities p and its distributions d of the distances to a box's four sides, and
the student's q and e, summed over images and anchors:

    [ sum over classes KL(Bernoulli(p), Bernoulli(q)) + max(p) * mean over sides KL(d, e) ] / sum of max(p)

times images, as Ultralytics' loss divides by the sum of target scores; the heads have the weights of their detection
losses. It is 0 where both networks agree, and `shift` of the sensitivity stage is the same divergence, unnormalised.
Hinton et al., arXiv:1503.02531, for classifiers; boxes by their distributions: Zheng et al., "Localization Distillation
for Dense Object Detection", CVPR 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from app.core.config import Config, UserError
from app.core.differences import WITHOUT_EFFECT, difference, shown
from app.core.files import read_json
from app.core.run import VIEW_SHAPE, RunRoot
from app.quant.model import load_scored, names_of, other_names
from app.train.done import teacher_path
from app.train.processes import ALONE, Ranks

HEADS = ("one2many", "one2one")
N_SIDES = 4
Heads = dict[str, dict[str, torch.Tensor]]


class Teacher:
    """The scored network of an FP16 training: EMA weights, BatchNorm re-estimated. It gets no gradient.

    Args:
        model: that network, on the device of the training.
        weight: of the distillation beside the detection loss, quant.distill.
        ranks: the batch is their parts together: sums of scores and numbers of images are added over them.
    """

    def __init__(self, model: Any, weight: float, ranks: Ranks) -> None:
        self.model, self.weight, self.ranks = model.eval().requires_grad_(False), weight, ranks
        # By this flag alone the head gives what the loss takes, of both branches; its layers stay in eval mode.
        self.model.model[-1].training = True

    def loss(self, images: torch.Tensor, preds: Heads, head_weights: torch.Tensor) -> torch.Tensor:
        """The distillation of both heads, a scalar.

        Args:
            images: [N,3,S,S], 0..1.
            preds: the student's outputs of both heads in training mode.
            head_weights: of the heads one2many and one2one, float32 [2].
        """
        with torch.no_grad():
            wanted: Heads = self.model(images)
        loss = head_weights.new_zeros(())
        for head, head_weight in zip(HEADS, head_weights, strict=True):
            divergence, score_sum = divergences(wanted[head], preds[head])
            sums = torch.stack([score_sum, score_sum.new_full((), len(images))])
            all_scores, n_images = self.ranks.all_reduce(sums)
            loss = loss + head_weight * divergence / all_scores.clamp(min=1) * n_images
        return self.weight * loss

    def beside(self, images: torch.Tensor, preds: Heads, criterion: Any) -> torch.Tensor:
        """`loss` with the weights that the detection's criterion gives the heads now."""
        return self.loss(images, preds, torch.tensor([criterion.o2m, criterion.o2o], device=images.device))

    def alone(self) -> Teacher:
        """The same teacher of a batch that one rank has as a whole."""
        return Teacher(self.model, self.weight, ALONE)


def divergences(wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in brackets of the formula at the top, over images and anchors, and the sum of max(p); scalars.

    Args:
        wanted, given: of the teacher and the student: `scores` [N,nc,A], logits of the classes; `boxes` [N,4*bins,A].
    """
    logits, scores = wanted["scores"].float(), given["scores"].float()
    p = logits.sigmoid()
    best = p.amax(1)
    least = binary_cross_entropy_with_logits(logits, p, reduction="none")
    classes = (binary_cross_entropy_with_logits(scores, p, reduction="none") - least).sum()
    log_d, log_e = _sides(wanted["boxes"]), _sides(given["boxes"])
    boxes = (log_d.exp() * (log_d - log_e)).sum(2).mean(1)
    return classes + (best * boxes).sum(), best.sum()


def _sides(boxes: torch.Tensor) -> torch.Tensor:
    """Logits [N,4*bins,A] -> logarithms of probabilities [N,4,bins,A]."""
    n_images, n_rows, n_anchors = boxes.shape
    return boxes.float().view(n_images, N_SIDES, n_rows // N_SIDES, n_anchors).log_softmax(2)


def read_teacher(config: Config, run_root: Path, device: torch.device, ranks: Ranks) -> Teacher | None:
    """The teacher of a training; None where quant.distill is 0.

    Raises:
        UserError: it cannot be read, is no FP16 training, or one of another recipe, seed or other classes.
    """
    path = teacher_path(config, run_root)
    if path is None or config.quant is None:
        return None
    model, source, checkpoint = load_scored(path)
    if differences := difference(source, config, ignore=(*WITHOUT_EFFECT, "variant", "quant")):
        raise UserError(f"quant.distill: the teacher {path} was trained with another recipe ({shown(differences)})")
    if source.variant != "fp16":
        raise UserError(f"quant.distill: the teacher {path} is of {source.label}, not of an FP16 training")
    names = read_json(RunRoot(run_root.parent, run_root.name).provenance, "data", VIEW_SHAPE)["names"]
    if fault := other_names(names_of(checkpoint), names):
        raise UserError(f"quant.distill: the teacher {path} has other classes than this run ({fault})")
    net: Any = model
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return Teacher(net.to(device, memory_format=layout), config.quant.distill, ranks)
