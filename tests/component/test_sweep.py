"""A sweep of processes that stand for the stages: order, signals, going on, GPUs, failures; and its words."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from app.__main__ import main, parse
from app.core import child
from app.core.config import Config, UserError, dump, load
from app.core.environment import hardware
from app.core.files import read_json, write_text
from app.core.results import read_rows, write_rows
from app.core.run import RunRoot, runs_of
from app.sweep import sweep as stage
from app.sweep.plan import Lane, Order, lanes_of
from app.sweep.price import after_hours, finished_after, listing, training_hours
from app.train.interrupt import Interrupted
from tests.support.report_fixtures import write
from tests.support.tiny_stages import FAILS

SCHEMES = ("w4a16", "w4a16-mixed", "w8a16")
STAGES = ["-m", "tests.support.tiny_stages"]
WAIT_S = 60  # far more than anything here takes


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRoot:
    monkeypatch.setattr(child, "PROGRAM", STAGES)
    monkeypatch.setattr(stage, "check_schemes", lambda lanes: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return RunRoot(tmp_path, "s")


def order(*seeds: int, schemes: tuple[str, ...] = SCHEMES, epochs: int = 2) -> Order:
    return Order(schemes, seeds, [], [f"train.epochs={epochs}"])


def keep_settings(given: Order, run: RunRoot) -> None:
    """What a training leaves behind of its settings, which those of this file do not."""
    for lane in lanes_of(given, run):
        for training in lane.trainings:
            write_text(training.run.variant_dir(training.config.label) / "config.yaml", dump(training.config))


def calls(run: RunRoot) -> list[str]:
    path = run.runs_dir / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def stop_when(run: RunRoot, n_rows: int, label: str) -> threading.Thread:
    """SIGTERM to this process when the training of seed 1 has so many epochs."""
    path = run.runs_dir / "s-seed1" / label / "results.csv"

    def wait() -> None:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and not (path.exists() and len(read_rows(path)) >= n_rows):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_stopped_twice_it_goes_on_where_it_was(run: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    """Three schemes and two seeds; each training has its own epochs once, and nobody is left behind."""
    caplog.set_level("INFO", "app")
    for label in ("fp16", "qat-w4a16-mixed"):
        stopper = stop_when(run, 2, label)
        with pytest.raises(Interrupted) as stop:
            stage.sweep(order(0, 1, epochs=6), run)
        stopper.join()
        assert stop.value.signal == signal.SIGTERM
        assert not (run.runs_dir / "s-seed1" / label / "done.json").exists()
        assert calls(run)[-1] == f"s-seed1 {label} train ends 143"
    stage.sweep(order(0, 1, epochs=6), run)
    for seed in (0, 1):
        for label in ("fp16", *(f"qat-{scheme}" for scheme in SCHEMES)):
            rows = read_rows(run.runs_dir / f"s-seed{seed}" / label / "results.csv")
            assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    trained = [line for line in calls(run) if line.endswith("train ends 0")]
    assert len(trained) == len(set(trained)) == 8
    assert calls(run)[-1] == "s report ends 0"
    assert caplog.text.count(": done in ") == 8
    assert "seed 1, qat-w4a16-mixed: begins (epoch " in caplog.text
    assert "3 schemes, 2 seeds: 8 trainings, 6 done; one after the other" in caplog.text


def test_a_lane_is_a_whole_job(run: RunRoot) -> None:
    stage.sweep(order(7, schemes=("w4a16", "w8a16")), run)
    begun = [line.partition(" begins")[0] for line in calls(run) if " begins" in line]
    assert begun == [
        "s-seed7 data", "s-seed7 fp16 train", "s-seed7 qat-w4a16 train", "s-seed7 qat-w8a16 train",
        "s-seed7 qat-w4a16 ptq", "s-seed7 qat-w8a16 ptq", "s-seed7 export", "s-seed7 eval", "s report",
    ]  # fmt: skip
    assert read_json(run.root / "sweep.json", "sweep") == {"runs": {"s-seed7": 7}}


def test_each_gpu_has_one_seed_at_a_time(run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    stage.sweep(order(0, 1, 2, schemes=("w4a16",)), run)
    at_work: dict[str, str] = {}
    most = 0
    for line in calls(run)[:-2]:  # the last ones are the report's
        name, _, gpu = line.partition(" begins ")
        lane = name.split()[0]
        if gpu:
            assert gpu in ("2", "5")
            assert gpu not in at_work.values()
            at_work[lane] = gpu
        else:
            at_work.pop(lane)
        most = max(most, len(at_work))
    assert most == 2


def test_a_training_that_fails_keeps_no_other_back(
    run: RunRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILS, "qat-w4a16")
    with pytest.raises(SystemExit, match="1"):
        stage.sweep(order(0, schemes=("w4a16", "w8a16")), run)
    assert "seed 0, qat-w4a16: ended with exit code 1: the guard ended it" in caplog.text
    assert "s-seed0 qat-w8a16 train ends 0" in calls(run)
    assert calls(run)[-1] == "s report ends 0"


def test_a_lane_goes_on_without_fp16(
    run: RunRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What needs FP16 is left out, and the next call makes it."""
    monkeypatch.setenv(FAILS, "fp16")
    with pytest.raises(SystemExit, match="1"):
        stage.sweep(order(0, 1, schemes=("w4a16",)), run)
    assert "seed 1, ptq: left out, because a training that it needs has failed" in caplog.text
    made = calls(run)
    for line in ("s-seed1 qat-w4a16 train ends 0", "s-seed1 export ends 0", "s report ends 0"):
        assert line in made
    assert not any("ptq" in line for line in made)
    monkeypatch.delenv(FAILS)
    stage.sweep(order(0, 1, schemes=("w4a16",)), run)
    assert "s-seed1 qat-w4a16 ptq ends 0" in calls(run)


def test_a_lane_without_any_training_keeps_no_other_back(
    run: RunRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILS, "fp16 qat-w4a16")
    with pytest.raises(SystemExit, match="1"):
        stage.sweep(order(0, 1, schemes=("w4a16",)), run)
    assert not any("export" in line for line in calls(run))
    assert "s-seed1 qat-w4a16 train ends 1" in calls(run)


def test_a_mistake_of_the_user_ends_all(run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PROGRAM", ["-c", "import sys; sys.stderr.write('error: no COCO folder'); sys.exit(2)"])
    with pytest.raises(UserError, match="seed 0, data: no COCO folder"):
        stage.sweep(order(0, 1), run)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Order(["w4a16"], [0], [], ["train.seed=3"]), "gives each training its own train.seed: name them with --seeds"),
        (Order(["w4a16"], [0], [], ["quant.scheme=w8a16"]), "name them with --schemes"),
        (Order(["w4a16"], [0], [], ["train={seed: 3}"]), "name them with --seeds"),
        (Order(["nothing"], [0], [], []), "choose one of"),
        (Order(["w4a16"], [-1], [], []), "train.seed"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_begins(run: RunRoot, given: Order, said: str) -> None:
    with pytest.raises(UserError, match=said):
        stage.sweep(given, run)
    assert not run.root.exists()


@pytest.mark.parametrize(("text", "option"), [("train: {seed: 3}", "--seeds"), ("quant: {scheme: w8a16}", "--schemes")])
def test_a_file_of_settings_names_neither_seed_nor_scheme(run: RunRoot, tmp_path: Path, text: str, option: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"mine.yaml: a sweep gives each training its own .* with {option}"):
        lanes_of(Order(["w4a16"], [0], [file], []), run)


def test_a_changed_scheme_starts_over_by_the_command_that_the_refusal_names(run: RunRoot, tmp_path: Path) -> None:
    """--force trains nothing anew that has its settings, and makes the files of all."""
    file = tmp_path / "my.yaml"
    rule = '- {{pattern: "*", bits: {}, granularity: channel, why: all}}\n'
    file.write_text(rule.format(5))
    given = order(0, 1, schemes=(str(file), "w8a16"))
    stage.sweep(given, run)
    keep_settings(given, run)
    file.write_text(rule.format(6))
    with pytest.raises(UserError, match="start over with ARGS=--force"):
        stage.sweep(given, run)
    n_before = len(calls(run))
    assert parse(["sweep", "--schemes", "a", "--seeds", "0", "--force"]).force
    forced = replace(given, force=True)
    assert [training.state() for training in lanes_of(forced, run)[0].trainings] == ["done", "starts over", "done"]
    assert [training_hours(training, HOURS) for training in lanes_of(forced, run)[0].trainings] == [0, 4, 0]
    write(run.runs_dir / "s-seed0" / "dataset" / "provenance.json", {"of": "other data"})
    stage.sweep(forced, run)
    assert not (run.runs_dir / "s-seed0" / "dataset" / "provenance.json").exists()
    begun = [line.partition(" begins")[0] for line in calls(run)[n_before:] if " begins" in line]
    own = ["data", "fp16 train", "qat-my train forced", "qat-w8a16 train", "qat-my ptq forced",
           "qat-w8a16 ptq forced", "export forced", "eval forced"]  # fmt: skip
    assert begun == [f"s-seed{seed} {name}" for seed in (0, 1) for name in own] + ["s report"]
    stage.sweep(given, run)


def test_a_damaged_training_that_force_keeps_is_to_be_deleted(run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = "error: last.pt is damaged: start over with ARGS=--force"
    script = f"import sys; sys.exit(0) if 'data' in sys.argv else sys.exit(sys.stderr.write({refuses!r}) and 2)"
    monkeypatch.setattr(child, "PROGRAM", ["-c", script])
    with pytest.raises(UserError, match=r"keeps what has its settings: delete .*/s-seed0/fp16\)"):
        stage.sweep(replace(order(0), force=True), run)


def test_changed_settings_of_the_export_are_refused_before_anything_begins(run: RunRoot) -> None:
    lane = lanes_of(order(0), run)[0]
    write(lane.run.onnx_dir / "a.json", {"export": {"opset": 13}})
    with pytest.raises(UserError, match=r"a.onnx was made with other settings of export: .* ARGS=--force"):
        stage.sweep(order(0), run)
    assert not calls(run)
    lanes_of(replace(order(0), force=True), run)


def test_a_sweep_keeps_the_seeds_of_earlier_calls(run: RunRoot) -> None:
    """Those that have begun, as long as their folders are there and their settings are the same."""
    for seeds in ((2, 0), (1,)):
        stage.sweep(order(*seeds, schemes=("w4a16",)), run)
        keep_settings(order(*seeds, schemes=("w4a16",)), run)
    assert read_json(run.root / "sweep.json", "sweep") == {"runs": {"s-seed2": 2, "s-seed0": 0, "s-seed1": 1}}
    assert [each.name for each in runs_of(["s"], run.runs_dir)] == ["s-seed2", "s-seed0", "s-seed1"]
    with pytest.raises(UserError, match=r"seed 2, of an earlier call of this sweep: .*train.epochs: 2 -> 3"):
        lanes_of(order(4, epochs=3), run)
    shutil.rmtree(run.runs_dir / "s-seed0")
    stage.sweep(order(1, 3, schemes=("w4a16", "w8a16")), run)
    assert list(read_json(run.root / "sweep.json", "sweep")["runs"]) == ["s-seed2", "s-seed1", "s-seed3"]


def test_a_finished_training_on_other_images_is_refused(run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check(config: Config, own: RunRoot) -> None:
        asked.append(config.label)
        raise UserError("was trained with other val images")

    stage.sweep(order(0, schemes=("w4a16",)), run)
    n_before = len(calls(run))
    monkeypatch.setattr("app.sweep.lanes.check_images", check)
    with pytest.raises(UserError, match="other val images"):
        stage.sweep(order(0, schemes=("w4a16",)), run)
    assert asked == ["fp16"]
    assert calls(run)[-1] == "s-seed0 data ends 0" and len(calls(run)) == n_before + 2


def test_a_sweep_of_no_runs_is_a_line(run: RunRoot) -> None:
    write(run.root / "sweep.json", {"runs": {}})
    with pytest.raises(UserError, match=r"sweep.json names no runs: run 'make sweep' again"):
        runs_of(["s"], run.runs_dir)


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["sweep", "dry-run"])
def test_a_sweep_goes_on_when_the_weights_that_it_started_from_are_gone(
    run: RunRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    weights = tmp_path / "best.pt"
    weights.write_text("weights")
    given = Order(["w4a16"], [0], [], ["train.epochs=2", f"train.weights={weights}"])
    keep_settings(given, run)
    write_estimate(run, lanes_of(given, run)[0].trainings[1].config)
    weights.unlink()
    sets = [word for setting in given.sets for word in ("--set", setting)]
    common = ["--run", "s", "--runs-dir", str(run.runs_dir), "--schemes", "w4a16", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["app", "sweep", *common, *sets, *words])
    assert main() == 0
    assert ("s-seed0 qat-w4a16 train ends 0" in calls(run)) == (not words)


def test_two_schemes_of_one_name_are_refused(run: RunRoot, tmp_path: Path) -> None:
    files = [tmp_path / folder / "my.yaml" for folder in "ab"]
    for bits, file in enumerate(files, 5):
        file.parent.mkdir()
        file.write_text(f'- {{pattern: "*", bits: {bits}, granularity: channel, why: all}}\n')
    with pytest.raises(UserError, match="two of them have the same name"):
        lanes_of(Order(list(map(str, files)), [0], [], []), run)


def test_another_recipe_in_the_folder_is_refused(run: RunRoot) -> None:
    training = lanes_of(order(0), run)[0].trainings[1]
    folder = training.run.variant_dir("qat-w4a16")
    write_text(folder / "config.yaml", dump(training.config))
    write_text(folder / "weights" / "last.pt", "")
    with pytest.raises(UserError, match=r"train.epochs: 2 -> 3"):
        stage.sweep(order(0, epochs=3), run)
    assert not calls(run)


def test_the_name_of_a_run_is_taken(run: RunRoot) -> None:
    write(run.run_json, {"name": "s", "stages": {}})
    with pytest.raises(UserError, match="is a run of its own: give the sweep another RUN=name"):
        lanes_of(order(0), run)


def test_a_sweep_stands_for_its_runs(run: RunRoot) -> None:
    write(run.root / "sweep.json", {"runs": {"s-seed0": 0, "s-seed3": 3}})
    names = [each.name for each in runs_of(["a", "s", "s-seed3"], run.runs_dir)]
    assert names == ["a", "s-seed0", "s-seed3"]


HOURS = {"train fp16": 2.0, "train qat": 4.0, "ptq": 0.5, "export": 0.4, "eval": 0.8}


def lanes(run: RunRoot) -> list[Lane]:
    """Seed 0 with FP16 done, and half of w4a16."""
    made = lanes_of(order(0, 1, schemes=("w4a16", "w8a16")), run)
    write(made[0].run.done("fp16"), {"epochs": 2, "best_ap": 0.5})
    folder = made[0].run.variant_dir("qat-w4a16")
    folder.mkdir()
    write_rows(folder / "results.csv", [{"epoch": 1.0}])
    return made


def test_hours_are_those_of_what_is_left(run: RunRoot) -> None:
    first, second = lanes(run)
    assert [training_hours(training, HOURS) for training in first.trainings] == [0, 2, 4]
    assert [training_hours(training, HOURS) for training in second.trainings] == [2, 4, 4]
    assert after_hours(first, HOURS) == pytest.approx(2 * 0.5 + 7 / 4 * 1.2)  # 7 checkpoints, the estimate's are 4
    second_trained = second.trainings[0].run
    for label in ("fp16", "qat-w4a16", "qat-w8a16", "ptq-w4a16", "ptq-w4a16-bn"):
        write(second_trained.done(label), {"epochs": 2, "best_ap": 0.5})
    assert after_hours(second, HOURS) == pytest.approx(0.5 + 7 / 4 * 1.2), "trainings are done, and not their scores"
    for folder in ("baseline-coco", "qat-w4a16-coco", "ptq-w4a16-coco", "ptq-w4a16-bn-coco"):
        write(second_trained.root / folder / "metrics.json", {})
    assert after_hours(second, HOURS) == pytest.approx(0.5 + 3 / 4 * 1.2)
    assert after_hours(replace(second, force=True), HOURS) == after_hours(first, HOURS)
    shutil.rmtree(second_trained.root)
    assert finished_after([3.0, 1.0, 1.5], 2) == 3.0
    lines = listing([first, second], HOURS, [None])
    assert lines[-1].startswith("22.20 hours of training and scoring, one training after the other: done after 22.20 h")
    assert any("epoch 1 of 2" in line and "2.00" in line for line in lines)
    assert "2 seeds at a time: done after 13.10 h" in listing([first, second], HOURS, ["0", "1"])[-1]


def test_dry_run_begins_nothing(run: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "app")
    of = lanes_of(order(0), run)[0].trainings[1].config
    write_estimate(run, of)
    stage.dry_run(order(4, schemes=("w8a16",)), run)
    assert "s-seed4" in caplog.text
    assert not calls(run) and not (run.runs_dir / "s-seed4").exists()
    assert not stage.is_estimate_of(lanes_of(order(0, epochs=9), run)[0].trainings[1].config, run)
    assert stage.is_estimate_of(of, run)
    for other in ({"gpus": ["NVIDIA H100"]}, {"cpu": "a machine that shares runs/"}, {"cpu_count": 96}, {"cpu": None}):
        write_estimate(run, of, **other)
        assert not stage.is_estimate_of(of, run)


def write_estimate(run: RunRoot, of: Config, **other: object) -> None:
    facts = {"hours": HOURS, "config": of.model_dump(mode="json"), "environment": {**hardware(), **other}}
    write(run.root / "estimate.json", facts)


def test_dry_run_prices_a_training_that_has_a_gpu_for_itself(
    run: RunRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "app")
    estimated: list[list[str]] = []

    def estimate(name: str, words: list[str]) -> int:
        estimated.append([name, *words])
        write_estimate(run, load("qat", [], [word for word in words if "=" in word]))
        return 0

    monkeypatch.setattr(stage, "places", lambda config: ["0", "1"])
    monkeypatch.setattr(stage, "run_stage", estimate)
    stage.dry_run(order(0, 1, schemes=("w4a16",)), run)
    stage.dry_run(order(0, 1, schemes=("w4a16",)), run)
    assert [words[0] for words in estimated] == ["estimate"] and "train.device=0" in estimated[0]
    assert "2 seeds at a time" in caplog.text


def test_the_second_signal_ends_at_once(run: RunRoot, tmp_path: Path) -> None:
    """A process of its own, whose stage ignores the first signal."""
    stubborn = (
        "import signal, time; n = []; signal.signal(15, lambda *_: n.append(1))\nwhile len(n) < 2: time.sleep(.05)"
    )
    script = (
        "import sys, time; from pathlib import Path; from app.core import child; from app.core.run import RunRoot\n"
        "from app.sweep.children import Children\n"
        f"child.PROGRAM = ['-c', {stubborn!r}]\n"
        "with Children() as children:\n"
        f"    child = children.start([], None, Path({str(tmp_path)!r}) / 'log')\n"
        "    print(child.pid, flush=True)\n"
        "    while not children.signal: time.sleep(0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    time.sleep(0.3)  # the stage has its handler
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 143
    end = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, "the stage is left behind"
        time.sleep(0.05)
