"""Small COCO folders and ONNX files built in code, for the tests of the evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.coco.categories import CATEGORIES, NAMES
from app.core.config import Eval

IMGSZ = 32
SETTINGS = Eval(
    provider="cpu", batch=2, conf=0.001, max_det=300, max_images=None, latency_warmup=1, latency_runs=5
)  # fmt: skip


def write_model(path: Path, bias: np.ndarray, contract: str = "raw", **options: Any) -> Path:
    """A graph whose output is `bias` for every image, plus `weight` times the image's mean R, G and B.

    Args:
        path: the file to write.
        bias: raw [84,A] or end2end [K,6].
        contract: goes into the metadata.
        options: weight [*bias.shape,3]; batch: fixed size (default free); imgsz: a side, or height and width; type and
            name: of the input; out_type: of the output; out_shape: declared instead of the true one; baked: the
            graph can run only one image; metadata: replaces the usual entries.
    """
    weight = options.get("weight", np.zeros((*bias.shape, 3)))
    imgsz, input_type = options.get("imgsz", IMGSZ), options.get("type", TensorProto.FLOAT)
    sides = [imgsz, imgsz] if isinstance(imgsz, int | str) else [*imgsz]
    name, out_type = options.get("name", "images"), options.get("out_type", TensorProto.FLOAT)
    nodes = [
        helper.make_node("Cast", [name], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Conv", ["mean", "weight", "bias"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["shaped"]),
        helper.make_node("Cast", ["shaped"], ["output"], to=out_type),
    ]
    constants = {
        "weight": weight.reshape(-1, 3, 1, 1).astype(np.float32),
        "bias": bias.reshape(-1).astype(np.float32),
        "shape": np.array([1 if options.get("baked") else 0, *bias.shape]),
    }
    batch = options.get("batch", "batch")
    out_shape = options.get("out_shape", [batch, *bias.shape])
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, input_type, [batch, 3, *sides])],
        [helper.make_tensor_value_info("output", out_type, out_shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    usual = {"contract": contract, "imgsz": str(IMGSZ), "names": json.dumps(NAMES), "label": "fp16", "scheme": "null"}
    helper.set_model_props(model, options.get("metadata", usual))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def raw_output(*rows: tuple[float, float, float, float, float, int], n_anchors: int = 21) -> np.ndarray:
    """Detections x1,y1,x2,y2,score,class -> raw [84,A], one detection an anchor, the other anchors score 0."""
    raw = np.zeros((84, n_anchors), np.float32)
    for anchor, (x1, y1, x2, y2, score, index) in enumerate(rows):
        raw[:4, anchor] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        raw[4 + index, anchor] = score
    return raw


def truth_box(image_id: int, bbox: list[float], category_id: int = 1, iscrowd: int = 0) -> dict[str, Any]:
    """One annotation; write_annotations numbers them."""
    area = bbox[2] * bbox[3]
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "area": area, "iscrowd": iscrowd}


def write_annotations(path: Path, sizes: dict[int, tuple[int, int]], truth: list[dict[str, Any]]) -> Path:
    """An instances file; sizes: image id -> width and height in px."""
    images = [
        {"id": image_id, "file_name": f"{image_id:012d}.png", "width": width, "height": height}
        for image_id, (width, height) in sizes.items()
    ]
    annotations = [{"id": number, **box} for number, box in enumerate(truth, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def write_coco(root: Path, colors_bgr: dict[int, tuple[int, int, int]], truth: list[dict[str, Any]]) -> Path:
    """A COCO folder whose val2017 has one plain image of 64 x 48 px for each id."""
    write_annotations(root / "annotations" / "instances_val2017.json", dict.fromkeys(colors_bgr, (64, 48)), truth)
    (root / "val2017").mkdir()
    for image_id, color in colors_bgr.items():
        image = np.full((48, 64, 3), color, np.uint8)
        cv2.imwrite(str(root / "val2017" / f"{image_id:012d}.png"), image)
    return root
