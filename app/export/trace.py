"""Traces a torch model to an ONNX graph, with one branch of the head, and computes torch's outputs for the gates."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.nn import QuantConv2d
from onnx import ModelProto
from torch import nn
from torch.jit._trace import TracerWarning
from ultralytics.nn.tasks import DetectionModel

from app.coco.images import letterbox, read_image
from app.core.config import Export
from app.core.files import read_json
from app.core.labels import Label
from app.core.run import PROVENANCE_SHAPE, RunRoot
from app.data.view import read_split
from app.export.done import N_PARITY_IMAGES
from app.export.gates import Tolerance, Truth


def parity_images(run: RunRoot, imgsz: int, n_images: int = N_PARITY_IMAGES) -> np.ndarray:
    """The first val images, letterboxed: [N,3,imgsz,imgsz] float32 0..1; the run's view is there (prepare.prepared)."""
    provenance = read_json(run.provenance, "data", PROVENANCE_SHAPE)
    inputs = []
    for image in read_split(provenance, "val")[:n_images]:
        array, _ = letterbox(read_image(Path(image.path)), imgsz)
        inputs.append(array)
    return np.stack(inputs)


def torch_truth(model: DetectionModel, images: np.ndarray) -> Truth:
    """What the files of `model` must compute for `images` [N,3,S,S], and how much rounding changes it.

    The rounding is changed in two ways: without oneDNN, whose kernels add in another order on most processors, and with
    pixels that are brighter by one unit in the last place.
    """
    raw_model = one_head(model, "raw")
    layers_by_bits: Counter[int] = Counter()
    full_by_bits: Counter[int] = Counter()
    for layer in quantized_layers(raw_model):
        bits = int(layer.weight_quant.bit_width())
        layers_by_bits[bits] += 1
        if not layer.weight_quant.is_narrow_range:
            full_by_bits[bits] += 1
    raw = outputs(raw_model, images)
    without_onednn = outputs(raw_model, images, onednn=False)
    from_brighter = outputs(raw_model, np.nextafter(images, np.float32(2)))
    off = np.maximum(np.abs(raw - without_onednn), np.abs(raw - from_brighter))
    rounding = Tolerance(float(off[:, :4].max()), float(off[:, 4:].max()))
    return Truth(images, raw, dict(layers_by_bits), rounding, list(model.names.values()), dict(full_by_bits))


def outputs(model: DetectionModel, images: np.ndarray, onednn: bool = True) -> np.ndarray:
    """The model's outputs for images [N,3,S,S], run one by one."""
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        return np.concatenate([model(torch.from_numpy(image[None])).numpy() for image in images])


def quantized_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, QuantConv2d)]


def one_head(model: DetectionModel, contract: str) -> DetectionModel:
    """A copy of the model whose head has only the one2one branch.

    Its output is for 'raw' [N,4+nc,A], cx,cy,w,h in px and nc probabilities; for 'end2end' [N,K,6], x1,y1,x2,y2 in px,
    score and class. Published YOLOv10 numbers, the validation in training and the evaluator all use this branch.

    v10Detect decodes cv2 and cv3 to xywh without top-k if it has no one2one branch, and it decodes the one2one branch
    to corners with top-k if cv2 is None (ultralytics/nn/modules/head.py Detect.forward and Detect.end2end, 8.4.190).
    """
    model = copy.deepcopy(model)
    layers: Any = model.model
    head = layers[-1]
    if contract == "raw":
        head.cv2, head.cv3 = head.one2one_cv2, head.one2one_cv3
        head.one2one_cv2 = head.one2one_cv3 = None
    else:
        head.cv2 = head.cv3 = None
    head.export, head.format, head.shape = True, "onnx", None
    return model


def traced_graph(settings: Export, model: DetectionModel, label: Label, images: np.ndarray, path: Path) -> ModelProto:
    """The graph of an FP32 or QCDQ file. The exporters can only write files: `path` is a temporary one for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        trace(settings, one_head(model, label.contract), label, images[:1], path)
        return onnx.load(path)
    finally:
        path.unlink(missing_ok=True)


def trace(settings: Export, model: nn.Module, label: Label, example: np.ndarray, path: Path) -> None:
    """Writes the ONNX file of a model from `one_head`; Brevitas adds QCDQ nodes for its quantized layers.

    dynamo=True would store FP32 weights before a QuantizeLinear (Brevitas 0.13.4). No layers are fused.
    """
    arguments: dict[str, Any] = {
        "input_names": ["images"],
        "output_names": [label.contract],
        "opset_version": settings.opset,
        "dynamo": False,
    }
    if settings.dynamic:
        arguments["dynamic_axes"] = {"images": {0: "batch"}, label.contract: {0: "batch"}}
    inputs = torch.from_numpy(example)
    with torch.no_grad(), warnings.catch_warnings():
        # Both are harmless: the TorchScript exporter is deprecated, and the trace fixes the input size on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        if label.is_quantized:
            export_onnx_qcdq(model, args=inputs, export_path=str(path), **arguments)
        else:
            torch.onnx.export(model, (inputs,), str(path), **arguments)
