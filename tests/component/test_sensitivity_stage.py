"""python -m app sensitivity on a small run: files, interruption, refusals; its scheme file in ptq and export."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.__main__ import main
from app.core.config import load
from app.core.files import read_json
from app.core.run import RunRoot
from app.core.scheme import find_scheme
from app.export.export import export
from app.quant.model import float_network
from app.quant.sizes import layers_of
from app.sensitivity.budget import BYTES, amount_of
from app.sensitivity.changes import MEASURED_BITS
from app.sensitivity.measure import Probe
from app.train.ptq import ptq
from tests.support.export_run import N_TINY, SETS, TINY, TINY_SETS, config_of, copy_of, make_run, network

SEARCH = (
    "sensitivity.images=4", "sensitivity.images_other_bits=2", "sensitivity.batch_images=2", "sensitivity.bn_images=2",
    "sensitivity.random_schemes=3",
)  # fmt: skip
SAID = ("data.n_val=8", *TINY_SETS[1:])


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with network(TINY), pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.sensitivity.changes.BUILTIN", ("w4a16", "w4a16-mixed"))  # the others fit YOLOv10's blocks
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    return make_run(tmp_path_factory.mktemp("sensitivity"), *SAID, variants=("fp16",))


def call(run: RunRoot, *words: str, sets: tuple[str, ...] = SEARCH) -> int:
    """The exit code of the command on a run."""
    settings = [*SETS, f"data.coco_dir={run.runs_dir / 'coco'}", *SAID, "sensitivity.against=[w4a16-mixed]", *sets]
    options = [word for item in settings for word in ("--set", item)]
    with pytest.MonkeyPatch.context() as patch:
        argv = ["app", "sensitivity", "--run", run.name, "--runs-dir", str(run.runs_dir), *options, *words]
        patch.setattr(sys, "argv", argv)
        return main()


def result_of(run: RunRoot) -> dict[str, Any]:
    return read_json(run.root / "sensitivity" / "sensitivity.json", "sensitivity")


@pytest.fixture(scope="module")
def measured(trained: RunRoot) -> RunRoot:
    assert call(trained) == 0
    return trained


@pytest.fixture
def unmeasured(measured: RunRoot, tmp_path: Path) -> RunRoot:
    shutil.copytree(measured.runs_dir / "coco", tmp_path / "coco")
    return copy_of(measured, tmp_path, "sensitivity", ".cache", "onnx", "ptq*")


def test_every_layer_has_its_numbers(measured: RunRoot) -> None:
    result = result_of(measured)
    assert len(result["layers"]) == N_TINY
    for layer in result["layers"]:
        assert list(layer["bits"]) == [str(bits) for bits in MEASURED_BITS]
        n_images = {bits: numbers["n_images"] for bits, numbers in layer["bits"].items()}
        assert n_images == {bits: 4 if bits == "4" else 2 for bits in n_images}
        assert layer["bits"]["2"]["shift"] > layer["bits"]["8"]["shift"] > 0
    assert [scheme["name"] for scheme in result["schemes"]] == [
        "w4a16", "w4a16-mixed", "all@2", "all@3", "all@5", "all@6", "random 1", "random 2", "random 3",
    ]  # fmt: skip
    assert result["rank_correlation"]["shift"] > 0.5
    folder = measured.root / "sensitivity"
    page = (folder / "sensitivity.md").read_text()
    assert "figures/layers-dark.png" in page and (folder / "figures" / "layers-dark.png").exists()
    assert "Rank correlation (Spearman)" in page
    assert not (folder / "partial.json").exists()


@pytest.mark.parametrize(("words", "without"), [((), ("sensitivity",)), (("--force",), ())], ids=["first", "forced"])
def test_an_interrupted_measurement_goes_on(
    measured: RunRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], without: tuple[str, ...]
) -> None:
    """Killed in its second batch; the first one is not repeated, and all numbers are those of the uninterrupted.

    A forced one goes on without --force: the result that it replaces is not taken for its own.
    """
    run = copy_of(measured, tmp_path, ".cache", *without)
    shutil.copytree(measured.runs_dir / "coco", tmp_path / "coco")
    measure, calls = Probe.measure, []

    def killed_in_the_second(self: Probe, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(Probe, "measure", killed_in_the_second)
    assert call(run, *words) == 130
    assert (run.root / "sensitivity" / "partial.json").exists()
    assert call(run) == 0
    assert len(calls) == 3
    assert {**result_of(run), "seconds": 0} == {**result_of(measured), "seconds": 0}


def test_a_result_is_kept_and_another_one_refused(measured: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = result_of(measured)
    assert call(measured) == 0
    assert f"sensitivity: done already ({measured.root / 'sensitivity' / 'sensitivity.json'})" in caplog.messages
    assert call(measured, "--images", "3") == 2
    assert "was made with another settings: overwrite it with --force" in caplog.messages[-1]
    assert result_of(measured) == before


def test_a_result_on_other_annotations_is_refused(unmeasured: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    assert call(unmeasured, "--images", "2") == 0
    path = unmeasured.root / "sensitivity" / "sensitivity.json"
    result = read_json(path, "sensitivity")
    result["key"]["images"]["val"]["annotation_sha256"] = "other"
    path.write_text(json.dumps(result))
    assert call(unmeasured, "--images", "2") == 2
    assert "was made with another images: overwrite it with --force" in caplog.messages[-1]


MANY_DIGITS = "1." + "0" * 40


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", f"{MANY_DIGITS}MB"), f"--budget {MANY_DIGITS}MB: give a size such as 3.0MB"),
        (("--budget", "1kB"), "--budget: 1,000 bytes is too little, schemes of this network take "),
        (("--budget", "few"), "--budget few: give a size such as 3.0MB"),
        (
            ("--budget-bits", "1.5"),
            "--budget-bits: 1.500 bits a weight is too little, ",
        ),
        (("--budget-bits", "same-as:nothing"), "scheme nothing: choose one of"),
    ],
)
def test_a_wrong_budget_is_one_line_before_anything_is_measured(
    unmeasured: RunRoot, caplog: pytest.LogCaptureFixture, words: tuple[str, ...], said: str
) -> None:
    assert call(unmeasured, *words) == 2
    assert caplog.messages[-1].startswith(f"error: {said}")
    assert not (unmeasured.root / "sensitivity").exists()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("bits: 4, granularity: tensor", "scheme mine has a layer with one scale"),
        ("bits: 4, granularity: channel, range: full", "scheme mine has a layer with range full"),
        ("bits: float", "scheme mine leaves every layer in float"),
    ],
)
def test_a_scheme_that_cannot_be_scored_is_refused_before_anything_is_measured(
    unmeasured: RunRoot, caplog: pytest.LogCaptureFixture, rule: str, said: str
) -> None:
    file = unmeasured.runs_dir / "mine.yaml"
    file.write_text(f'- {{pattern: "*", {rule}, why: all}}\n')
    against = (*SEARCH, f"sensitivity.against=[{file}]")
    assert call(unmeasured, "--budget", "same-as:w4a16", sets=against) == 2
    assert said in caplog.messages[-1]
    assert not (unmeasured.root / "sensitivity").exists()


def test_two_rows_of_one_name_are_refused(unmeasured: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    file = unmeasured.runs_dir / "fit-as-w4a16.yaml"
    file.write_text('- {pattern: "*", bits: 5, granularity: channel, why: all}\n')
    against = (*SEARCH, f"sensitivity.against=[{file}]")
    assert call(unmeasured, "--budget", "same-as:w4a16", sets=against) == 2
    assert "another row of the proposal is named fit-as-w4a16 too" in caplog.messages[-1]


def test_bits_of_a_scheme_in_float_are_no_budget(unmeasured: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    file = unmeasured.runs_dir / "plain.yaml"
    file.write_text('- {pattern: "*", bits: float, why: all}\n')
    assert call(unmeasured, "--budget-bits", f"same-as:{file}") == 2
    assert "--budget-bits: 0.000 bits a weight is too little" in caplog.messages[-1]


def test_the_proposal_is_scored_and_taken_by_ptq_and_export(measured: RunRoot, tmp_path: Path) -> None:
    """Its file fits the budget, its gates pass, and it is scored beside the given scheme on other images."""
    assert call(measured, "--budget", "same-as:w4a16-mixed") == 0
    folder = measured.root / "sensitivity"
    file = folder / "scheme" / "fit-as-w4a16-mixed.yaml"
    facts = read_json(folder / "fit-as-w4a16-mixed.json", "sensitivity")
    model = float_network(load("fp16"))
    given, found = (layers_of(model, find_scheme(value)) for value in ("w4a16-mixed", str(file)))
    assert amount_of(BYTES, found) <= amount_of(BYTES, given) == facts["budget"]["amount"]
    assert [row["name"] for row in facts["rows"]] == ["fp32", "fit-as-w4a16-mixed", "w4a16-mixed"]
    assert facts["rows"][1]["bytes"] == amount_of(BYTES, found) and facts["n_images"] == 4
    assert facts["duels"][0]["verdict"] in ("wins", "loses", "not told apart")
    config = config_of(measured, "qat", *SAID, f"quant.scheme={file}")
    run = RunRoot(measured.runs_dir, measured.name)
    ptq(config, run, force=False)
    export(config, run, force=False)
    record = read_json(run.onnx_dir / "yolov10n-fit-as-w4a16-mixed-qcdq-ptq-bn.json", "export")
    assert record["scheme"] == "fit-as-w4a16-mixed" and {"codes", "parity"} <= record["gates"].keys()


def test_without_a_baseline_it_says_so(measured: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = copy_of(measured, tmp_path, "fp16", ".cache", "sensitivity", "onnx", "ptq*")
    shutil.copytree(measured.runs_dir / "coco", tmp_path / "coco")
    assert call(run) == 2
    assert "train-fp16" in caplog.messages[-1]
