"""bench rehearsal: which commands it gives, what it makes of their numbers, and that a second call goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.bench import rehearsal
from app.bench.observe import Look, Observed
from app.bench.rehearsal import PARTS, Plan, bench_rehearsal, overhead, shown
from app.core.config import UserError
from app.core.results import write_rows
from app.core.run import RunRoot
from tests.support.report_fixtures import write

SETS = ["train.batch=64", "train.bn_batches=5", "model=yolov10n.yaml"]
PLAN = Plan(draw_s=10, train_s=100, n_train=3000, n_val=50, n_scored=20)
STEP = {"time/train_s": 8.0, "time/images_per_s": 40.0, "time/bn_reestimation_s": 2.0}


class Stages:
    """Stands for `observe`: keeps the words of every call, and leaves behind what the stage would."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], float | None]] = []

    def __call__(self, words: list[str], log_path: Path, stop_after_s: float | None = None) -> Observed:
        self.calls.append((words, stop_after_s))
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text("train fp16: continues after epoch 0, batch 7 of the next of 300\n")
        if words[0] == "draw":
            numbers = {"n_train": int(words[words.index("--n-train") + 1]), "n_val": 50}
            write(Path(words[words.index("--to") + 1]) / "draw.json", numbers)
            return Observed(seconds=5.0)
        root = Path(words[words.index("--runs-dir") + 1]) / words[words.index("--run") + 1]
        if words[0] == "data":
            write(root / "dataset" / "provenance.json", provenance(words))
        if words[0] == "train" and stop_after_s is None:
            folder = root / ("fp16" if "fp16" in words else "qat-w4a16")
            folder.mkdir()
            write_rows(folder / "results.csv", [{"epoch": n, **STEP, "time/epoch_s": 11.0} for n in (1.0, 2.0)])
        if words[0] == "train" and stop_after_s is not None:
            progress = [(float(second), 1, 640 * second) for second in range(10, 20)]
            looks = [Look(float(second), 2**30, 50, [2**29] * 3, [20] * 3) for second in range(10, 20)]
            return Observed(20.0, 143, 0.5, looks, [], progress)
        return Observed(seconds=3.0)


def provenance(words: list[str]) -> dict[str, Any]:
    counts = dict.fromkeys(("n_listed", "n_broken", "n_annotations", "n_crowd", "n_without_objects"), 0)
    facts: dict[str, Any] = {"annotation_sha256": "", "image_ids_sha256": "", "image_ids": None, "subset": False}
    chosen = [word.partition("=")[2] for word in words if word.startswith("data.n_train=")]
    n_train = int(chosen[0]) if chosen else 3000
    train = {**counts, **facts, "name": "train2017", "n_images": n_train}
    splits = {"train": train, "val": {**train, "name": "val2017", "n_images": 50}}
    return {"title": "", "names": ["a"], "coco_dir": "/", "seed": 0, "splits": splits, "view_dir": "/"}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(rehearsal, "observe", stages)
    monkeypatch.setattr(rehearsal, "image_s", lambda: 1e-6)
    return stages


def test_every_part_once_and_again_only_what_is_missing(tmp_path: Path, stages: Stages) -> None:
    run = RunRoot(tmp_path, "reh")
    first = Plan(**{**vars(PLAN), "parts": PARTS[:3]})
    bench_rehearsal(run, [], SETS, first)
    assert [words[0] for words, _ in stages.calls] == ["draw", "data", "train", "train"]
    assert [stop for _, stop in stages.calls] == [None, None, 50, 50], "half of the time each, then a SIGTERM"
    assert stages.calls[2][0] == stages.calls[3][0], "the same command goes on"
    bench_rehearsal(run, [], SETS, PLAN)
    more = [words for words, _ in stages.calls[4:]]
    assert [words[0] for words in more] == ["data", "train", "train", "ptq", "export", "eval", "report"]
    drawn = f"data.coco_dir={(run.root / 'drawn').resolve()}"
    assert all(drawn in words for words, _ in stages.calls[1:])
    for words in more:
        assert words[words.index("--run") + 1] == "reh-short"
        assert {"data.n_train=320", "train.epochs=2", "eval.max_images=20"} <= set(words)  # 5 batches of 64
    result = json.loads((run.root / "bench-rehearsal.json").read_text())
    assert list(result["parts"]) == list(PARTS)
    assert result["parts"]["draw"]["images_per_s"] == pytest.approx(3050 / 5)
    assert result["settings"] == {"model": "yolov10n.yaml", "imgsz": 640, "batch": 64, "workers": 8}


def test_the_table(tmp_path: Path, stages: Stages) -> None:
    """640 images/s; an epoch of COCO takes 184.8 s in steps, 100 s for 5,000 val images (1 s for 50), and BatchNorm."""
    bench_rehearsal(RunRoot(tmp_path, "reh"), [], SETS, PLAN)
    result = json.loads((tmp_path / "reh" / "bench-rehearsal.json").read_text())
    steps_s = 118_287 / 640
    assert overhead(result["parts"]) == pytest.approx((100 + 2) / steps_s)
    text = "\n".join(shown(result))
    for words in (
        "| begun: images/s                      |         640 |    640 |  640 |",
        "| resumed: largest loader, MiB         |         512 |    512 |  512 |",
        "| resumed: images, loaders, exit code  |       12160 |      3 |  143 |",
        "continues after epoch 0, batch 7",
        "qat, an epoch of few batches: 40 images/s, validation of 50 images in three states 1.0 s, "
        "BatchNorm on 320 images 2.0 s",
        "beside its steps, computed from these: 55.2% of the steps",
    ):
        assert words in text, text


def test_as_much_is_drawn_as_there_is_time_for(tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores for 10 s, of which 0.8 are drawn in, at 10 ms an image: 1,600 images, 50 of them val."""
    monkeypatch.setattr(rehearsal, "image_s", lambda: 0.01)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    bench_rehearsal(RunRoot(tmp_path, "reh"), [], SETS, Plan(**{**vars(PLAN), "parts": ("draw",)}))
    words, _ = stages.calls[0]
    assert words[words.index("--n-train") + 1] == "1550"


def test_a_dataset_of_the_users_is_not_drawn(tmp_path: Path, stages: Stages) -> None:
    parts = ("draw", "data")
    bench_rehearsal(RunRoot(tmp_path, "reh"), [], [*SETS, "data.coco_dir=/a"], Plan(**{**vars(PLAN), "parts": parts}))
    assert [words[0] for words, _ in stages.calls] == ["data"]
    assert "data.coco_dir=/a" in stages.calls[0][0]


def test_a_part_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--arms exprt: a rehearsal has the parts draw, data, train, short"):
        bench_rehearsal(RunRoot(tmp_path, "reh"), [], SETS, Plan(10, 10, parts=("draw", "exprt")))
