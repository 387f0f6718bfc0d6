"""Which images make a batch: tickets, epochs and the parts of ranks, as functions of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from app.core.config import UserError

STRIDE = 32  # px of the input to a px of the network's smallest map
LABELS = ("batch_idx", "cls", "bboxes")  # entries of a batch that have a row for every object


class Ticket(NamedTuple):
    """What to read: `position` counts the images of an epoch in its shuffled order."""

    epoch: int
    position: int


class Place(NamedTuple):
    """A batch of an epoch, both counted from 0."""

    epoch: int
    batch: int


class Part(NamedTuple):
    """The share of one of n ranks: of a batch of b images those from b * rank // n to b * (rank + 1) // n."""

    rank: int
    n: int


BEGINNING = Place(0, 0)
WHOLE = Part(0, 1)


class EpochBatches(Sampler[list[Ticket]]):
    """Tickets of batch after batch, epoch after epoch; a pass of `iter` gives what is left of an epoch.

    Args:
        n_images: of the dataset.
        batch_size: of a batch, over all ranks.
        part: of each batch.
        start: where the first pass begins.

    Raises:
        UserError: a rank would get nothing of an epoch's last batch.
    """

    def __init__(self, n_images: int, batch_size: int, part: Part = WHOLE, start: Place = BEGINNING) -> None:
        self.n_images, self.batch_size, self.part = n_images, batch_size, part
        self.n_last = n_images % batch_size or batch_size
        if self.n_last < part.n:
            raise UserError(
                f"train.batch={batch_size} leaves {self.n_last} of {n_images} images for the last batch of an epoch, "
                f"fewer than {part.n} processes: choose another train.batch, or fewer devices"
            )
        self.start(*start)

    def check_batchnorm(self, imgsz: int) -> None:
        """BatchNorm needs two values a channel, and its smallest map has one value for every `STRIDE` px of an image.

        Raises:
            UserError: a rank would get one value a channel in an epoch's last batch.
        """
        n_smallest = self.n_last // self.part.n
        if n_smallest * (imgsz // STRIDE) ** 2 < 2:
            raise UserError(
                f"train.imgsz={imgsz} with {n_smallest} image for a process in the last batch of an epoch "
                f"({self.n_images} images, train.batch={self.batch_size}) leaves BatchNorm one value a channel: choose "
                f"another train.batch or data.n_train, or train.imgsz={imgsz + STRIDE}"
            )

    def start(self, epoch: int, batch: int) -> None:
        """The next pass begins at this batch of `epoch`, both counted from 0."""
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        return -(-self.n_images // self.batch_size)

    @property
    def n_own(self) -> int:
        """Images of this rank's part of a full batch."""
        rank, n = self.part
        return self.batch_size * (rank + 1) // n - self.batch_size * rank // n

    def __iter__(self) -> Iterator[list[Ticket]]:
        epoch, first = self.epoch, self.batch
        self.start(epoch + 1, 0)
        return (self._tickets(epoch, batch) for batch in range(first, len(self)))

    def _tickets(self, epoch: int, batch: int) -> list[Ticket]:
        start = batch * self.batch_size
        size = min(self.batch_size, self.n_images - start)
        rank, n = self.part
        own = range(start + size * rank // n, start + size * (rank + 1) // n)
        return [Ticket(epoch, position) for position in own]


def epoch_order(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(n_images) that an epoch reads its images in, int64 [n_images]."""
    return np.random.default_rng([seed, epoch]).permutation(n_images)


def first_images(batch: dict[str, Any], n_images: int) -> dict[str, Any]:
    """A smaller batch of the first images, as the last one of an epoch may be."""
    is_kept = batch["batch_idx"] < n_images
    labels = {name: batch[name][is_kept] for name in LABELS}
    return {**batch, **labels, "img": batch["img"][:n_images]}
