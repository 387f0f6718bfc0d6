"""The .json beside each ONNX file against readings of the file itself, of checkpoints and of the network."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from app.core.labels import BASELINE, FP16
from app.core.run import RunRoot
from app.export.export import export, load_trained, write_file
from app.export.trace import parity_images
from app.quant.model import build, load_checkpoint, save_checkpoint
from app.train.ptq import ptq
from tests.support.export_run import IMGSZ, N_TINY, TINY, config_of, make_run, network
from tests.support.scheme_files import built_in
from tests.support.stand_in_session import OFF

SCHEME = "w4a16-mixed"
# Four images, and no optimisation of the graph: other tests have both.
SETS = (f"quant.scheme={SCHEME}", "train.batch=2", "train.bn_batches=2", "data.n_val=4", "export.optimize=false")
N_IMAGES = 4
# Three quantized layers of the branch that is exported, and one of the other branch, which no file may count.
RULES = (
    ("model.0.conv", 8),
    ("model.1.conv", 4),
    ("model.5.one2one_cv2.0.2", 4),
    ("model.5.cv2.0.2", 4),
    ("*", "float"),
)
LAST_EPOCHS = {"fp16": 6, f"qat-{SCHEME}": 3}  # in checkpoints counted from 0
STRIDES = (8, 16, 32)
N_4_BITS, N_8_BITS = 2, 1
N_CONVS = N_TINY + 1  # DFL's
# Float32 sums in another order; this network is untrained and magnifies them up to 1e-4 in score. Its two branches
# differ by more than 0.01.
TORCH_BOX_PX, TORCH_SCORE, BRANCHES_SCORE = 0.1, 1e-3, 1e-2
SNR_RTOL = 1e-4  # sums of up to 1e5 float32 squares


@dataclass(frozen=True)
class Expected:
    label: str
    variant: str
    folder: str  # whose checkpoint the file is made of
    precision: str
    contract: str = "raw"

    @property
    def is_quantized(self) -> bool:
        return self.variant != "fp16"


QAT, PTQ = f"qat-{SCHEME}", f"ptq-{SCHEME}"
FILES = {
    "yolov10n-baseline-fp32": Expected("baseline", "fp16", "fp16", "fp32"),
    "yolov10n-baseline-fp16": Expected("baseline-fp16", "fp16", "fp16", "fp16"),
    "yolov10n-baseline-fp32-end2end": Expected("baseline-end2end", "fp16", "fp16", "fp32", "end2end"),
    f"yolov10n-{SCHEME}-qcdq-qat": Expected(QAT, "qat", QAT, "qcdq"),
    f"yolov10n-{SCHEME}-int4-qat": Expected(f"{QAT}-int4", "qat", QAT, "int4"),
    f"yolov10n-{SCHEME}-qcdq-ptq": Expected(PTQ, "ptq", PTQ, "qcdq"),
    f"yolov10n-{SCHEME}-qcdq-ptq-bn": Expected(f"{PTQ}-bn", "ptq", f"{PTQ}-bn", "qcdq"),
}
EVERY_FILE = pytest.mark.parametrize("stem", FILES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRoot]:
    with network(TINY), built_in(tmp_path_factory.mktemp("schemes"), SCHEME, *RULES):
        yield exported(tmp_path_factory.mktemp("runs"))


def exported(runs_dir: Path) -> RunRoot:
    run = make_run(runs_dir, *SETS)
    for label, epoch in LAST_EPOCHS.items():
        path = run.best(label)
        entries = {**load_checkpoint(path), "epoch": epoch}
        config = config_of(run, "fp16" if label == "fp16" else "qat", *SETS)
        save_checkpoint(path, config, {key: entries[key] for key in ("scored", "epoch")})
    config = config_of(run, "qat", *SETS)
    ptq(config, run, force=False)
    export(config, run, force=False)
    write_file(config.export, run, load_trained(run, FP16), replace(BASELINE, contract="end2end"))
    return run


def onnx_path(run: RunRoot, stem: str) -> Path:
    return run.root / "onnx" / f"{stem}.onnx"


def record_of(run: RunRoot, stem: str) -> dict[str, Any]:
    return json.loads(onnx_path(run, stem).with_suffix(".json").read_text(encoding="utf-8"))


def checkpoint_path(run: RunRoot, label: str) -> Path:
    return run.root / label / "weights" / "best.pt"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sides(value: onnx.ValueInfoProto) -> list[int]:
    return [side.dim_value for side in value.type.tensor_type.shape.dim]


def test_no_other_files_are_there(run: RunRoot) -> None:
    names = {f"{stem}{ending}" for stem in FILES for ending in (".onnx", ".json")}
    assert {path.name for path in (run.root / "onnx").iterdir()} == names


@EVERY_FILE
def test_label_variant_scheme_and_precision(run: RunRoot, stem: str) -> None:
    record, expected = record_of(run, stem), FILES[stem]
    assert (record["label"], record["variant"], record["model"]) == (expected.label, expected.variant, "yolov10n")
    assert record["scheme"] == (SCHEME if expected.is_quantized else None)
    assert record["precision"] == expected.precision == precision_of(onnx.load(onnx_path(run, stem)))
    facts = {entry.key: entry.value for entry in onnx.load(onnx_path(run, stem)).metadata_props}
    assert (facts["label"], facts["precision"]) == (expected.label, expected.precision)


def precision_of(model: ModelProto) -> str:
    """As the types of the first convolution's and the quantized weights say."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    if TensorProto.INT4 in kinds.values():
        return "int4"
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return "qcdq"
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    precisions: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}
    return precisions[kinds[first.input[1]]]


@EVERY_FILE
def test_contract_input_and_classes(run: RunRoot, stem: str) -> None:
    record, graph = record_of(run, stem), onnx.load(onnx_path(run, stem)).graph
    n_anchors = sum((IMGSZ // stride) ** 2 for stride in STRIDES)
    shape = [1, 84, n_anchors] if FILES[stem].contract == "raw" else [1, min(300, n_anchors), 6]
    assert [(value.name, sides(value)) for value in graph.output] == [(FILES[stem].contract, shape)]
    assert record["contract"] == FILES[stem].contract
    assert (record["imgsz"], record["n_classes"]) == (IMGSZ, 80)
    [images] = graph.input
    assert (images.name, sides(images)) == (record["input"]["name"], [1, 3, IMGSZ, IMGSZ])
    assert images.type.tensor_type.elem_type == TensorProto.FLOAT
    assert record["input"]["type"] == "float32"


@EVERY_FILE
def test_epoch_and_checkpoints(run: RunRoot, stem: str) -> None:
    """PTQ files name the checkpoint they are read from and, as source, the baseline whose weights it quantizes."""
    record, expected = record_of(run, stem), FILES[stem]
    baseline, own = (digest(checkpoint_path(run, label)) for label in ("fp16", expected.folder))
    assert record["checkpoint_sha256"] == own
    is_ptq = expected.variant == "ptq"
    assert record["source_sha256"] == (baseline if is_ptq else None)
    assert (own != baseline) == expected.is_quantized
    assert record["epoch"] == LAST_EPOCHS["fp16" if is_ptq else expected.folder] + 1
    assert len({digest(checkpoint_path(run, label)) for label in ("fp16", QAT, PTQ, f"{PTQ}-bn")}) == 4


@EVERY_FILE
def test_file_and_its_nodes(run: RunRoot, stem: str) -> None:
    path, record = onnx_path(run, stem), record_of(run, stem)
    model = onnx.load(path)
    assert (record["file"], record["size_bytes"], record["sha256"]) == (path.name, len(path.read_bytes()), digest(path))
    assert record["opset"] == model.opset_import[0].version == (21 if FILES[stem].precision == "int4" else 17)
    assert record["nodes"] == Counter(node.op_type for node in model.graph.node)
    assert record["nodes"]["Conv"] == N_CONVS
    assert record["export"] == {"opset": 17, "dynamic": False, "optimize": False}
    assert record["gates"]["parity"]["n_images"] == N_IMAGES
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["checkpoint_sha256"] == record["checkpoint_sha256"]


@EVERY_FILE
def test_quantized_layers_by_bits(run: RunRoot, stem: str) -> None:
    record, model = record_of(run, stem), onnx.load(onnx_path(run, stem))
    counted = Counter(bits_in_file(model))
    wanted = {"4": N_4_BITS, "8": N_8_BITS} if FILES[stem].is_quantized else {}
    assert record["quantized_layers"] == counted == wanted
    if wanted:
        assert record["gates"]["codes"] == {"layers": wanted, "max_codes_per_channel": most_levels(model)}


def bits_in_file(model: ModelProto) -> list[str]:
    """Of every DequantizeLinear, from its type or from the largest code of the Clip before it."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    limits = {node.output[0]: tensors[node.input[2]] for node in model.graph.node if node.op_type == "Clip"}
    names = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    by_limit = {7: "4", 127: "8"}
    return [by_limit[int(numpy_helper.to_array(limits[name]))] if name in limits else "4" for name in names]


def most_levels(model: ModelProto) -> int:
    kinds = (TensorProto.INT8, TensorProto.INT4)
    codes = [numpy_helper.to_array(t).astype(int) for t in model.graph.initializer if t.data_type in kinds]
    weights = [code for code in codes if code.ndim == 4]
    return max(len(np.unique(channel)) for weight in weights for channel in weight)


def test_fp32_file_gives_the_one2one_branch_of_the_trained_network(run: RunRoot) -> None:
    """The network with both branches, built and run without the export's code: its scores and its boxes."""
    config = config_of(run, "fp16", *SETS)
    model = build(config)[0]
    model.load_state_dict(load_checkpoint(checkpoint_path(run, "fp16"))["scored"])
    images = parity_images(run, IMGSZ)[:2]
    with torch.no_grad():
        branches = model.eval()(torch.from_numpy(images))[1]
    scores, boxes = branches["one2one"]["scores"].sigmoid().numpy(), branches["one2one"]["boxes"].numpy()
    assert np.abs(scores - branches["one2many"]["scores"].sigmoid().numpy()).max() > BRANCHES_SCORE
    raw = run_session(onnx_path(run, "yolov10n-baseline-fp32"), images)
    assert np.abs(raw[:, 4:] - scores).max() < TORCH_SCORE
    assert np.abs(raw[:, :4] - decoded(boxes)).max() < TORCH_BOX_PX


def decoded(boxes: np.ndarray) -> np.ndarray:
    """[N,64,A] -> [N,4,A] cx,cy,w,h in px: the mean of 0..15 under each side's distribution, from its cell's centre."""
    weights = np.exp(boxes.astype(float).reshape(len(boxes), 4, 16, -1))
    left, top, right, bottom = np.moveaxis((weights * np.arange(16)[:, None]).sum(2) / weights.sum(2), 1, 0)
    cells = [(x + 0.5, y + 0.5, s) for s in STRIDES for y in range(IMGSZ // s) for x in range(IMGSZ // s)]
    x, y, stride = np.array(cells).T
    sides = x + (right - left) / 2, y + (bottom - top) / 2, left + right, top + bottom
    return np.stack(sides, axis=1) * stride


def run_session(path: Path, images: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = OFF, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"images": image[None]})[0]) for image in images])


@pytest.mark.parametrize("label", [PTQ, f"{PTQ}-bn"])
def test_health_of_ptq_is_that_of_the_baseline_weights(run: RunRoot, label: str) -> None:
    """The noise of every layer, with its own number of bits, from the weights of the baseline's checkpoint."""
    health, described = (
        json.loads((run.root / label / name).read_text(encoding="utf-8"))
        for name in ("health.json", "quant_config.json")
    )
    assert health["epoch"] == LAST_EPOCHS["fp16"] + 1
    weights = load_checkpoint(checkpoint_path(run, "fp16"))["scored"]
    bits = {layer["name"]: layer["bits"] for layer in described["layers"] if layer["bits"] is not None}
    assert health["snr_db"].keys() == bits.keys()
    for name, noise in health["snr_db"].items():
        weight = weights[f"{name}.weight"].flatten(1).numpy()
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(2 ** (bits[name] - 1) - 1)
        lost = weight - np.rint(weight / scale) * scale
        assert noise == pytest.approx(10 * math.log10((weight**2).sum() / (lost**2).sum()), rel=SNR_RTOL)


def test_only_the_second_ptq_checkpoint_has_other_statistics(run: RunRoot) -> None:
    baseline, plain, reestimated = (
        load_checkpoint(checkpoint_path(run, label))["scored"] for label in ("fp16", PTQ, f"{PTQ}-bn")
    )
    names = [name for name in baseline if name.endswith(("running_mean", "running_var"))]
    assert all(torch.equal(baseline[name], plain[name]) for name in names)
    used = [name for name in names if "one2many" not in name]
    assert not any(torch.equal(plain[name], reestimated[name]) for name in used)
