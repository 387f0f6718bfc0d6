"""The stability bench's table: equal epochs are compared, and what is not there yet is a dash."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from app.bench import stability
from app.bench.stability import ARMS, BRANCH, Plan, bench_stability, root_of, to_train, train_all, training_of
from app.bench.stability_figure import draw
from app.bench.stability_rows import BASE, base_of, curves, merge, read_file, recipe, up_to, write_file
from app.bench.stability_table import (
    at,
    corrected,
    loss_over_fp16,
    lowest_share,
    mean_curve,
    share_of_fp16,
    show,
    worst,
)
from app.core.config import CONF_DIR, Config, UserError, dump, load
from app.core.environment import REPO_DIR
from app.core.files import write_json
from app.core.results import STATES, write_rows
from app.core.run import RunRoot
from app.core.scheme import find_scheme
from app.quant.model import build
from app.train.interrupt import Interrupted
from tests.support.export_run import TINY, network


def row(arm: str, seed: int, curve: dict[int, float]) -> dict[str, Any]:
    """A training whose three states have the same AP, by epoch."""
    aps, losses = list(curve.values()), [7 - ap for ap in curve.values()]
    return {
        "arm": arm, "seed": seed, "epoch": list(curve), "AP": dict.fromkeys(STATES, aps),
        "train_loss": [loss / 2 for loss in losses], "val_loss": losses, "corrected": None,
    }  # fmt: skip


def test_every_arm_can_be_built_and_has_a_folder_of_its_own(tmp_path: Any) -> None:
    roots = {root_of(RunRoot(tmp_path, "stability"), arm, 0).root for arm in ARMS}
    assert len(roots) == len(ARMS)
    networks: dict[Any, Config] = {}
    for arm in ARMS:
        config = training_of(RunRoot(tmp_path, "stability"), arm, 0, [], ["model=yolov10n.yaml"]).config
        networks.setdefault((config.variant, None if config.quant is None else config.quant.model_dump_json()), config)
    for config in networks.values():
        needs_all = ("qat-w4a16-mixed-dw", "qat-w4a16-full")  # their patterns fit a whole YOLOv10 alone
        is_tiny_enough = config.label not in needs_all
        with network(TINY) if is_tiny_enough else contextlib.nullcontext():
            _, quant_config = build(config)
        assert (quant_config is None) == (config.variant == "fp16")


def test_a_scheme_file_is_an_arm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has a folder, its rows join those of a file, and a call that does not name it says so."""
    own, run = tmp_path / "own.yaml", RunRoot(tmp_path, "stability")
    own.write_text('- {pattern: "*", bits: 3, granularity: channel, why: own}\n')
    arm, kept = str(own), tmp_path / "kept.json"
    training = training_of(run, arm, 1, [], [])
    assert training.config.quant is not None and training.config.quant.scheme.name == "own"
    assert training.root.root.parent == tmp_path
    known = recipe(load("qat"), {"fp16": [], arm: [f"quant.scheme={arm}"]})
    write_file(kept, known, [row("fp16", 1, {6: 0.2}), row(arm, 1, {6: 0.1})])
    with caplog.at_level(logging.INFO):
        bench_stability(run, [], [], Plan(["fp16", arm], [1], 0, 1, files=(kept,)))
    assert cells_of(caplog.messages[4])[0] == arm
    with pytest.raises(UserError, match=r"kept\.json: it has rows of .*own\.yaml, unknown .*: --arms has to name it"):
        bench_stability(run, [], [], Plan(["fp16"], [1], 0, 1, files=(kept,)))
    with pytest.raises(UserError, match=r"--arms w9: choose among fp16, .* or name a scheme file such as my\.yaml"):
        bench_stability(run, [], [], Plan(["w9"], [1], 0, 1))


def test_a_float_warm_up_begins_with_what_fp16_keeps(tmp_path: Any) -> None:
    run, conf = RunRoot(tmp_path, "stability"), ["train.epochs=120"]
    fp16, branch = (training_of(run, arm, 3, [], conf).config for arm in (BASE, BRANCH))
    assert branch.quant is not None and branch.quant.warmup_from is not None
    assert Path(branch.quant.warmup_from) == tmp_path / "stability-fp16-3" / "fp16" / "weights" / "epoch80.pt"
    assert (fp16.train.save_period, branch.n_quant_warmup_epochs) == (20, 80)


@pytest.mark.parametrize(("epochs", "switches"), [(60, [20, 30, 40]), (120, [40, 60, 80]), (240, [80, 120, 160])])
def test_fp16_keeps_the_epoch_of_every_switch(tmp_path: Any, epochs: int, switches: list[int]) -> None:
    run, sets = RunRoot(tmp_path, "stability"), [f"train.epochs={epochs}"]
    arms = [f"{BRANCH} for a third", f"{BRANCH} for a half", BRANCH]
    configs = [training_of(run, arm, 0, [], sets).config for arm in arms]
    assert [config.n_quant_warmup_epochs for config in configs] == switches
    period = training_of(run, BASE, 0, [], sets).config.train.save_period
    assert [switch % period for switch in switches] == [0, 0, 0]


def test_the_low_final_rate_has_an_fp16_of_its_own(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    low = training_of(RunRoot(tmp_path, "stability"), "fp16, lrf 0.01", 0, [], []).config
    assert (low.variant, low.quant, low.hyp.lrf, low.train.save_period) == ("fp16", None, 0.01, 0)
    assert base_of("w4a16, lrf 0.01") == "fp16, lrf 0.01"
    assert (base_of("fp16, lrf 0.01"), base_of("w4a16")) == ("fp16", "fp16")
    rows = [row("fp16", 0, {6: 0.4}), row("fp16, lrf 0.01", 0, {6: 0.2}), row("w4a16, lrf 0.01", 0, {6: 0.1})]
    with caplog.at_level(logging.INFO):
        show(rows)
    assert [cells_of(line)[6] for line in caplog.messages[2:]] == ["1.000 at 6", "0.500 at 6", "0.500 at 6"]
    assert [len(panel.lines) for panel in draw(rows).axes] == [3, 4, 4]  # three states, and behind them FP16


def test_it_cannot_begin_without_fp16(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="begins with the weights of fp16, name that arm too"):
        bench_stability(RunRoot(tmp_path, "stability"), [], [], Plan([f"{BRANCH}, mixed"], [0], 0, 1))


def test_a_signal_ends_the_trainings_too(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, started = RunRoot(tmp_path, "stability"), []

    def start(*args: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"]))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(stability, "start", start)
    with pytest.raises(Interrupted):
        train_all([training_of(run, "fp16", 0, [], [])], [], Plan(["fp16"], [0], 60, 1))
    assert started[0].returncode == -signal.SIGTERM


def test_the_share_compares_the_last_epoch_that_all_have() -> None:
    fp16 = [row("fp16", 0, {6: 0.1, 12: 0.2, 18: 0.4}), row("fp16", 1, {6: 0.1, 12: 0.2})]
    w4a16 = [row("w4a16", 0, {6: 0.05, 12: 0.15, 18: 0.4}), row("w4a16", 1, {6: 0.1, 12: 0.1, 18: 0.4})]
    assert share_of_fp16(w4a16, fp16, 1) == "0.625 at 12"
    assert share_of_fp16(w4a16, fp16, 2) == "0.667 at 12"
    assert share_of_fp16(w4a16, fp16, 3) == "-"


def test_the_error_of_a_share_is_what_the_seeds_are_off_it() -> None:
    """Half of FP16, whatever FP16 is: no error; one seed a third off."""
    fp16 = [row("fp16", seed, {6: 0.1 + 0.1 * seed}) for seed in range(3)]
    half = [row("w4a16", seed, {6: 0.05 + 0.05 * seed}) for seed in range(3)]
    assert share_of_fp16(half, fp16, 1) == "0.500 ± 0.000 at 6"
    half[1]["AP"]["ema_bn"] = [0.13]
    off = [0.05 - 0.055, 0.13 - 0.11, 0.15 - 0.165]  # from 0.55 of FP16
    assert share_of_fp16(half, fp16, 1) == f"0.550 ± {stdev(off) / 3**0.5 / 0.2:.3f} at 6"


def test_only_seeds_that_fp16_has_are_compared() -> None:
    assert share_of_fp16([row("w4a16", 1, {6: 0.1}), row("w4a16", 2, {6: 0.3})], [row("fp16", 2, {6: 0.4})], 1) == (
        "0.750 at 6"
    )


def test_the_loss_over_fp16_is_that_of_pairs() -> None:
    fp16 = [row("fp16", seed, {6: 0.1 * seed}) for seed in range(3)]
    ours = [row("w4a16", seed, {6: 0.1 * seed - 0.02 - 0.01 * (seed - 1)}) for seed in range(3)]
    assert loss_over_fp16(ours, fp16, "val_loss") == f"+0.020 ± {0.01 / 3**0.5:.3f}"
    assert loss_over_fp16(ours, fp16, "train_loss") == f"+0.010 ± {0.005 / 3**0.5:.3f}"
    assert loss_over_fp16(ours[:2], fp16, "val_loss") == "+0.015"
    assert loss_over_fp16(ours, [], "val_loss") == "-"


def test_no_share_before_the_first_validation_that_counts() -> None:
    """After a warm-up of two thirds that is late."""
    warm = row("8-bit warm-up", 0, {84: 0.2, 120: 0.3})
    assert share_of_fp16([warm], [row("fp16", 0, {6: 0.1, 36: 0.2})], 1) == "-"
    assert at(warm, warm["AP"]["ema_bn"], 90) == 0.2


def test_table(caplog: pytest.LogCaptureFixture) -> None:
    fell = row("w4a16", 0, {6: 0.1, 12: 0.22, 18: 0.4, 24: 0.2})
    with caplog.at_level(logging.INFO):
        show([row("fp16", 0, {6: 0.1, 12: 0.2}), row("fp16", 1, {6: 0.1, 12: 0.4}), fell])
    _, _, fp16, w4a16 = map(cells_of, caplog.messages)
    assert fp16[:4] == ["fp16", "2", "12", "0.3000 ± 0.1000"]
    assert fp16[6:8] == ["1.000 at 12", "-"]
    assert fp16[8:] == ["6.7000 ± 0.1000", *["+0.000"] * 2, *["-"] * 5]  # the running best does not count yet
    assert w4a16[6:] == ["1.100 at 12", "-", "6.8000", "-0.020", "-0.010", "0.50", "0.50", "0.50", "0.50", "-"]


def test_a_seed_that_went_on_does_not_count_beyond_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        show([row("fp16", 0, {6: 0.1, 12: 0.2, 18: 0.3}), row("fp16", 1, {6: 0.1, 12: 0.2, 18: 0.3, 24: 0.1})])
    assert cells_of(caplog.messages[2])[11:14] == ["1.00", "1.00", "1.00"]
    assert worst([0.5, None]) == "-"


def test_a_row_as_it_was_at_an_epoch() -> None:
    of = row("fp16", 0, {6: 0.1, 12: 0.2}) | {"corrected": 0.3}
    assert up_to(of, 12) == of
    assert up_to(of, 11) == row("fp16", 0, {6: 0.1})
    assert up_to(of, 5) is None


def test_of_a_training_the_longest_row_counts() -> None:
    short, long = row("fp16", 1, {6: 0.1}), row("fp16", 1, {6: 0.1, 12: 0.2})
    others = [row("w4a16", 0, {6: 0.3}), row("fp16", 0, {6: 0.3})]
    for given in ([short, long], [long, short]):
        assert merge([*others, *given], ["fp16", "w4a16"]) == [others[1], long, others[0]]


@pytest.mark.parametrize("more", [{"AP_frequent": None}, {"corrected": 0.2}])
def test_of_equally_long_rows_the_fuller_one_counts(more: dict[str, Any]) -> None:
    old = row("fp16", 1, {6: 0.1})
    assert merge([old, old | more], ["fp16"]) == merge([old | more, old], ["fp16"]) == [old | more]


def test_a_curve_that_a_resumed_training_has_in_part_is_left_out() -> None:
    """None of the epochs has the second number: no class has enough objects."""
    first = {"epoch": 6.0, "train/a": 2.0, "val_loss/ema_bn": 6.0, **{f"AP/{state}": 0.1 for state in STATES}}
    of = curves([first, {**first, "epoch": 12.0, "AP_frequent/ema_bn": 0.2}])
    assert "AP_frequent" not in of and of["AP_commonest"] is None
    assert curves([{**first, "AP_frequent/ema_bn": 0.2}])["AP_frequent"] == [0.2]
    assert up_to({**of, "arm": "fp16"}, 6)["AP_commonest"] is None  # pyright: ignore[reportOptionalSubscript]


ROW = {"w4a16": ["quant.dampening=1e-3"]}


@pytest.mark.parametrize(
    ("sets", "arms", "message"),
    [
        (["train.epochs=7"], ROW, "other settings (train.epochs: 300 -> 7)"),
        (["quant.dampening=1e-3"], ROW, "other settings (quant.dampening: 0.0 -> 0.001)"),
        (["quant.freeze_momentum=0.1"], ROW, "other settings (quant.freeze_momentum: 0.01 -> 0.1)"),  # not in the file
        ([], {"w4a16": []}, "w4a16 was ['quant.dampening=1e-3'], now it is []"),
        ([], {}, "it has rows of w4a16, unknown to this call: --arms has to name it"),
        (["train.seed=3", "train.workers=5", "data.coco_dir=elsewhere", "guard.collapse=warn"], ROW, None),
    ],
)
def test_rows_of_another_recipe_stay_apart(tmp_path: Any, sets: list[str], arms: Any, message: str | None) -> None:
    written = recipe(load("qat"), ROW)
    del written["config"]["quant.freeze_momentum"]  # as if the key were new since then
    write_file(tmp_path / "a.json", written, [row("w4a16", 0, {6: 0.1})])
    with pytest.raises(UserError, match=re.escape(message)) if message else contextlib.nullcontext():
        assert read_file(tmp_path / "a.json", recipe(load("qat", sets=sets), arms)) == [row("w4a16", 0, {6: 0.1})]


def test_rows_of_other_rules_of_a_scheme_stay_apart(tmp_path: Any) -> None:
    """As if w4a16-mixed had been edited since then; fp16 and the rows of before there was a hash stay readable."""
    arms = {"fp16": [], "w4a16": [], "w4a16-mixed": ["quant.scheme=w4a16-mixed"]}
    now = recipe(load("qat"), arms)
    assert now["schemes"]["w4a16"] == find_scheme("w4a16").sha256
    assert now["schemes"]["w4a16-mixed"] == find_scheme("w4a16-mixed").sha256
    mixed = row("w4a16-mixed", 3, {6: 0.1})
    rows = [row("fp16", 3, {6: 0.1}) | {"scheme_sha256": None}, mixed]
    write_file(tmp_path / "old.json", {key: now[key] for key in ("config", "arms")}, rows)
    assert read_file(tmp_path / "old.json", now) == rows
    rows[1] = mixed | {"scheme_sha256": "0123456789"}
    write_file(tmp_path / "a.json", now, rows)
    with pytest.raises(UserError, match=r"w4a16-mixed \(seed 3\) was trained with other rules .*, 01234567 i"):
        read_file(tmp_path / "a.json", now)


def test_fp16_of_a_file_is_made_again_for_the_checkpoint_that_a_branch_begins_with(tmp_path: Any) -> None:
    run, whole = RunRoot(tmp_path, "stability"), {"AP_frequent": None}
    trainings = [training_of(run, arm, seed, [], ["train.epochs=6"]) for seed in (0, 1) for arm in (BASE, BRANCH)]
    rows = [row(BASE, seed, {6: 0.1}) | whole for seed in (0, 1)]
    assert to_train(trainings, rows) == trainings
    assert to_train(trainings, [*rows, row(BRANCH, 0, {6: 0.1}) | whole]) == trainings[2:]
    kept = trainings[3].config.warmup_from
    assert kept is not None
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert to_train(trainings, rows) == [*trainings[:2], trainings[3]]


def test_what_cannot_begin_is_named(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train_all([training_of(RunRoot(tmp_path, "stability"), BRANCH, 3, [], [])], [], Plan([BRANCH], [3], 60, 1))
    assert "float warm-up, seed 3, cannot begin without" in caplog.messages[0]
    assert "stability-fp16-3/fp16/weights/epoch201.pt" in caplog.messages[0]


@pytest.mark.parametrize("text", ['{"rows": []}', "[]", "7"])
def test_a_file_of_something_else(tmp_path: Any, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: not a bench-stability\.json"):
        read_file(tmp_path / "a.json", recipe(load("qat"), ROW))


def finished(run: RunRoot, arm: str, seed: int, sets: list[str]) -> None:
    """A folder as a training of two validations leaves it."""
    training = training_of(run, arm, seed, [], sets)
    folder = training.out_dir
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(training.config))
    states = {f"AP/{state}": 0.1 for state in STATES}
    rows = [{"epoch": n, "train/a": 2.0, "train/b": 3.0, **states, "val_loss/ema_bn": 6.0} for n in (6, 12)]
    write_rows(folder / "results.csv", [{"epoch": 1, "train/a": 9.0, "train/b": 9.0}, *rows])
    write_json(folder / "env.json", {"gpus": ["A, 1, 2"], "packages": {"torch": "2"}, "code_version": "abc"})


def test_own_rows_and_those_of_a_file(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What is written holds all of them, whatever is shown, and can be read again."""
    run, sets = RunRoot(tmp_path, "stability"), ["model=yolov10n.yaml"]
    finished(run, "w4a16", 0, sets)
    of_all = recipe(load("qat", sets=sets), ARMS)
    write_file(tmp_path / "b.json", of_all, [row("fp16", seed, {6: 0.2}) for seed in (0, 1)])
    with caplog.at_level(logging.INFO):
        bench_stability(run, [], sets, Plan(["w4a16"], [0], 0, 1, files=(tmp_path / "b.json",)))
    assert [cells_of(line)[0] for line in caplog.messages if line.startswith("|")][2:] == ["w4a16"]
    fp16, other, ours = read_file(run.root / "bench-stability.json", of_all)
    assert (fp16["arm"], other["seed"]) == ("fp16", 1)
    assert ours == {
        "arm": "w4a16", "seed": 0, "epoch": [6, 12], "AP": {key: [0.1, 0.1] for key in STATES},
        "train_loss": [5.0, 5.0], "val_loss": [6.0, 6.0], "corrected": None,
        "scheme_sha256": find_scheme("w4a16").sha256, "AP_frequent": None, "AP_commonest": None,
        "gpu": "A", "torch": "2", "code_version": "abc",
    }  # fmt: skip


OTHER_RECIPES = {
    "train.epochs=60": "yolov10n.yaml, 320 px, 60 epochs, batch 64, lr0 0.02, lrf 0.1",
    "train.epochs=240": "yolov10n.yaml, 320 px, 240 epochs, batch 64, lr0 0.02, lrf 0.1",
    "model=yolov10s.yaml": "yolov10s.yaml, 320 px, 120 epochs, batch 64, lr0 0.02, lrf 0.1",
}


@pytest.mark.parametrize("setting", OTHER_RECIPES)
def test_rows_of_another_size_or_length_are_shown_under_its_name(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    run, overlays = RunRoot(tmp_path, "stability"), [CONF_DIR / "stability.yaml"]
    kept = tmp_path / "kept.json"
    write_file(kept, recipe(load("qat", overlays, [setting]), ARMS), [row("w4a16", 3, {6: 0.2})])
    with caplog.at_level(logging.INFO):
        bench_stability(run, overlays, [setting], Plan(["w4a16"], None, 0, 1, files=(kept,)))
    assert caplog.messages[0] == OTHER_RECIPES[setting]
    assert cells_of(caplog.messages[3])[:3] == ["w4a16", "1", "6"]
    with pytest.raises(UserError, match=f"other settings .{setting.partition('=')[0]}: "):
        bench_stability(run, overlays, [], Plan(["w4a16"], None, 0, 1, files=(kept,)))


def test_a_folder_of_another_configuration_is_not_shown(tmp_path: Any) -> None:
    run = RunRoot(tmp_path, "stability")
    finished(run, "w4a16", 0, ["train.epochs=7"])
    with pytest.raises(UserError, match=r"another configuration \(train.epochs: 7 -> 300\)"):
        bench_stability(run, [], [], Plan(["w4a16"], [0], 0, 1))


def test_nothing_to_show(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        bench_stability(RunRoot(tmp_path, "stability"), [], [], Plan(["w4a16"], [0], 0, 1))
    assert caplog.messages == ["nothing to show yet: no such training has been validated"]


# Line of the table of measures that the bench prints -> column of docs/results.md.
MEASURES = {"AP_frequent, last 5": 1, "AP_commonest, last 5": 2, "AP": 3}
LOSSES = {10: 4, 9: 5}  # column of the table of arms -> column of docs/results.md
# Arm -> its name in docs/results.md; in the order of the bench's columns.
ARMS_OF_PAGE = {
    "w4a16": "w4a16 (the default)", "w4a16-mixed": "w4a16-mixed", "w4a16-mixed-dw": "w4a16-mixed-dw",
    "w4a16, distilled": "w4a16, distilled (n=8)",
}  # fmt: skip
MEASURE_OF_PAGE = "AP_frequent, last 5"  # the number that judges
OF_16_SEEDS = ("fp16", "w4a16", "w4a16-mixed", "w4a16-mixed-dw")  # the arms whose falls the page counts
LATEST, EAGER = "docs/stability.json", "docs/stability-eager.json"
# Of the last section, the name of an option -> its arm in the bench.
OPTIONS = {
    "no option": BRANCH,
    "learned scales": f"{BRANCH}, learned scale",
    "one scale a layer": f"{BRANCH}, per tensor",
    "DFL at 4 bits": f"{BRANCH}, DFL not exempt",
}
ALL, AT_96 = f"--with {LATEST}", f"--with {LATEST} --until 96"
OF_EAGER, EAGER_AT_96, SEED_6 = f"--with {EAGER}", f"--with {EAGER} --until 96", f"--with {EAGER} --seeds 6"
FOUND_SCHEME = "docs/found-yolov10n.yaml"
FOUND = (
    f"--with {LATEST} docs/stability-found.json --seeds 8 9 10 11 12 13 14 15 "
    f"--arms fp16 w4a16 w4a16-mixed-dw {FOUND_SCHEME}"
)
FULL = f"--with {LATEST} docs/stability-full.json --until 72 --seeds 0 1 2 3 4 5 6 7 --arms fp16 w4a16 w4a16-full"
FLOAT_FIRST = "--with docs/stability-float-first.json"
OF_60 = "--with docs/stability-n60.json --set train.epochs=60"
OF_120 = f"--with {LATEST} --seeds 0 1 2 3 4 5 6 7 --arms fp16 w4a16"
LARGER = "--with docs/stability-s60.json --set train.epochs=60 --set model=yolov10s.yaml"
# Each of its arguments is a command line; a process for each would spend its time on imports.
PROGRAM = """
import sys
from app.__main__ import main
for line in sys.argv[1:]:
    print("command", line, file=sys.stderr)
    sys.argv = ["app", *line.split()]
    if code := main():
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the bench prints of the kept rows; without data, with the recipe of conf/stability.yaml."""
    common = f"bench stability --run s --runs-dir {tmp_path_factory.mktemp('runs')}"
    common += " --for-s 0 --set data.coco_dir=not-there "
    commands = [ALL, AT_96, OF_EAGER, EAGER_AT_96, SEED_6, FOUND, FULL]
    commands += [FLOAT_FIRST, OF_60, OF_120, LARGER]
    command = [sys.executable, "-c", PROGRAM, *(common + arguments for arguments in commands)]
    done = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, check=True)
    pages = done.stderr.split("command " + common)[1:]
    return dict(zip(commands, map(str.splitlines, pages), strict=True))


def by_first_cell(lines: list[str]) -> dict[str, list[str]]:
    """Rows of all tables; of those that begin alike the last."""
    return {cells[0]: cells for cells in map(cells_of, lines)}


def of_arms(lines: list[str]) -> dict[str, list[str]]:
    """Rows of the bench's table of arms and that of measures, which come before the one of pairs."""
    return by_first_cell(lines[::-1])


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """Rows of the tables of docs/results.md."""
    return by_first_cell((REPO_DIR / "docs" / "results.md").read_text().splitlines())


def test_the_results_page_shows_what_the_file_says(printed: dict[str, list[str]], told: dict[str, list[str]]) -> None:
    ours = of_arms(printed[ALL])
    for place, (arm, name) in enumerate(ARMS_OF_PAGE.items(), start=3):
        for measure, column_of_page in MEASURES.items():
            assert ours[measure][place] == told[name][column_of_page]
        for column, column_of_page in LOSSES.items():
            assert ours[arm][column] == told[name][column_of_page]
    for measure, column_of_page in MEASURES.items():
        assert told["fp16"][column_of_page] == f"1 ({ours[measure][1]})"


def test_the_results_page_shows_how_far_curves_fall(printed: dict[str, list[str]]) -> None:
    """The mean curves of AP keep 0.97 of their best, those of AP_frequent 0.99; single trainings are counted."""
    page = (REPO_DIR / "docs" / "results.md").read_text().replace("\n", " ")
    for arm in OF_16_SEEDS:
        (falls,) = (line for line in printed[ALL] if line.startswith(f"{arm}: lowest"))
        of_ap, of_frequent = falls.partition("below 0.9: ")[2].split("; ")
        lowest, n_below = of_ap.removeprefix("AP ").split(", ")
        assert float(lowest) >= 0.97
        assert f"{arm} {n_below}" in page
        lowest, n_below = of_frequent.removeprefix("AP_frequent ").split(", ")
        assert float(lowest) >= 0.99
        assert n_below == "0 of 16"


def test_the_results_page_shows_what_schemes_and_options_differ_by(printed: dict[str, list[str]]) -> None:
    lines = printed[ALL]
    (first,) = (number for number, line in enumerate(lines) if "as a share of" in line)
    (of_low_rate,) = (cells for cells in map(cells_of, lines) if cells[0] == MEASURE_OF_PAGE)
    heads = cells_of(lines[first])
    pairs = by_first_cell(lines[first + 2 : first + 1 + len(heads)])
    page = (REPO_DIR / "docs" / "results.md").read_text().replace("\n", " ")
    dw, base = pairs["w4a16-mixed-dw"], heads.index("w4a16")
    assert f"mixed-dw has {dw[base]} of w4a16's AP and {dw[heads.index('w4a16-mixed')]} of mixed's" in page
    assert f"gives {pairs['w4a16, distilled'][base]} of plain w4a16" in page
    (arms,) = (cells_of(line) for line in lines if line.startswith("| measure"))
    shares = {arm.partition(" (n=")[0]: cell for arm, cell in zip(arms, of_low_rate, strict=True)}
    assert f"FP16 keeps {shares['fp16, lrf 0.01']}, " in page
    for arm, words in (("w4a16", "w4a16 loses"), ("w4a16-mixed-dw", "w4a16-mixed-dw")):
        share, error = map(float, shares[f"{arm}, lrf 0.01"].split(" ± "))
        assert f"{words} {1 - share:.3f} ± {error:.3f}" in page


def test_the_results_page_shows_what_float_first_gave(printed: dict[str, list[str]]) -> None:
    lines = printed[FLOAT_FIRST]
    (heads,) = (cells_of(line) for line in lines if line.startswith("| measure"))
    share = dict(zip(heads, of_arms(lines)[MEASURE_OF_PAGE], strict=True))
    page = (REPO_DIR / "docs" / "results.md").read_text().replace("\n ", "")
    third, half = share[f"{BRANCH} for a third (n=4)"], share[f"{BRANCH} for a half (n=5)"]
    assert f"no gain: {third} (4 seeds), {half} (5) and {share[f'{BRANCH} (n=6)']} (6) of the FP16" in page


def test_the_results_page_shows_what_length_and_size_change(printed: dict[str, list[str]]) -> None:
    shares = {key: of_arms(printed[key]) for key in (OF_60, OF_120, LARGER)}
    of_five = {key: measures[MEASURE_OF_PAGE][3] for key, measures in shares.items()}
    last = {key: measures["AP_frequent"][3] for key, measures in shares.items()}
    page = (REPO_DIR / "docs" / "results.md").read_text().replace("\n ", "")
    assert f"of 60 epochs w4a16 has {of_five[OF_60]} of FP16, of 120 epochs {of_five[OF_120]} with the same" in page
    assert f"last one alone has {last[OF_60]} and {last[OF_120]}" in page
    assert f"YOLOv10s, 60 epochs, has {of_five[LARGER]} (8 seeds)" in page


def test_the_results_page_shows_what_all_codes_gave(printed: dict[str, list[str]]) -> None:
    arms, pairs = of_arms(printed[FULL]), by_first_cell(printed[FULL])
    _, _, _, plain, full = arms[MEASURE_OF_PAGE]
    page = (REPO_DIR / "docs" / "results.md").read_text().replace("\n ", "")
    assert f"difference: {full} of FP16 and {pairs['w4a16-full'][1]} of w4a16" in page
    assert f"epoch 72 of 120, where the GPU's time ended: w4a16 has {plain} there" in page


def test_the_page_of_sensitivity_shows_what_its_scheme_gave_in_training(printed: dict[str, list[str]]) -> None:
    page = by_first_cell((REPO_DIR / "docs" / "sensitivity.md").read_text().splitlines())
    arms, pairs = of_arms(printed[FOUND]), by_first_cell(printed[FOUND])
    heads = next(cells_of(line) for line in printed[FOUND] if "as a share of" in line)
    of = heads.index("w4a16-mixed-dw")
    rows = {"w4a16": "`w4a16`", FOUND_SCHEME: "the proposal, [found-yolov10n.yaml](found-yolov10n.yaml)"}
    for place, (arm, name) in zip((3, 5), rows.items(), strict=True):
        assert page[name][1:] == [arms[MEASURE_OF_PAGE][place], pairs[arm][of], arms[arm][10]]


def test_the_results_page_shows_the_earlier_loop_beside_this_one(
    printed: dict[str, list[str]], told: dict[str, list[str]]
) -> None:
    for column, lines in ((1, printed[EAGER_AT_96]), (2, printed[AT_96])):
        ours = of_arms(lines)
        for arm, name in (("fp16", "FP16"), ("w4a16", "w4a16"), ("w4a16-mixed", "w4a16-mixed")):
            assert told[f"{name}, AP"][column] == ours[arm][5]
            assert told[f"{name}, val loss"][column] == ours[arm][8]


def test_the_results_page_shows_the_options_that_the_file_says(
    printed: dict[str, list[str]], told: dict[str, list[str]]
) -> None:
    of_seed_6, of_all = of_arms(printed[SEED_6]), of_arms(printed[OF_EAGER])
    for option, arm in OPTIONS.items():
        share = float(of_seed_6[arm][7].partition(" at ")[0])
        assert told[option][2].split()[0] == f"{share:.2f}"
    assert of_all["earlier recipe, scales averaged"][5].split()[0] == "0.0199"
    assert round(float(of_all["earlier recipe, scales averaged"][6].split()[0]), 2) == 0.65


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_a_jump_of_one_seed_is_smaller_in_the_mean_curve() -> None:
    of = [row("fp16", 0, {6: 0.1, 12: 0.2, 18: 0.1, 24: 0.3}), row("fp16", 1, {6: 0.1, 12: 0.2, 18: 0.3})]
    assert mean_curve(of) == pytest.approx({6: 0.1, 12: 0.2, 18: 0.2})
    assert lowest_share(list(mean_curve(of).values())) == 1.0
    assert lowest_share(of[0]["AP"]["ema_bn"]) == 0.5


def test_the_correction_is_shown_beside_the_best_state() -> None:
    of = [row("correction", seed, {6: 0.2, 12: 0.1}) | {"corrected": 0.3 + 0.2 * seed} for seed in (0, 1)]
    assert corrected(of) == "0.2000 -> 0.4000"
    assert corrected([*of, row("correction", 2, {6: 0.2})]) == "-"


def test_a_panel_an_arm_with_three_states_and_fp16_behind() -> None:
    rows = [row("fp16", 0, {6: 0.1, 12: 0.3}), row("fp16", 1, {6: 0.3, 12: 0.5}), row("w4a16", 0, {6: 0.1, 12: 0.2})]
    fp16, w4a16 = draw(rows).axes
    mean = pytest.approx([0.2, 0.4])
    assert [np.asarray(line.get_ydata()).tolist() for line in fp16.lines] == [[0.1, 0.3], [0.3, 0.5], mean, mean, mean]
    assert [np.asarray(line.get_ydata()).tolist() for line in w4a16.lines] == [[0.1, 0.3], *[[0.1, 0.2]] * 3]
    assert (fp16.get_title(), w4a16.get_title()) == ("fp16 (n=2)", "w4a16 (n=1)")
