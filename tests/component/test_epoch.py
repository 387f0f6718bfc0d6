"""What an epoch reads, in which order and augmentation, and what it makes of the losses of its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from app.quant.model import load_checkpoint
from app.train.batches import Part
from app.train.loader import train_loader
from app.train.ptq import bn_images
from app.train.train import train
from tests.support.scripted import (
    PLAIN,
    Batch,
    box_of,
    number_of,
    read_table,
    reading,
    scores,
    scripted,
    solid,
    write_coco,
)
from tests.support.settle import settle
from tests.support.tiny import tiny_network

N_IMAGES, BATCH = 30, 8
SIZES = [8, 8, 8, 6]  # of an epoch's batches
N_BATCHES = len(SIZES)
LR, MOMENTUM, PULL = 0.01, 0.5, 1e-3  # PULL: gradient of a weight for one image; not clipped
SETTINGS: dict[str, Any] = PLAIN | {
    "train.epochs": 2, "train.batch": BATCH, "train.val_every": 2, "hyp.lr0": LR, "hyp.lrf": 1,
    "hyp.momentum": MOMENTUM, "hyp.weight_decay": 0,
}  # fmt: skip
# Augmentation as in the full run, without the images' own colours: flip, colour, scale, shift and mosaic.
AUGMENTED: dict[str, Any] = {
    "hyp.mosaic": 1, "hyp.hsv_h": 0.015, "hyp.hsv_s": 0.7, "hyp.hsv_v": 0.4, "hyp.translate": 0.1, "hyp.scale": 0.5,
    "hyp.fliplr": 0.5,
}  # fmt: skip
ROUNDED = 1e-5  # results.csv has five decimals of a loss
PIXEL = 1e-6  # float32 of n / 255
LABEL = 1e-5  # label files have six decimals
FLOAT32_ATOL = 1e-6  # of weights below 1, after eight steps; the way is 3e-3


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def level_of(number: int) -> int:
    """Grey level of an image, which tells it from all others."""
    return 20 + 5 * number


@pytest.fixture(scope="module")
def coco_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one grey level each."""
    images = [solid(level_of(number)) for number in range(N_IMAGES + 5)]
    return write_coco(tmp_path_factory.mktemp("coco") / "coco", images[:N_IMAGES], images[N_IMAGES:])


@pytest.fixture(scope="module")
def twins_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with the same pixels: they differ by their augmentation alone."""
    pixels = np.random.default_rng(0).integers(0, 255, solid(0).shape, np.uint8)
    return write_coco(tmp_path_factory.mktemp("coco") / "twins", [pixels] * N_IMAGES, [pixels])


def losses_of(numbers: list[int]) -> tuple[float, float, float]:
    """Box, class and DFL loss of a batch: no two batches have the same."""
    return float(np.mean(numbers)), float(np.max(numbers)), float(np.min(numbers)) / 7


@dataclass(frozen=True)
class Trained:
    """A finished training and the batches that it read, in order."""

    folder: Path
    batches: list[Batch]

    def epoch(self, number: int) -> list[Batch]:
        """Batches of an epoch, from 1, of a training that has read each once."""
        return self.batches[(number - 1) * N_BATCHES : number * N_BATCHES]

    def order(self, epoch: int) -> list[int]:
        return [number for batch in self.epoch(epoch) for number in batch.numbers]

    def images(self, epoch: int) -> torch.Tensor:
        """Pixels of an epoch by position, [30,3,64,64]."""
        return torch.cat([batch.images for batch in self.epoch(epoch)])

    def by_number(self, epoch: int) -> torch.Tensor:
        """Pixels of an epoch by image number."""
        return self.images(epoch)[np.argsort(self.order(epoch))]

    def losses(self) -> list[list[float]]:
        names = ("train/box_loss", "train/cls_loss", "train/dfl_loss")
        return [[float(row[name]) for name in names] for row in read_table(self.folder / "results.csv")]


def trained(runs_dir: Path, name: str, coco_dir: Path, settings: dict[str, Any]) -> Trained:
    """An FP16 training with given losses and scores; it validates after the last epoch alone."""
    config, run = settle(runs_dir, name, "fp16", {**SETTINGS, "data.coco_dir": coco_dir, **settings})
    with reading(losses_of, PULL) as batches, scripted([scores(ap) for ap in (0.1, 0.2, 0.3)]):
        train(config, run, force=False)
    return Trained(run.variant_dir("fp16"), batches)


@pytest.fixture(scope="module")
def plain(coco_dir: Path, runs_dir: Path) -> Trained:
    return trained(runs_dir, "plain", coco_dir, {})


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_is_every_image_once(plain: Trained, epoch: int) -> None:
    assert [len(batch.numbers) for batch in plain.epoch(epoch)] == SIZES
    assert sorted(plain.order(epoch)) == list(range(N_IMAGES))
    assert len(plain.batches) == 2 * N_BATCHES


def test_epochs_have_orders_of_their_own(plain: Trained) -> None:
    assert plain.order(1) != plain.order(2)
    assert plain.order(1) != sorted(plain.order(1))
    assert plain.order(2) != sorted(plain.order(2))


def test_pixels_and_labels_are_those_of_the_image(plain: Trained) -> None:
    """Letterboxing puts 16 rows of 114 above and below; the box is x, y, w, h in 64 x 32 px, its centre 16 lower."""
    for batch in plain.epoch(1):
        assert batch.classes == batch.numbers
        for number, pixels, box in zip(batch.numbers, batch.images, batch.boxes, strict=True):
            x, y, w, h = box_of(number)
            assert box == pytest.approx([(x + w / 2) / 64, (y + h / 2 + 16) / 64, w / 64, h / 64], abs=LABEL)
            assert pixels[:, 16:48].unique().tolist() == pytest.approx([level_of(number) / 255], abs=PIXEL)
            assert pixels[:, :16].unique().tolist() == pytest.approx([114 / 255], abs=PIXEL)


# --- order and augmentation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(twins_dir: Path, runs_dir: Path) -> dict[str, Trained]:
    """Two trainings of seed 0 and one of seed 1, augmented."""
    cases = {"zero": 0, "again": 0, "one": 1}
    return {name: trained(runs_dir, name, twins_dir, AUGMENTED | {"train.seed": seed}) for name, seed in cases.items()}


def share_alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of samples [N,3,H,W] that are the same in both."""
    return np.mean([torch.equal(x, y) for x, y in zip(a, b, strict=True)]).item()


def test_the_same_seed_reads_the_same(seeds: dict[str, Trained]) -> None:
    for epoch in (1, 2):
        assert seeds["zero"].order(epoch) == seeds["again"].order(epoch)
        assert torch.equal(seeds["zero"].images(epoch), seeds["again"].images(epoch))


def test_another_seed_has_another_order(seeds: dict[str, Trained]) -> None:
    for epoch in (1, 2):
        assert seeds["zero"].order(epoch) != seeds["one"].order(epoch)


def test_another_seed_has_another_augmentation(seeds: dict[str, Trained]) -> None:
    """Of an image, and of a place in the epoch."""
    for epoch in (1, 2):
        assert share_alike(seeds["zero"].images(epoch), seeds["one"].images(epoch)) == 0
        assert share_alike(seeds["zero"].by_number(epoch), seeds["one"].by_number(epoch)) == 0


def test_epochs_have_augmentations_of_their_own(seeds: dict[str, Trained]) -> None:
    for one in seeds.values():
        assert share_alike(one.images(1), one.images(2)) == 0
        assert share_alike(one.by_number(1), one.by_number(2)) == 0


def test_no_two_samples_of_an_epoch_are_augmented_alike(seeds: dict[str, Trained]) -> None:
    for epoch in (1, 2):
        samples = seeds["zero"].images(epoch)
        assert len({sample.numpy().tobytes() for sample in samples}) == N_IMAGES


@pytest.mark.parametrize("n", [2, 3])
def test_processes_read_disjoint_parts_that_make_the_batch(
    seeds: dict[str, Trained], twins_dir: Path, runs_dir: Path, n: int
) -> None:
    """Each part holds the same samples, pixel for pixel, as the batch of one process."""
    whole = seeds["zero"]
    config, run = settle(runs_dir, "zero", "fp16", {**SETTINGS, **AUGMENTED, "data.coco_dir": twins_dir})
    dataset = bn_images(config, run, workers=0).dataset
    loaders = [train_loader(dataset, 0, pin_memory=False, part=Part(k, n)) for k in range(n)]
    for batch, *parts in zip(whole.epoch(1), *loaders, strict=True):
        numbers = [[number_of(file) for file in part["im_file"]] for part in parts]
        assert list(chain(*numbers)) == batch.numbers
        assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
        assert torch.equal(torch.cat([part["img"] for part in parts]).float() / 255, batch.images)


# --- BatchNorm's re-estimation ---------------------------------------------------------------------------------------


def test_batchnorm_is_reestimated_on_train_images(
    coco_dir: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On as many batches as train.bn_batches says: grey levels tell the images, and 114 the padding."""
    seen: list[torch.Tensor] = []
    predict = DetectionModel.predict

    def look(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            seen.append((x * 255).round().int())
        return predict(self, x, *args, **kwargs)

    monkeypatch.setattr(DetectionModel, "predict", look)
    trained(runs_dir, "bn", coco_dir, {"train.bn_batches": 3, "train.epochs": 1})
    assert [len(images) for images in seen] == [BATCH] * 3
    levels = [image[0, 32, 32].item() for images in seen for image in images]
    assert set(levels) <= {level_of(number) for number in range(N_IMAGES)}
    assert max(Counter(levels).values()) == 1


# --- what becomes of the losses --------------------------------------------------------------------------------------


def test_losses_of_an_epoch_are_means_over_its_batches(plain: Trained) -> None:
    """Every batch counts once, the smaller last one too."""
    for epoch in (1, 2):
        wanted = np.mean([losses_of(batch.numbers) for batch in plain.epoch(epoch)], axis=0)
        assert plain.losses()[epoch - 1] == pytest.approx(wanted.tolist(), abs=ROUNDED)


def way(sizes: list[int]) -> float:
    """How far each weight of the first convolution goes in SGD steps, with Nesterov's momentum, of these batches."""
    velocity = position = 0.0
    for size in sizes:
        velocity = MOMENTUM * velocity + size * PULL
        position -= LR * (size * PULL + MOMENTUM * velocity)
    return position


def assert_moved(trained: Trained, sizes: list[int]) -> None:
    model = load_checkpoint(trained.folder / "weights" / "last.pt")["model"]
    moved = model["model.0.conv.weight"] - trained.batches[0].weights
    assert torch.allclose(moved, torch.full_like(moved, way(sizes)), rtol=0, atol=FLOAT32_ATOL)


def test_every_image_pulls_alike_at_the_weights(plain: Trained) -> None:
    """The step of the last batch is as much smaller as the batch."""
    assert_moved(plain, SIZES * 2)


def test_a_left_out_batch_counts_nowhere(coco_dir: Path, runs_dir: Path) -> None:
    """The batch with image 13 has no finite loss; its epoch's means are over the three others."""
    bad = 13

    def losses(numbers: list[int]) -> tuple[float, float, float]:
        assert len(batches) < 10 * N_BATCHES, "it goes back again and again"
        return (float("nan"), 1.0, 1.0) if bad in numbers else losses_of(numbers)

    config, run = settle(runs_dir, "fault", "fp16", {**SETTINGS, "data.coco_dir": coco_dir})
    with reading(losses, PULL) as batches, scripted([scores(ap) for ap in (0.1, 0.2, 0.3)]):
        train(config, run, force=False)
    good = {tuple(batch.numbers): None for batch in batches if bad not in batch.numbers}
    assert len(good) == 2 * (N_BATCHES - 1)
    by_epoch = np.array([losses_of(list(numbers)) for numbers in good]).reshape(2, N_BATCHES - 1, 3)
    result = Trained(run.variant_dir("fp16"), batches)
    for losses_of_row, means in zip(result.losses(), by_epoch.mean(axis=1), strict=True):
        assert losses_of_row == pytest.approx(means.tolist(), abs=ROUNDED)
    assert_moved(result, [len(numbers) for numbers in good])
    last = load_checkpoint(result.folder / "weights" / "last.pt")
    assert [fault["what"] for fault in last["faults"]] == ["loss", "loss"]


def test_a_batch_that_is_read_again_after_a_rollback_counts_once(coco_dir: Path, runs_dir: Path) -> None:
    """Two batches make a step, and the second one has no finite loss: the first one's gradient is there already."""
    order: list[list[int]] = []

    def losses(numbers: list[int]) -> tuple[float, float, float]:
        if numbers not in order:
            order.append(numbers)
        return (float("nan"), 1.0, 1.0) if order.index(numbers) == 1 else losses_of(numbers)

    settings = {**SETTINGS, "data.coco_dir": coco_dir, "hyp.nbs": 2 * BATCH, "train.epochs": 1}
    config, run = settle(runs_dir, "half-step", "fp16", settings)
    with reading(losses, PULL) as batches, scripted([scores(ap) for ap in (0.1, 0.2, 0.3)]):
        train(config, run, force=False)
    assert_moved(Trained(run.variant_dir("fp16"), batches), [SIZES[0], SIZES[2] + SIZES[3]])
