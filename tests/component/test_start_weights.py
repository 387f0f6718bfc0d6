"""A training from a checkpoint, and a run whose baseline is one: what is computed, recorded and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

from app.core.config import Config, UserError
from app.core.files import read_json, sha256
from app.core.results import read_rows
from app.core.run import RunRoot
from app.eval.evaluate import evaluate
from app.export.export import export
from app.export.trace import parity_images
from app.quant.model import load_scored
from app.report.evidence import gather
from app.report.findings import derive
from app.report.publish import compared
from app.report.summary import summary
from app.report.verdict import start_lines
from app.train.done import make_ready
from app.train.import_weights import import_weights
from app.train.ptq import ptq
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.export_run import TINY, TINY_SETS, config_of, copy_of, enliven, make_run, network

SETS = (*TINY_SETS, "train.epochs=1", "train.device=cpu", "train.workers=0")


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with network(TINY), pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)  # figures stay empty, a second less each
        yield


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    """A run of the data stage alone."""
    return make_run(tmp_path_factory.mktemp("fresh"), *TINY_SETS, variants=())


@pytest.fixture(scope="module")
def published(fresh: RunRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Ultralytics' own code writes it: the pickle of a network in FP16."""
    torch.manual_seed(1)
    yolo: Any = YOLO("yolov10n.yaml", task="detect")
    enliven(yolo.model, torch.from_numpy(parity_images(fresh, 96)))
    yolo.model.names = dict(enumerate(read_json(fresh.provenance, "data")["names"]))
    yolo.ckpt = {"train_args": {"imgsz": 64}}
    path = tmp_path_factory.mktemp("published") / "best.pt"
    yolo.save(path)
    return path


def configured(run: RunRoot, variant: str, *sets: str) -> Config:
    """Of a copy too, which reads the images of the first."""
    place = read_json(run.provenance, "data")["coco_dir"]
    return config_of(run, variant, *SETS, f"data.coco_dir={place}", *sets)


@pytest.fixture(scope="module")
def imported(fresh: RunRoot, published: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    """FP16 and PTQ of the checkpoint, and a QAT training from it: exported and scored."""
    run = copy_of(fresh, tmp_path_factory.mktemp("imported"))
    import_weights(configured(run, "fp16"), run, published, force=False)
    config = configured(run, "qat", f"train.weights={published}")
    ptq(config, run, force=False)
    train(config, run, force=False)
    export(config, run, force=False)
    evaluate(config, run, force=False)
    return run


def test_the_network_computes_what_ultralytics_computes(imported: RunRoot, published: Path) -> None:
    """Bit for bit; its ONNX file has passed the gates against it."""
    images = torch.from_numpy(parity_images(imported, 96))
    theirs: Any = torch.load(published, weights_only=False)["model"].float().eval()
    ours, config, checkpoint = load_scored(imported.best("fp16"))
    with torch.no_grad():
        wanted, computed = theirs(images)[1]["one2one"], ours(images)[1]["one2one"]
    assert wanted["scores"].sigmoid().max() > 0.02, "it is no empty answer"
    assert all(torch.equal(computed[key], wanted[key]) for key in ("boxes", "scores"))
    assert (config.hyp.mosaic, config.model, checkpoint["epoch"]) == (0, "yolov10n.yaml", -1)


def test_every_record_says_where_the_weights_are_from(imported: RunRoot, published: Path) -> None:
    facts = {"file": "best.pt", "sha256": sha256(published)}
    said = f"from best.pt, sha256 {facts['sha256'][:12]}"
    stages = read_json(imported.run_json, "data")["stages"]
    assert stages["import-weights"]["start"] == stages["train qat-w4a16"]["start"] == said
    records = [read_json(path, "export") for path in imported.onnx_dir.glob("*.json")]
    assert [record["start"] for record in records] == len(records) * [facts]
    assert {record["epoch"] for record in records} == {0, 1}
    scores = [read_json(path, "eval")["model"]["start"] for path in imported.root.glob("*-coco/metrics.json")]
    assert scores == len(records) * [facts]


def test_the_page_names_the_checkpoint_and_misses_nothing(imported: RunRoot, published: Path) -> None:
    evidence = gather(imported)
    findings = derive(evidence, configured(imported, "qat").report)
    said = f"best.pt, sha256 {sha256(published)[:12]}"
    assert findings["missing"] == []
    assert not any("best.pt" in doubt for doubt in findings["doubts"]), "both are from the same file"
    assert start_lines(findings) == [
        f"**Start:** the baseline is {said}, imported and not trained here; qat-w4a16 was trained from {said}."
    ]
    assert compared(evidence).startswith(f"compare PTQ with the imported weights from {said}, qat-w4a16: ")
    page = summary(evidence, findings, [], [])
    assert page.count("weights began |") == 2, "in the tables of files and of trainings"
    rows = [line for line in page.splitlines() if ".onnx |" in line]
    assert len(rows) == 6
    assert all(f" | from {said} | " in line for line in rows)
    assert "import-weights" not in page.partition("## Missing")[2]


def test_a_training_begins_with_the_weights_and_goes_on_without_the_file(
    imported: RunRoot, published: Path, tmp_path: Path
) -> None:
    run = copy_of(imported, tmp_path, "onnx", "qat-w4a16*", "fp16", "ptq*", "baseline*")
    file = tmp_path / "own.pt"
    file.write_bytes(published.read_bytes())
    config = configured(run, "fp16", f"train.weights={file}")
    assert make_ready(config, run, force=False)
    trainer = Trainer(config, run, "cpu")
    assert trainer.headline().startswith(f"yolov10n from own.pt, sha256 {sha256(file)[:12]}, 2 images of ")
    trainer.set_up()
    wanted = load_scored(imported.best("fp16"))[0].state_dict()
    for state in (trainer.model.state_dict(), trainer.ema.ema.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    trainer.close()
    train(config, run, force=False)
    rows = (run.variant_dir("fp16") / "results.csv").read_bytes()
    run.done("fp16").unlink()
    file.unlink()
    train(config, run, force=False)
    assert read_rows(run.variant_dir("fp16") / "results.csv")
    assert (run.variant_dir("fp16") / "results.csv").read_bytes() == rows


def test_importing_again_is_done_and_another_file_or_a_training_is_refused(
    imported: RunRoot, published: Path, tiny_run: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = copy_of(imported, tmp_path)
    config, before = configured(run, "fp16"), sha256(run.best("fp16"))
    import_weights(config, run, published, force=False)
    assert caplog.messages == [f"import-weights: done already ({run.best('fp16')})"]
    other = tiny_run.best("fp16")
    with pytest.raises(UserError, match=r"holds the weights of another file \(best\.pt\): take another RUN"):
        import_weights(config, run, other, force=False)
    with pytest.raises(UserError, match=r"holds imported weights \(from best\.pt, sha256 \w{12}\) and no training"):
        make_ready(config, run, force=False)
    import_weights(config, run, other, force=True)
    assert sha256(run.best("fp16")) != before
    with pytest.raises(UserError, match="holds a training"):
        import_weights(config, copy_of(tiny_run, tmp_path / "trained"), published, force=False)


def test_what_import_says_of_size_and_of_quantized_weights(
    fresh: RunRoot, published: Path, tiny_run: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(fresh, tmp_path)
    import_weights(configured(run, "fp16"), run, published, force=False)
    assert "it was trained at 64 px and will be scored at 96" in caplog.text
    with pytest.raises(UserError, match="quantized weights: import a float network"):
        import_weights(configured(run, "fp16"), run, tiny_run.best("qat-w4a16"), force=True)
