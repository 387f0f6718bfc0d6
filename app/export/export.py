"""Export: checkpoint -> ONNX files, each checked against torch on real images before it gets its name."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
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

from app.coco.annotations import NAMES
from app.coco.images import letterbox, read_image
from app.core.config import Config, Export, UserError, config_hash
from app.core.environment import code_version
from app.core.files import read_json, sha256, write_atomic, write_json
from app.core.run import RunRoot, record_stage
from app.data.view import read_split
from app.export.gates import Tolerance, Truth, check_codes, check_file, check_half, check_parity, check_same_output
from app.export.graphs import optimize, set_facts, tidy, to_half, to_int4
from app.quant.model import load_scored

log = logging.getLogger(__name__)
N_PARITY_IMAGES = 8
DERIVED_FROM = {"fp16": "fp32", "int4": "qcdq"}  # precision of a file -> that of the file it is made of
LABEL_ENDINGS = {"fp32": "", "qcdq": "", "fp16": "-half", "int4": "-int4"}
# The facts of the .json that are in the file's metadata too.
METADATA = (
    "contract", "label", "variant", "scheme", "precision", "model", "imgsz", "config_hash", "code_version",
    "checkpoint_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run: the model in eval mode, what it is, and what its files must compute.

    `source_sha256` is that of the checkpoint whose weights it quantizes (ptq), None where it was trained itself.
    """

    label: str
    model: DetectionModel
    config: Config
    epoch: int
    checkpoint_sha256: str
    source_sha256: str | None
    truth: Truth

    @property
    def method(self) -> str:
        """fp16, qat or ptq: how the weights were made."""
        return self.label.partition("-")[0]

    @property
    def precisions(self) -> tuple[str, ...]:
        """In the order in which they can be made. A scheme without a 4-bit layer has no INT4 file."""
        if self.config.quant is None:
            return ("fp32", "fp16")
        return ("qcdq", "int4") if 4 in self.truth.layers_by_bits else ("qcdq",)


def export(config: Config, run: RunRoot, force: bool) -> None:
    """Exports every trained variant of the run; what is up to date with its checkpoint is left alone.

    Raises:
        UserError: nothing trained yet, a checkpoint of another model, or files of another checkpoint without `force`.
        RuntimeError: a gate failed; the file was not written.
    """
    labels = run.trained_labels()
    if not labels:
        raise UserError(f"no finished training under {run.root}: run 'make train-fp16 train-qat' first")
    for label in labels:
        trained = load_trained(run, label)
        if trained.config.label != label:
            path = run.best(label)
            raise UserError(
                f"{path} is a checkpoint of {trained.config.label}, not of {label}: put the right file back or retrain"
            )
        for contract in config.export.contracts:
            for precision in trained.precisions:
                export_file(config.export, run, trained, (precision, contract), force)
    write_overview(run)


def load_trained(run: RunRoot, label: str) -> Trained:
    """Loads best.pt of one variant and computes with torch what its files must give.

    Raises:
        UserError: the checkpoint is not readable.
    """
    path = run.best(label)
    model, config, checkpoint = load_scored(path)
    bits = Counter(int(layer.weight_quant.bit_width()) for layer in quantized_layers(one_head(model, "raw")))
    truth = torch_truth(model, parity_images(run, config.train.imgsz), dict(bits))
    epoch, source_sha256 = checkpoint["epoch"] + 1, checkpoint.get("source_sha256")
    return Trained(label, model, config, epoch, sha256(path), source_sha256, truth)


def quantized_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, QuantConv2d)]


def parity_images(run: RunRoot, imgsz: int) -> np.ndarray:
    """The first val images, letterboxed: [N,3,imgsz,imgsz] float32 0..1."""
    chosen = read_split(read_json(run.provenance, "data"), "val")[:N_PARITY_IMAGES]
    return np.stack([letterbox(read_image(Path(image.path)), imgsz)[0] for image in chosen])


def torch_truth(model: DetectionModel, images: np.ndarray, layers_by_bits: dict[int, int]) -> Truth:
    """Two other computations show how far rounding moves the output: without oneDNN, whose kernels sum in another order
    on most processors, and from pixels that are one unit in the last place brighter."""
    raw = one_head(model, "raw")

    def outputs(images: np.ndarray, onednn: bool = True) -> np.ndarray:
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
            return np.concatenate([raw(torch.from_numpy(image[None])).numpy() for image in images])

    first = outputs(images)
    others = outputs(images, onednn=False), outputs(np.nextafter(images, np.float32(2)))
    off = np.maximum(*(np.abs(first - other) for other in others))
    return Truth(images, first, layers_by_bits, Tolerance(float(off[:, :4].max()), float(off[:, 4:].max())))


def one_head(model: DetectionModel, contract: str) -> DetectionModel:
    """A copy whose only branch is one2one; raw: [N,84,A] cx,cy,w,h in px, then 80 probabilities; end2end: [N,K,6].

    Published YOLOv10 numbers, training's validation and the evaluator all use this branch. v10Detect decodes cv2/cv3
    to xywh without top-k where there is no one2one branch, and the one2one branch to x1,y1,x2,y2 with top-k where
    cv2 is None (ultralytics/nn/modules/head.py Detect.forward and Detect.end2end, 8.4.190).
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


def export_file(settings: Export, run: RunRoot, trained: Trained, kind: tuple[str, str], force: bool) -> None:
    """One ONNX file, unless it is there already; `kind` is precision and contract.

    Raises:
        UserError: there is a file of another checkpoint or other settings, and no `force`.
    """
    path = run.onnx_dir / file_name(trained.label, trained.config, kind)
    wanted = {"checkpoint_sha256": trained.checkpoint_sha256, "export": file_settings(settings)}
    if not force and is_done(path, wanted):
        log.info("export %s: done already (%s)", trained.label, path)
    else:
        write_file(settings, run, trained, kind)


def write_file(settings: Export, run: RunRoot, trained: Trained, kind: tuple[str, str]) -> None:
    """Writes one ONNX file and its .json; the file gets its name once all gates are passed.

    Raises:
        RuntimeError: a gate failed; the file was not written.
    """
    path = run.onnx_dir / file_name(trained.label, trained.config, kind)
    record: dict[str, Any] = describe(trained, kind) | {"export": file_settings(settings)}

    def write(part: Path) -> None:
        graph = make_graph(settings, run, trained, kind)
        set_facts(graph, {key: record[key] for key in METADATA} | {"names": NAMES})
        onnx.save(graph, part)
        record["gates"] = check(part, run, trained, kind)
        record["nodes"] = dict(Counter(node.op_type for node in graph.graph.node).most_common())
        record["opset"] = graph.opset_import[0].version

    for old_path in (path.with_suffix(".json"), path):  # what fails a gate leaves no file, not even the one before
        old_path.unlink(missing_ok=True)
    write_atomic(path, write)
    record |= {"file": path.name, "sha256": sha256(path), "size_bytes": path.stat().st_size}
    write_json(path.with_suffix(".json"), record)
    record_stage(run, f"export {record['label']}", {"file": path.name, "sha256": record["sha256"]})
    parity = record["gates"]["parity"]
    log.info(
        "export %s: %s, %.2f MB, off torch by at most %.1e px and %.1e in score on %d images",
        record["label"], path, record["size_bytes"] / 1e6, parity["max_box_px"], parity["max_score"],
        parity["n_images"],
    )  # fmt: skip
    if parity["magnifies_rounding"]:
        log.warning(
            "export %s: that is more than in any trained network; this one magnifies rounding, and what the file "
            "scores says little about its format: train longer", record["label"],
        )  # fmt: skip


def file_name(label: str, config: Config, kind: tuple[str, str]) -> str:
    """yolov10m-baseline-fp32.onnx, yolov10m-w4a16-qcdq-qat.onnx, ...-ptq-bn.onnx; end2end files end in -end2end."""
    precision, contract = kind
    name = f"{Path(config.model).stem}-baseline-{precision}"
    if config.quant:
        method, _, ending = label.partition(f"-{config.quant.scheme}")
        name = f"{Path(config.model).stem}-{config.quant.scheme}-{precision}-{method}{ending}"
    return f"{name}.onnx" if contract == "raw" else f"{name}-{contract}.onnx"


def file_settings(settings: Export) -> dict[str, Any]:
    """What a single file depends on: not which other files are made."""
    return settings.model_dump(exclude={"contracts"})


def is_done(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the file is there and as wanted; one without a .json is left over from an interrupted export.

    Raises:
        UserError: the file is of another checkpoint or other settings: a finished result is not overwritten unasked.
    """
    record_path = path.with_suffix(".json")
    if not path.exists() or not record_path.exists():
        return False
    record = read_json(record_path, "export")
    if differs := [key for key, value in wanted.items() if record.get(key) != value]:
        raise UserError(f"{path} was made with another {' and '.join(differs)}: overwrite it with --force")
    if record["sha256"] != sha256(path):
        raise UserError(f"{path} is not the file that its .json describes: overwrite it with --force")
    return True


def describe(trained: Trained, kind: tuple[str, str]) -> dict[str, Any]:
    """The facts about a file that are known before it is made."""
    precision, contract = kind
    config = trained.config
    return {
        "label": trained.label + LABEL_ENDINGS[precision] + ("" if contract == "raw" else f"-{contract}"),
        "variant": trained.method,
        "scheme": config.quant.scheme if config.quant else None,
        "precision": precision,
        "model": Path(config.model).stem,
        "contract": contract,
        "input": {"name": "images", "layout": "NCHW", "type": "float32", "color": "RGB", "range": [0, 1], "pad": 114},
        "imgsz": config.train.imgsz,
        "n_classes": len(NAMES),
        "config_hash": config_hash(config),
        "code_version": code_version(),
        "checkpoint_sha256": trained.checkpoint_sha256,
        "source_sha256": trained.source_sha256,
        "quantized_layers": {str(bits): n for bits, n in trained.truth.layers_by_bits.items()},
        "epoch": trained.epoch,
    }


def make_graph(settings: Export, run: RunRoot, trained: Trained, kind: tuple[str, str]) -> ModelProto:
    """FP32 and QCDQ files are traced from torch; FP16 and INT4 files are made of those, read back from disk."""
    precision, contract = kind
    if precision in DERIVED_FROM:
        source = onnx.load(run.onnx_dir / file_name(trained.label, trained.config, (DERIVED_FROM[precision], contract)))
        return to_half(source) if precision == "fp16" else to_int4(source)
    path = run.onnx_dir / f".{trained.label}-{contract}.traced"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        trace(settings, one_head(trained.model, contract), path, kind, trained.truth.images)
        graph = onnx.load(path)
    finally:
        path.unlink(missing_ok=True)
    tidy(graph)
    return optimize(graph) if settings.optimize else graph


def trace(settings: Export, model: nn.Module, path: Path, kind: tuple[str, str], images: np.ndarray) -> None:
    """TorchScript exporter for both variants; Brevitas adds its QCDQ nodes where there are quantized layers.

    dynamo=True would leave FP32 weights behind QuantizeLinear (Brevitas 0.13.4). No layer is fused before.
    """
    precision, contract = kind
    arguments: dict[str, Any] = {
        "input_names": ["images"], "output_names": [contract], "opset_version": settings.opset, "dynamo": False,
    }  # fmt: skip
    if settings.dynamic:
        arguments["dynamic_axes"] = {"images": {0: "batch"}, contract: {0: "batch"}}
    example = torch.from_numpy(images[:1])
    with torch.no_grad(), warnings.catch_warnings():
        # Known and harmless here: the TorchScript exporter is deprecated, and tracing fixes the input size on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        if precision == "qcdq":
            export_onnx_qcdq(model, args=example, export_path=str(path), **arguments)
        else:
            torch.onnx.export(model, (example,), str(path), **arguments)


def check(part: Path, run: RunRoot, trained: Trained, kind: tuple[str, str]) -> dict[str, Any]:
    """All gates of one file, with what they measured.

    Raises:
        RuntimeError: a gate failed.
    """
    precision, contract = kind
    gates: dict[str, Any] = {"checker": check_file(part)}
    if precision in ("qcdq", "int4"):
        gates["codes"] = check_codes(part, trained.truth.layers_by_bits)
    if precision == "fp16":
        gates["half"] = check_half(part)
    if precision == "int4":
        reference_path = run.onnx_dir / file_name(trained.label, trained.config, ("qcdq", contract))
        gates["bit_equal"] = check_same_output(part, reference_path, trained.truth.images)
    gates["parity"] = check_parity(part, trained.truth, contract, precision)
    return gates


def write_overview(run: RunRoot) -> None:
    """onnx/export.json: every file of the run with its size, its ratio to the FP32 file and its gates."""
    records = [read_json(path.with_suffix(".json"), "export") for path in sorted(run.onnx_dir.glob("*.onnx"))]
    full = {record["contract"]: record["size_bytes"] for record in records if record["precision"] == "fp32"}
    files = {
        record["file"]: {
            "label": record["label"], "size_bytes": record["size_bytes"],
            "ratio_to_fp32": record["size_bytes"] / full[record["contract"]] if record["contract"] in full else None,
            "gates": record["gates"],
        }
        for record in records
    }  # fmt: skip
    write_json(run.onnx_dir / "export.json", files)
