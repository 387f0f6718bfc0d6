"""Gates that an ONNX file passes before it gets its name. Each returns the figure it measured or says what differs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

from app.coco.annotations import NAMES
from app.coco.detections import raw_rows
from app.core.labels import Label
from app.export.graphs import QuantWeight, learned_convolutions, quant_weights

LEVELS = {"off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL, "on": ort.GraphOptimizationLevel.ORT_ENABLE_ALL}
ROW_NAMES = ("cx", "cy", "w", "h", *NAMES)


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from torch: boxes in px, scores in probability."""

    box_px: float
    score: float


# Float32 on both sides, in another order of summation: what is seen on trained networks is 4e-4 px and 3e-6.
FLOAT32 = Tolerance(1e-2, 1e-4)
# FP16 has 11 bits. Seen: 0.08 px and 1e-3 on trained YOLOv10n at 160 px. A decode in FP16 alone would cost 0.25 px.
FLOAT16 = Tolerance(2.0, 1e-2)
# A network that magnifies rounding more than that, as one that is all but random does, gets this many times what torch
# itself moves by when something is rounded otherwise: FP16 rounds 2**13 times as coarsely. A wrong weight or node is
# orders of magnitude beyond. Its file says `magnifies_rounding`, and export and report warn of it.
TIMES_ROUNDING = {FLOAT32: 10, FLOAT16: 2**13}


@dataclass(frozen=True)
class Truth:
    """What torch computes: images float32 [N,3,S,S], raw output [N,84,A], number of quantized layers by bits, and how
    far rounding moves `raw`."""

    images: np.ndarray
    raw: np.ndarray
    layers_by_bits: dict[int, int]
    rounding: Tolerance

    def allowed(self, precision: str) -> Tolerance:
        """How far a file of this precision may be from `raw`."""
        fixed = fixed_tolerance(precision)
        times = TIMES_ROUNDING[fixed]
        box_px = max(fixed.box_px, times * self.rounding.box_px)
        return Tolerance(box_px, max(fixed.score, times * self.rounding.score))


class Off(NamedTuple):
    """How far an output is from torch's: the largest difference of boxes (px) and of scores, and where the worst is."""

    box_px: float
    score: float
    where: str


def fixed_tolerance(precision: str) -> Tolerance:
    """How far the file of a trained network may be from torch."""
    return FLOAT16 if precision == "fp16" else FLOAT32


def name_of(path: Path) -> str:
    """The name that a file is to get: write_atomic of app/core/files.py calls it .NAME.PID.part while it is checked."""
    return path.name.removeprefix(".").partition(".onnx")[0] + ".onnx"


def check_file(path: Path) -> str:
    """onnx.checker in full: types and shapes too."""
    onnx.checker.check_model(str(path), full_check=True)
    return "full"


def run_file(path: Path, images: np.ndarray, level: str) -> list[np.ndarray]:
    """Outputs of ONNX Runtime on the CPU for images [N,3,S,S]: one by one and, where the batch is free, all at once."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 3  # without a GPU the CUDA build warns about device discovery
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    one_by_one = [np.asarray(session.run(None, {"images": image[None]})[0]) for image in images]
    results = [np.concatenate(one_by_one)]
    if not isinstance(session.get_inputs()[0].shape[0], int):
        results.append(np.asarray(session.run(None, {"images": images})[0]))
    return results


def check_parity(path: Path, truth: Truth, label: Label) -> dict[str, Any]:
    """ONNX Runtime (CPU, graph optimisation off and on) against torch on the same images.

    Returns:
        n_images, max_box_px and max_score; what was allowed; `magnifies_rounding`: this is beyond fixed_tolerance.

    Raises:
        RuntimeError: a box or a score is further off than its tolerance; names image and output.
    """
    allowed = truth.allowed(label.precision)
    max_box_px = max_score = 0.0
    measure = off_raw if label.contract == "raw" else off_end2end
    for level in LEVELS:
        for outputs in run_file(path, truth.images, level):
            for image, (output, raw) in enumerate(zip(outputs, truth.raw, strict=True)):
                off = measure(output, raw, allowed)
                max_box_px, max_score = max(max_box_px, off.box_px), max(max_score, off.score)
                if not (off.box_px <= allowed.box_px and off.score <= allowed.score):  # NaN is not within it either
                    raise RuntimeError(
                        f"{name_of(path)} differs from torch by {off.box_px:.2e} px (allowed {allowed.box_px:.2g}) and "
                        f"{off.score:.2e} in score (allowed {allowed.score:.2g}), graph optimisation {level}, "
                        f"image {image}, {off.where}"
                    )
    fixed = fixed_tolerance(label.precision)
    return {
        "n_images": len(truth.images),
        "max_box_px": max_box_px,
        "max_score": max_score,
        "allowed_box_px": allowed.box_px,
        "allowed_score": allowed.score,
        "magnifies_rounding": max_box_px > fixed.box_px or max_score > fixed.score,
    }


def off_raw(output: np.ndarray, raw: np.ndarray, allowed: Tolerance) -> Off:
    """Compares two raw outputs [84,A]."""
    off = np.abs(output - raw)
    allowed_by_row = np.array([allowed.box_px] * 4 + [allowed.score] * len(NAMES))
    shares = np.nan_to_num(off / allowed_by_row[:, None], nan=np.inf)
    row, anchor = np.unravel_index(shares.argmax(), off.shape)
    return Off(float(off[:4].max()), float(off[4:].max()), f"output {ROW_NAMES[row]} of anchor {anchor}")


def off_end2end(output: np.ndarray, raw: np.ndarray, allowed: Tolerance) -> Off:
    """Compares an end2end output [K,6] with torch's raw one [84,A].

    Equal scores may come in any order, so each row is compared with the anchor that is closest to it, and the list of
    scores with the K best of raw.
    """
    best = np.sort(raw_rows(raw, len(output))[:, 4])[::-1]
    score_off = np.abs(np.sort(output[:, 4])[::-1] - best)
    cx, cy, w, h = raw[:4]
    corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])  # [4,A]
    box_off = np.abs(output[:, :4, None] - corners).max(axis=1)  # [K,A]
    classes = np.nan_to_num(output[:, 5]).astype(int)
    own_off = np.abs(raw[4:][classes] - output[:, 4, None])  # [K,A]
    anchors = np.maximum(box_off / allowed.box_px, own_off / allowed.score).argmin(axis=1)
    rows = np.arange(len(output))
    box_px, own = box_off[rows, anchors], own_off[rows, anchors]
    worst = int(np.maximum(box_px / allowed.box_px, own / allowed.score).argmax())
    where = f"detection {worst} ({NAMES[classes[worst]]})"
    return Off(float(box_px.max()), float(max(own.max(), score_off.max())), where)


def check_codes(path: Path, layers_by_bits: dict[int, int]) -> dict[str, Any]:
    """Codes inside their range, at most 2**bits - 1 different ones a channel, as many layers as the model has.

    Returns:
        layers: number by bits, e.g. {'4': 83}; max_codes_per_channel.

    Raises:
        RuntimeError: one of these does not hold; names the layer.
    """
    model = onnx.load(path)
    layers: Counter[int] = Counter()
    most = 0
    for weight in quant_weights(model):
        most = max(most, codes_per_channel(path, weight))
        layers[weight.bits] += 1
    n_dequantize = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
    if layers != layers_by_bits or n_dequantize != sum(layers_by_bits.values()):
        raise RuntimeError(
            f"{name_of(path)}: {n_dequantize} DequantizeLinear nodes, layers by bits {dict(layers)}; "
            f"the model has {dict(layers_by_bits)}"
        )
    return {"layers": {str(bits): count for bits, count in layers.items()}, "max_codes_per_channel": most}


def codes_per_channel(path: Path, weight: QuantWeight) -> int:
    """The largest number of different codes in a channel.

    Raises:
        RuntimeError: codes beyond the range, or more than fit into it.
    """
    name = weight.dequantize.name
    if weight.low != -weight.high or weight.codes.min() < weight.low or weight.codes.max() > weight.high:
        raise RuntimeError(f"{name_of(path)}: {name} holds codes beyond {weight.low}..{weight.high}")
    distinct = max(len(np.unique(channel)) for channel in weight.codes)
    if distinct > 2**weight.bits - 1:
        raise RuntimeError(f"{name_of(path)}: {name} has {distinct} codes in a channel")
    return distinct


def check_same_output(path: Path, reference_path: Path, images: np.ndarray) -> dict[str, Any]:
    """Bit-equality of two files on the CPU provider, graph optimisation off and on.

    Raises:
        RuntimeError: an output differs; names it.
    """
    for level in LEVELS:
        output = np.stack(run_file(path, images, level))
        expected = np.stack(run_file(reference_path, images, level))
        if not np.array_equal(output, expected):
            place = tuple(int(i) for i in np.argwhere(output != expected)[0][1:])
            raise RuntimeError(
                f"{name_of(path)}: output {place} differs from {reference_path.name}, graph optimisation {level}"
            )
    return {"reference": reference_path.name, "n_images": len(images)}


def check_half(path: Path) -> dict[str, int]:
    """Every learned convolution of an FP16 file has FP16 weights; the decode's constants are FP32.

    Returns:
        learned_convolutions, float16_initializers, and float32_values: how many numbers stay FP32.

    Raises:
        RuntimeError: a convolution with FP32 weights; names it.
    """
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convolutions = learned_convolutions(model)
    for node in convolutions:
        if any(types[name] != TensorProto.FLOAT16 for name in node.input[1:]):
            raise RuntimeError(f"{name_of(path)}: {node.name} has weights that are not FP16")
    n_single = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            n_single += numpy_helper.to_array(tensor).size
    return {
        "learned_convolutions": len(convolutions),
        "float16_initializers": list(types.values()).count(TensorProto.FLOAT16),
        "float32_values": n_single,
    }
