"""The fast step on a real GPU: the graph against the same kernels without it, and the loss against Ultralytics'.

pytest -m gpu tests/gpu/test_graph_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss

from app.bench.step import Ours, network, synthetic_batch
from app.core.config import load
from app.train.loss import HeadLoss, capacity, label_rows, pad_rows
from app.train.processes import ALONE
from tests.support.random_boxes import labels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]
N_IMAGES, SIDE_PX, N_STEPS = 8, 320, 8
RTOL, GRAD_RTOL = 1e-5, 1e-4  # float32 sums in another order


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def trained(variant: str, graph: bool, *sets: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and buffers after N_STEPS steps; the last batch is smaller, so the graph does not take it."""
    size = ("model=yolov10n.yaml", f"train.imgsz={SIDE_PX}", f"train.graph={str(graph).lower()}")
    config = load(variant, [], [*size, *sets])
    is_distilled = config.quant is not None and config.quant.distill > 0
    twin = network(load("fp16", [], [*size, *sets])) if is_distilled else None
    arm = Ours(config, network(config), torch.device("cuda"), N_IMAGES, twin)
    for step in range(N_STEPS):
        n_images = N_IMAGES if step < N_STEPS - 1 else 3
        batch = synthetic_batch(n_images, SIDE_PX, pinned=True)
        batch["img"] = batch["img"].roll(step, 0).pin_memory()
        arm.step(batch)
    assert (arm.graph.graph is not None) == graph
    weights = torch.cat([weight.detach().flatten() for weight in arm.state.net.parameters()])
    return weights, torch.cat([buffer.double().flatten() for buffer in arm.state.net.buffers()])


@pytest.mark.parametrize("sets", [
    (), ("quant.learned_scale=true",), ("quant.scheme=w4a16-mixed",), ("quant.scheme=w4a16-full",),
    ("quant.distill=1.0",),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_graph_equals_its_kernels(variant: str, sets: tuple[str, ...]) -> None:
    for ours, theirs in zip(trained(variant, True, *sets), trained(variant, False, *sets), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("counts", "largest", "spread"),
    [([20, 35, 8, 60, 0, 12], 0.4, 1.0), ([20, 35, 8, 60], 0.3, 0.02), ([300, 1], 0.3, 2.0), ([60, 1, 150], 0.9, 0.3),
     ([0, 0], 0.5, 1.0), ([40, 50], 0.02, 2.0)],
)  # fmt: skip
def test_loss_equals_ultralytics(counts: list[int], largest: float, spread: float) -> None:
    torch.manual_seed(1)
    model: Any = DetectionModel("yolov10n.yaml", verbose=False).cuda()
    model.args = get_cfg()
    criterion, n_images = E2ELoss(model), len(counts)
    batch = {key: value.cuda() for key, value in labels(counts, largest).items()}
    feats = [torch.zeros(n_images, 1, 640 // stride, 640 // stride, device="cuda") for stride in (8, 16, 32)]

    def outputs() -> dict[str, Any]:
        generator = torch.Generator("cuda").manual_seed(3)
        heads = {}
        for head in ("one2many", "one2one"):
            boxes = torch.randn(n_images, 64, 8400, generator=generator, device="cuda") * spread
            scores = torch.randn(n_images, 80, 8400, generator=generator, device="cuda") * 2 - 3
            heads[head] = {"boxes": boxes.requires_grad_(), "scores": scores.requires_grad_(), "feats": feats}
        return heads

    ours, theirs = outputs(), outputs()
    expected, expected_items = criterion(theirs, batch)
    expected.sum().backward()
    padded = torch.zeros(capacity(n_images), 6, device="cuda")
    pad_rows(label_rows(batch), padded, n_images)
    weights = torch.tensor([criterion.o2m, criterion.o2o], device="cuda")
    loss, items = HeadLoss(criterion, ALONE)(ours, padded, weights)
    loss.backward()
    torch.testing.assert_close(loss, expected.sum(), rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(items, torch.stack(list(expected_items.values())), rtol=RTOL, atol=RTOL)
    for head, tensors in ours.items():
        for name in ("boxes", "scores"):
            error = (tensors[name].grad - theirs[head][name].grad).norm()
            assert error <= GRAD_RTOL * theirs[head][name].grad.norm(), (head, name)
