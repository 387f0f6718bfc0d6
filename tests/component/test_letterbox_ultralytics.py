"""Our letterbox is to the pixel that of Ultralytics' validation, and raw and end2end choose as its head does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics.data.augment import LetterBox
from ultralytics.data.base import BaseDataset
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import ops

from app.coco.detections import select
from app.coco.images import letterbox, undo
from app.core.config import load

SIZES = [(640, 480), (480, 640), (161, 97), (97, 161), (160, 160), (40, 30), (500, 333), (333, 500), (300, 1), (1, 300)]
FLOAT32_PX = 1e-4  # Ultralytics computes boxes in float32; their size is up to 640 px


def loaded_by_ultralytics(path: str, imgsz: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """Its own load_image on one file, without a dataset around it."""
    dataset = SimpleNamespace(
        ims=[None], im_files=[path], npy_files=[SimpleNamespace(exists=lambda: False)], cv2_flag=cv2.IMREAD_COLOR,
        imgsz=imgsz, augment=False, cache=False, channels=3, prefix="",
    )  # fmt: skip
    return BaseDataset.load_image(dataset, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("imgsz", [64, 160, 640])
def test_same_pixels_and_same_boxes(tmp_path, size: tuple[int, int], imgsz: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, image)
    resized, original_hw, resized_hw = loaded_by_ultralytics(path, imgsz)
    theirs: Any = LetterBox(new_shape=(imgsz, imgsz), scaleup=False)
    params = theirs.get_params({"img": resized})
    expected = theirs(image=resized)[..., ::-1].transpose(2, 0, 1).copy()

    array, placement = letterbox(image, imgsz)
    np.testing.assert_array_equal(array, (torch.from_numpy(expected).float() / 255).numpy())

    boxes = rng.uniform(-5, imgsz + 5, (20, 2, 2)).astype(np.float32)
    boxes = np.sort(boxes, axis=1).reshape(20, 4)
    gain = (resized_hw[0] / original_hw[0], resized_hw[1] / original_hw[1])
    ratio_pad = (gain, (params["left"], params["top"]))
    scaled: Any = ops.scale_boxes((imgsz, imgsz), torch.from_numpy(boxes.copy()), original_hw, ratio_pad)
    corners = scaled.numpy()
    expected_xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    np.testing.assert_allclose(undo(boxes, placement), expected_xywh, atol=FLOAT32_PX * max(1.0, max(size) / imgsz))


def test_raw_is_chosen_as_by_the_head() -> None:
    torch.manual_seed(0)
    head = Detect(nc=80, ch=(8,), end2end=True)
    raw = torch.rand(1, 84, 2100) ** 8
    raw[:, :4] = 100 + 500 * torch.rand(1, 4, 2100)
    cx, cy, w, h = raw[:, :4].unbind(1)
    corners = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), 1)
    end2end = head.postprocess(torch.cat([corners, raw[:, 4:]], 1).permute(0, 2, 1))
    settings = load("qat").eval
    from_raw = select(raw[0].numpy(), "raw", settings)
    from_end2end = select(end2end[0].numpy(), "end2end", settings)
    np.testing.assert_array_equal(from_raw[:, 4:], from_end2end[:, 4:])
    np.testing.assert_allclose(from_raw[:, :4], from_end2end[:, :4], atol=FLOAT32_PX)
