"""The validator scores a network that gives known boxes as worked out on paper."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.metrics import DetMetrics

from app.train.train import train
from app.train.validator import N_AHEAD, HeldOut, Validator, class_aps, keep_pace, tensors_of, without_one2many
from tests.support.random_boxes import labels
from tests.support.scripted import PLAIN, box_of, read_table, reading, solid, write_coco
from tests.support.settle import settle
from tests.support.tiny import tiny_network

N_TRAIN, VAL = 4, range(4, 9)  # numbers of the images
STATES = ("raw", "ema", "ema_bn")
# Ultralytics integrates precision over 101 points of recall, of which the last one counts as 0: a perfect class has
# 1 - 0.5 / 100. Every image has one object, of a class of its own.
PERFECT = 0.995
SHARES_AP50 = {4: 1.0, 5: 1.0, 6: 0.0, 7: 0.5, 8: 0.0}
SHARES_AP = {**SHARES_AP50, 5: 0.5}  # an IoU of 0.72 is enough for the thresholds 0.5 to 0.7, five of ten
ROUNDED = 1e-5  # the validator's numbers have five decimals


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def level_of(number: int) -> int:
    """Grey level of an image, which tells it from all others."""
    return 40 + 20 * number


def detections_of(number: int) -> list[list[float]]:
    """Rows x1, y1, x2, y2, score, class in the letterboxed image of 96 x 64 px, which begins at 16, 16."""
    x, y, w, h = box_of(number)
    exact = [x + 16, y + 16, x + w + 16, y + h + 16]
    lower = [*exact[:3], y + 0.72 * h + 16]
    return {
        4: [[*exact, 0.9, 4]],
        5: [[*lower, 0.9, 5]],
        6: [],
        7: [[0, 0, 6, 6, 0.9, 7], [*exact, 0.8, 7]],  # the false one first: half the precision
        8: [[*exact, 0.5, 4]],  # of another class, behind that class's own object
    }[number]


def given(images: torch.Tensor) -> torch.Tensor:
    """Output of the end-to-end head, [N,300,6], for images [N,3,64,96] that their grey level tells."""
    out = torch.zeros(len(images), 300, 6)
    for image, rows in zip(images, out, strict=True):
        number = next(n for n in VAL if level_of(n) == round(image[0, 32, 48].item() * 255))
        for row, detection in zip(rows, detections_of(number), strict=False):
            row.copy_(torch.tensor(detection))
    return out


def losses_of(numbers: list[int]) -> tuple[float, float, float]:
    """Box, class and DFL loss of a batch."""
    return float(np.mean(numbers)), float(len(numbers)), float(np.max(numbers)) * 10


def test_scores_and_losses_of_known_detections(tmp_path: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco_dir = write_coco(tmp_path / "coco", [solid(30)] * N_TRAIN, [solid(level_of(number)) for number in VAL])
    predict, read = DetectionModel.predict, []

    def give(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return predict(self, x, *args, **kwargs) if torch.is_grad_enabled() else (given(x), None)

    def losses(numbers: list[int]) -> tuple[float, float, float]:
        read.append(numbers)
        return losses_of(numbers)

    settings = {"train.epochs": 1, "train.batch": 2, "train.bn_batches": 0, "data.coco_dir": coco_dir}
    config, run = settle(runs_dir, "r", "fp16", PLAIN | settings)
    monkeypatch.setattr(DetectionModel, "predict", give)
    with reading(losses):
        train(config, run, force=False)
    (row,) = read_table(run.variant_dir("fp16") / "results.csv")
    ap50, ap = (PERFECT * np.mean(list(shares.values())) for shares in (SHARES_AP50, SHARES_AP))
    terms = np.mean([losses_of(numbers) for numbers in read if min(numbers) in VAL], axis=0)
    assert sorted({tuple(numbers) for numbers in read if min(numbers) in VAL}) == [(4, 5, 6, 7), (8,)]
    for state in STATES:
        wanted = {f"AP/{state}": ap, f"AP50/{state}": ap50, f"val_loss/{state}": terms.sum()}
        assert {name: float(row[name]) for name in wanted} == pytest.approx(wanted, abs=ROUNDED)
    assert [float(row[f"val/{name}_loss"]) for name in ("box", "cls", "dfl")] == pytest.approx(terms, abs=ROUNDED)


class Batches(list[list[int]]):
    """A loader of batches of images, by their numbers, without processes."""

    dataset = VAL

    def __iter__(self) -> Iterator[Any]:
        for numbers in list.__iter__(self):
            images = torch.stack([torch.full((3, 64, 96), level_of(number), dtype=torch.uint8) for number in numbers])
            boxes = [
                ((x + w / 2 + 16) / 96, (y + h / 2 + 16) / 64, w / 96, h / 64) for x, y, w, h in map(box_of, numbers)
            ]
            yield {
                "img": images, "cls": torch.tensor(numbers).view(-1, 1).float(), "bboxes": torch.tensor(boxes),
                "batch_idx": torch.arange(len(numbers)).float(), "im_file": ["a.jpg"] * len(numbers),
                "ori_shape": [(64, 96)] * len(numbers), "ratio_pad": [None] * len(numbers),
            }  # fmt: skip


class StockHeldOut(HeldOut):
    """What Ultralytics' validator asks a model for."""

    def forward(self, images: torch.Tensor, augment: bool = False) -> dict[str, Any]:
        assert not augment
        return super().forward(images)

    def loss(self, batch: dict[str, Any], outputs: dict[str, Any]) -> Any:
        return None, {f"{term}@{name}": value for (name, term), value in super().loss(batch, outputs).items()}


class StockValidator(Validator):
    """With the pass of Ultralytics' own validator."""

    def get_model(self, model: Any, trainer: Any = None) -> Any:
        return trainer.held_out

    def gather_stats(self) -> None:
        pass

    def get_stats(self) -> Any:
        return flat(super().get_stats())


def flat(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Numbers as 'number@set', in the form that Ultralytics' pass takes and gives."""
    return {f"{key}@{name}": value for name, numbers in results.items() for key, value in numbers.items()}


def test_the_pass_computes_what_ultralytics_own_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a network in training mode and two batches; a term of the loss follows from images and weights."""
    weight = next(iter(network(0).state_dict()))

    def predict(self: Any, images: torch.Tensor, *_: Any, **__: Any) -> Any:
        return given(images), self.state_dict()[weight].sum()

    def lose(self: Any, batch: dict[str, Any], preds: Any) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {"box_loss": batch["img"].mean() + preds[1]}

    sets = {"raw": tensors_of(network(1)), "ema": tensors_of(network(2))}
    held_out, stock_held_out = (kind(network(9).train(), sets) for kind in (HeldOut, StockHeldOut))
    monkeypatch.setattr(DetectionModel, "predict", predict)
    monkeypatch.setattr(DetectionModel, "loss", lose)
    options = {"plots": False, "nms": False}
    stock = StockValidator(Batches([[4, 5, 6, 7], [8]]), tmp_path, get_cfg(overrides=options))
    trainer = SimpleNamespace(
        held_out=stock_held_out, device=torch.device("cpu"), data={}, amp=False, world_size=1, epoch=0, epochs=2,
        loss_items={f"box_loss@{name}": torch.zeros(()) for name in sets},
        stopper=SimpleNamespace(possible_stop=False),
        label_loss_items=lambda items, prefix: {f"{prefix}/{name}": value for name, value in items.items()},
    )  # fmt: skip
    expected = DetectionValidator.__call__(stock, trainer)
    ours = Validator(Batches([[4, 5, 6, 7], [8]]), tmp_path, get_cfg(overrides=options))
    ours.device, ours.data = torch.device("cpu"), {}
    n_batches: list[int] = []
    results = ours.score(held_out, lambda: n_batches.append(1))
    assert flat(results) == expected
    assert results["raw"]["metrics/mAP50(B)"] == pytest.approx(PERFECT * 0.5, abs=ROUNDED)
    assert results["raw"]["val/box_loss"] != results["ema"]["val/box_loss"]
    assert (len(n_batches), ours.seen, stock.seen) == (2, 5, 5)
    assert (held_out.model.training, held_out.end2end) == (False, True)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_the_host_is_two_batches_ahead_of_the_gpu_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_on: list[str] = []
    waited_for: list[int] = []

    class Event:
        def record(self, stream: str) -> None:
            self.number = len(recorded_on)
            recorded_on.append(stream)

        def synchronize(self) -> None:
            waited_for.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    scored: Any = deque()
    for n_launched in range(1, 6):
        keep_pace(scored, torch.device("cuda:1"))
        assert recorded_on == ["stream of cuda:1"] * n_launched
        assert waited_for == list(range(n_launched - N_AHEAD))


def test_a_held_out_model_gives_what_each_set_of_weights_gives() -> None:
    """One model in place of three: outputs, terms of the loss and the state that it is left in."""
    models = {name: network(seed) for seed, name in enumerate(STATES)}
    held_out = HeldOut(network(9), {name: tensors_of(model) for name, model in models.items()}).eval()
    images, batch = torch.rand(2, 3, 64, 64), labels([2, 1], 0.5)
    held_out.end2end = True
    with torch.inference_mode():
        outputs = held_out(images)
        terms = held_out.loss(batch, outputs)
        for name, model in models.items():
            model.end2end = True
            expected = model.eval()(images)
            assert torch.equal(outputs[name][0], expected[0])
            for term, value in model.loss(batch, expected)[1].items():
                assert torch.equal(terms.pop((name, term)), value)
    assert not terms
    held_out.take("raw")
    for key, value in models["raw"].state_dict().items():
        assert torch.equal(held_out.model.state_dict()[key], value), key


def test_without_the_one2many_head_the_detections_are_the_same_and_the_weights_stay() -> None:
    model = network(0).eval()
    model.end2end = True
    images, keys = torch.rand(1, 3, 64, 64), list(model.state_dict())
    with torch.inference_mode():
        expected = model(images)
        with without_one2many(model):
            found = model(images)
            assert model.end2end
    assert torch.equal(found[0], expected[0])
    assert found[1]["one2many"] == {}
    assert list(model.state_dict()) == keys


def network(seed: int) -> Any:
    """A small network whose BatchNorm has statistics."""
    torch.manual_seed(seed)
    model: Any = DetectionModel("yolov10n.yaml", verbose=False).requires_grad_(False)
    model.args = get_cfg()
    model(torch.rand(2, 3, 64, 64))
    return model


def metrics_of(n_objects: dict[int, int], n_thresholds: dict[int, int]) -> DetMetrics:
    """Processed metrics of an image whose every object is found, at the first so many of ten thresholds of IoU."""
    metrics = DetMetrics({number: str(number) for number in range(10)})
    for number, n in n_objects.items():
        right = np.arange(10) < n_thresholds[number]
        stats = {"tp": np.tile(right, (n, 1)), "conf": np.linspace(0.9, 0.5, n)}
        stats |= {"pred_cls": np.full(n, number), "target_cls": np.full(n, number), "target_img": np.array([number])}
        for key, value in stats.items():
            metrics.stats[key].append(value)
    metrics.process()
    return metrics


def test_frequent_classes_have_a_hundred_objects_and_the_commonest_the_most() -> None:
    """A class of 99 objects does not count. That of 120 is right at half of the thresholds."""
    found = class_aps(metrics_of({2: 99, 3: 100, 7: 120}, {2: 0, 3: 10, 7: 5}))
    assert found == pytest.approx({"AP_frequent": (PERFECT + PERFECT / 2) / 2, "AP_commonest": PERFECT / 2})
    assert class_aps(metrics_of({2: 99}, {2: 10})) == {}
