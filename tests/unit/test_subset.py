"""A subset is labelled as one: images skipped as broken, left out by eval.max_images or data.n_val, and all three."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.coco.dataset import Dataset, annotation_path
from app.coco.score import describe_dataset, load_truth
from app.core.config import load
from app.core.files import read_json, sha256, write_json
from app.core.run import RunRoot, open_run
from app.data.prepare import prepare
from app.eval.evaluate import evaluate
from app.report.figures import AUTHORS_YOLOV10M
from app.report.report import report
from tests.support.data_fixtures import write_image
from tests.support.drawn import kept_figures, y_of
from tests.support.eval_fixtures import raw_output, truth_box, write_annotations, write_coco, write_model
from tests.support.markdown_tables import row
from tests.support.report_fixtures import build_run, write

IDS = (1, 2, 3, 4, 5, 6)
N_VAL = 5000  # images of COCO's val2017
BROKEN = 4  # its image file is empty
BOX_IN_IMAGE = [16.0, 8.0, 32.0, 24.0]
HIT = (8.0, 8.0, 24.0, 20.0, 0.9, 0)  # the same box in the input
# Two objects in image 1, a crowd beside the object of image 2, one object in images 3, 4 and 5, none in image 6.
TRUTH = [
    *(truth_box(image_id, BOX_IN_IMAGE) for image_id in (1, 2, 3, 4, 5)),
    truth_box(1, [0, 0, 8, 8], 3),
    truth_box(2, [0, 0, 8, 8], 1, iscrowd=1),
]


@dataclass(frozen=True)
class Case:
    """Settings, whether an image is broken, and what must be said of val2017."""

    sets: tuple[str, ...]
    broken: bool
    n_images: int
    counts: str  # of the data stage: images used, listed, broken, annotations, crowd, without objects


SKIP = "data.skip_broken=true"
CASES = {
    "all": Case((), False, 6, "6 6 0 7 1 1"),
    "skipped": Case((SKIP,), True, 5, "5 6 1 6 1 1"),
    "nothing to skip": Case((SKIP,), False, 6, "6 6 0 7 1 1"),
    "max_images": Case(("eval.max_images=3",), False, 3, "6 6 0 7 1 1"),
    "more than there are": Case(("eval.max_images=9",), False, 6, "6 6 0 7 1 1"),
    "skipped and max_images": Case((SKIP, "eval.max_images=3"), True, 3, "5 6 1 6 1 1"),
    "skipped and max_images that takes all": Case((SKIP, "eval.max_images=9"), True, 5, "5 6 1 6 1 1"),
}


def build(folder: Path, broken: bool) -> Path:
    coco_dir = write_coco(folder / "coco", dict.fromkeys(IDS, (0, 0, 255)), TRUTH)
    write_annotations(coco_dir / "annotations" / "instances_train2017.json", {7: (40, 30)}, [])
    (coco_dir / "train2017").mkdir()
    write_image(coco_dir / "train2017" / "000000000007.png", (40, 30))
    if broken:
        (coco_dir / "val2017" / f"{BROKEN:012d}.png").write_bytes(b"")
    return coco_dir


def through_the_stages(folder: Path, case: Case, *more: str) -> RunRoot:
    """Data stage, one exported file, evaluation and report."""
    coco_dir, run = build(folder, case.broken), open_run("r", folder / "runs")
    sets = [f"data.coco_dir={coco_dir}", "eval.provider=cpu", "eval.latency_runs=1", "eval.latency_warmup=0"]
    config = load("qat", sets=[*sets, *case.sets, *more])
    prepare(config, run, False)
    path = write_model(run.onnx_dir / "net.onnx", raw_output(HIT), metadata={"contract": "raw", "label": "fp16"})
    write_json(path.with_suffix(".json"), {"label": "fp16", "sha256": sha256(path)})
    evaluate(config, run, False)
    with kept_figures():
        report(config, run)
    return run


def metrics_of(run: RunRoot) -> dict[str, Any]:
    return read_json(run.root / "baseline-coco" / "metrics.json", "eval")


def n_truth(ids: Iterable[int]) -> int:
    return sum(box["image_id"] in ids for box in TRUTH)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_counts_and_label(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: Case) -> None:
    caplog.set_level(logging.INFO)
    run = through_the_stages(tmp_path, case)
    facts, text = metrics_of(run)["dataset"], run.summary.read_text()
    subset = case.n_images < len(IDS)
    assert (facts["n_images"], facts["n_images_listed"], facts["subset"]) == (case.n_images, 6, subset)
    assert (f"SUBSET of {case.n_images} of 6 images" in text) == subset
    assert ("SUBSET" in text) == subset
    assert (f"val2017, {case.n_images} images, " in text) == (not subset)
    assert ("(subset of 6)" in caplog.text) == subset
    columns = ("images used", "listed", "broken", "annotations", "crowd", "without objects")
    assert row(text, "val2017", *columns) == case.counts.split()


@pytest.mark.parametrize("name", ["skipped", "max_images", "skipped and max_images"])
def test_only_the_images_named_are_scored(tmp_path: Path, name: str) -> None:
    """What is left out is neither detected nor missed: all objects of class 1 are found."""
    run = through_the_stages(tmp_path, CASES[name])
    metrics = metrics_of(run)
    ids = metrics["dataset"]["image_ids"]
    rows = json.loads((run.root / "baseline-coco" / "detections.json").read_text())
    assert [entry["image_id"] for entry in rows] == ids
    assert len(set(ids)) == CASES[name].n_images
    assert set(ids) <= set(IDS) - ({BROKEN} if CASES[name].broken else set())
    assert metrics["dataset"]["n_annotations"] == n_truth(ids)


def test_the_object_of_a_skipped_image_is_not_missed(tmp_path: Path) -> None:
    """Class 1: four objects, all found, a detection more in image 6 of equal score; class 3: one object, not found.

    Detections of equal score are ranked by image: the fault in image 6 comes last. So AP is (1 + 0) / 2.
    """
    run = through_the_stages(tmp_path, CASES["skipped"])
    assert metrics_of(run)["coco"]["AP"] == pytest.approx(0.5)
    assert metrics_of(run)["coco"]["AR_100"] == pytest.approx(0.5)


def test_skipped_and_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """data.n_val chooses among the images that are whole."""
    caplog.set_level(logging.INFO)
    run = through_the_stages(tmp_path, Case((SKIP,), True, 2, ""), "data.n_val=2")
    split, facts = read_json(run.provenance, "data")["splits"]["val"], metrics_of(run)["dataset"]
    assert (split["n_images"], split["n_listed"], split["n_broken"], split["subset"]) == (2, 6, 1, True)
    assert BROKEN not in split["image_ids"]
    assert facts["image_ids"] == split["image_ids"]
    assert split["n_annotations"] == facts["n_annotations"] == n_truth(split["image_ids"])
    assert "val2017: 2 images of 6, seed 0" in caplog.text
    assert "1 broken ones skipped" in caplog.text
    assert "SUBSET of 2 of 6 images" in run.summary.read_text()


@pytest.mark.parametrize("change", [{}, {"n_images": 1199}, {"subset": True, "n_images": 9}], ids=str)
def test_authors_curve_stands_beside_the_whole_of_coco_only(tmp_path: Path, change: dict[str, Any]) -> None:
    """1,200 images are listed: a training that left one out is not the task of the published one."""
    run = build_run(tmp_path)
    tree = json.loads(run.provenance.read_text()) | {"title": "COCO 2017"}
    tree["splits"]["val"] |= change
    write(run.provenance, tree)
    path = run.variant_dir("fp16") / "results.csv"
    path.write_text(path.read_text().replace("\n4,", "\n10,"))  # the authors' curve begins at epoch 10
    with kept_figures() as figures:
        report(load("qat"), run)
    shown = [line for line in figures["curves.png"].axes[1].lines if str(line.get_label()).startswith("authors")]
    assert [y_of(line) for line in shown] == ([] if change else [[AUTHORS_YOLOV10M[10]]])


@pytest.fixture(scope="module")
def of_5000(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder without images, whose splits list as many as val2017 does."""
    coco_dir = tmp_path_factory.mktemp("whole")
    for split in ("train2017", "val2017"):
        write_annotations(annotation_path(coco_dir, split), dict.fromkeys(range(1, N_VAL + 1), (64, 48)), [])
    return coco_dir


@pytest.mark.parametrize(
    ("title", "split", "n_left_out", "complete"),
    [
        ("COCO 2017", "val2017", 0, True),
        ("COCO 2017", "val2017", 1, False),
        ("COCO 2017", "train2017", 0, False),
        ("a COCO-format dataset, not COCO 2017", "val2017", 0, False),
    ],
)
def test_the_whole_of_coco_val(of_5000: Path, title: str, split: str, n_left_out: int, complete: bool) -> None:
    dataset = Dataset(of_5000, split, None, title)
    facts = describe_dataset(load_truth(dataset.annotation_file), dataset, list(range(1, N_VAL + 1 - n_left_out)))
    assert facts["complete_coco_val"] is complete
    assert (facts["n_images"], facts["n_images_listed"], facts["subset"]) == (5000 - n_left_out, 5000, n_left_out > 0)
