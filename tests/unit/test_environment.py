"""The variables of the environment: those of notebooks and of launchers other than torchrun."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import app.__main__ as cli
from app.core import cgroups, child
from app.core.config import UserError
from app.core.environment import RANK_VARIABLES, REPO_DIR, isolate_libraries, launched_as, n_cores, n_threads
from app.core.files import printable
from app.core.progress import Meter

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def environ() -> Iterator[pytest.MonkeyPatch]:
    """Changes os.environ for a test; what the test itself sets goes too."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        for name in TORCHRUN:
            patch.delenv(name, raising=False)
        yield patch
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("without", ["", *TORCHRUN])
def test_torchrun_is_known_by_all_its_variables(environ: pytest.MonkeyPatch, without: str) -> None:
    for name, value in TORCHRUN.items():
        if name != without:
            environ.setenv(name, value)
    if without in ("RANK", "WORLD_SIZE"):
        assert launched_as() is None
    elif without:
        with pytest.raises(UserError, match=f"WORLD_SIZE=4 without {without}: start the processes with torchrun"):
            launched_as()
    else:
        assert launched_as() == (1, 4, 1, 2)


BAD = [("RANK", "x"), ("RANK", "4"), ("RANK", "-1"), ("RANK", ""), ("RANK", "1.0"), ("WORLD_SIZE", "many")]
BAD += [("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "8"), ("MASTER_PORT", "http"), ("LOCAL_RANK", "²")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_that_do_not_fit(environ: pytest.MonkeyPatch, name: str, value: str) -> None:
    for key, sound in (TORCHRUN | {name: value}).items():
        environ.setenv(key, sound)
    with pytest.raises(UserError, match="torchrun"):
        launched_as()


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "5"}, {"LOCAL_RANK": "x"}, {}])
def test_one_process_is_alone(environ: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, str]) -> None:
    for name, value in values.items():
        environ.setenv(name, value)
    assert launched_as() is None
    isolate_libraries(tmp_path)
    assert not set(RANK_VARIABLES) & set(os.environ)


@pytest.mark.parametrize("values", [TORCHRUN, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "many"}])
@pytest.mark.parametrize("command", ["data", "export", "all", "publish --run r --aim x", "download-coco --to coco"])
def test_stages_of_one_process_refuse_ranks(
    environ: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, values: dict[str, str], command: str
) -> None:
    for name, value in values.items():
        environ.setenv(name, value)
    environ.setattr(sys, "argv", ["app", *command.split()])
    environ.setattr("app.core.progress.set_up_terminal", lambda: None)
    assert cli.main() == 2
    (line,) = [record.getMessage() for record in caplog.records]
    stage, ranks = command.partition(" ")[0], f"RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']}"
    assert line == (f"error: the environment says {ranks}, but {stage} runs in one process: unset RANK and WORLD_SIZE")


LEVEL = """
import logging
from app.core.progress import set_up_terminal
set_up_terminal()
print(logging.getLogger("app").level)
"""


@pytest.mark.parametrize(("n", "level"), [(None, logging.INFO), ("1", logging.INFO), ("2", logging.ERROR)])
def test_only_one_of_several_processes_is_silent(environ: pytest.MonkeyPatch, n: str | None, level: int) -> None:
    environ.setenv("RANK", "1")
    if n is not None:
        environ.setenv("WORLD_SIZE", n)
    result = subprocess.run([sys.executable, "-c", LEVEL], capture_output=True, text=True, check=True, cwd=REPO_DIR)
    assert result.stdout == f"{level}\n"


def test_torchruns_ranks_stay(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in TORCHRUN.items():
        environ.setenv(name, value)
    isolate_libraries(tmp_path)
    assert os.environ["LOCAL_RANK"] == "1"


def test_a_notebooks_backend_is_not_used(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    isolate_libraries(tmp_path)
    assert os.environ["MPLBACKEND"] == "agg"


def test_the_font_is_a_file_and_no_link(
    environ: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    isolate_libraries(tmp_path)
    font = tmp_path / "ultralytics" / "Ultralytics" / "Arial.ttf"
    assert font.is_file()
    assert not font.is_symlink()


@pytest.fixture
def groups(tmp_path: Path, environ: pytest.MonkeyPatch) -> Path:
    """Six cores by affinity; the root of the control groups, where this process has none yet."""
    environ.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 16)))
    environ.setattr(os, "cpu_count", lambda: 64)
    environ.setattr(cgroups, "PROC", tmp_path)
    environ.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


@pytest.mark.parametrize(("n_processes", "n"), [(1, 6), (3, 2), (4, 1), (9, 1)])
def test_threads_take_the_cores_that_the_process_may_use(
    groups: Path, environ: pytest.MonkeyPatch, n_processes: int, n: int
) -> None:
    environ.setenv("OMP_NUM_THREADS", "1")  # as Ultralytics sets it when it is imported
    assert n_threads(n_processes) == n


@pytest.mark.parametrize(
    ("limit", "n"), [("max 100000", 6), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 6)]
)
def test_a_container_with_a_share_of_the_cores_has_as_many(groups: Path, limit: str, n: int) -> None:
    """docker run --cpus=1.5: two processes at a time, as the kernel counts them."""
    (groups / "cpu.max").write_text(f"{limit}\n")
    assert n_cores() == n


def test_the_narrowest_quota_of_nested_groups_counts(groups: Path) -> None:
    """A batch system limits the job, which is a group above that of its step."""
    step = groups / "job.slice" / "step.scope"
    step.mkdir(parents=True)
    (groups.parent / "self" / "cgroup").write_text("0::/job.slice/step.scope\n")
    (step / "cpu.max").write_text("500000 100000\n")
    (step.parent / "cpu.max").write_text("300000 100000\n")
    assert n_cores() == 3


@pytest.mark.parametrize(("quota", "n"), [("-1", 6), ("150000", 2)])
def test_version_1_of_control_groups(groups: Path, quota: str, n: int) -> None:
    """The path is the host's, so that only the root of the container's own mount is there."""
    (groups.parent / "self" / "cgroup").write_text("4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n0::/\n")
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert n_cores() == n


@pytest.mark.parametrize("module", ["app.export.export", "app.train.ptq", "app.sensitivity.sensitivity"])
def test_a_stage_computes_with_the_cores_that_it_may_use(tmp_path: Path, module: str) -> None:
    """Ultralytics leaves one thread to what imports it before PyTorch, and to all children."""
    program = (
        "from pathlib import Path; from app.core.environment import isolate_libraries; "
        f"isolate_libraries(Path({str(tmp_path)!r})); import {module}, torch; print(torch.get_num_threads())"
    )
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, cwd=REPO_DIR)
    assert int(done.stdout.split()[-1]) == n_cores(), done.stderr


SAID = {
    signal.SIGKILL: "SIGKILL (short of memory?)",
    signal.SIGSEGV: "SIGSEGV",
    signal.SIGBUS: "SIGBUS (short of memory?)",
}


@pytest.mark.parametrize("number", SAID)
def test_a_killed_stage_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    words = ["train", "--variant", "qat", "--run", "r"]

    def killed(command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        assert command[3:] in (words, [*words, "--force"])
        code = f"import os, resource as r; r.setrlimit(r.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), {int(number)})"
        return popen([sys.executable, "-c", code], **kwargs)

    popen, handlers = (
        subprocess.Popen,
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )
    monkeypatch.setattr(child.subprocess, "Popen", killed)
    assert child.run_stage("train --variant qat", ["--run", "r"]) == 128 + number
    expected = f"'train --variant qat' was killed by {SAID[number]}: the same command goes on from there"
    assert [record.getMessage() for record in caplog.records] == [expected]
    child.run_stage("train --variant qat", ["--run", "r", "--force"])  # which would delete the checkpoint
    assert caplog.records[-1].getMessage().endswith("the same command without --force goes on from there")
    for name, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handlers, strict=True):
        signal.signal(name, handler)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\nb\r", r"a\nb\r"), ("a\u202eb", r"a\u202eb"), ("\ud800", r"\ud800"),
     ("Ärger 😀, 図", "Ärger 😀, 図")],
)  # fmt: skip
def test_no_control_character_is_printed(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert Meter(text, 1).desc == shown
