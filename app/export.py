"""Export: checkpoint -> ONNX with the `raw` contract, checked against torch on real images before it gets its name."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.nn import QuantConv2d
from onnx import numpy_helper
from torch import nn
from torch.jit._trace import TracerWarning
from ultralytics.nn.tasks import DetectionModel

from app.coco import NAMES
from app.config import Config, UserError, config_hash
from app.detections import letterbox, read_image
from app.model import load_scored
from app.run import RunRoot, code_version, read_json, record_stage, sha256, write_atomic, write_json
from app.view import read_split

log = logging.getLogger(__name__)
N_PARITY_IMAGES = 8
# Float32 on both sides, in another order of summation: what is seen is 3e-5 px and 1e-6; ten times that is a fault.
BOX_TOLERANCE_PX = 1e-2
SCORE_TOLERANCE = 1e-4


def export(config: Config, run: RunRoot, force: bool) -> None:
    """Exports every trained variant of the run; what is up to date with its checkpoint is left alone.

    Raises:
        UserError: nothing trained yet.
        RuntimeError: a gate failed; no file was left.
    """
    labels = run.trained_labels()
    if not labels:
        raise UserError(f"no finished training under {run.root}: run 'make train-fp16 train-qat' first")
    for label in labels:
        export_variant(config, run, label, force)


def export_variant(config: Config, run: RunRoot, label: str, force: bool) -> None:
    """Writes onnx/<model>-<...>.onnx and the .json beside it for one trained variant."""
    checkpoint_path = run.variant_dir(label) / "weights" / "best.pt"
    model, trained, checkpoint = load_scored(checkpoint_path)
    path = run.onnx_dir / file_name(trained)
    record_path = path.with_suffix(".json")
    wanted = {"checkpoint_sha256": sha256(checkpoint_path), "export": config.export.model_dump()}
    if not force and path.exists() and record_path.exists():
        record = read_json(record_path, "export")
        if all(record[key] == value for key, value in wanted.items()) and record["sha256"] == sha256(path):
            log.info("export %s: done already (%s)", label, path)
            return
    record = describe(trained, label, wanted) | {"epoch": checkpoint["epoch"] + 1}
    images = parity_images(run, trained.train.imgsz)
    select_one2one(model, config.export.dynamic)

    def write(part: Path) -> None:
        to_onnx(model, images[:1], part, config)
        finish_graph(part, record)
        record["parity"] = check_parity(model, images, part, config.export.dynamic)
        record["quantized_layers"] = check_codes(model, part)

    write_atomic(path, write)
    graph = onnx.load(path, load_external_data=False).graph
    record |= {"nodes": dict(Counter(node.op_type for node in graph.node).most_common())}
    record |= {"file": path.name, "sha256": sha256(path), "size_bytes": path.stat().st_size}
    write_json(record_path, record)
    record_stage(run, f"export {label}", {"file": path.name, "sha256": record["sha256"]})
    parity = record["parity"]
    log.info(
        "export %s: %s, %.2f MB, off torch by at most %.1e px and %.1e in score on %d images",
        label, path, record["size_bytes"] / 1e6, parity["max_box_px"], parity["max_score"], parity["n_images"],
    )  # fmt: skip


def file_name(trained: Config) -> str:
    stem = Path(trained.model).stem
    return f"{stem}-{trained.quant.scheme}-qcdq-qat.onnx" if trained.quant else f"{stem}-baseline-fp32.onnx"


def describe(trained: Config, label: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The facts about a file that its metadata and its .json share."""
    return {
        "label": label,
        "variant": trained.variant,
        "scheme": trained.quant.scheme if trained.quant else None,
        "precision": "qcdq" if trained.quant else "fp32",
        "model": Path(trained.model).stem,
        "contract": "raw",
        "input": {"name": "images", "layout": "NCHW", "type": "float32", "color": "RGB", "range": [0, 1], "pad": 114},
        "imgsz": trained.train.imgsz,
        "n_classes": len(NAMES),
        "config_hash": config_hash(trained),
        "code_version": code_version(),
        **wanted,
    }


def select_one2one(model: DetectionModel, dynamic: bool) -> None:
    """Makes the one2one branch the only one, so that the output is [N,84,A]: cx,cy,w,h in px, then 80 probabilities.

    Published YOLOv10 numbers, training's validation and the evaluator all use this branch. Without a one2one branch
    v10Detect decodes cv2/cv3 to xywh without top-k (ultralytics/nn/modules/head.py Detect.forward, 8.4.190).
    """
    layers: Any = model.model
    head = layers[-1]
    head.cv2, head.cv3 = head.one2one_cv2, head.one2one_cv3
    head.one2one_cv2 = head.one2one_cv3 = None
    head.export, head.format, head.dynamic = True, "onnx", dynamic


def parity_images(run: RunRoot, imgsz: int) -> torch.Tensor:
    """The first val images, letterboxed: [N,3,imgsz,imgsz] float32 0..1."""
    chosen = read_split(read_json(run.provenance, "data"), "val")[:N_PARITY_IMAGES]
    arrays = [letterbox(read_image(Path(image.path)), imgsz)[0] for image in chosen]
    return torch.from_numpy(np.stack(arrays))


def to_onnx(model: nn.Module, example: torch.Tensor, path: Path, config: Config) -> None:
    """TorchScript exporter for both variants; Brevitas adds its QCDQ nodes where there are quantized layers.

    dynamo=True would leave FP32 weights behind QuantizeLinear (Brevitas 0.13.4). BatchNorm is not fused before.
    """
    settings: dict[str, Any] = {
        "input_names": ["images"], "output_names": ["raw"], "opset_version": config.export.opset, "dynamo": False,
    }  # fmt: skip
    if config.export.dynamic:
        settings["dynamic_axes"] = {"images": {0: "batch", 2: "height", 3: "width"}, "raw": {0: "batch", 2: "anchors"}}
    with torch.no_grad(), warnings.catch_warnings():
        # Known and harmless here: the TorchScript exporter is deprecated, and tracing fixes the input size on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        if is_quantized(model):
            export_onnx_qcdq(model, args=example, export_path=str(path), **settings)
        else:
            torch.onnx.export(model, (example,), str(path), **settings)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(layer, QuantConv2d) for layer in model.modules())


def finish_graph(path: Path, record: dict[str, Any]) -> None:
    """Constant weights instead of overridable inputs, metadata, and the full checker."""
    model = onnx.load(path)
    weights = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    keys = ("contract", "label", "variant", "scheme", "precision", "model", "imgsz", "config_hash", "code_version")
    facts = {key: record[key] for key in (*keys, "checkpoint_sha256")} | {"names": NAMES}
    for key, value in facts.items():
        if value is None:  # no scheme
            continue
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def check_parity(model: nn.Module, images: torch.Tensor, path: Path, dynamic: bool) -> dict[str, Any]:
    """Runs torch and ONNX Runtime (CPU, graph optimisation off and on) on the same images.

    Raises:
        RuntimeError: a box or score is further off than its tolerance.
    """
    batches = [images] if dynamic else list(images.split(1))
    with torch.no_grad():
        expected = np.concatenate([model(batch).numpy() for batch in batches])
    worst = {"n_images": len(images), "max_box_px": 0.0, "max_score": 0.0}
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3  # without a GPU the CUDA build warns about device discovery
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        got = np.concatenate([np.asarray(session.run(None, {"images": batch.numpy()})[0]) for batch in batches])
        off = np.abs(got - expected)
        worst["max_box_px"] = max(worst["max_box_px"], float(off[:, :4].max()))
        worst["max_score"] = max(worst["max_score"], float(off[:, 4:].max()))
    if not (worst["max_box_px"] <= BOX_TOLERANCE_PX and worst["max_score"] <= SCORE_TOLERANCE):
        raise RuntimeError(
            f"{path.name} differs from torch by {worst['max_box_px']:.2e} px (allowed {BOX_TOLERANCE_PX}) and "
            f"{worst['max_score']:.2e} in score (allowed {SCORE_TOLERANCE}); no file was written"
        )
    return worst


def check_codes(model: nn.Module, path: Path) -> dict[str, int]:
    """Compares the quantized weights in the graph with those of the model, and their codes with their bits.

    Returns:
        number of layers by bits, e.g. {'4': 106}.

    Raises:
        RuntimeError: a code beyond the clip, or another number of quantized layers than the model has.
    """
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    clips = {node.output[0]: node for node in graph.node if node.op_type == "Clip"}
    found: Counter[int] = Counter()
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            codes, low, high = (
                numpy_helper.to_array(constants[name]).astype(int) for name in clips[node.input[0]].input
            )
            if codes.min() < low or codes.max() > high or low != -high:
                raise RuntimeError(f"{path.name}: {node.name} holds codes beyond {low}..{high}")
            found[int(high + 1).bit_length()] += 1
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, QuantConv2d)]
    expected = Counter(int(layer.weight_quant.bit_width()) for layer in layers)
    if found != expected:
        raise RuntimeError(f"{path.name}: quantized layers by bits {dict(found)}, the model has {dict(expected)}")
    return {str(bits): count for bits, count in found.items()}
