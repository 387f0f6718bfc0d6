"""The colour kernel in Triton's interpreter against OpenCV, byte for byte: all 256^3 colours, and whole batches.

The interpreter has to be chosen before Triton is imported, so the tests run this file as a script.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from app.train import colours
from app.train.colours import Palette, palette, recolour
from tests.support.interpreter import run_in_interpreter

IMGSZ = 320
CPU = torch.device("cpu")


def test_the_kernel_gives_opencvs_bytes_in_the_interpreter() -> None:
    done = run_in_interpreter(__file__)
    assert done.returncode == 0, done.stderr


def test_no_palette_where_opencv_treats_the_end_of_a_row_in_another_way() -> None:
    """So it does in rows that are no multiple of 32 px, in version 5.0.0; no training has such images."""
    assert palette(40, CPU) is None


def test_no_palette_where_one_value_depends_on_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = cv2.cvtColor

    def end_of_row(pixels: np.ndarray, code: int, **options: Any) -> np.ndarray:
        found = convert(pixels, code, **options)
        if code == cv2.COLOR_BGR2HSV and pixels.shape[1] == IMGSZ:
            found[77, -1, 2] ^= 1
        return found

    monkeypatch.setattr(colours.cv2, "cvtColor", end_of_row)
    assert palette(IMGSZ, CPU) is None


# --- the script ------------------------------------------------------------------------------------------------------


def by_opencv(images: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Images [N,3,H,W] RGB as a loader process makes them: cv2, LUT, cv2."""
    changed = []
    for image, table in zip(images, tables, strict=True):
        bgr = np.ascontiguousarray(image[::-1].transpose(1, 2, 0))
        hsv = cv2.LUT(cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV), np.ascontiguousarray(table.T)[None])
        changed.append(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).transpose(2, 0, 1))
    return np.stack(changed)


def tables_of(n: int, rng: np.random.Generator) -> np.ndarray:
    """New hues below 180, new saturations and values, [n,3,256]."""
    tables = rng.integers(0, 256, (n, 3, 256), dtype=np.uint8)
    tables[:, 0] %= colours.HUES
    return tables


def all_colours(table: Palette) -> None:
    """As one image of 4096 x 4096 px, under tables that reach as many hues, saturations and values as there are."""
    numbers = np.arange(1 << 24, dtype="<u4").view(np.uint8).reshape(1, 4096, 4096, 4)
    images = np.ascontiguousarray(numbers[..., :3].transpose(0, 3, 1, 2))
    tables = tables_of(1, np.random.default_rng(0))
    found = recolour(torch.from_numpy(images), torch.from_numpy(tables), table)
    assert np.array_equal(found.numpy(), by_opencv(images, tables))


def batches(table: Palette) -> None:
    """Images of noise, each with tables of its own; sizes that fill no block; into a tensor that is there."""
    rng = np.random.default_rng(1)
    for n, height in ((3, 5), (1, 64)):
        images, tables = rng.integers(0, 256, (n, 3, height, IMGSZ), dtype=np.uint8), tables_of(n, rng)
        out = torch.full(images.shape, 7, dtype=torch.uint8)
        assert recolour(torch.from_numpy(images), torch.from_numpy(tables), table, out) is out
        assert np.array_equal(out.numpy(), by_opencv(images, tables))


def all_results(table: Palette) -> None:
    """RGB of every hue, saturation and value, in rows of two other lengths."""
    numbers = np.arange(colours.HUES << 16, dtype="<u4").view(np.uint8).reshape(-1, 4)
    for row in (32, 640):
        hsv = np.ascontiguousarray(numbers[:, 2::-1]).reshape(-1, row, 3)
        rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(-1, 3)
        assert np.array_equal(table.rgb_of.numpy().view(np.uint8).reshape(-1, 4)[:, :3], rgb)


if __name__ == "__main__":
    made = palette(IMGSZ, CPU)
    assert made
    all_results(made)
    batches(made)
    colours.BLOCK = 1 << 20  # the interpreter takes its time for every program
    all_colours(made)
