"""New hue, saturation and value of a batch of training images in one kernel, with OpenCV's own results.

Every result of cv2.cvtColor is in two tables, which cv2.cvtColor itself has filled: BGR -> HSV for all 256^3 colours,
HSV -> RGB for all 180 * 256^2. So an image has the bytes that the installed OpenCV gives, whichever that is. The tables
take 114 MB of the GPU's memory.
"""

# Triton's types do not describe a launch.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import triton
import triton.language as tl

from app.train.augment import HUES, N_LEVELS

BLOCK = 1024  # pixels of a program
ROW_PX = 4096  # of the tables while OpenCV fills them

_N_LEVELS = tl.constexpr(N_LEVELS)
_BYTE = tl.constexpr(255)


@dataclass(frozen=True)
class Palette:
    """OpenCV's colours, a pixel an int32: `hsv_of` at blue + 256 green + 65536 red has hue + 256 saturation + 65536
    value; `rgb_of` at value + 256 saturation + 65536 hue has red + 256 green + 65536 blue."""

    hsv_of: torch.Tensor
    rgb_of: torch.Tensor


def palette(imgsz: int, device: torch.device) -> Palette | None:
    """The colours of images with rows of `imgsz` px; None where OpenCV's depend on the place in such a row.

    OpenCV 5.0.0 converts HSV in blocks of 32 px, and what is left of a row in other code with other results. `imgsz` is
    a multiple of 32, so nothing is left. That is asked of OpenCV here, because its blocks are those of a CPU.
    """
    bgr = _all_colours(N_LEVELS)[..., :3].copy()
    hsv = _all_colours(HUES)[..., 2::-1].copy()
    tables = []
    for source, code in ((bgr, cv2.COLOR_BGR2HSV), (hsv, cv2.COLOR_HSV2RGB)):
        found = cv2.cvtColor(source, code).reshape(-1, 3)
        n_whole = len(found) // imgsz * imgsz
        in_rows = cv2.cvtColor(source.reshape(-1, 3)[:n_whole].reshape(-1, imgsz, 3), code)
        if not np.array_equal(in_rows.reshape(-1, 3), found[:n_whole]):
            return None
        packed = cv2.cvtColor(found[None], cv2.COLOR_BGR2BGRA).view(np.int32).ravel()
        tables.append(torch.from_numpy(packed).to(device))
    return Palette(*tables)


def _all_colours(n: int) -> np.ndarray:
    """The bytes of 0 .. n * 65536 - 1, lowest first: uint8 [n * 16,ROW_PX,4]."""
    return np.arange(n << 16, dtype="<u4").view(np.uint8).reshape(-1, ROW_PX, 4)


def recolour(
    images: torch.Tensor, colours: torch.Tensor, table: Palette, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Images uint8 [N,3,H,W] RGB, contiguous, with new colours.

    Args:
        colours: uint8 [N,3,256]: new hue, saturation and value for each old one.
        out: like `images`; gets the result.
    """
    out = torch.empty_like(images) if out is None else out
    n_pixels = images[0, 0].numel()
    grid = (triton.cdiv(n_pixels, BLOCK), len(images))
    with torch.cuda.device_of(images):
        _recolour[grid](images, colours, table.hsv_of, table.rgb_of, out, n_pixels, BLOCK=BLOCK)
    return out


@triton.jit
def _recolour(images, colours, hsv_of, rgb_of, out, n_pixels, BLOCK: tl.constexpr):  # noqa: PLR0913 - a kernel
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pixel < n_pixels
    red = image * 3 * n_pixels + pixel
    green, blue = red + n_pixels, red + 2 * n_pixels
    place = tl.load(images + blue, exists, 0).to(tl.int32)
    place += tl.load(images + green, exists, 0).to(tl.int32) << 8
    place += tl.load(images + red, exists, 0).to(tl.int32) << 16
    hsv = tl.load(hsv_of + place, exists, 0)
    own = colours + image * 3 * _N_LEVELS
    hue = tl.load(own + (hsv & _BYTE), exists, 0).to(tl.int32)
    saturation = tl.load(own + _N_LEVELS + (hsv >> 8 & _BYTE), exists, 0).to(tl.int32)
    value = tl.load(own + 2 * _N_LEVELS + (hsv >> 16 & _BYTE), exists, 0).to(tl.int32)
    rgb = tl.load(rgb_of + (value + (saturation << 8) + (hue << 16)), exists, 0)
    tl.store(out + red, (rgb & _BYTE).to(tl.uint8), exists)
    tl.store(out + green, (rgb >> 8 & _BYTE).to(tl.uint8), exists)
    tl.store(out + blue, (rgb >> 16 & _BYTE).to(tl.uint8), exists)
