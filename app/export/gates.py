"""The gates that an ONNX file must pass before it gets its name. Each returns what it measured, or raises an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

from app.coco.categories import NAMES
from app.coco.detections import raw_rows
from app.core.labels import Label
from app.export.graphs import QuantWeight, learned_convolutions, quant_weights

LEVELS = {"off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL, "on": ort.GraphOptimizationLevel.ORT_ENABLE_ALL}
BOX_ROWS = ("cx", "cy", "w", "h")


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference of a file from torch: boxes in px, scores in probability."""

    box_px: float
    score: float


# Float32 on both sides, summed in another order: trained networks differ by 4e-4 px and 3e-6.
FLOAT32 = Tolerance(1e-2, 1e-4)
# FP16 has 11 bits: trained YOLOv10n at 160 px differs by 0.08 px and 1e-3. An FP16 decode would add 0.25 px.
FLOAT16 = Tolerance(2.0, 1e-2)
# A network that is almost random can magnify rounding beyond these. Its tolerance is the effect of another rounding on
# torch's own output times this factor: FP16 rounds 2**13 times as coarsely as FP32. A wrong weight or node changes the
# output by orders of magnitude more. The file's record says `magnifies_rounding`; export and report warn of it.
TIMES_ROUNDING = {FLOAT32: 10, FLOAT16: 2**13}


@dataclass(frozen=True)
class Truth:
    """What torch computes: for `images` float32 [N,3,S,S] the raw output `raw` [N,4+nc,A].

    `layers_by_bits` is the number of quantized layers by bits, `full_by_bits` that of those whose codes have the full
    range, as -8..7; `rounding` is how much rounding changes `raw`; `names`
    are those of the nc classes.
    """

    images: np.ndarray
    raw: np.ndarray
    layers_by_bits: dict[int, int]
    rounding: Tolerance
    names: Sequence[str] = tuple(NAMES)
    full_by_bits: dict[int, int] = field(default_factory=dict)

    def allowed(self, precision: str) -> Tolerance:
        """Largest allowed difference of a file of this precision from `raw`."""
        fixed = fixed_tolerance(precision)
        times = TIMES_ROUNDING[fixed]
        box_px = max(fixed.box_px, times * self.rounding.box_px)
        score = max(fixed.score, times * self.rounding.score)
        return Tolerance(box_px, score)


class Off(NamedTuple):
    """The largest differences from torch's output, of boxes (px) and of scores, and the place of the worst one."""

    box_px: float
    score: float
    where: str


def fixed_tolerance(precision: str) -> Tolerance:
    """Largest allowed difference from torch for the file of a trained network."""
    return FLOAT16 if precision == "fp16" else FLOAT32


def name_of(path: Path) -> str:
    """The final name of a file: while it is checked, write_atomic of app/core/files.py calls it .NAME.PID.part."""
    return path.name.removeprefix(".").partition(".onnx")[0] + ".onnx"


def check_file(path: Path) -> str:
    """Runs onnx.checker with full_check, which infers types and shapes too."""
    onnx.checker.check_model(str(path), full_check=True)
    return "full"


def run_file(path: Path, images: np.ndarray, level: str) -> list[np.ndarray]:
    """Outputs of ONNX Runtime on the CPU for images [N,3,S,S]: one by one and, if the batch is free, all at once."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 3  # without a GPU the CUDA build warns about device discovery
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"images": batch})[0])

    one_by_one = [run(image[None]) for image in images]
    results = [np.concatenate(one_by_one)]
    has_free_batch = not isinstance(session.get_inputs()[0].shape[0], int)
    if has_free_batch:
        results.append(run(images))
    return results


def check_parity(path: Path, truth: Truth, label: Label) -> dict[str, Any]:
    """ONNX Runtime (CPU, graph optimisation off and on) against torch on the same images.

    Returns:
        n_images; the largest differences max_box_px and max_score; the allowed ones; and `magnifies_rounding`, whether
        a difference is larger than fixed_tolerance.

    Raises:
        RuntimeError: a box or a score differs by more than its tolerance; names image and output.
    """
    allowed = truth.allowed(label.precision)
    max_box_px = max_score = 0.0
    measure = off_raw if label.contract == "raw" else off_end2end
    for level in LEVELS:
        for outputs in run_file(path, truth.images, level):
            for image, (output, raw) in enumerate(zip(outputs, truth.raw, strict=True)):
                off = measure(output, raw, allowed, truth.names)
                max_box_px = max(max_box_px, off.box_px)
                max_score = max(max_score, off.score)
                if not (off.box_px <= allowed.box_px and off.score <= allowed.score):  # so that NaN is refused too
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


def off_raw(output: np.ndarray, raw: np.ndarray, allowed: Tolerance, names: Sequence[str] = NAMES) -> Off:
    """Compares a raw output [4+nc,A] with torch's; the worst place is the one with most of its tolerance used up."""
    off = np.abs(output - raw)
    allowed_by_row = np.array([allowed.box_px] * 4 + [allowed.score] * len(names))
    shares = np.nan_to_num(off / allowed_by_row[:, None], nan=np.inf)
    row, anchor = np.unravel_index(shares.argmax(), off.shape)
    where = f"output {(*BOX_ROWS, *names)[row]} of anchor {anchor}"
    return Off(float(off[:4].max()), float(off[4:].max()), where)


def off_end2end(output: np.ndarray, raw: np.ndarray, allowed: Tolerance, names: Sequence[str] = NAMES) -> Off:
    """Compares an end2end output [K,6] with torch's raw output [4+nc,A].

    Detections of equal scores may come in any order. So each is compared with the anchor that is closest to it, and the
    sorted list of scores with the K best of raw.
    """
    scores = output[:, 4]
    best = np.sort(raw_rows(raw, len(output))[:, 4])[::-1]
    rank_off = np.abs(np.sort(scores)[::-1] - best)  # [K]
    cx, cy, w, h = raw[:4]
    corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])  # [4,A]
    box_off = np.abs(output[:, :4, None] - corners).max(axis=1)  # [K,A]
    classes = np.nan_to_num(output[:, 5]).astype(int)
    score_off = np.abs(raw[4:][classes] - scores[:, None])  # [K,A]
    anchors = np.maximum(box_off / allowed.box_px, score_off / allowed.score).argmin(axis=1)
    rows = np.arange(len(output))
    box_px = box_off[rows, anchors]
    score = score_off[rows, anchors]
    worst = int(np.maximum(box_px / allowed.box_px, score / allowed.score).argmax())
    where = f"detection {worst} ({names[classes[worst]]})"
    return Off(float(box_px.max()), float(max(score.max(), rank_off.max())), where)


def check_codes(
    path: Path, layers_by_bits: dict[int, int], full_by_bits: dict[int, int] | None = None
) -> dict[str, Any]:
    """Checks for every quantized layer that codes are in their range, and that a channel has no more than fit into it.

    That are 2**bits - 1 different ones, and 2**bits in the full range, which only as many layers have as the model has.

    Returns:
        layers: number by bits, e.g. {'4': 83}; max_codes_per_channel; full_range: number by bits, if any.

    Raises:
        RuntimeError: a layer's codes are wrong, or a quantized layer is missing; names the layer.
    """
    model = onnx.load(path)
    wanted_full = Counter(full_by_bits)
    layers: Counter[int] = Counter()
    full: Counter[int] = Counter()
    max_codes = 0
    for weight in quant_weights(model):
        max_codes = max(max_codes, codes_per_channel(path, weight, weight.bits in wanted_full))
        layers[weight.bits] += 1
        full[weight.bits] += weight.is_full
    n_dequantize = len([node for node in model.graph.node if node.op_type == "DequantizeLinear"])
    if layers != layers_by_bits or n_dequantize != sum(layers_by_bits.values()):
        raise RuntimeError(
            f"{name_of(path)}: {n_dequantize} DequantizeLinear nodes, layers by bits {dict(layers)}; "
            f"the model has {dict(layers_by_bits)}"
        )
    if full != wanted_full:
        raise RuntimeError(
            f"{name_of(path)}: layers of full range by bits {dict(+full)}; the model has {dict(wanted_full)}"
        )
    facts: dict[str, Any] = {"layers": _as_texts(layers), "max_codes_per_channel": max_codes}
    return facts | ({"full_range": _as_texts(+full)} if wanted_full else {})


def _as_texts(by_bits: Counter[int]) -> dict[str, int]:
    """The same numbers with keys as JSON has them."""
    return {str(bits): count for bits, count in by_bits.items()}


def codes_per_channel(path: Path, weight: QuantWeight, may_be_full: bool) -> int:
    """The largest number of different codes in a channel.

    Raises:
        RuntimeError: a code is out of range, the range is neither symmetric nor, where it may be, full, or a channel
            has more codes than fit into it.
    """
    name = weight.dequantize.name
    is_known = weight.low == -weight.high or (may_be_full and weight.is_full)
    if not is_known or weight.codes.min() < weight.low or weight.codes.max() > weight.high:
        raise RuntimeError(f"{name_of(path)}: {name} holds codes beyond {weight.low}..{weight.high}")
    distinct = max(len(np.unique(channel)) for channel in weight.codes)
    if distinct > 2**weight.bits - (not weight.is_full):
        raise RuntimeError(f"{name_of(path)}: {name} has {distinct} codes in a channel")
    return distinct


def check_same_output(path: Path, reference_path: Path, images: np.ndarray) -> dict[str, Any]:
    """Checks that the outputs of two files are bit-equal on the CPU provider, with graph optimisation off and on.

    Raises:
        RuntimeError: an output differs; names the first one.
    """
    for level in LEVELS:
        output = np.stack(run_file(path, images, level))
        expected = np.stack(run_file(reference_path, images, level))
        if not np.array_equal(output, expected):
            first = np.argwhere(output != expected)[0]
            place = tuple(first[1:].tolist())
            raise RuntimeError(
                f"{name_of(path)}: output {place} differs from {reference_path.name}, graph optimisation {level}"
            )
    return {"reference": reference_path.name, "n_images": len(images)}


def check_half(path: Path) -> dict[str, int]:
    """Checks that every learned convolution of an FP16 file has FP16 weights; constants of the decode stay FP32.

    Returns:
        learned_convolutions and float16_initializers (counts), and float32_values, the number of values left in FP32.

    Raises:
        RuntimeError: a convolution has weights that are not FP16; names it.
    """
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convolutions = learned_convolutions(model)
    for node in convolutions:
        weight_types = {types[name] for name in node.input[1:]}
        if weight_types != {TensorProto.FLOAT16}:
            raise RuntimeError(f"{name_of(path)}: {node.name} has weights that are not FP16")
    n_float32 = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            n_float32 += numpy_helper.to_array(tensor).size
    return {
        "learned_convolutions": len(convolutions),
        "float16_initializers": list(types.values()).count(TensorProto.FLOAT16),
        "float32_values": n_float32,
    }
