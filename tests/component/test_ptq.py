"""PTQ of a tiny run: two checkpoints, exported and scored like any other; weights untouched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.core.config import UserError
from app.core.files import read_json, sha256
from app.core.run import RunRoot
from app.eval.evaluate import exported_files
from app.export.done import is_exported
from app.export.export import export
from app.quant.model import load_checkpoint, load_scored
from app.train.done import is_ptq_done
from app.train.ptq import ptq
from tests.support.export_run import TINY, TINY_SETS, config_of, copy_of, network

SETS = (*TINY_SETS, "quant.scheme=w4a16-mixed")
LABELS = ["ptq-w4a16-mixed", "ptq-w4a16-mixed-bn"]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with network(TINY):
        yield


@pytest.fixture(scope="module")
def run(tiny_run: RunRoot, tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    run = copy_of(tiny_run, tmp_path_factory.mktemp("ptq"), "qat-w4a16", "onnx")
    config = config_of(run, "qat", *SETS, "export.contracts=[raw,end2end]")
    ptq(config, run, force=False)
    assert not run.onnx_dir.exists()
    shutil.copytree(tiny_run.onnx_dir, run.onnx_dir, ignore=shutil.ignore_patterns("*qat*"))  # the baseline's files
    export(config, run, force=False)
    return run


def scored(run: RunRoot, label: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.variant_dir(label) / "weights" / "best.pt")["scored"]


def test_weights_are_those_of_the_baseline_and_only_bn_differs(run: RunRoot) -> None:
    baseline, plain, reestimated = (scored(run, label) for label in ("fp16", *LABELS))
    assert list(baseline) == list(plain) == list(reestimated)
    assert all(torch.equal(baseline[key], plain[key]) for key in baseline)
    changed = {key.rpartition(".")[2] for key in plain if not torch.equal(plain[key], reestimated[key])}
    assert changed == {"running_mean", "running_var"}


def test_noise_of_every_quantized_layer_is_recorded(run: RunRoot) -> None:
    folder = run.variant_dir(LABELS[0])
    health, layers = (read_json(folder / name, "ptq") for name in ("health.json", "quant_config.json"))
    assert health["snr_db"].keys() == {layer["name"] for layer in layers["layers"] if not layer["exempt"]}
    assert all(10 < snr < 60 for snr in health["snr_db"].values())  # 4 and 8 bits of random weights


def test_onnx_files_are_ready_for_eval_and_say_what_they_are(run: RunRoot) -> None:
    files = exported_files(run)
    assert list(files) == ["baseline", "baseline-end2end", "baseline-fp16", "baseline-fp16-end2end", *LABELS]
    for label in LABELS:
        record, ending = files[label].record, label.removeprefix(LABELS[0])
        assert files[label].path.name == f"yolov10n-w4a16-mixed-qcdq-ptq{ending}.onnx"
        assert (record["variant"], record["scheme"], record["precision"]) == ("ptq", "w4a16-mixed", "qcdq")
        assert record["source_sha256"] == sha256(run.best("fp16"))
        assert record["checkpoint_sha256"] == sha256(run.best(label))
        assert {"codes", "parity"} <= record["gates"].keys()
    _, config, _ = load_scored(run.variant_dir(LABELS[0]) / "weights" / "best.pt")
    assert config.quant is not None
    assert config.quant.scheme.name == "w4a16-mixed"


def test_both_stages_are_done_and_say_so_in_a_line(
    run: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The question of the whole job has the stage's answer, also where a file has changed or settings have."""
    caplog.set_level("INFO")
    config, mine = config_of(run, "qat", *SETS, "export.contracts=[raw,end2end]"), copy_of(run, tmp_path)
    assert is_ptq_done(config, mine) and is_exported(config, mine)
    assert caplog.messages[0] == "ptq w4a16-mixed: done already (2 checkpoints)"
    assert caplog.messages[-1] == f"export: done already (6 files in {mine.onnx_dir})"
    assert not is_exported(config_of(run, "qat", *SETS, "export.opset=16"), mine)
    onnx = mine.onnx_dir / "yolov10n-w4a16-mixed-qcdq-ptq.onnx"
    content = onnx.read_bytes()
    onnx.write_bytes(content[:-1] + b"?")
    assert not is_exported(config, mine)
    onnx.write_bytes(content)
    assert is_exported(config, mine)
    mine.best("ptq-w4a16-mixed").write_bytes(b"damaged")
    assert is_ptq_done(config, mine) and not is_exported(config, mine)


def test_second_time_leaves_everything_and_another_baseline_is_refused(run: RunRoot) -> None:
    config = config_of(run, "qat", *SETS)
    paths = [path for path in [*run.root.glob("ptq*/**/*"), *run.onnx_dir.glob("*ptq*")] if path.is_file()]
    assert {path.name for path in paths} >= {"best.pt", "done.json", "yolov10n-w4a16-mixed-qcdq-ptq.onnx"}
    before = {path: path.stat().st_mtime_ns for path in paths}
    ptq(config, run, force=False)
    export(config, run, force=False)
    assert before == {path: path.stat().st_mtime_ns for path in paths}
    run.best(LABELS[0]).unlink()
    ptq(config, run, force=False)
    assert run.best(LABELS[0]).exists()
    best = run.variant_dir("fp16") / "weights" / "best.pt"
    checkpoint = load_checkpoint(best)
    torch.save({**checkpoint, "epoch": 7}, best)
    with pytest.raises(UserError, match=r"made with another source_sha256: [^\n]*--force$"):
        ptq(config, run, force=False)
    ptq(config, run, force=True)
    (run.variant_dir("fp16") / "done.json").unlink()  # else export stops at the files of the baseline
    with pytest.raises(
        UserError, match=r"ptq\.onnx was made with another checkpoint_sha256 and source_sha256: .*--force$"
    ):
        export(config, run, force=False)


def test_without_a_baseline_it_says_what_to_do(tmp_path: Path) -> None:
    empty = RunRoot(tmp_path, "empty")
    with pytest.raises(UserError, match="no finished training of fp16: run 'make train-fp16' first"):
        ptq(config_of(empty, "qat"), empty, force=False)


def test_an_unfinished_baseline_is_not_quantized(run: RunRoot, tmp_path: Path) -> None:
    """A later epoch may still replace its best.pt, and then the files of two baselines would stand side by side."""
    unfinished = RunRoot(tmp_path, "unfinished")
    shutil.copytree(run.root, unfinished.root)
    unfinished.done("fp16").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no finished training of fp16"):
        ptq(config_of(unfinished, "qat", *SETS), unfinished, force=True)
