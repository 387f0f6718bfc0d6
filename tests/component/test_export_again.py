"""Export over what is there already, with other settings, and where it must refuse: on small networks."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from app.core.config import UserError
from app.core.files import read_json
from app.core.labels import BASELINE, FP16, Label
from app.core.run import RunRoot
from app.export import gates as onnx_gates
from app.export.export import export, load_trained, write_file
from app.export.gates import run_file
from app.export.graphs import quant_weights
from app.export.trace import parity_images
from tests.support.export_run import (
    EVERY_BLOCK,
    IMGSZ,
    N_TINY,
    TINY,
    TINY_SETS,
    config_of,
    copy_of,
    make_run,
    network,
    write_checkpoint,
)
from tests.support.scheme_files import built_in

BOTH = "export.contracts=[raw,end2end]"
STEMS = ["yolov10n-baseline-fp32", "yolov10n-baseline-fp16", "yolov10n-w4a16-qcdq-qat", "yolov10n-w4a16-int4-qat"]


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with network(TINY):
        yield


def file_of(run: RunRoot, stem: str, contract: str = "raw") -> Path:
    return run.onnx_dir / f"{stem}{'' if contract == 'raw' else '-end2end'}.onnx"


def test_done_already_and_force(tiny_run: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = config_of(tiny_run, "qat", *TINY_SETS, BOTH)
    before = {path.name: path.stat().st_mtime_ns for path in tiny_run.onnx_dir.glob("*.onnx")}
    export(config, tiny_run, force=False)
    assert sum("done already" in message for message in caplog.messages) == 8
    assert {path.name: path.stat().st_mtime_ns for path in tiny_run.onnx_dir.glob("*.onnx")} == before
    other = only("fp16", tiny_run, tmp_path)
    with pytest.raises(UserError, match=r"yolov10n-baseline-fp32\.onnx was made with another export: .*--force"):
        export(config_of(other, "qat", "export.opset=16"), other, force=False)
    export(config_of(other, "qat", "export.opset=16"), other, force=True)
    assert read_json(other.onnx_dir / "yolov10n-baseline-fp32.json", "export")["opset"] == 16


def only(label: str, run: RunRoot, runs_dir: Path) -> RunRoot:
    """A copy of the run with one variant only."""
    return copy_of(run, runs_dir, *({"fp16", "qat-w4a16"} - {label}))


@pytest.mark.parametrize(("label", "gate"), [("fp16", "check_half"), ("qat-w4a16", "check_same_output")])
def test_failed_gate_leaves_no_file(
    tiny_run: RunRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str, gate: str
) -> None:
    other = only(label, tiny_run, tmp_path)

    def fail(path: Path, *_: object) -> None:
        raise RuntimeError(f"{path.name} is wrong")

    monkeypatch.setattr(f"app.export.export.{gate}", fail)
    with pytest.raises(RuntimeError, match="is wrong"):
        export(config_of(other, "qat"), other, force=True)
    stem = STEMS[1] if label == "fp16" else STEMS[3]
    assert not list(other.onnx_dir.glob(f"*{stem}.*"))
    assert not [path for path in other.onnx_dir.iterdir() if path.name.startswith(".")]


def test_a_network_that_magnifies_rounding_is_named(
    tiny_run: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its gate is passed because torch moves as much itself."""
    trained = load_trained(tiny_run, FP16)
    truth = trained.truth
    assert not onnx_gates.check_parity(file_of(tiny_run, STEMS[0]), truth, BASELINE)["magnifies_rounding"]
    restless = replace(truth, raw=truth.raw + 0.02, rounding=onnx_gates.Tolerance(0.01, 0.01))
    other = RunRoot(tmp_path, "other")
    other.root.mkdir()
    write_file(config_of(tiny_run, "fp16").export, other, replace(trained, truth=restless), BASELINE)
    record = read_json(next(other.onnx_dir.glob("*.json")), "export")
    assert record["gates"]["parity"]["magnifies_rounding"]
    assert "this one magnifies rounding" in caplog.text


def test_dynamic_batch(tmp_path: Path) -> None:
    """Of every kind of block: what a trace fixes, such as the sizes that an attention reads, would fix the batch.

    The attention is quantized; Brevitas takes long for each layer.
    """
    only_attention = (("model.7.*", 4), ("*", "float"))
    with network(EVERY_BLOCK), built_in(tmp_path / "schemes", "w4a16", *only_attention):
        run = make_run(tmp_path, "export.dynamic=true", BOTH)
        export(config_of(run, "qat", "export.dynamic=true", BOTH), run, force=False)
    images = parity_images(run, IMGSZ)
    for stem in STEMS:
        for contract in ("raw", "end2end"):
            path = file_of(run, stem, contract)
            shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
            assert (shape[0].dim_param, [side.dim_value for side in shape[1:]]) == ("batch", [3, IMGSZ, IMGSZ])
            one_by_one, together = run_file(path, images, "on")
            assert one_by_one.shape == together.shape == ((8, 84, 189) if contract == "raw" else (8, 189, 6))


def test_other_checkpoint_is_refused_in_one_line(tiny_run: RunRoot, tmp_path: Path) -> None:
    other = only("fp16", tiny_run, tmp_path)
    write_checkpoint(other, config_of(other, "qat"), other.variant_dir("fp16"))
    with pytest.raises(UserError, match=r"best\.pt is a checkpoint of qat-w4a16, not of fp16: [^\n]*$"):
        export(config_of(other, "qat"), other, force=True)
    write_checkpoint(other, config_of(other, "fp16", "train.seed=1"), other.variant_dir("fp16"))
    with pytest.raises(UserError, match=r"made with another checkpoint_sha256: [^\n]*--force$"):
        export(config_of(other, "qat"), other, force=False)


def test_a_trained_checkpoint_is_not_taken_for_ptq(tiny_run: RunRoot, tmp_path: Path) -> None:
    other = only("qat-w4a16", tiny_run, tmp_path)
    shutil.copytree(other.variant_dir("qat-w4a16"), other.variant_dir("ptq-w4a16"))
    with pytest.raises(UserError, match=r"best\.pt is a checkpoint of qat-w4a16, not of ptq-w4a16: [^\n]*$"):
        load_trained(other, Label("ptq", "w4a16"))


def test_mixed_scheme_keeps_8_bits_and_w8_has_no_int4_file(tmp_path: Path) -> None:
    run = make_run(tmp_path, "quant.scheme=w4a16-mixed", variants=("qat",))
    export(config_of(run, "qat"), run, force=False)
    model = onnx.load(run.onnx_dir / "yolov10n-w4a16-mixed-int4-qat.onnx")
    assert Counter(weight.bits for weight in quant_weights(model)) == {8: 7, 4: N_TINY - 7}
    shutil.rmtree(run.root / "qat-w4a16-mixed")
    config = config_of(run, "qat", "quant.scheme=w8a16")
    write_checkpoint(run, config, run.variant_dir("qat-w8a16"))
    export(config, run, force=False)
    assert [path.name for path in run.onnx_dir.glob("*w8a16*.onnx")] == ["yolov10n-w8a16-qcdq-qat.onnx"]
