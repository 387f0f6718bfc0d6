"""last.pt under kill -9, full disks, damage and hostile content."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.config import UserError, load
from app.core.environment import REPO_DIR
from app.quant.model import CHECKPOINT_FORMAT, SEAL_BYTES, load_checkpoint, save_checkpoint
from app.train.checkpoint import last_whole
from tests.support.settle import AT_EVERY_STEP, sets_of

CONFIG = load("fp16")


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """Two checkpoints: number 2 as last.pt, and number 1 before it."""
    path = tmp_path / "last.pt"
    for number in (1, 2):
        save(path, number)
    return path


def save(path: Path, number: int) -> None:
    entries = {"number": number, "weights": torch.full((1000,), float(number))}
    save_checkpoint(path, CONFIG, entries, path.with_name("last-1.pt"))


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_plain_torch_load_reads_a_checkpoint(last: Path) -> None:
    assert torch.load(last, weights_only=True)["number"] == 2


def test_the_last_one_is_used_and_the_one_before_is_kept(last: Path) -> None:
    assert last_whole(last)["number"] == 2  # pyright: ignore
    assert load_checkpoint(last.with_name("last-1.pt"))["number"] == 1
    assert last_whole(last.with_name("none.pt").parent / "sub" / "last.pt") is None


@pytest.mark.parametrize("place", [0, 0.1, 0.25, 0.5, 0.75, 0.9, -400, -80, -70, -1])
def test_a_flipped_bit_is_recognised_and_the_one_before_is_used(
    last: Path, caplog: pytest.LogCaptureFixture, place: float | int
) -> None:
    """At the front, in the tensors, in the directory of the ZIP, in the checksum itself."""
    flip(last, place if isinstance(place, int) else int(place * last.stat().st_size))
    with pytest.raises(UserError, match=r"last\.pt is not a whole checkpoint: its checksum does not fit"):
        load_checkpoint(last)
    assert last_whole(last)["number"] == 1  # pyright: ignore
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(f"cut off or damaged; the one before it is used, {last.with_name('last-1.pt')}")
    assert sorted(os.listdir(last.parent)) == ["last-1.pt", "last-damaged.pt"]
    save(last, 3)
    assert load_checkpoint(last.with_name("last-1.pt"))["number"] == 1  # the damaged one has not taken its place


@pytest.mark.parametrize("end", [0, 1000, -SEAL_BYTES - 1, -SEAL_BYTES + 1])
def test_a_cut_off_one_is_recognised_and_the_one_before_is_used(last: Path, end: int) -> None:
    """Empty, in the tensors, and a byte before and after the seal; what ends where the seal begins has all its data."""
    last.write_bytes(last.read_bytes()[:end])
    assert last_whole(last)["number"] == 1  # pyright: ignore


def test_one_byte_less_is_recognised(last: Path) -> None:
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UserError, match="checksum"):
        load_checkpoint(last)


def test_two_damaged_ones_are_an_error_with_the_remedy(last: Path) -> None:
    flip(last, 500)
    flip(last.with_name("last-1.pt"), 500)
    with pytest.raises(UserError, match=r"last-1\.pt is not a whole checkpoint"):
        last_whole(last)
    last.with_name("last-1.pt").unlink()
    with pytest.raises(UserError, match="there is none before it: start over with ARGS=--force"):
        last_whole(last)


@pytest.mark.parametrize("point", ["os.fsync", "pathlib.Path.hardlink_to", "pathlib.Path.replace", "half"])
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_broken_off_save_leaves_both_as_they_were(
    last: Path, monkeypatch: pytest.MonkeyPatch, point: str, how: str
) -> None:
    """Killed, or refused by the system, at each step of a save, and with half of the bytes written."""

    def stop(*args: Any, **kwargs: Any) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")

    def half(path: Path, data: Any) -> None:
        path.write_bytes(data[: len(data) // 2])
        stop()

    with monkeypatch.context() as patch:
        if point == "half":
            patch.setattr("app.quant.model.write_sealed", half)
        else:
            patch.setattr(point, stop)
        if point == "pathlib.Path.hardlink_to":
            patch.setattr(shutil, "copyfile", stop)  # what is tried in its place
        if how == "kill":
            pid = os.fork()
            if pid == 0:
                save(last, 3)
                os._exit(0)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        else:
            with pytest.raises(OSError, match="No space left"):
                save(last, 3)
            assert sorted(os.listdir(last.parent)) == ["last-1.pt", "last.pt"]
    assert load_checkpoint(last)["number"] == 2
    assert load_checkpoint(last.with_name("last-1.pt"))["number"] == 1


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_no_pickle_of_a_checkpoint_that_is_handed_in_is_executed(tmp_path: Path, form: str) -> None:
    path, trap = tmp_path / "best.pt", tmp_path / "trap"
    content = {"format": CHECKPOINT_FORMAT, "config": {}, "scored": Hostile(trap)}
    torch.save(content, path) if form == "torch" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"best\.pt is not a"):
        load_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())  # noqa: S301
    assert trap.exists()  # it would have


# --- a real disk that is full ----------------------------------------------------------------------------------------

# A training of its own on a disk of 130 MB: the first checkpoints of 35 to 45 MB fit, a third beside two does not.
SETTINGS = {
    "data.n_train": 16, "data.n_val": 4, "train.batch": 8, "train.epochs": 2, "hyp.nbs": 8,
    "hyp.close_mosaic": 0, **AT_EVERY_STEP,
}  # fmt: skip
SCRIPT = """
mount -t tmpfs -o size=130m none "$1"
shift
"$@" 2> "$OUT/first"; echo $? > "$OUT/codes"
ls -A "$RUNS/r/fp16/weights" > "$OUT/files"
mount -o remount,size=500m "$RUNS"
"$@" 2> "$OUT/second"; echo $? >> "$OUT/codes"
cp "$RUNS/r/fp16/results.csv" "$OUT"
"""
TRY = "unshare -Urm mount -t tmpfs none /mnt"
NO_MOUNT = "this system does not let a user mount a small disk (user namespaces)"


@pytest.mark.skipif(subprocess.run(["sh", "-c", TRY], capture_output=True).returncode != 0, reason=NO_MOUNT)
def test_a_full_disk_stops_the_training_cleanly_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    runs_dir, out_dir = tmp_path / "runs", tmp_path / "out"
    runs_dir.mkdir()
    out_dir.mkdir()
    command = [sys.executable, "-m", "app", "train", "--variant", "fp16", "--run", "r", "--runs-dir", str(runs_dir)]
    command += [part for item in sets_of(SETTINGS) for part in ("--set", item)]
    env = os.environ | {"RUNS": str(runs_dir), "OUT": str(out_dir)}
    shell = ["unshare", "-Urm", "sh", "-c", SCRIPT, "sh", str(runs_dir), *command]
    subprocess.run(shell, cwd=REPO_DIR, env=env, check=True)
    first, second = ((out_dir / name).read_text() for name in ("first", "second"))
    assert (out_dir / "codes").read_text().split() == ["2", "0"], first + second
    line = first.splitlines()[-1]
    assert line.startswith(f"error: no space left in {runs_dir} (")
    assert line.endswith("finished files and the last checkpoint are whole; make room, and the same command goes on")
    assert "Traceback" not in first
    assert ".part" not in (out_dir / "files").read_text()
    assert "train fp16: continues after epoch" in second
    assert (out_dir / "results.csv").read_text().count("\n") == 3
