"""The eval bench: every step from our AP to that of `yolo val` on a scene worked by hand, and how turns are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from app.bench.eval import OURS, STOCK, Amount, Given, add_stock_metadata, high_water_kib, judge, repeat, run_measured
from app.bench.explain import explain, stock_ap
from app.coco.score import ImageFile, load_truth
from app.core.config import load
from tests.support.eval_fixtures import raw_output, truth_box, write_annotations, write_model

SIZES = {1: (400, 300), 2: (400, 300)}
# Ultralytics integrates over the recall from 0 to 1 and reaches 1 - 1/200 where COCO's mean of 101 points gives 1.
ULTRALYTICS_PERFECT = 0.995


def found(image_id: int, bbox: list[float], confidence: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": bbox, "score": confidence}


def test_steps_add_up_and_each_is_its_own(tmp_path: Path) -> None:
    """Two detections inside a crowd are ignored by COCO; without the region they are misses ranked before the hit. Then
    `yolo val` keeps only the hit."""
    hit = [200.0, 200.0, 40.0, 40.0]
    truth = [truth_box(1, hit), truth_box(1, [0, 0, 100, 100], 1, iscrowd=1)]
    annotations = write_annotations(tmp_path / "instances.json", SIZES, truth)
    ours = [found(1, [5, 5, 20, 20], 0.9), found(1, [50, 50, 30, 30], 0.8), found(1, hit, 0.5)]
    (tmp_path / "detections.json").write_text(json.dumps(ours))
    theirs = [{"file": f"{1:012d}.png", **{k: v for k, v in ours[2].items() if k != "image_id"}}]
    recorded = {"AP": 0.99, "rows": theirs}
    result = explain(load_truth(annotations), [1, 2], str(tmp_path), recorded)
    crowds, metric, detections, rest = result["steps"].values()
    assert (result["ours"], result["stock"]) == (pytest.approx(1.0), 0.99)
    assert crowds == pytest.approx(1 / 3 - 1)
    assert metric == pytest.approx(stock_ap(load_truth(annotations), ours, [1, 2]) - 1 / 3)
    assert abs(metric) < 0.02
    assert detections == pytest.approx(ULTRALYTICS_PERFECT - 1 / 3, abs=0.02)
    assert sum(result["steps"].values()) == pytest.approx(0.99 - 1.0)
    assert rest == pytest.approx(0.99 - ULTRALYTICS_PERFECT, abs=1e-3)
    assert (result["n_ours"], result["n_stock"], result["n_same"]) == (3, 1, 1)
    assert result["stock_detections_by_our_score"] == pytest.approx(1.0)


def test_turns_are_judged_by_the_median_of_their_ratios() -> None:
    def turn(ours_s: float, stock_s: float, session_s: float) -> dict[str, Any]:
        ours = {"total_s": ours_s, "session_s": 0.95 * ours_s, "process_s": ours_s + 1}
        return {OURS: ours, STOCK: {"total_s": stock_s, "process_s": stock_s + 5}, "session": {"total_s": session_s}}

    judged = judge([turn(10, 20, 9), turn(12, 18, 12), turn(30, 20, 20)])
    assert judged["share_in_onnxruntime"] == pytest.approx(0.95)
    assert judged["to_pure_session"] == pytest.approx(10 / 9)
    assert judged["to_yolo_val"] == pytest.approx(12 / 18)
    assert judged["process_to_yolo_val"] == pytest.approx(13 / 23)


def test_repeated_images_keep_their_boxes_under_ids_of_their_own(tmp_path: Path) -> None:
    annotations = write_annotations(tmp_path / "instances.json", SIZES, [truth_box(2, [1, 2, 30, 40])])
    images = []
    for image_id in SIZES:
        path = tmp_path / f"{image_id:012d}.png"
        path.write_bytes(b"picture %d" % image_id)
        images.append(ImageFile(image_id, path, *SIZES[image_id]))
    given = Given(tmp_path / "m.onnx", tmp_path, load_truth(annotations), images, load("qat").eval)
    assert Amount(1, None).copies(2) == (1, 2, 4)
    assert Amount(1, 5).copies(2) == (1, 3)
    for n_times in Amount(1, 5).copies(2):
        repeat(given, n_times)
    once, thrice = (load_truth(tmp_path / f"coco-{n}" / "annotations" / "instances_val2017.json") for n in (1, 3))
    assert sorted(once.imgs) == [1, 2]
    assert sorted(thrice.imgs) == [1, 2, 3, 4, 5, 6]
    assert [a["image_id"] for a in thrice.dataset["annotations"]] == [2, 4, 6]
    assert {tuple(a["bbox"]) for a in thrice.dataset["annotations"]} == {(1, 2, 30, 40)}
    linked = [(tmp_path / "coco-3" / "val2017" / thrice.imgs[i]["file_name"]).read_bytes() for i in (1, 2, 5, 6)]
    assert linked == [b"picture 1", b"picture 2"] * 2


def test_stock_metadata_leaves_graph_and_contract(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.onnx", raw_output(), batch=2)
    add_stock_metadata(source, tmp_path / "both.onnx", load("qat").eval)
    before, after = onnx.load(source), onnx.load(tmp_path / "both.onnx")
    facts = {entry.key: entry.value for entry in after.metadata_props}
    assert after.graph == before.graph
    assert (facts["contract"], facts["task"], facts["imgsz"], facts["batch"]) == ("raw", "detect", "[32, 32]", "2")
    assert facts["end2end"] == "False"


def test_memory_and_failure_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process holds its memory until it was measured, however busy the machine is."""
    held, measured = tmp_path / "held", tmp_path / "measured"

    def measure(pid: int) -> int:
        is_held = held.exists()
        kib = high_water_kib(pid)
        if is_held:
            measured.touch()
        return kib

    def peak(n_bytes: int) -> float:
        for path in (held, measured):
            path.unlink(missing_ok=True)
        code = f"import pathlib, time; held = b'x' * {n_bytes}; pathlib.Path('{held}').touch()\n"
        code += f"while not pathlib.Path('{measured}').exists(): time.sleep(0.01)"
        return run_measured(["/usr/bin/env", "python3", "-c", code])["peak_mib"]

    monkeypatch.setattr("app.bench.eval.high_water_kib", measure)
    assert peak(200 << 20) - peak(1) == pytest.approx(200, abs=20)
    with pytest.raises(RuntimeError, match="no such thing"):
        run_measured(["/usr/bin/env", "python3", "-c", "raise SystemExit('no such thing')"])
