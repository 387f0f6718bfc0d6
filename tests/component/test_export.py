"""Export of YOLOv10n in both variants from files alone: gates, metadata, contracts, FP16 and INT4 files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from brevitas.nn import QuantConv2d
from onnx import TensorProto, numpy_helper

from app.coco.categories import NAMES
from app.coco.detections import select
from app.core.config import load
from app.core.files import read_json, sha256
from app.core.labels import Label
from app.core.run import RunRoot
from app.core.shapes import misfits
from app.export import gates as onnx_gates
from app.export.export import Trained, export, load_trained
from app.export.gates import run_file
from app.export.graphs import quant_weights
from app.export.trace import one_head
from app.quant.model import build
from app.report.evidence import RECORD_SHAPE
from tests.support.cuda_kernels import without_kernel
from tests.support.export_run import IMGSZ, config_of, make_run

BOTH = "export.contracts=[raw,end2end]"
N_QUANTIZED = 83  # convolutions of YOLOv10n with one head, without DFL's
KINDS = {
    "yolov10n-baseline-fp32": ("baseline", "fp32"),
    "yolov10n-baseline-fp16": ("baseline-fp16", "fp16"),
    "yolov10n-w4a16-qcdq-qat": ("qat-w4a16", "qcdq"),
    "yolov10n-w4a16-int4-qat": ("qat-w4a16-int4", "int4"),
}
STEMS = list(KINDS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRoot, dict[str, Trained]]:
    """The run and what export loaded for it: torch takes seconds for the outputs of a checkpoint."""
    run, loaded = make_run(tmp_path_factory.mktemp("runs")), {}

    def load(run: RunRoot, label: Label) -> Trained:
        loaded[str(label)] = load_trained(run, label)
        return loaded[str(label)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.export.export.load_trained", load)
        export(config_of(run, "qat", BOTH), run, force=False)
    return run, loaded


@pytest.fixture
def run(exported: tuple[RunRoot, dict[str, Trained]]) -> RunRoot:
    return exported[0]


@pytest.fixture
def trained(exported: tuple[RunRoot, dict[str, Trained]]) -> dict[str, Trained]:
    return exported[1]


def variant_of(stem: str) -> str:
    return "fp16" if "baseline" in stem else "qat-w4a16"


def file_of(run: RunRoot, stem: str, contract: str = "raw") -> Path:
    return run.onnx_dir / f"{stem}{'' if contract == 'raw' else '-end2end'}.onnx"


def test_all_files_are_there_and_listed(run: RunRoot) -> None:
    names = sorted(file_of(run, stem, contract).name for stem in STEMS for contract in ("raw", "end2end"))
    assert sorted(path.name for path in run.onnx_dir.glob("*.onnx")) == names
    assert sorted(path.with_suffix(".onnx").name for path in run.onnx_dir.glob("*.json")) == names
    sizes = {stem: file_of(run, stem).stat().st_size for stem in STEMS}
    assert sizes["yolov10n-baseline-fp16"] / sizes["yolov10n-baseline-fp32"] < 0.51
    assert sizes["yolov10n-w4a16-int4-qat"] / sizes["yolov10n-baseline-fp32"] <= 0.18
    assert not [path for path in run.onnx_dir.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("contract", ["raw", "end2end"])
@pytest.mark.parametrize("stem", STEMS)
def test_metadata_in_the_file_is_that_of_the_json(run: RunRoot, stem: str, contract: str) -> None:
    path = file_of(run, stem, contract)
    record = read_json(path.with_suffix(".json"), "export")
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts.pop("names")) == NAMES
    assert facts.pop("imgsz") == str(IMGSZ) == str(record["imgsz"])
    assert facts == {key: record[key] for key in facts}
    assert {"contract", "config_hash", "code_version", "checkpoint_sha256"} <= facts.keys()
    assert misfits(record, RECORD_SHAPE) == []  # what the report reads
    assert record["quantized_layers"] == ({} if "baseline" in stem else {"4": N_QUANTIZED})
    label, precision = KINDS[stem]
    assert (record["label"], record["precision"]) == (label + ("" if contract == "raw" else "-end2end"), precision)
    assert record["checkpoint_sha256"] == sha256(run.variant_dir(variant_of(stem)) / "weights" / "best.pt")
    assert (record["sha256"], record["size_bytes"]) == (sha256(path), path.stat().st_size)
    assert (model.opset_import[0].version, record["opset"]) == ((21, 21) if precision == "int4" else (17, 17))
    sides = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert ([value.name for value in model.graph.input], sides) == (["images"], [1, 3, IMGSZ, IMGSZ])


@pytest.mark.parametrize("stem", STEMS)
def test_gates_measured_parity_with_optimisation_off_and_on(
    run: RunRoot, trained: dict[str, Trained], stem: str
) -> None:
    """The gate's figure is the largest of both levels, measured here again without the gate's code."""
    path = file_of(run, stem)
    truth = trained[variant_of(stem)].truth
    off = [np.abs(run_file(path, truth.images, level)[0] - truth.raw) for level in ("off", "on")]
    parity = read_json(path.with_suffix(".json"), "export")["gates"]["parity"]
    assert parity["n_images"] == 8
    assert parity["max_box_px"] == pytest.approx(max(level[:, :4].max() for level in off))
    assert parity["max_score"] == pytest.approx(max(level[:, 4:].max() for level in off))
    assert truth.raw[:, 4:].max() - truth.raw[:, 4:].min() > 100 * truth.allowed("fp32").score  # else it says nothing


@pytest.mark.parametrize("stem", STEMS[2:])
@pytest.mark.parametrize("contract", ["raw", "end2end"])
def test_codes_are_those_of_the_quantizer(run: RunRoot, trained: dict[str, Trained], stem: str, contract: str) -> None:
    path = file_of(run, stem, contract)
    model = onnx.load(path)
    weights = {(*weight.codes.shape, weight.codes.tobytes()) for weight in quant_weights(model)}
    layers = [
        layer for layer in one_head(trained["qat-w4a16"].model, contract).modules() if isinstance(layer, QuantConv2d)
    ]
    expected = [
        (layer.quant_weight().value / layer.quant_weight().scale).round().int().detach().numpy() for layer in layers
    ]
    assert weights == {(*codes.shape, codes.tobytes()) for codes in expected}
    assert max(len(np.unique(channel)) for codes in expected for channel in codes) <= 15
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["DequantizeLinear"] == len(layers) == N_QUANTIZED
    assert kinds["Clip"] == (0 if "int4" in stem else N_QUANTIZED)
    gates = read_json(path.with_suffix(".json"), "export")["gates"]
    assert gates["codes"] == {"layers": {"4": N_QUANTIZED}, "max_codes_per_channel": 15}


def test_int4_file_holds_two_codes_a_byte_and_gives_the_same_bits(run: RunRoot, trained: dict[str, Trained]) -> None:
    path = file_of(run, "yolov10n-w4a16-int4-qat")
    packed = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == TensorProto.INT4]
    assert len(packed) == N_QUANTIZED
    assert all(len(tensor.raw_data) == (np.prod(tensor.dims) + 1) // 2 for tensor in packed)
    images = trained["qat-w4a16"].truth.images
    for level in ("off", "on"):
        a, b = (run_file(file_of(run, stem), images, level)[0] for stem in STEMS[2:])
        np.testing.assert_array_equal(a, b)


def test_half_file_is_half_but_for_the_decode(run: RunRoot) -> None:
    model = onnx.load(file_of(run, "yolov10n-baseline-fp16"))
    convolutions = {node.name: node for node in model.graph.node if node.op_type == "Conv"}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    single = [name for name, node in convolutions.items() if types[node.input[1]] == TensorProto.FLOAT]
    assert single == ["/model.23/dfl/conv/Conv"]
    assert len(convolutions) == N_QUANTIZED + 1
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in [*inferred.graph.value_info, *inferred.graph.output]
    }
    sigmoid = next(node for node in model.graph.node if node.name == "/model.23/Sigmoid")
    assert kinds[sigmoid.output[0]] == kinds["raw"] == TensorProto.FLOAT
    assert sum(kind == TensorProto.FLOAT16 for kind in kinds.values()) > 200


@pytest.mark.parametrize("contract", ["raw", "end2end"])
@pytest.mark.parametrize("stem", STEMS)
def test_every_node_has_a_cuda_kernel(run: RunRoot, stem: str, contract: str) -> None:
    """But for the native INT4 file, which is there to be shipped small: its opset 21 sends Resize to the CPU."""
    left_over = without_kernel(onnx.load(file_of(run, stem, contract)))
    assert ("Resize-19 of FLOAT" in left_over) if "int4" in stem else not left_over


def test_raw_and_end2end_give_the_same_detections(run: RunRoot, trained: dict[str, Trained]) -> None:
    settings = load("qat").eval
    truth = trained["fp16"].truth
    images, allowed = truth.images, truth.allowed("fp32")
    for stem in STEMS:
        raw, end2end = (run_file(file_of(run, stem, contract), images, "on")[0] for contract in ("raw", "end2end"))
        assert end2end.shape == (8, 189, 6)  # fewer than 300 anchors at 96 px
        for a, b in zip(raw, end2end, strict=True):
            first, second = select(a, "raw", settings), select(b, "end2end", settings)
            np.testing.assert_allclose(first[:, 4], second[:, 4], atol=allowed.score)
            same = np.abs(first - second).max(axis=1) < allowed.box_px
            assert same.mean() > 0.98  # the others have equal scores in another order


def test_wrong_graphs_fail_their_gates(run: RunRoot, trained: dict[str, Trained], tmp_path: Path) -> None:
    """One weight, one code or one layer too few: each is found, and the message names it."""
    truth = trained["qat-w4a16"].truth
    model = onnx.load(file_of(run, "yolov10n-w4a16-qcdq-qat"))
    weight = next(quant_weights(model))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight.name)
    codes = weight.codes.copy()
    codes[0, 0, 0, 0] = -8
    tensor.CopyFrom(numpy_helper.from_array(codes.astype(np.int8), weight.name))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    with pytest.raises(RuntimeError, match=rf"{weight.dequantize.name} holds codes beyond -7\.\.7"):
        onnx_gates.check_codes(path, truth.layers_by_bits)
    codes[0, 0, 0, 0] = -weight.codes[0, 0, 0, 0] or 7
    tensor.CopyFrom(numpy_helper.from_array(codes.astype(np.int8), weight.name))
    onnx.save(model, path)
    with pytest.raises(
        RuntimeError, match=r"differs from torch by .* graph optimisation off, image 0, output \w+ of anchor"
    ):
        onnx_gates.check_parity(path, truth, Label("qat", "w4a16"))
    with pytest.raises(RuntimeError, match=r"differs from yolov10n-w4a16-qcdq-qat\.onnx"):
        onnx_gates.check_same_output(path, file_of(run, "yolov10n-w4a16-qcdq-qat"), truth.images[:1])
    with pytest.raises(RuntimeError, match="83 DequantizeLinear nodes"):
        onnx_gates.check_codes(path, {4: N_QUANTIZED + 1})
    with pytest.raises(RuntimeError, match=r"/model\.0/conv/Conv has weights that are not FP16"):
        onnx_gates.check_half(file_of(run, "yolov10n-baseline-fp32"))


def test_end2end_parity_sees_a_wrong_choice(run: RunRoot, trained: dict[str, Trained]) -> None:
    truth = trained["fp16"].truth
    allowed = truth.allowed("fp32")
    output = run_file(file_of(run, "yolov10n-baseline-fp32", "end2end"), truth.images[:1], "on")[0][0]
    box_px, score, _ = onnx_gates.off_end2end(output, truth.raw[0], allowed)
    assert box_px <= allowed.box_px
    assert score <= allowed.score
    missed = np.concatenate([output[1:], output[-1:]])  # the best detection is left out, all others are right
    box_px, score, _ = onnx_gates.off_end2end(missed, truth.raw[0], allowed)
    assert score > allowed.score
    shifted = output + np.array([1, 0, 0, 0, 0, 0], np.float32)
    assert onnx_gates.off_end2end(shifted, truth.raw[0], allowed)[0] > allowed.box_px


def test_int4_file_of_yolov10m_is_small(tmp_path: Path) -> None:
    """Sizes do not depend on training or image size. Limit of the contract: 0.15 of FP32, four bytes a parameter."""
    run = make_run(tmp_path, "model=yolov10m.yaml", "train.imgsz=32", "data.n_val=2", variants=("qat",))
    export(config_of(run, "qat"), run, force=False)
    model = one_head(build(config_of(run, "fp16", "model=yolov10m.yaml"))[0], "raw")
    fp32_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (run.onnx_dir / "yolov10m-w4a16-int4-qat.onnx").stat().st_size <= 0.15 * fp32_bytes
    assert (run.onnx_dir / "yolov10m-w4a16-qcdq-qat.onnx").stat().st_size <= 0.30 * fp32_bytes
