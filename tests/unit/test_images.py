"""Which image files are whole: decided by decoding, the same for the data stage and for all that read images."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from app.coco.images import fault, read_image
from app.core.config import UserError
from tests.support.data_fixtures import claiming_png

WIDTH, HEIGHT = 64, 48
CUT = "is cut off or damaged"
JPEG_KINDS = {
    "baseline": (),
    "progressive": (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "restart markers": (cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
}


def encode(suffix: str, options: Sequence[int] = (), flat: bool = False) -> bytes:
    noise = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return cv2.imencode(suffix, noise // 64 + 120 if flat else noise, options)[1].tobytes()


def verdict(folder: Path, content: bytes, name: str = "image.jpg") -> str:
    """What the data stage says of a file, after a look whether `read_image` says the same."""
    path = folder / name
    path.write_bytes(content)
    reason = fault(folder, name, WIDTH, HEIGHT)
    if reason:
        with pytest.raises(UserError) as error:
            read_image(path)
        assert str(error.value) == f"image {path} {reason}: restore the file"
    else:
        assert read_image(path).shape == (HEIGHT, WIDTH, 3)
    return reason


def with_thumbnail(jpeg: bytes) -> bytes:
    """The file with a small JPEG in an APP1 segment, as cameras write it."""
    block = b"Exif\0\0" + cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_jpeg_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    jpeg = encode(".jpg", JPEG_KINDS[kind])
    last_part = range(len(jpeg) - len(jpeg) // 50, len(jpeg))
    for n_bytes in [*range(4, len(jpeg), 97), *last_part]:
        assert verdict(tmp_path, jpeg[:n_bytes]) == CUT, f"{n_bytes} of {len(jpeg)} bytes"


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("wrap", [bytes, with_thumbnail])
def test_a_jpeg_whose_rest_is_zeros_is_refused(tmp_path: Path, kind: str, wrap: Callable[[bytes], bytes]) -> None:
    jpeg = wrap(encode(".jpg", JPEG_KINDS[kind], flat=True))
    assert verdict(tmp_path, jpeg) == ""
    for n_bytes in range(len(jpeg) // 2, len(jpeg), 29):
        assert verdict(tmp_path, jpeg[:n_bytes] + bytes(len(jpeg))) == CUT, f"{n_bytes} of {len(jpeg)} bytes"


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("behind", [bytes(3), bytes(5000), b"other bytes" * 99, b"\xff\xda"])
def test_bytes_behind_the_end_of_a_jpeg_are_nothing(tmp_path: Path, kind: str, behind: bytes) -> None:
    assert verdict(tmp_path, encode(".jpg", JPEG_KINDS[kind]) + behind) == ""


def test_fill_bytes_before_a_marker_are_part_of_a_jpeg(tmp_path: Path) -> None:
    jpeg = encode(".jpg")
    assert verdict(tmp_path, jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]) == ""


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff"])
def test_the_content_decides_not_the_suffix(tmp_path: Path, suffix: str) -> None:
    content = encode(suffix)
    assert verdict(tmp_path, content, "image.jpg") == ""
    assert verdict(tmp_path, content[: len(content) // 2], "image.jpg") == "cannot be decoded"
    assert verdict(tmp_path, encode(".jpg")[:-9], f"image{suffix}") == CUT


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_not_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x.jpg")
    assert fault(tmp_path, "x.jpg", WIDTH, HEIGHT) == "is a pipe, socket or device, not a file"


def claiming_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    jpeg = encode(".jpg")
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


@pytest.mark.parametrize("claiming", [claiming_png, claiming_jpeg])
def test_the_header_is_read_before_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claiming: Callable[[int, int], bytes]
) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the image was decoded"))
    for size, reason in (((30_000, 30_000), "has more pixels than"), ((9000, 9001), "has 9000 x 9001 px, the annot")):
        (tmp_path / "x.jpg").write_bytes(claiming(*size))
        assert fault(tmp_path, "x.jpg", WIDTH, HEIGHT).startswith(reason)
    (tmp_path / "x.jpg").write_bytes(claiming(30_000, 30_000))
    with pytest.raises(UserError, match="has more pixels than the 178,956,970 that are decoded"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".bmp", ".jp2"])
def test_flipped_bits_are_a_verdict(tmp_path: Path, suffix: str) -> None:
    rng, content = np.random.default_rng(0), encode(suffix)
    for number in range(30):
        spoiled = bytearray(content)
        for place in rng.integers(0, 200 if number % 2 else len(spoiled), 3):
            spoiled[place] ^= 1 << number % 8
        (tmp_path / "x.jpg").write_bytes(spoiled)
        assert "\n" not in fault(tmp_path, "x.jpg", WIDTH, HEIGHT)
