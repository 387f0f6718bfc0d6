"""Post-hoc correction lowers the loss, folds exactly, and touches only BatchNorm's affine part and biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from brevitas.nn import QuantConv2d
from torch import nn

from app.core.config import load
from app.quant import schemes
from app.quant.model import build, load_checkpoint, save_checkpoint
from app.train.correction import _corrections, correct, keep_better

# Float32 in another order of operations: BatchNorm of scaled numbers against BatchNorm with scaled weights.
FOLD_TOLERANCE = 1e-5
YOLO_TOLERANCE = 1e-3  # the same through 100 layers, on outputs of size 1 to 10


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1))
    norm: Any = model[1]
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    quant = load("qat", [], ["quant.scheme=w4a16"]).quant
    assert quant is not None
    schemes.quantize(model, quant)
    return model.eval()


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(4, 3, 6, 6), torch.full((4, 2, 4, 4), 0.7)) for _ in range(n)]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_loss_falls_and_only_affine_parts_change() -> None:
    model = toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = loss_of(model, batches(1)[0]).item()
    assert correct(model, batches(30), loss_of, 0.05) == 30
    assert loss_of(model, batches(1)[0]).item() < 0.2 * start
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"1.weight", "1.bias", "3.bias"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(layer.training for layer in model.modules())
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("n", [4, 5])
def test_parts_of_batches_make_the_steps_of_whole_ones(n: int) -> None:
    """A rank has a half of each batch; their losses are sums over images. Of five halves the last is a step alone."""

    def sum_of(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, batch) * len(batch[0])

    halves, whole, split = batches(n), toy(), toy()
    joined = [tuple(map(torch.cat, zip(*halves[i : i + 2], strict=True))) for i in range(0, n, 2)]
    assert correct(whole, joined, sum_of, 0.05) == correct(split, halves, sum_of, 0.05, 2) == -(-n // 2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=FOLD_TOLERANCE, atol=FOLD_TOLERANCE)


def drift(model: nn.Module) -> list[Any]:
    """Corrections away from their start, active through hooks."""
    torch.manual_seed(2)
    corrections = list(_corrections(model))
    for correction in corrections:
        if correction.scale.requires_grad:
            correction.scale.data.uniform_(0.5, 1.5)
        correction.shift.data.uniform_(-0.5, 0.5)
    return [(correction, correction.conv.register_forward_hook(correction)) for correction in corrections]


def fold_all(active: list[Any]) -> None:
    for correction, handle in active:
        handle.remove()
        correction.fold()


def test_folded_model_computes_the_same() -> None:
    model = toy()
    active = drift(model)
    images = batches(1)[0][0]
    expected = model(images)
    fold_all(active)
    torch.testing.assert_close(model(images), expected, rtol=FOLD_TOLERANCE, atol=FOLD_TOLERANCE)


def test_yolov10n_folds_into_every_layer() -> None:
    model, _ = build(load("qat", [], ["model=yolov10n.yaml"]))
    model.eval()
    active = drift(model)
    without_norm = [name for name, layer in model.named_modules() for c, _ in active if c.conv is layer and not c.norm]
    assert len(without_norm) == 12
    assert all(name.startswith("model.23.") and name.endswith(".2") for name in without_norm)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)[1]["one2one"]
        fold_all(active)
        folded = model(images)[1]["one2one"]
    for name in ("boxes", "scores"):
        torch.testing.assert_close(folded[name], expected[name], rtol=YOLO_TOLERANCE, atol=YOLO_TOLERANCE)


def test_a_layer_that_nothing_can_be_folded_into_is_left_as_it_is() -> None:
    """DFL, where a scheme quantizes it."""
    model, _ = build(load("qat", [], ["model=yolov10n.yaml", "quant.scheme=w4a16-dfl"]))
    corrected = {correction.conv for correction in _corrections(model)}
    left = [name for name, layer in model.named_modules() if isinstance(layer, QuantConv2d) and layer not in corrected]
    assert left == ["model.23.dfl.conv"]
    dfl = nn.Sequential(model.get_submodule(left[0]))
    assert correct(dfl, [(torch.rand(1, 16, 4, 8), torch.zeros(1))], loss_of, 0.1) == 0


@pytest.mark.parametrize(("ap", "kept", "best"), [(0.39, True, 0.4), (0.4, False, 0.4), (0.45, False, 0.45)])
def test_a_correction_that_is_as_good_replaces_the_best(tmp_path: Path, ap: float, kept: bool, best: float) -> None:
    config, path = load("qat"), tmp_path / "best.pt"
    before = {"scored": {"weight": torch.zeros(1)}, "epoch": 3, "fitness": 0.4, "names": ["nut"]}
    save_checkpoint(path, config, before)
    corrected: Any = nn.Linear(1, 1, bias=False)
    assert keep_better(path, config, before, corrected, ap) == best
    assert load_checkpoint(path)["fitness"] == best
    assert torch.equal(load_checkpoint(path)["scored"]["weight"], torch.zeros(1)) == kept
