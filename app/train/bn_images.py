"""The train images that BatchNorm is re-estimated on: the mixture that the averaged weights have seen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from itertools import islice
from typing import Any

import torch

from app.core.config import Config
from app.train.batches import Place
from app.train.loader import CocoDataset, train_loader
from app.train.step import ema_decay

BN_EPOCH = 2**31 - 1  # never trained: the tickets of these batches
N_PINNING = 2  # one thread is not always as fast as the GPU (runs/LOG.md)


class BnImages:
    """The same train batches at every validation. Kept as bytes, bn_batches * batch * 3 * imgsz^2 (2 GB by default).

    Args:
        dataset: train images; whether mosaic is on in it does not matter, and nothing of it is changed.
        hyp: Ultralytics' arguments: the augmentation while mosaic is on, and the number of loader processes.
        config: of the training.
    """

    def __init__(self, dataset: CocoDataset, hyp: Any, config: Config) -> None:
        self.dataset, self.hyp, self.config = dataset, hyp, config
        self.drawn: list[torch.Tensor] = []
        self.n_mosaic = 0

    def after(self, epoch: int) -> list[torch.Tensor]:
        """uint8 [N,3,imgsz,imgsz] each, for the weights after `epoch` (from 0), which does not fall from call to call.

        The first ones are drawn with mosaic: as many as `mosaic_share` says. The others without.
        """
        n_batches = -(-self.dataset.ni // self.dataset.batch_size)
        n = min(self.config.train.bn_batches, n_batches)
        n_mosaic = round(n * mosaic_share(self.config, n_batches, epoch))
        if self.drawn:
            self.drawn[n_mosaic : self.n_mosaic] = self._draw(n_mosaic, self.n_mosaic, mosaic=False)
        else:
            self.drawn = [*self._draw(0, n_mosaic, mosaic=True), *self._draw(n_mosaic, n, mosaic=False)]
        self.n_mosaic = n_mosaic
        return self.drawn

    def _draw(self, first: int, end: int, mosaic: bool) -> list[torch.Tensor]:
        """Batches first..end-1 of BN_EPOCH."""
        if first == end:
            return []
        view = self.dataset.view(copy(self.hyp))
        if not mosaic:
            view.close_mosaic(copy(self.hyp))
        loader = train_loader(view, self.hyp.workers, pin_memory=False, start=Place(BN_EPOCH, first))
        # Copies: what a loader process has handed over stays in shared memory, which is small in a container.
        images = [batch["img"].clone() for batch in islice(loader, end - first)]
        loader.close()
        return images


def mosaic_share(config: Config, n_batches: int, epoch: int) -> float:
    """Weight of the steps with mosaic in the EMA after `epoch` (from 0): the product of its decays since the closing.

    Statistics of the new images alone do not fit weights that are still averaged over the old ones (runs/LOG.md).
    """
    closes_at = max(config.train.epochs - config.hyp.close_mosaic, 0)
    if epoch < closes_at or not config.hyp.close_mosaic:
        return 1.0
    n_steps = -(-n_batches // max(round(config.hyp.nbs / config.train.batch), 1))  # of an epoch
    if closes_at == 0:
        return 0.0
    updates = range(closes_at * n_steps + 1, (epoch + 1) * n_steps + 1)
    return math.prod(ema_decay(config.train, n) for n in updates)


def pinned_ahead(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The batches in pinned memory, copied there by N_PINNING threads while those before are used.

    A copy to a GPU from other memory waits until the GPU has done all that was launched before.
    """
    ready: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(N_PINNING) as pool:
        for batch in batches:
            ready.append(pool.submit(batch.pin_memory))
            if len(ready) > N_PINNING:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()
