"""Every bad input ends as one exact line with the remedy, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.__main__ import parse
from app.core.config import UserError
from app.core.environment import REPO_DIR
from app.core.files import read_json
from app.core.run import RunRoot
from tests.support.bad_annotation_cases import Case
from tests.support.bad_input_cases import ARGUMENTS, BOXES, CASES, FILES, Argument
from tests.support.bad_input_doc import DOC, document
from tests.support.data_fixtures import listing, run_data

N_PROMISED = 30
TIMEOUT_S = 60  # of one process; it takes about a second


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_leaves_nothing(coco_dir: Path, run: RunRoot, case: Case) -> None:
    case.spoil(coco_dir)
    before = listing(coco_dir) if coco_dir.exists() else {}
    with pytest.raises(UserError) as error:
        run_data(run, coco_dir, *case.sets)
    assert str(error.value).replace(str(coco_dir), "COCO") == case.line
    assert not run.root.exists()
    assert list(run.runs_dir.rglob("*.part")) == []
    assert before == (listing(coco_dir) if coco_dir.exists() else {})


@pytest.mark.parametrize("case", [*FILES, *BOXES], ids=lambda case: case.name)
def test_single_bad_images_can_be_skipped(coco_dir: Path, run: RunRoot, case: Case) -> None:
    case.spoil(coco_dir)
    run_data(run, coco_dir, "data.skip_broken=true")
    train = read_json(run.provenance, "data")["splits"]["train"]
    assert (train["n_listed"], train["n_images"], train["n_broken"]) == (2, 1, 1)
    assert f"{train['broken'][0]['file']} {train['broken'][0]['reason']};" in case.line


def test_fault_of_the_whole_file_leaves_no_view(coco_dir: Path, run: RunRoot) -> None:
    (coco_dir / "annotations" / "instances_val2017.json").write_text("{}")  # the second split: the first was built
    with pytest.raises(UserError, match="has no list 'images'"):
        run_data(run, coco_dir)
    assert list((run.cache_dir / "views").iterdir()) == []


def test_names_are_unique_and_as_many_as_promised() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= N_PROMISED
    assert not any("\n" in case.line for case in CASES)


def test_the_page_says_what_the_cases_say() -> None:
    assert DOC.read_text(encoding="utf-8") == document(), "run PYTHONPATH=. python tests/support/bad_input_doc.py"
    assert document().count("\n| ") - document().count("\n| what is wrong") == len(CASES) + len(ARGUMENTS)


def app(tmp_path: Path, *args: str) -> tuple[int, str]:
    """Exit code and what a process of the command line writes to stderr."""
    command = [sys.executable, "-m", "app", *args]
    env = os.environ | {"PYTHONPATH": str(REPO_DIR)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=TIMEOUT_S, env=env
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("data", "--set", "data.coco_dir=none"), "error: no COCO folder at CWD/none: give COCO_DIR=path, "
         "or run 'make download-coco'"),
        (("data", "--conf", "no.yaml"), "error: cannot read the configuration file no.yaml: [Errno 2] "
         "No such file or directory: 'no.yaml'"),
        (("data", "--conf", "bad.yaml"), 'error: bad.yaml is not valid YAML: while parsing a flow sequence in '
         '"<unicode string>", line 1, column 4: a: [1 ^ expected \',\' or \']\', but got \'<stream end>\' in '
         '"<unicode string>", line 1, column 6: a: [1 ^'),
        (("data", "--run", "../up"), "error: --run '../up': use letters, digits, '.', '_' and '-' "
         "(it becomes a folder under runs)"),
    ],
    ids=["no COCO folder", "CONF file missing", "CONF file not YAML", "run name that is a path"],
)  # fmt: skip
def test_command_line_ends_with_2_and_one_line(tmp_path: Path, args: tuple[str, ...], line: str) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    code, stderr = app(tmp_path, *args)
    assert (code, stderr.replace(str(tmp_path), "CWD")) == (2, f"{line}\n")
    assert not (tmp_path / "runs" / "full").exists()


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.name)
def test_an_argument_that_is_none_says_how_it_is_written(case: Argument, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(list(case.args))
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {case.line}\n")


def test_a_word_in_the_place_of_a_choice_does_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["bench", "train.epochs=3"])
    assert capsys.readouterr().err.endswith(": a setting is written --set train.epochs=3\n")


def test_unknown_stage_names_the_stages(tmp_path: Path) -> None:
    code, stderr = app(tmp_path, "trian")
    assert code == 2
    assert "invalid choice: 'trian' (choose from 'all', 'data', 'train'" in stderr
    assert list(tmp_path.iterdir()) == []
