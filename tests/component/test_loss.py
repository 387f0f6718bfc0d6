"""The loss kernels in Triton's interpreter, against Ultralytics' loss of both heads: values and gradients.

The interpreter has to be chosen before Triton is imported, so the test runs this file as a script.
"""

from __future__ import annotations

from typing import Any

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss

from app.train.loss import HeadLoss, capacity, label_rows, pad_rows
from app.train.processes import ALONE
from app.train.step import watched_terms
from tests.support.interpreter import run_in_interpreter
from tests.support.random_boxes import labels

STRIDES, SIDE_PX = (8, 16, 32), 96
# float32 sums in another order, and atan to 2e-7. Where an object has fewer candidates of positive align than it
# selects, torch.topk on a CPU fills up with others than on a GPU (app/train/assign.py): the cases here avoid crowds.
RTOL, GRAD_RTOL = 1e-5, 1e-4


def test_kernels_equal_ultralytics_in_the_interpreter() -> None:
    done = run_in_interpreter(__file__)
    assert done.returncode == 0, done.stderr


def test_label_rows_are_sorted_and_padded() -> None:
    batch = {
        "batch_idx": torch.tensor([2.0, 0.0, 2.0]),
        "cls": torch.tensor([[5.0], [6.0], [7.0]]),
        "bboxes": torch.rand(3, 4),
    }
    padded = torch.full((5, 6), 9.0)
    pad_rows(label_rows(batch), padded, 3)
    assert padded[:, 0].tolist() == [0, 2, 2, 3, 3]
    assert padded[:3, 1].tolist() == [6, 5, 7]
    assert capacity(2) >= 2 * 300


def outputs(n_images: int, spread: float) -> dict[str, Any]:
    """Outputs of both heads as the network gives them in training; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    feats = [torch.zeros(n_images, 1, SIDE_PX // stride, SIDE_PX // stride) for stride in STRIDES]
    n_anchors = sum(feat.shape[2] * feat.shape[3] for feat in feats)
    heads = {}
    for head in ("one2many", "one2one"):
        boxes = torch.randn(n_images, 64, n_anchors, generator=generator) * spread
        scores = torch.randn(n_images, 80, n_anchors, generator=generator) * 2 - 3
        heads[head] = {"boxes": boxes.requires_grad_(), "scores": scores.requires_grad_(), "feats": feats}
    return heads


def compare(criterion: E2ELoss, counts: list[int], largest: float, spread: float) -> None:
    batch = labels(counts, largest)
    ours, theirs = outputs(len(counts), spread), outputs(len(counts), spread)
    expected, expected_items = criterion(theirs, batch)
    expected.sum().backward()
    padded = torch.zeros(sum(counts) + 3, 6)
    pad_rows(label_rows(batch), padded, len(counts))
    loss, items = HeadLoss(criterion, ALONE)(ours, padded, torch.tensor([criterion.o2m, criterion.o2o]))
    loss.backward()
    torch.testing.assert_close(loss, expected.sum(), rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(items, torch.stack(list(expected_items.values())), rtol=RTOL, atol=RTOL)
    for head, tensors in ours.items():
        for name in ("boxes", "scores"):
            error = (tensors[name].grad - theirs[head][name].grad).norm()
            assert error <= GRAD_RTOL * theirs[head][name].grad.norm(), (counts, head, name)


def compare_scored(criterion: E2ELoss, counts: list[int]) -> None:
    """A model that is scored, without its one2many head, gives the terms of the other one, the numbers of val/*."""
    batch, preds = labels(counts, 0.5), outputs(len(counts), 1.0)
    padded = torch.zeros(sum(counts) + 3, 6)
    pad_rows(label_rows(batch), padded, len(counts))
    with torch.inference_mode():
        expected = criterion(preds, batch)[1]
        _, items = HeadLoss(criterion, ALONE)({**preds, "one2many": {}}, padded, torch.ones(2))
    torch.testing.assert_close(items, torch.stack(list(expected.values())), rtol=RTOL, atol=RTOL)


def see(criterion: E2ELoss, head: str, kind: str, value: float, where: tuple[slice, ...]) -> None:
    """Outputs that are not finite: the loss of both is not, nor a gradient, and the terms say it of either head."""
    batch = labels([3, 2], 0.5)
    for is_ours in (False, True):
        preds = outputs(2, 1.0)
        with torch.no_grad():
            preds[head][kind][where] = value
        if is_ours:
            padded = torch.zeros(8, 6)
            pad_rows(label_rows(batch), padded, 2)
            loss, terms = HeadLoss(criterion, ALONE)(preds, padded, torch.tensor([criterion.o2m, criterion.o2o]))
            assert not watched_terms(loss, terms).isfinite().any(), (head, kind, value)
        else:
            loss = criterion(preds, batch)[0].sum()
        loss.backward()
        assert not loss.isfinite(), (head, kind, value, is_ours)
        grads = [preds[head][name].grad.isfinite().all() for name in ("boxes", "scores")]
        assert not all(grads), (head, kind, value, is_ours)


if __name__ == "__main__":
    torch.manual_seed(0)
    network: Any = DetectionModel("yolov10n.yaml", verbose=False)
    network.args = get_cfg()
    criterion = E2ELoss(network)
    compare(criterion, counts=[3, 2], largest=0.5, spread=1.0)
    compare(criterion, counts=[0, 0], largest=0.5, spread=1.0)
    compare(criterion, counts=[0, 5, 0], largest=0.5, spread=3.0)
    compare(criterion, counts=[4, 6], largest=0.02, spread=2.0)  # smaller than a stride
    compare_scored(criterion, counts=[3, 0, 2])
    whole, finest, a_bin = (slice(None),) * 3, (slice(None), slice(None), slice(0, 144)), (slice(None), slice(3, 4))
    for head in ("one2many", "one2one"):
        for value, where in ((float("nan"), whole), (float("nan"), finest), (float("inf"), a_bin)):
            see(criterion, head, "boxes", value, where)
        see(criterion, head, "scores", float("nan"), (slice(0, 1), slice(5, 6), slice(7, 8)))
