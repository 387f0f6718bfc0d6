"""Image file -> network input and output -> boxes in the image, to the pixel."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from app.coco.categories import CATEGORY_IDS
from app.coco.detections import results, select
from app.coco.images import Placement, letterbox, place, read_image, undo
from app.core.config import UserError
from tests.support.eval_fixtures import SETTINGS

GREY = np.float32(114) / np.float32(255)
ROUNDING_PX = 1e-9  # float64 there and back
FLOAT32_PX = 1e-4  # corners around centre and size of up to 640 px in float32: a few units of 6e-5


@pytest.mark.parametrize(
    ("size", "imgsz", "expected"),
    [
        ((640, 480), 640, (640, 480, 0, 80)),
        ((480, 640), 640, (480, 640, 80, 0)),
        ((161, 97), 160, (160, 97, 0, 31)),  # 97 * 160/161 = 96.4 rounds up; 63 px of padding: 31 above, 32 below
        ((97, 161), 160, (97, 160, 31, 0)),
        ((40, 30), 160, (160, 120, 0, 20)),  # scaled up
        ((500, 333), 640, (640, 427, 0, 106)),  # 426.24 rounds up
        ((3000, 1), 160, (160, 1, 0, 79)),  # a thin image keeps one pixel
        ((160, 160), 160, (160, 160, 0, 0)),
    ],
)
def test_place(size: tuple[int, int], imgsz: int, expected: tuple[int, int, int, int]) -> None:
    assert place(*size, imgsz) == Placement(*size, *expected)


def test_unscaled_image_is_copied_to_the_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (97, 160, 3), dtype=np.uint8)
    array, placement = letterbox(image, 160)
    assert (array.shape, array.dtype, placement.top) == ((3, 160, 160), np.float32, 31)
    expected = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(array[:, 31:128], expected)
    assert (array[:, :31] == GREY).all()
    assert (array[:, 128:] == GREY).all()


def test_scaled_up_rectangle_comes_back() -> None:
    """A white rectangle, doubled: in the input it covers twice its px, and undo gives its own px."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:35, 10:50] = 255
    array, placement = letterbox(image, 160)
    rows, columns = np.nonzero(array[0, 20:140] > 0.5)  # without the padding above and below
    box = np.array([[columns.min(), rows.min() + 20, columns.max() + 1, rows.max() + 21]])
    np.testing.assert_allclose(undo(box, placement), [[10, 20, 40, 15]], atol=ROUNDING_PX)


@pytest.mark.parametrize("size", [(640, 480), (161, 97), (97, 161), (40, 30), (500, 333), (333, 500), (1000, 3)])
def test_undo_is_the_inverse(size: tuple[int, int]) -> None:
    p = place(*size, 160)
    corners = np.sort(np.random.default_rng(1).uniform(0, 1, (50, 2, 2)), axis=1) * size
    inside = corners * [p.new_width / p.width, p.new_height / p.height] + [p.left, p.top]
    expected = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
    np.testing.assert_allclose(undo(inside.reshape(-1, 4), p), expected, atol=ROUNDING_PX)


def test_undo_clips_to_the_image() -> None:
    boxes = np.array([[-20.0, -5.0, 200.0, 200.0], [0.0, 0.0, 10.0, 10.0]])  # the second lies in the padding
    np.testing.assert_array_equal(undo(boxes, place(80, 60, 160)), [[0, 0, 80, 60], [0, 0, 5, 0]])


def end2end_by_hand(raw: np.ndarray, max_det: int) -> np.ndarray:
    """The same choice by sorting everything: anchors by best class, then as many anchor-class pairs of those."""
    scores = raw[4:]
    max_det = min(max_det, raw.shape[1])
    anchors = sorted(range(raw.shape[1]), key=lambda a: -scores[:, a].max())[:max_det]
    pairs = sorted(((scores[c, a], a, c) for a in anchors for c in range(80)), reverse=True)[:max_det]
    rows = []
    for value, a, c in pairs:
        cx, cy, w, h = raw[:4, a]
        rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, value, c])
    return np.array(rows, np.float32)


@pytest.mark.parametrize("n_anchors", [21, 8400])
def test_raw_and_end2end_give_the_same_detections(n_anchors: int) -> None:
    rng = np.random.default_rng(2)
    raw = rng.uniform(1, 640, (84, n_anchors)).astype(np.float32)
    raw[4:] = rng.beta(0.1, 8, (80, n_anchors))
    raw[4:6, 7] = 0.99, 0.98  # one anchor gives two classes
    from_raw = select(raw, "raw", SETTINGS)
    from_end2end = select(end2end_by_hand(raw, SETTINGS.max_det), "end2end", SETTINGS)
    np.testing.assert_array_equal(from_raw[:, 4:], from_end2end[:, 4:])
    np.testing.assert_allclose(from_raw[:, :4], from_end2end[:, :4], atol=FLOAT32_PX)
    assert from_raw[:2, 5].tolist() == [0, 1]


def test_select_keeps_what_is_above_conf_and_the_best() -> None:
    rows = np.array([[0, 0, 1, 1, score, 0] for score in (0.2, 0.5, 0.25, 0.9)], np.float32)
    settings = SETTINGS.model_copy(update={"conf": 0.25, "max_det": 2})
    assert select(rows, "end2end", settings)[:, 4].tolist() == [np.float32(0.9), 0.5]
    settings = SETTINGS.model_copy(update={"conf": 0.25})
    assert len(select(rows, "end2end", settings)) == 2  # 0.25 itself is dropped


@pytest.mark.parametrize(("contract", "shape"), [("raw", (84, 400)), ("end2end", (300, 6))])
def test_output_that_is_not_finite_is_refused(contract: str, shape: tuple[int, int]) -> None:
    output = np.full(shape, 0.1, np.float32)
    output[4, 4] = np.nan
    with pytest.raises(UserError, match="not finite"):
        select(output, contract, SETTINGS)


def test_results_are_coco_rows() -> None:
    detections = np.array([[10, 30, 50, 70, 0.1, 79], [0, 20, 1, 21, 0.05, 0]], np.float32)
    first, second = results(17, detections, place(80, 60, 160))
    expected_score = float(np.float32(0.1))
    assert first == {"image_id": 17, "category_id": 90, "bbox": [5.0, 5.0, 20.0, 20.0], "score": expected_score}
    assert (second["category_id"], second["bbox"]) == (1, [0.0, 0.0, 0.5, 0.5])
    assert len(CATEGORY_IDS) == 80


def test_grey_image_gets_three_channels(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((3, 5), 77, np.uint8))
    image = read_image(tmp_path / "grey.png")
    assert image.shape == (3, 5, 3)
    assert (image == 77).all()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    """Orientation 6: the stored columns are the rows that one sees."""
    jpeg = cv2.imencode(".jpg", np.zeros((24, 40, 3), np.uint8))[1].tobytes()
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    block = b"Exif\0\0" + tiff
    path = tmp_path / "rotated.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:])
    assert read_image(path).shape == (40, 24, 3)


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be read"), (b"", "is empty"), (b"text", "decoded")])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"broken\.png.*{reason}"):
        read_image(path)
