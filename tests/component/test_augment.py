"""Our training samples are Ultralytics' own to the last bit: images, classes and boxes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from app.core.config import load
from app.data.view import Image
from app.train import augment, loader
from app.train.augment import Augmentation
from app.train.batches import Ticket
from app.train.loader import COLOURS, PREFETCH_BATCHES, CocoDataset, Memory, start_worker

# Width and height: larger and smaller than the sample, long and high, one px wide and high.
SIZES = [(700, 500), (333, 800), (320, 320), (100, 60), (47, 90), (640, 2), (300, 1), (1, 300), (640, 480), (8, 8)]
N_BOXES = [3, 0, 1, 7, 0, 2, 1, 1, 40, 2]
SEED, N_WORKERS = 3, 1
DATA = {"train": "", "names": {0: "a", 1: "b"}, "nc": 2, "channels": 3}
RECIPES = {
    "the recipe": {},
    "no mosaic": {"hyp.mosaic": 0},
    "some mosaics": {"hyp.mosaic": 0.5, "hyp.flipud": 0.5, "hyp.degrees": 20, "hyp.scale": 0.9, "hyp.translate": 0.4},
    "no colours": {"hyp.hsv_h": 0, "hyp.hsv_s": 0, "hyp.hsv_v": 0},
    "a recipe for Ultralytics' own code": {"hyp.mixup": 0.5, "hyp.shear": 3},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    """Noise, so that a px at the wrong place shows. A box of no size and some beyond the border are among the boxes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = []
    for number, ((width, height), n_boxes) in enumerate(zip(SIZES, N_BOXES, strict=True)):
        path = str(folder / f"{number}.png")
        cv2.imwrite(path, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        labels = rng.uniform(0, 1, (n_boxes, 5)).astype(np.float32)
        labels[:, 0] = labels[:, 0].round()
        labels[:1, 3] = 0
        made.append(Image(path, (height, width), labels))
    return made


class Stock(YOLODataset):
    """Ultralytics' dataset with labels that are there already. Mosaic takes its partners from `buffer` as it is."""

    def __init__(self, images: list[Image], **kwargs: Any) -> None:
        self.images = images
        super().__init__(img_path="", data=DATA, task="detect", augment=True, **kwargs)

    def get_img_files(self, img_path: Any) -> list[str]:
        return [image.path for image in self.images]

    def get_labels(self) -> list[dict[str, Any]]:
        labels = []
        for image in self.images:
            label = {"im_file": image.path, "shape": image.shape_hw, "segments": [], "keypoints": None}
            boxes = {"cls": image.labels[:, :1].copy(), "bboxes": image.labels[:, 1:].copy()}
            labels.append({**label, **boxes, "normalized": True, "bbox_format": "xywh"})
        return labels

    def load_image(self, *args: Any, **kwargs: Any) -> Any:
        buffer = list(self.buffer)
        image = super().load_image(*args, **kwargs)
        self.buffer = buffer
        return image


def settings(imgsz: int, sets: dict[str, Any], cache: bool = False) -> dict[str, Any]:
    config = load("fp16", sets=[f"{key}={value}" for key, value in sets.items()])
    hyp: Any = get_cfg(overrides=config.hyp.model_dump())
    return {"imgsz": imgsz, "batch_size": len(SIZES), "hyp": hyp, "cache": "ram" if cache else None}


@pytest.fixture
def ours(images: list[Image], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loader, "read_split", lambda *_: images)
    return lambda **kwargs: CocoDataset("train", DATA, {}, SEED, **kwargs)


def stock_sample(stock: Stock, ticket: Ticket) -> dict[str, Any]:
    """What Ultralytics makes of a ticket: its image is that of the epoch's order, mosaic may take all but the last one
    before it, and the seeds are those of the ticket."""
    order = np.random.default_rng([SEED, ticket.epoch]).permutation(len(SIZES))
    before = range(ticket.position - len(SIZES) + 1, ticket.position)
    stock.buffer = [int(order[place % len(SIZES)]) for place in before]
    state = np.random.SeedSequence([SEED, *ticket]).generate_state(1)[0]
    random.seed(int(state))
    np.random.seed(state)
    return stock[int(order[ticket.position])]


def assert_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(batch["im_file"]) == list(expected["im_file"])
    for key in ("img", "cls", "bboxes", "batch_idx"):
        assert batch[key].dtype == expected[key].dtype, key
        assert torch.equal(batch[key], expected[key]), key


@pytest.mark.parametrize("imgsz", [320, 640])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_is_that_of_ultralytics(images: list[Image], ours: Any, recipe: str, imgsz: int) -> None:
    with_settings = settings(imgsz, RECIPES[recipe])
    dataset, stock = ours(**with_settings), Stock(images, **with_settings)
    assert isinstance(dataset.transforms, Augmentation) == ("hyp.mixup" not in RECIPES[recipe])
    for epoch in range(2):
        tickets = [Ticket(epoch, position) for position in range(len(SIZES))]
        batch = dataset.collate_fn(dataset.__getitems__(tickets))
        expected = stock.collate_fn([stock_sample(stock, ticket) for ticket in tickets])
        assert_equal(batch, expected)


def test_partners_of_kept_images_and_the_last_epochs(images: list[Image], ours: Any) -> None:
    """With train.cache mosaic takes any image; after close_mosaic there is none."""
    with_settings = settings(320, {}, cache=True)
    dataset, stock = ours(**with_settings), Stock(images, **with_settings)
    assert dataset.cache == stock.cache == "ram"
    for closes in (False, True):
        if closes:
            dataset.close_mosaic(copy(with_settings["hyp"]))
            stock.close_mosaic(copy(with_settings["hyp"]))
        tickets = [Ticket(5, position) for position in range(len(SIZES))]
        batch = dataset.collate_fn(dataset.__getitems__(tickets))
        assert_equal(batch, stock.collate_fn([stock_sample(stock, ticket) for ticket in tickets]))


def test_colours_that_are_left_to_a_gpu_make_the_same_image(ours: Any) -> None:
    dataset = ours(**settings(320, {}))
    tickets = [Ticket(0, position) for position in range(len(SIZES))]
    complete = dataset.__getitems__(tickets)
    later = dataset.view(settings(320, {})["hyp"], colours_later=True).__getitems__(tickets)
    assert later[COLOURS].shape == (len(SIZES), 3, 256)
    assert not torch.equal(later["img"], complete["img"])
    for pixels, tables in zip(later["img"].numpy(), later[COLOURS].numpy(), strict=True):
        hsv = cv2.cvtColor(pixels.transpose(1, 2, 0).copy(), cv2.COLOR_RGB2HSV)
        changed = np.stack([tables[part][hsv[..., part]] for part in range(3)], 2)
        pixels[:] = cv2.cvtColor(changed, cv2.COLOR_HSV2RGB).transpose(2, 0, 1)
    assert_equal(later, complete)


def test_a_part_of_the_canvas_that_the_warp_reads_is_never_left_unwritten(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canvas keeps what was on it: whatever that is, the samples are the same."""
    dataset = ours(**settings(320, RECIPES["some mosaics"]))
    tickets = [Ticket(epoch, position) for epoch in range(3) for position in range(len(SIZES))]
    seen = []
    for value in (0, 255):
        images = []
        for ticket in tickets:
            dataset.transforms.canvas[:] = value
            images.append(dataset[ticket]["img"])
        seen.append(torch.stack(images))
    assert torch.equal(*seen)


def test_albumentations_take_part_where_they_are_installed(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "find_spec", lambda name: name)
    assert not isinstance(ours(**settings(320, {})).transforms, Augmentation)


def test_images_are_decoded_once_an_epoch(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of four of ten images, whose partners come from it: each is read once, and the three before the first
    place, which mosaic takes from the end of the epoch, once more at most."""
    monkeypatch.setattr(loader, "MOSAIC_WINDOW", 4)
    read: list[int] = []
    read_file = CocoDataset._read
    monkeypatch.setattr(CocoDataset, "_read", lambda self, i: read.append(i) or read_file(self, i))
    dataset = ours(**{**settings(320, {}), "batch_size": 1})
    order = np.random.default_rng([SEED, 0]).permutation(len(SIZES)).tolist()
    for position in range(len(SIZES)):
        dataset[Ticket(0, position)]
    n_reads = {image: read.count(image) for image in order}
    assert [n_reads[image] for image in order[1:7]] == [1] * 6
    assert len(read) <= len(SIZES) + 4


class Numbers(Dataset[int]):
    def __getitem__(self, key: int) -> int:
        return key


def test_a_loader_process_has_as_many_batches_under_way_as_it_has_memory_for() -> None:
    """When a batch is handed out, torch has asked for `PREFETCH_BATCHES` others of each process at most, so a slot that
    comes round again belongs to a batch that has been handed out."""
    n_asked, n_processes = 0, 2

    def batches() -> Iterator[list[int]]:
        nonlocal n_asked
        for number in range(20):
            n_asked += 1
            yield [number]

    source = DataLoader(
        Numbers(), batch_sampler=list(batches()), num_workers=n_processes, prefetch_factor=PREFETCH_BATCHES
    )
    n_asked = 0
    object.__setattr__(source, "batch_sampler", batches())
    for n_before, _ in enumerate(source):
        assert n_asked - (n_before + 1) <= n_processes * PREFETCH_BATCHES
    memory = Memory()
    slots = [memory.take((2, 3, 8, 8)).data_ptr() for _ in range(2 * PREFETCH_BATCHES)]
    assert slots[:PREFETCH_BATCHES] == slots[PREFETCH_BATCHES:]
    assert len(set(slots)) == PREFETCH_BATCHES
    assert memory.take((1, 3, 8, 8)).shape == (1, 3, 8, 8)


def test_memory_that_began_with_a_short_batch_takes_whole_ones() -> None:
    """With many loader processes the first batches of one may be an epoch's last, and short."""
    memory = Memory()
    sizes = [2, 1, 1, 2, 2, 1]
    slots = [memory.take((n_images, 3, 8, 8)) for n_images in [*sizes, *[2] * PREFETCH_BATCHES]]
    assert [len(slot) for slot in slots] == [*sizes, *[2] * PREFETCH_BATCHES]
    assert slots[-1].data_ptr() == memory.slots[-1].data_ptr()


@pytest.mark.parametrize("pins", [True, False])
def test_memory_is_used_again_only_where_batches_are_copied(ours: Any, pins: bool) -> None:
    dataset = ours(**settings(320, {}))
    tickets = [[Ticket(0, position)] for position in range(len(SIZES))]
    loop = DataLoader(
        dataset, batch_sampler=tickets, num_workers=1, collate_fn=dataset.collate_fn,
        prefetch_factor=PREFETCH_BATCHES, worker_init_fn=partial(start_worker, pins=pins),
    )  # fmt: skip
    kept = [batch["img"] for batch in loop]
    files = {storage.untyped_storage().data_ptr() for storage in kept}
    assert (len(files) < len(kept)) == pins
    if not pins:
        assert torch.equal(torch.cat(kept), torch.stack([dataset[ticket]["img"] for [ticket] in tickets]))
