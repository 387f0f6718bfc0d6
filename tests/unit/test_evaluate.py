"""The evaluator from ONNX file and COCO folder to metrics.json, on graphs built in code; no torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from app.coco.dataset import Dataset, hash_contents, hash_ids
from app.coco.score import first_of, load_truth, score, standalone_dataset
from app.core.config import Eval, UserError, load
from app.core.environment import REPO_DIR, clocks
from app.core.files import read_json, sha256, write_json
from app.core.run import RunRoot
from app.eval import pipeline
from app.eval.evaluate import evaluate, evaluate_file, evaluate_standalone, is_scored
from tests.support.eval_fixtures import IMGSZ, SETTINGS, raw_output, truth_box, write_coco, write_model

# Images are 64 x 48, inputs 32 x 32: halved, 4 px of padding above and below.
BOX_IN_IMAGE = [16.0, 8.0, 32.0, 24.0]
HIT = (8.0, 8.0, 24.0, 20.0, 0.9, 0)
FAULT = (0.0, 4.0, 4.0, 8.0, 0.5, 0)
COLORS_BGR = {1: (0, 0, 255), 2: (0, 255, 0), 5: (255, 0, 0)}


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco", COLORS_BGR, [truth_box(i, BOX_IN_IMAGE) for i in COLORS_BGR])


def dataset(coco_dir: Path) -> Dataset:
    return Dataset(coco_dir, "val2017", None, "a test")


def settings(**changes: Any) -> Eval:
    return SETTINGS.model_copy(update=changes)


def detections(out_dir: Path) -> list[dict[str, Any]]:
    return json.loads((out_dir / "detections.json").read_text())


def test_perfect_model_scores_one(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT))
    metrics = evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    assert metrics == read_json(tmp_path / "out" / "metrics.json", "eval")
    assert metrics["coco"]["AP"] == pytest.approx(1.0)
    assert metrics["coco"]["AP_small"] == pytest.approx(1.0)  # 32 * 24 px
    assert metrics["coco"]["AP_large"] is None
    score_written = float(np.float32(0.9))
    expected = {"category_id": 1, "bbox": BOX_IN_IMAGE, "score": score_written}
    assert detections(tmp_path / "out") == [{"image_id": i} | expected for i in COLORS_BGR]


def test_metrics_name_everything_they_depend_on(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT))
    metrics = evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    facts = metrics["dataset"]
    assert (facts["n_images"], facts["n_images_listed"], facts["n_annotations"], facts["subset"]) == (3, 3, 3, False)
    assert facts["image_ids_sha256"] == hash_ids([5, 1, 2])
    assert facts["complete_coco_val"] is False
    assert metrics["model"] == {
        "file": "m.onnx", "sha256": sha256(onnx_path), "size_bytes": onnx_path.stat().st_size, "label": "fp16",
        "scheme": None, "precision": None, "contract": "raw", "imgsz": 32, "start": None,
    }  # fmt: skip
    assert metrics["runtime"]["provider"] == "CPUExecutionProvider"
    latency = metrics["latency_ms"]
    assert (latency["batch"], latency["warmup"], latency["runs"]) == (1, 1, 5)
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert latency["clocks"].keys() == clocks(on_gpu=False).keys()
    assert latency["with_processing"]["p50"] >= latency["p50"]
    seconds = metrics["time_s"]
    assert seconds["total"] >= seconds["session"] + seconds["postprocess"] > 0


def test_scoring_the_written_file_again_gives_the_same(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(FAULT, (8.1, 8.2, 23.3, 19.7, 0.4, 0)))
    metrics = evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    truth = load_truth(dataset(coco_dir).annotation_file)
    assert score(truth, tmp_path / "out" / "detections.json", [1, 2, 5]) == metrics["coco"]
    assert 0 < metrics["coco"]["AP"] < 1


def color_model(path: Path, **options: Any) -> Path:
    """Scores class 0, 1 or 2 with the share of red, green or blue in the image; the box is fixed."""
    weight = np.zeros((84, 21, 3))
    weight[4:7, 0] = np.eye(3)
    return write_model(path, raw_output((*HIT[:4], 0.0, 0)), weight=weight, **options)


@pytest.mark.parametrize("batch", [1, 2, 4, "free"])
def test_every_image_gets_its_own_detections(tmp_path: Path, coco_dir: Path, batch: int | str) -> None:
    """Three images in batches of 1, 2 (the last one padded), 4 (more than there are) and free."""
    onnx_path = color_model(tmp_path / "m.onnx", **({} if batch == "free" else {"batch": batch}))
    metrics = evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", settings(conf=0.5))
    found = [(row["image_id"], row["category_id"]) for row in detections(tmp_path / "out")]
    assert found == [(1, 1), (2, 2), (5, 3)]  # red, green, blue
    assert metrics["settings"]["batch"] == (SETTINGS.batch if batch == "free" else batch)
    assert metrics["latency_ms"]["batch"] == (1 if batch == "free" else batch)


def test_decoding_ahead_is_bounded_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def load(number: Any, _imgsz: int) -> Any:
        started.append(number)
        return number

    monkeypatch.setattr(pipeline, "load_input", load)
    numbers: list[Any] = list(range(50))
    taken = []
    with pipeline.decoders(4) as pool:
        for number in pipeline.decode_ahead(pool, numbers, IMGSZ, 5):
            assert len(started) - len(taken) <= 5
            taken.append(number)
    assert taken == numbers


HANGING = """
import io, sys, time
from pathlib import Path
from app.coco.score import ImageFile
from app.core.config import UserError
from app.eval import pipeline
from app.eval.runtime import open_model
from tests.support.eval_fixtures import SETTINGS

def hang(path):
    time.sleep(120)

pipeline.READ_S, pipeline.LEAVE_S, pipeline.read_image = 1.0, 0.5, hang
model = open_model(Path(sys.argv[1]), "cpu")
start = time.monotonic()
try:
    pipeline.detect(model, [ImageFile(id, Path("a.jpg"), 4, 4) for id in range(50)], io.StringIO(), SETTINGS, "eval")
except UserError as error:
    print(f"{time.monotonic() - start:.1f}", error, flush=True)
"""


def test_a_read_that_hangs_is_said_and_ends_the_process(tmp_path: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT))
    command = [sys.executable, "-c", HANGING, str(onnx_path)]
    result = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, check=False, timeout=60)
    seconds, said = result.stdout.split(" ", 1)
    assert float(seconds) < 3
    assert said == "an image could not be read in 1 s: check the disk of the dataset\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_raw_and_end2end_files_give_the_same_result(tmp_path: Path, coco_dir: Path) -> None:
    rows = [HIT, FAULT, (9.0, 9.0, 25.0, 21.0, 0.7, 3)]
    padding = [(0.0, 0.0, 0.0, 0.0, 0.0, 0)] * 18
    raw = write_model(tmp_path / "raw.onnx", raw_output(*rows))
    end2end = write_model(tmp_path / "end2end.onnx", np.array([*rows, *padding]), "end2end")
    first = evaluate_file(raw, dataset(coco_dir), tmp_path / "a", SETTINGS)
    second = evaluate_file(end2end, dataset(coco_dir), tmp_path / "b", SETTINGS)
    assert detections(tmp_path / "a") == detections(tmp_path / "b")
    assert first["coco"] == second["coco"]
    assert second["model"]["contract"] == "end2end"


def test_model_that_finds_nothing_scores_zero(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output())
    metrics = evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    assert detections(tmp_path / "out") == []
    assert metrics["coco"]["AP"] == 0.0


def test_max_images_is_labelled_everywhere(tmp_path: Path, coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT))
    metrics = evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", settings(max_images=2))
    chosen = first_of([1, 2, 5], 2)
    facts = metrics["dataset"]
    assert (facts["subset"], facts["n_images"], facts["n_images_listed"], facts["n_annotations"]) == (True, 2, 3, 2)
    assert facts["image_ids_sha256"] == hash_ids(chosen)
    assert [row["image_id"] for row in detections(tmp_path / "out")] == chosen
    assert metrics["coco"]["AP"] == pytest.approx(1.0)  # the image left out does not count as missed
    assert caplog.messages
    assert all("subset" in message for message in caplog.messages)


def test_choice_of_images_is_seeded() -> None:
    ids = list(range(100))
    assert first_of(ids, 10) == first_of(ids[::-1], 10) == sorted(first_of(ids, 10))
    assert first_of(ids, 10) != ids[:10]
    assert set(first_of(ids, 10)) < set(first_of(ids, 20))
    assert first_of(ids, None) == first_of(ids, 1000) == ids


NOT_THE_CONTRACT = [
    ({"metadata": {"imgsz": "32"}}, "metadata 'contract' is missing"),
    ({"metadata": {"contract": "top"}}, "metadata 'contract' is top"),
    ({"metadata": {"contract": "raw", "names": '["cat"]'}}, "not the 80 COCO classes"),
    ({"metadata": {"contract": "raw", "imgsz": "64"}}, "metadata imgsz 64"),
    ({"metadata": {"contract": "end2end"}}, r"\[N,300,6\]"),
    ({"type": TensorProto.INT8}, r"tensor\(int8\); the contract is one input"),
]


@pytest.mark.parametrize(("options", "message"), NOT_THE_CONTRACT)
def test_other_models_are_refused(tmp_path: Path, coco_dir: Path, options: dict[str, Any], message: str) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT), **options)
    with pytest.raises(UserError, match=message):
        evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_other_class_count_and_damaged_file_are_refused(tmp_path: Path, coco_dir: Path) -> None:
    of_voc = write_model(tmp_path / "voc.onnx", np.zeros((24, 21)))
    with pytest.raises(UserError, match=r"\[N,84,A\]"):
        evaluate_file(of_voc, dataset(coco_dir), tmp_path / "out", SETTINGS)
    of_voc.write_bytes(of_voc.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be loaded"):
        evaluate_file(of_voc, dataset(coco_dir), tmp_path / "out", SETTINGS)
    with pytest.raises(UserError, match="make export"):
        evaluate_file(tmp_path / "none.onnx", dataset(coco_dir), tmp_path / "out", SETTINGS)


def test_missing_image_is_named_and_nothing_is_left(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT))
    evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    (coco_dir / "val2017" / "000000000005.png").unlink()
    with pytest.raises(UserError, match=r"000000000005\.png"):
        evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    # The result before is no longer that of this folder: no metrics.json, and no part file beside the old detections.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detections.json"]


def test_image_of_another_size_is_refused_and_any_name_is_taken(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT))
    annotation_file = dataset(coco_dir).annotation_file
    tree = json.loads(annotation_file.read_text())
    tree["images"][2]["width"] = 65
    annotation_file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="64 x 48 px, its annotations say 65 x 48"):
        evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    tree["images"][2] |= {"width": 64, "file_name": "000000000006.png"}  # of image id 5: the number is only a name
    annotation_file.write_text(json.dumps(tree))
    (coco_dir / "val2017" / "000000000005.png").rename(coco_dir / "val2017" / "000000000006.png")
    evaluate_file(onnx_path, dataset(coco_dir), tmp_path / "out", SETTINGS)
    ids = {row["image_id"] for row in json.loads((tmp_path / "out" / "detections.json").read_text())}
    assert 5 in ids
    assert 6 not in ids


@pytest.fixture
def run(tmp_path: Path, coco_dir: Path) -> RunRoot:
    """A run whose data and export stages are done, with one file of each variant."""
    run = RunRoot(tmp_path / "runs", "test")
    annotation_file = dataset(coco_dir).annotation_file
    split = {
        "name": "val2017", "annotation_file": str(annotation_file), "annotation_sha256": sha256(annotation_file),
        "image_ids": None, "image_ids_sha256": hash_ids(COLORS_BGR), "subset": False, "n_images": 3, "n_listed": 3,
        "n_broken": 0, "n_annotations": 3, "n_crowd": 0, "n_without_objects": 0,
    }  # fmt: skip
    folder = {"coco_dir": str(coco_dir)}
    splits = {"train": split, "val": split}
    write_json(run.provenance, {**folder, "settings": folder, "title": "a test", "seed": 0, "splits": splits})
    for label, rows in {"qat-w4a16": (FAULT, HIT), "baseline": (HIT,)}.items():
        metadata = {"contract": "raw", "label": label}
        path = write_model(run.onnx_dir / f"{label}.onnx", raw_output(*rows), metadata=metadata)
        write_json(path.with_suffix(".json"), {"label": label, "sha256": sha256(path)})
    return run


SETS = ["eval.provider=cpu", "eval.latency_runs=2"]


def lines_of(run: RunRoot, caplog: pytest.LogCaptureFixture, *sets: str, force: bool = False) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.INFO)
    evaluate(load("qat", [], [*SETS, *sets]), run, force)
    passing = ("images/s, 0:", " in 0:", ": timing one image", ": computing AP")
    return [message for message in caplog.messages if not any(words in message for words in passing)]


def test_stage_scores_all_files_once(run: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    first, second = lines_of(run, caplog)
    assert first.startswith("eval baseline: AP 1.0000, AP50 1.0000, 3 images,")
    assert second.startswith("eval qat-w4a16: AP ")
    assert (run.root / "baseline-coco" / "metrics.json").exists()
    assert (run.root / "qat-w4a16-coco" / "detections.json").exists()
    assert set(read_json(run.run_json, "data")["stages"]) == {"eval baseline", "eval qat-w4a16"}
    assert lines_of(run, caplog) == [f"eval: {run.root / d} done already" for d in ("baseline-coco", "qat-w4a16-coco")]
    assert len(lines_of(run, caplog, force=True)) == 2


def test_the_job_asks_whether_all_files_are_scored(run: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    config = load("qat", [], SETS)
    assert not is_scored(config, run)
    lines_of(run, caplog)
    caplog.clear()
    assert is_scored(config, run)
    assert caplog.messages == ["eval: done already (2 files)"]
    assert not is_scored(load("qat", [], [*SETS, "eval.conf=0.002"]), run)
    (run.root / "baseline-coco" / "detections.json").unlink()
    assert not is_scored(config, run)


def test_other_images_than_those_of_the_run_are_not_passed_over(
    run: RunRoot, coco_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for same in ([], [f"data.coco_dir={coco_dir}"]):
        assert not any("scores the images" in line for line in lines_of(run, caplog, *same))
    first = lines_of(run, caplog, "data.coco_dir=/elsewhere")[0]
    assert f"scores the images of the run ({coco_dir}), not those of data.coco_dir=/elsewhere" in first


def test_stale_results_are_scored_again(run: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    lines_of(run, caplog)
    lines = lines_of(run, caplog, "eval.conf=0.6")
    assert [("of other settings" in line or "of another settings" in line) for line in lines] == [True, False] * 2
    path = write_model(
        run.onnx_dir / "baseline.onnx", raw_output(FAULT), metadata={"contract": "raw", "label": "baseline"}
    )
    write_json(path.with_suffix(".json"), {"label": "baseline", "sha256": sha256(path)})
    lines = lines_of(run, caplog, "eval.conf=0.6")
    assert "of another model file" in lines[0]
    assert lines[1].startswith("eval baseline: AP 0.0000")
    assert "done already" in lines[2]


def test_stage_refuses_what_export_did_not_make(run: RunRoot) -> None:
    config = load("qat", [], SETS)
    record_path = run.onnx_dir / "baseline.json"
    record = read_json(record_path, "export")
    write_json(record_path, record | {"sha256": "0" * 64})
    with pytest.raises(UserError, match="not the file that its"):
        evaluate(config, run, False)
    write_json(record_path, record | {"label": "qat-w4a16"})
    with pytest.raises(UserError, match="are both qat-w4a16"):
        evaluate(config, run, False)
    write_json(record_path, record | {"label": "../../up"})  # it would name the folder of the scores
    with pytest.raises(UserError, match=r"\.\./\.\./up is no label of ours"):
        evaluate(config, run, False)
    write_json(record_path, {"sha256": record["sha256"]})
    with pytest.raises(UserError, match="lacks label"):
        evaluate(config, run, False)
    record_path.unlink()
    with pytest.raises(UserError, match=r"baseline\.json is missing: run 'make export'"):
        evaluate(config, run, False)
    for path in run.onnx_dir.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="make export"):
        evaluate(config, run, False)


def test_stage_refuses_changed_annotations(run: RunRoot, coco_dir: Path) -> None:
    with open(dataset(coco_dir).annotation_file, "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="has changed: run 'make data"):
        evaluate(load("qat", [], SETS), run, False)


def test_images_that_have_changed_are_not_scored(
    run: RunRoot, coco_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines_of(run, caplog)  # before it was recorded what the images hold
    files = {1: "000000000001.png", 2: "000000000002.png", 5: "000000000005.png"}
    digests = {key: sha256(coco_dir / "val2017" / name)[:16] for key, name in files.items()}
    tree = read_json(run.provenance, "data")
    tree["splits"]["val"]["images_sha256"] = hash_contents(digests)
    write_json(run.provenance, tree)
    assert all("done already" in line for line in lines_of(run, caplog))
    lines_of(run, caplog, force=True)
    assert read_json(run.root / "baseline-coco" / "metrics.json", "eval")["dataset"]["images_sha256"] is not None
    image = coco_dir / "val2017" / files[5]
    image.write_bytes(image.read_bytes() + b" ")  # a decoder sees the same
    with pytest.raises(UserError, match=r"images in .*val2017 have changed since 'make data'"):
        lines_of(run, caplog, "eval.max_images=1", force=True)
    digests[5] = sha256(image)[:16]
    tree["splits"]["val"]["images_sha256"] = hash_contents(digests)  # as 'make data ARGS=--force' records it
    write_json(run.provenance, tree)
    assert sum("of another settings or images" in line for line in lines_of(run, caplog)) == 2


def test_standalone(tmp_path: Path, coco_dir: Path) -> None:
    onnx_path = write_model(tmp_path / "m.onnx", raw_output(HIT), metadata={"contract": "raw"})
    config = load("qat", [], SETS)
    metrics = evaluate_standalone(config, onnx_path, standalone_dataset(coco_dir, "val2017"), tmp_path / "out")
    assert metrics == read_json(tmp_path / "out" / "metrics.json", "eval")
    assert metrics["model"]["label"] == "m"
    assert metrics["dataset"]["title"] == "a COCO-format dataset, not COCO 2017"
    assert metrics["coco"]["AP"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="--coco-dir must hold test2017"):
        standalone_dataset(coco_dir, "test2017")
    annotation_file = dataset(coco_dir).annotation_file
    annotation_file.write_text(annotation_file.read_text().replace("000000000005.png", "../000000000005.png"))
    with pytest.raises(UserError, match="image id 5: its file name leaves the image folder"):
        standalone_dataset(coco_dir, "val2017")


def test_an_image_outside_of_the_dataset_is_not_read(run: RunRoot, coco_dir: Path) -> None:
    """provenance.json of a run from elsewhere may name an image that 'make data' would have refused."""
    annotation_file = dataset(coco_dir).annotation_file
    annotation_file.write_text(annotation_file.read_text().replace("000000000005.png", "../000000000005.png"))
    (coco_dir / "val2017" / "000000000005.png").rename(coco_dir / "000000000005.png")
    tree = read_json(run.provenance, "data")
    tree["splits"]["val"] |= {"image_ids": [1, 5], "annotation_sha256": sha256(annotation_file)}
    write_json(run.provenance, tree)
    with pytest.raises(UserError, match=r"image id 5: its file name leaves the image folder: run 'make data ARGS="):
        evaluate(load("qat", [], SETS), run, False)


def test_evaluator_imports_no_training_library() -> None:
    code = (
        "import sys, app.eval.evaluate; "
        "assert not {'torch', 'torchvision', 'ultralytics', 'brevitas'} & sys.modules.keys(), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
