"""What training reads: the checked view through Ultralytics' augmentation.

A sample is a function of its ticket alone: (epoch, position in the epoch), the seed and the number of loader processes
decide image, mosaic partners and augmentation, so that a training can resume anywhere.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
from collections import deque
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch.utils.data import default_collate, get_worker_info
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset

from app.coco.dataset import SPLITS
from app.coco.images import place, read_image
from app.core.config import UserError
from app.core.memory import available_bytes
from app.data.view import read_split
from app.train.augment import N_PARTNERS, Augmentation, Boxes, Sample, takes
from app.train.batches import BEGINNING, STRIDE, WHOLE, EpochBatches, Part, Place, Ticket, epoch_order

MOSAIC_WINDOW = 8  # batches of recently read images from which mosaic takes its partners, as Ultralytics has it
PREFETCH_BATCHES = 4  # each loader process keeps ahead
COLOURS = "colours"  # entry of a batch whose images have their old colours: Sample.colours, uint8 [N,3,256]
WAIT_S = 600.0  # for one batch; longer means that a loader process hangs
log = logging.getLogger(__name__)
# A forked process has its parent's garbage. It may hold CUDA graphs of a training that has ended: to free one there
# aborts the process. So the collector of a child leaves alone what was there before the fork.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def dataset_of(folder: Path, classes: list[str]) -> dict[str, Any]:
    """What Ultralytics' trainer and dataset know of a dataset, as its check_det_dataset gives it of a coco.yaml.

    `folder` is the run's dataset/; the lists of images there are only named: their images come from the view.
    """
    names = dict(enumerate(classes))
    lists = {split: str(folder / f"{split}.txt") for split in SPLITS}
    return {"path": folder, **lists, "names": names, "nc": len(names), "channels": 3}


class UnreadableImage(UserError):
    """An image that a loader process cannot read. Torch makes the error anew with a traceback for its text."""

    def __init__(self, text: str) -> None:
        line = text.strip().rpartition("\n")[2]
        super().__init__(line.removeprefix(f"{__name__}.{type(self).__name__}: "))


class Memory:
    """Shared memory of a loader process for the images of its batches, used again and again.

    Fresh pages cost more time than a sample's bytes in them. A process has `PREFETCH_BATCHES` batches under way at
    most: torch asks it for another one when it hands one out (torch/utils/data/dataloader.py _process_data, 2.10). By
    then the thread that pins memory has copied that one, so this is right for loaders that pin, and for no others.
    """

    def __init__(self) -> None:
        self.slots: deque[torch.Tensor] = deque()

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A uint8 tensor in the slot that was taken longest ago; one that began with an epoch's short batch grows."""
        slot = self.slots.popleft() if len(self.slots) == PREFETCH_BATCHES else None
        if slot is None or len(slot) < shape[0]:
            slot = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self.slots.append(slot)
        return slot[: shape[0]]


class CocoDataset(YOLODataset):
    """YOLODataset whose labels come from the checked view and whose train samples are functions of their tickets.

    Ultralytics' own scan would pickle a cache beside the labels, drop images silently and rewrite JPEGs in place
    (ultralytics/data/utils.py check_image); its samples depend on what the loader process did before (8.4.190).
    """

    colours_later = False  # the images keep their colours, and a batch has the entry COLOURS

    def __init__(self, split: str, data: dict[str, Any], provenance: dict[str, Any], seed: int, **kwargs: Any) -> None:
        """`split` is train, which is augmented, or val; kwargs: imgsz, batch_size, hyp and cache of YOLODataset, and
        n_sharing, the number of processes that share this machine's memory."""
        self.provenance, self.split, self.seed = provenance, split, seed
        self.stream_of: tuple[int, int, int] | None = None  # epoch, worker, number of workers
        self.recent: dict[int, None] = {}  # decoded images, in order
        self.boxes: Boxes | None = None
        self.memory: Memory | None = None
        train = split == "train"
        in_ram, n_sharing = kwargs.pop("cache", None) == "ram", kwargs.pop("n_sharing", 1)
        super().__init__(
            img_path=data[split], data=data, task="detect", stride=STRIDE, prefix=f"{split}: ",
            augment=train, rect=not train, pad=0.0 if train else 0.5, **kwargs,
        )  # fmt: skip
        self.n_recent = min(self.ni, MOSAIC_WINDOW * self.batch_size, 1000)
        self.max_buffer_length = sys.maxsize  # load_image below lets go of images, not BaseDataset's own
        if in_ram:
            self.cache = "ram"  # where memory does not suffice too: it says from which images mosaic takes partners
            if self._fit_into(available_bytes() // n_sharing):
                self.cache_images()
        del self.images  # `labels` has them

    def _fit_into(self, room: int) -> bool:
        """Whether the scaled images fit twice into so many bytes. BaseDataset's own asks what the machine has, which
        a container may not have, and which ranks share."""
        sizes = (image.shape_hw for image in self.images)
        placed = [place(width, height, cast(int, self.imgsz)) for height, width in sizes]
        needed = sum(3 * image.new_width * image.new_height for image in placed)
        if 2 * needed > room:
            log.warning(
                "train.cache: the %s images take %.2f GiB, more than half of the %.2f GiB that there are for them: "
                "they are read anew for every sample, take train.cache=false", self.split, needed / 2**30, room / 2**30,
            )  # fmt: skip
        return 2 * needed <= room

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        """Paths in the view; BaseDataset's own reads the list `img_path`."""
        self.images = read_split(self.provenance, self.split)
        return [image.path for image in self.images]

    def get_labels(self) -> list[dict[str, Any]]:
        """One dict an image in the layout of BaseDataset.get_labels; boxes are xywh, normalised."""
        return [
            {
                "im_file": image.path, "shape": image.shape_hw, "segments": [], "keypoints": None,
                "cls": image.labels[:, :1], "bboxes": image.labels[:, 1:], "normalized": True, "bbox_format": "xywh",
            }
            for image in self.images
        ]  # fmt: skip

    def build_transforms(self, hyp: Any) -> Any:
        """For training an Augmentation, where it does all that `hyp` asks for, else Ultralytics' own transforms."""
        if not self.augment or not takes(hyp):
            return super().build_transforms(hyp)
        self.boxes = self.boxes or Boxes(self.labels)
        return Augmentation(cast(int, self.imgsz), hyp, self.boxes, self._pixels, self.colours_later)

    def view(self, hyp: Any, colours_later: bool = False) -> CocoDataset:
        """A dataset that shares this one's images, with other augmentation."""
        other = copy(self)
        other.colours_later = colours_later
        other.transforms = other.build_transforms(hyp)
        return other

    def __getitems__(self, keys: list[Any]) -> Any:
        """What `collate_fn` makes a batch of: for tickets where an Augmentation makes the samples, the batch itself."""
        if not isinstance(keys[0], Ticket) or not isinstance(self.transforms, Augmentation):
            return [self[key] for key in keys]
        shape = (len(keys), 3, *[cast(int, self.imgsz)] * 2)
        images = self.memory.take(shape) if self.memory else torch.empty(shape, dtype=torch.uint8)
        samples = [self._sample(ticket, image) for ticket, image in zip(keys, images.numpy(), strict=True)]
        counts = [len(sample.classes) for sample in samples]
        batch = {
            "img": images,
            "im_file": [self.im_files[sample.image] for sample in samples],
            "cls": torch.from_numpy(np.concatenate([sample.classes for sample in samples])),
            "bboxes": torch.from_numpy(np.concatenate([sample.boxes for sample in samples])),
            "batch_idx": torch.from_numpy(np.repeat(np.arange(len(keys), dtype=np.float32), counts)),
        }
        colours = [sample.colours for sample in samples if sample.colours is not None]
        return {**batch, COLOURS: torch.from_numpy(np.stack(colours))} if colours else batch

    @staticmethod
    def collate_fn(batch: Any) -> dict[str, Any]:
        """A batch, from what `__getitems__` gives. A loader process writes the images into shared memory at once.

        Ultralytics' own stacks them elsewhere first, and they are copied once more when the batch is sent (8.4.190).
        """
        if isinstance(batch, dict):
            return batch
        images = default_collate([sample.pop("img") for sample in batch])
        return {"img": images, **YOLODataset.collate_fn(batch)}

    def __getitem__(self, key: int | Ticket) -> dict[str, Any]:
        """Sample of a ticket (training) or of an image number (validation)."""
        if not isinstance(key, Ticket):
            return super().__getitem__(key)
        if isinstance(self.transforms, Augmentation):
            batch = self.__getitems__([key])
            return {**batch, "img": batch["img"][0], "im_file": batch["im_file"][0]}
        image, window = self._begin_sample(key)
        self.buffer = self.stream.take(window, mode="wrap").tolist()
        return super().__getitem__(image)

    def _sample(self, ticket: Ticket, out: np.ndarray) -> Sample:
        image, window = self._begin_sample(ticket)

        def partners() -> list[int]:
            if self.cache == "ram":
                return [random.randint(0, self.ni - 1) for _ in range(N_PARTNERS)]
            return [int(self.stream[place % len(self.stream)]) for place in random.choices(window, k=N_PARTNERS)]

        return cast(Augmentation, self.transforms)(image, partners, out)

    def _begin_sample(self, ticket: Ticket) -> tuple[int, range]:
        """Chooses the stream of a ticket, lets go of images that have left the window, and sets all seeds.

        Returns:
            the ticket's image, and the window: the places in the stream of what mosaic may put beside it.
        """
        info = get_worker_info()
        batch, in_batch = divmod(ticket.position, self.batch_size)
        n_workers = info.num_workers if info else 1
        is_new = self._choose_stream(ticket.epoch, batch % n_workers, n_workers)
        at = batch // n_workers * self.batch_size + in_batch  # place in the stream
        n_partners = max(min(self.n_recent, len(self.stream)) - 1, 1)
        window = range(at - n_partners, at)
        self._forget(window, is_new)
        state = int(np.random.SeedSequence([self.seed, *ticket]).generate_state(1)[0])
        random.seed(state)
        np.random.seed(state)
        return int(self.stream[at % len(self.stream)]), window

    def _choose_stream(self, epoch: int, worker: int, n_workers: int) -> bool:
        """Sets `stream`, the images that a loader process reads in an epoch, in order: batches go round the workers.

        Mosaic partners are taken from a worker's own stream: those images are decoded already. At the beginning of an
        epoch the window of partners wraps to the end of the stream.

        Returns:
            whether it is another stream than before.
        """
        if self.stream_of == (epoch, worker, n_workers):
            return False
        self.stream_of = (epoch, worker, n_workers)
        order = epoch_order(self.ni, self.seed, epoch)
        batches = np.arange(self.ni) // self.batch_size
        self.stream = order[batches % n_workers == worker]
        return True

    def _forget(self, window: range, is_new: bool) -> None:
        """Lets go of decoded images that are not in the window, given as places in the stream: all of them in a new
        stream, else the one that has just left it."""
        gone: list[int] = []
        if is_new:
            kept = set(self.stream.take(window, mode="wrap").tolist())
            gone = [image for image in self.recent if image not in kept]
        elif len(self.stream) > len(window) + 1:
            gone = [int(self.stream[(window.start - 1) % len(self.stream)])]
        for image in gone:
            if image in self.recent:
                del self.recent[image]
                cast(list[Any], self.ims)[image] = None

    def load_image(self, i: int, rect_mode: bool = True, resize_short: bool = False) -> Any:
        """An image with its long side scaled to imgsz, its own height and width, and those after the scaling.

        As BaseDataset.load_image (8.4.190) for these arguments, but the file is read as everywhere else. Ultralytics
        would prefer an .npy file beside the image, whatever is in it, and overwrite or delete it.

        Decoded images of training are kept for mosaic, `n_recent` at most.
        """
        images, sizes, new_sizes = cast(tuple[list[Any], ...], (self.ims, self.im_hw0, self.im_hw))
        kept = images[i]
        if kept is not None:
            return kept, sizes[i], new_sizes[i]
        image = self._read(i)
        if self.augment and self.cache != "ram":
            images[i], sizes[i], new_sizes[i] = image
            self.recent[i] = None
            if len(self.recent) > self.n_recent:
                oldest = next(iter(self.recent))
                del self.recent[oldest]
                images[oldest] = None
        return image

    def _pixels(self, i: int) -> np.ndarray:
        return self.load_image(i)[0]

    def _read(self, i: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Decodes and scales an image.

        Raises:
            UnreadableImage: its file has gone, or was damaged, since the data stage looked at it.
        """
        try:
            pixels = read_image(Path(self.im_files[i]))
        except UserError as error:
            raise UnreadableImage(str(error)) from error
        height, width = pixels.shape[:2]
        placement = place(width, height, self.imgsz)
        new_hw = placement.new_height, placement.new_width
        if new_hw != (height, width):
            pixels = cv2.resize(pixels, new_hw[::-1], interpolation=cv2.INTER_LINEAR)
        return pixels, (height, width), new_hw


def train_loader(
    dataset: CocoDataset,
    workers: int,
    pin_memory: bool,
    start: Place = BEGINNING,
    part: Part = WHOLE,
) -> InfiniteDataLoader:
    """Loader of shuffled batches, or of this rank's part of each, from `start` on without an end.

    Its `batch_sampler.sampler.start(epoch, batch)` together with `reset()` begins anywhere.
    """
    batch_size = min(dataset.batch_size, dataset.ni)
    batches = EpochBatches(dataset.ni, batch_size, part, start)
    batches.check_batchnorm(cast(int, dataset.imgsz))
    loader = InfiniteDataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        timeout=WAIT_S if workers else 0,
        pin_memory=pin_memory,
        collate_fn=dataset.collate_fn,
        worker_init_fn=partial(start_worker, pins=pin_memory and torch.cuda.is_available()),
    )
    # DataLoader has none beside a batch sampler; Ultralytics' trainer asks for it (_build_train_pipeline, 8.4.190).
    object.__setattr__(loader, "batch_size", batch_size)
    return loader


def limit_wait(loader: InfiniteDataLoader) -> InfiniteDataLoader:
    """Gives a loader of Ultralytics' making, before it is first used, what train_loader has: no endless wait."""
    if loader.num_workers:
        loader.timeout, loader.worker_init_fn = WAIT_S, start_worker
    return loader


def start_worker(worker: int, pins: bool = False) -> None:
    """Signals are the trainer's business: Ctrl-C and torchrun's reach its whole process group, which is left here.

    Args:
        pins: the loader copies every batch into pinned memory.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    info = get_worker_info()
    if info and pins:
        cast(CocoDataset, info.dataset).memory = Memory()
