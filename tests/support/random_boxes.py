"""Random boxes in the layout of Ultralytics' loader."""

from __future__ import annotations

import torch


def labels(counts: list[int], largest: float) -> dict[str, torch.Tensor]:
    """Boxes of random place, class and size up to `largest` of the side; counts[i] of them on image i."""
    n = sum(counts)
    sizes = torch.rand(n, 2) * largest + 0.004
    centres = torch.rand(n, 2) * (1 - sizes) + sizes / 2
    return {
        "batch_idx": torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).float(),
        "cls": torch.randint(0, 80, (n, 1)).float(),
        "bboxes": torch.cat([centres, sizes], 1),
    }
