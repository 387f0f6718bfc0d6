"""Four drawn images with crowds and the detections of two variants, small enough to score by hand.

1: a person and a crowd of persons; fp16 finds the person (score .80) and two persons in the crowd (.95, .90), qat-w4a16
   one in the crowd (.95) and a person where there is none (.60).
2: a crowd of persons, nothing else; fp16 finds one in the crowd (.85), qat-w4a16 nothing.
3: a car; fp16 finds it at IoU 0.72 (.70), qat-w4a16 exactly (.55).
4: a person and a crowd of cars; fp16 finds the person (.75) and a person among the cars (.72), qat-w4a16 the person
   alone (.58).

What lies in a crowd of its own class counts neither as found nor as a fault; a person among cars is a fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from app.coco.dataset import Dataset
from app.core.files import sha256
from app.core.run import RunRoot
from tests.support.eval_fixtures import truth_box, write_annotations
from tests.support.report_fixtures import build_run, edit, provenance, score_detections, write

PERSON, CAR = 1, 3
SIZE_WH: tuple[int, int] = (64, 48)
TRUTH = [
    truth_box(1, [4, 4, 20, 20], PERSON), truth_box(1, [30, 10, 30, 30], PERSON, iscrowd=1),
    truth_box(2, [0, 0, 64, 48], PERSON, iscrowd=1),
    truth_box(3, [10, 10, 30, 20], CAR),
    truth_box(4, [20, 8, 16, 30], PERSON), truth_box(4, [0, 0, 18, 48], CAR, iscrowd=1),
]  # fmt: skip
FOUND: dict[str, list[tuple[int, int, list[float], float]]] = {
    "baseline-coco": [
        (1, PERSON, [4, 4, 20, 20], 0.80), (1, PERSON, [32, 12, 8, 8], 0.95), (1, PERSON, [45, 20, 10, 10], 0.90),
        (2, PERSON, [10, 10, 10, 10], 0.85),
        (3, CAR, [10, 10, 30, 14.4], 0.70),
        (4, PERSON, [20, 8, 16, 30], 0.75), (4, PERSON, [2, 2, 10, 10], 0.72),
    ],
    "qat-w4a16-coco": [
        (1, PERSON, [32, 12, 8, 8], 0.95), (1, PERSON, [4, 30, 8, 8], 0.60),
        (3, CAR, [10, 10, 30, 20], 0.55),
        (4, PERSON, [20, 8, 16, 30], 0.58),
    ],
}  # fmt: skip
P50_MS = {"baseline-coco": 6.25, "qat-w4a16-coco": 4.75}


def build_crowds(runs_dir: Path, coco_dir: Path) -> RunRoot:
    """A run of fp16 and qat-w4a16 whose detections.json and metrics.json fit the four images."""
    run = build_run(runs_dir, "crowds")
    sizes: dict[int, tuple[int, int]] = dict.fromkeys((1, 2, 3, 4), SIZE_WH)
    file = write_annotations(coco_dir / "annotations/instances_val2017.json", sizes, TRUTH)
    (coco_dir / "val2017").mkdir()
    for image_id in sizes:
        Image.new("RGB", SIZE_WH, (40 * image_id, 90, 120)).save(coco_dir / f"val2017/{image_id:012d}.png")
    tree = provenance()
    tree["splits"]["val"] |= {"annotation_file": str(file), "annotation_sha256": sha256(file)}
    write(run.provenance, tree | {"coco_dir": str(coco_dir)})
    dataset = Dataset(coco_dir, "val2017", None, "small set")
    for folder, rows in FOUND.items():
        edit(run.root / folder / "metrics.json", "latency_ms.p50", P50_MS[folder])
        score_detections(run.root / folder, list(map(result, rows)), dataset)
    return run


def result(row: tuple[int, int, list[float], float]) -> dict[str, Any]:
    image_id, category_id, bbox, score = row
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
