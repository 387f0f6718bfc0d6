"""A scheme file with every number of bits from QAT and PTQ to the ONNX files, read there without the export's code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from app.core.config import Config, UserError, load
from app.core.files import read_json, write_json
from app.core.run import RunRoot
from app.export.export import export
from app.quant.model import check_scheme, load_checkpoint
from app.train.ptq import ptq
from app.train.train import make_ready
from tests.support.export_run import IMGSZ, N_TINY, TINY, TINY_SETS, config_of, copy_of, make_run, network
from tests.support.scheme_files import write_rules

# Layer of the backbone: bits and granularity. All else is at 5 bits but the last convolutions of boxes, in float.
BACKBONE = {0: (2, "channel"), 1: (3, "tensor"), 2: (4, "channel"), 3: (6, "tensor"), 4: (7, "channel")}
RULES = [
    *((f"model.{place}.conv", *kind) for place, kind in BACKBONE.items()),
    ("model.5.*cv2.[0-9].2", "float"),
    ("model.5.*cv3.[0-9].2", 8),
    ("*", 5),
]
N_LEVELS = 3  # of the head, each with a last convolution of boxes and one of classes
LAYERS = {"2": 1, "3": 1, "4": 1, "6": 1, "7": 1, "8": N_LEVELS, "5": N_TINY - len(BACKBONE) - 2 * N_LEVELS}
LARGEST = {2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}
FILES = {"qat": "yolov10n-mine-qcdq-qat", "ptq": "yolov10n-mine-qcdq-ptq"}
PACKED = "yolov10n-mine-int4-qat"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rules(tmp_path_factory.mktemp("files") / "mine.yaml", *RULES)


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRoot]:
    with network(TINY):
        run = make_run(tmp_path_factory.mktemp("runs"), *sets(file))
        config = config_of(run, "qat", *sets(file))
        ptq(config, run, force=False)
        for label in ("fp16", "ptq-mine-bn"):  # their files would only take time
            (run.variant_dir(label) / "done.json").unlink()
        export(config, run, force=False)
        yield run


def sets(file: Path) -> tuple[str, ...]:
    return (*TINY_SETS, f"quant.scheme={file}")


def graph(run: RunRoot, stem: str) -> onnx.GraphProto:
    return onnx.load(run.onnx_dir / f"{stem}.onnx").graph


class Weight:
    """The codes of a layer in a file, with the type of their tensor and the limits of the Clip behind it, if any."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        clips = {clip.output[0]: clip for clip in graph.node if clip.op_type == "Clip"}
        name = node.input[0]
        self.limits: tuple[int, int] | None = None
        if name in clips:
            name, low, high = clips[name].input
            self.limits = int(numpy_helper.to_array(tensors[low])), int(numpy_helper.to_array(tensors[high]))
        self.type = tensors[name].data_type
        self.codes = numpy_helper.to_array(tensors[name]).astype(int)
        self.scale = numpy_helper.to_array(tensors[node.input[1]])


def weights(graph: onnx.GraphProto) -> dict[str, Weight]:
    """By the name of the node; that of a layer in the backbone is /model.N/conv/..."""
    return {node.name: Weight(graph, node) for node in graph.node if node.op_type == "DequantizeLinear"}


def of_backbone(graph: onnx.GraphProto) -> dict[int, Weight]:
    found = {}
    for name, weight in weights(graph).items():
        if match := re.match(r"/model\.([0-4])/conv/", name):
            found[int(match[1])] = weight
    return found


@pytest.mark.parametrize(("method", "label"), [("qat", "qat-mine"), ("ptq", "ptq-mine")])
def test_codes_and_clips_of_the_file_are_those_of_the_checkpoint(run: RunRoot, method: str, label: str) -> None:
    """Worked out with NumPy: scale = abs-max of the channel or of the layer over the largest code."""
    state = load_checkpoint(run.best(label))["scored"]
    found = of_backbone(graph(run, FILES[method]))
    assert set(found) == set(BACKBONE)
    for place, (bits, granularity) in BACKBONE.items():
        weight = state[f"model.{place}.conv.weight"].numpy()
        axes = None if granularity == "tensor" else (1, 2, 3)
        scale = np.abs(weight).max(axis=axes, keepdims=True) / np.float32(LARGEST[bits])
        assert found[place].limits == (-LARGEST[bits], LARGEST[bits])
        np.testing.assert_array_equal(found[place].codes, np.rint(weight / scale))
        np.testing.assert_array_equal(found[place].scale.ravel(), scale.ravel())
        assert np.abs(found[place].codes).max() == LARGEST[bits]


@pytest.mark.parametrize("stem", [*FILES.values(), PACKED])
def test_the_gates_count_the_layers_of_each_number_of_bits(run: RunRoot, stem: str) -> None:
    record = read_json(run.onnx_dir / f"{stem}.json", "export")
    assert record["quantized_layers"] == record["gates"]["codes"]["layers"] == LAYERS
    found = Counter(weight.limits for weight in weights(graph(run, FILES["qat"])).values())
    assert found == {(-LARGEST[int(bits)], LARGEST[int(bits)]): n for bits, n in LAYERS.items()}


def test_up_to_4_bits_are_packed_and_more_take_a_byte(run: RunRoot) -> None:
    plain, packed = weights(graph(run, FILES["qat"])), weights(graph(run, PACKED))
    assert plain.keys() == packed.keys()
    for name, weight in packed.items():
        np.testing.assert_array_equal(weight.codes, plain[name].codes)
        is_packed = plain[name].limits in ((-1, 1), (-3, 3), (-7, 7))
        assert weight.type == (TensorProto.INT4 if is_packed else TensorProto.INT8)
        assert weight.limits == (None if is_packed else plain[name].limits)
    record = read_json(run.onnx_dir / f"{PACKED}.json", "export")
    assert record["gates"]["bit_equal"]["reference"] == f"{FILES['qat']}.onnx"


def test_the_layers_in_float_keep_their_weights(run: RunRoot) -> None:
    state = load_checkpoint(run.best("qat-mine"))["scored"]
    tensors = [numpy_helper.to_array(tensor) for tensor in graph(run, PACKED).initializer]
    for level in range(N_LEVELS):
        weight = state[f"model.5.one2one_cv2.{level}.2.weight"].numpy()
        assert any(tensor.shape == weight.shape and np.array_equal(tensor, weight) for tensor in tensors)


def test_the_hash_of_the_rules_is_recorded_beside_a_copy(run: RunRoot, file: Path) -> None:
    config = config_of(run, "qat", *sets(file))
    assert config.quant is not None
    for label in ("ptq-mine", "ptq-mine-bn"):
        folder = run.variant_dir(label)
        assert read_json(folder / "quant_config.json", "ptq")["scheme_sha256"] == config.quant.scheme.sha256
        assert (folder / "scheme" / "mine.yaml").exists()


def test_ptq_of_a_changed_file_is_refused_with_the_rules(run: RunRoot, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "runs", "onnx", "qat-mine")
    write_json(other.done("fp16"), {})
    changed = write_rules(tmp_path / "mine.yaml", *RULES[:-1], ("*", 6))
    said = r"was made with mine \(\* at 5 bits by channel\), now it is mine \(\* at 6 bits by channel\): .*--force$"
    with network(TINY), pytest.raises(UserError, match=said):
        ptq(config_of(run, "qat", *sets(changed)), other, force=False)


def test_a_training_goes_on_without_the_file_and_refuses_a_changed_one(run: RunRoot, tmp_path: Path) -> None:
    file = write_rules(tmp_path / "own.yaml", *RULES)
    other = copy_of(run, tmp_path / "runs", "onnx", "qat-mine")

    def config_now() -> Config:
        return load("qat", [], [f"train.imgsz={IMGSZ}", f"quant.scheme={file}"], other.root)

    assert make_ready(config_now(), other, force=False)
    checkpoint = other.variant_dir("qat-own") / "weights" / "last.pt"
    checkpoint.parent.mkdir()
    torch.save({}, checkpoint)
    file.unlink()
    assert make_ready(config_now(), other, force=False)
    write_rules(file, *RULES[:-1], ("*", "float"))
    said = r"another configuration \(quant\.scheme: own \(\* at 5 bits by channel\) -> own \(\* in float\)\): take"
    with pytest.raises(UserError, match=said):
        make_ready(config_now(), other, force=False)
    assert make_ready(config_now(), other, force=True)


def test_a_scheme_that_does_not_fit_the_model_is_found_before_a_training(run: RunRoot, tmp_path: Path) -> None:
    with network(TINY):
        check_scheme(config_of(run, "fp16"))
        check_scheme(config_of(run, "qat", *sets(write_rules(tmp_path / "mine.yaml", *RULES))))
        config = config_of(run, "qat", *sets(write_rules(tmp_path / "mine.yaml", ("model.10.conv", 8), *RULES)))
        with pytest.raises(UserError, match=r"'model\.10\.conv' matches no layer; nearest: model\.[0-4]\.conv, "):
            check_scheme(config)
