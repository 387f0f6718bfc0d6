"""Which images mosaic puts together: those that the same loader process has read just before, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.train import loader
from app.train.batches import Ticket
from app.train.loader import CocoDataset
from app.train.ptq import bn_images
from tests.support.settle import settle

N_IMAGES, BATCH = 36, 2
WINDOW = 16  # images: eight batches, the one that is read now among them
SETTINGS = {"data.n_train": N_IMAGES, "data.n_val": 1, "train.batch": BATCH, "hyp.mosaic": 1}


@pytest.fixture(scope="module")
def dataset(runs_dir: Path) -> CocoDataset:
    config, run = settle(runs_dir, "mosaic", "fp16", SETTINGS)
    return bn_images(config, run, workers=0).dataset


@pytest.mark.parametrize("n_workers", [1, 2])
def test_partners_are_the_images_that_the_process_has_read_before(
    dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch, n_workers: int
) -> None:
    """Batches go round the processes: with two, one reads images 0 1 4 5 8 9 ... of the epoch's order, 18 in all."""
    monkeypatch.setattr(loader, "get_worker_info", lambda: SimpleNamespace(num_workers=n_workers))
    load_image = CocoDataset.load_image
    loaded: list[int] = []

    def look(self: CocoDataset, i: int, *args: Any, **kwargs: Any) -> Any:
        loaded.append(i)
        return load_image(self, i, *args, **kwargs)

    monkeypatch.setattr(CocoDataset, "load_image", look)
    distances: set[int] = set()
    for epoch in (0, 1):
        for worker in range(n_workers):
            own, partners = [], []
            for position in range(N_IMAGES):
                if position // BATCH % n_workers == worker:
                    loaded.clear()
                    dataset[Ticket(epoch, position)]
                    assert len(loaded) == 4  # a mosaic of 2 x 2
                    own.append(loaded[0])
                    partners.append(loaded[1:])
                    assert sum(image is not None for image in dataset.ims) <= WINDOW
            n_own = N_IMAGES // n_workers
            assert len(set(own)) == n_own
            for place, images in enumerate(partners):  # the first ones have theirs from the end of the epoch
                distances |= {(place - own.index(image)) % n_own for image in images}
    assert distances == set(range(1, WINDOW))
