"""train.weights: what the configuration makes of it; the hash of the file, not its place, tells starts apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from app.core.config import UserError, dump, load
from app.core.differences import config_hash, difference
from app.core.files import write_text
from app.core.start import Start, told
from app.eval.metadata import start_of
from app.train.done import check_snapshot

CONTENT, OTHER = b"weights", b"other weights"


def started(path: Path | str, *sets: str, run_root: Path | None = None) -> Start:
    weights = load("fp16", sets=[f"train.weights={path}", *sets], run_root=run_root).train.weights
    assert weights is not None
    return weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "its own #1.pt"
    path.write_bytes(CONTENT)
    return path


def test_a_path_becomes_the_file_and_its_hash(file: Path) -> None:
    start = started(file)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (start.path, start.sha256) == (str(file), digest)
    assert str(start) == told(start.facts) == f"from its own #1.pt, sha256 {digest[:12]}"


def test_null_is_random_weights() -> None:
    assert load("fp16", sets=["train.weights=null"]) == load("fp16")
    assert load("fp16").train.weights is None
    assert told(None) == "from random weights"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist: name a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "fetch it with 'git lfs pull'"),
    ],
    ids=["missing", "pointer"],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "best.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        started(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_hash_counts_and_not_the_place(file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.pt"
    moved.write_bytes(CONTENT)
    here, there = (load("fp16", sets=[f"train.weights={path}"]) for path in (file, moved))
    assert difference(here, there) == {}
    assert config_hash(here) == config_hash(there)
    moved.write_bytes(OTHER)
    other = load("fp16", sets=[f"train.weights={moved}"])
    shown = [f"sha256 {hashlib.sha256(content).hexdigest()[:12]}" for content in (CONTENT, OTHER)]
    assert difference(here, other) == {"train.weights": tuple(shown)}
    assert difference(load("fp16"), here) == {"train.weights": (None, shown[0])}
    assert len({config_hash(config) for config in (here, other, load("fp16"))}) == 3


def test_a_training_that_has_begun_needs_the_file_no_more_but_refuses_another(file: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "run" / "fp16" / "config.yaml"
    config = load("fp16", sets=[f"train.weights={file}"])
    write_text(snapshot, dump(config))
    write_text(snapshot.parent / "weights" / "last.pt", "")
    file.unlink()
    again = load("fp16", sets=[f"train.weights={file}"], run_root=tmp_path / "run")
    assert again.train.weights == config.train.weights
    check_snapshot(again, snapshot)
    with pytest.raises(UserError, match="does not exist"):
        started(file, run_root=tmp_path / "another run")
    file.write_bytes(OTHER)
    with pytest.raises(UserError, match=r"another configuration \(train\.weights: sha256 [0-9a-f]{12} -> sha256"):
        check_snapshot(load("fp16", sets=[f"train.weights={file}"], run_root=tmp_path / "run"), snapshot)
    with pytest.raises(UserError, match=r"train\.weights: sha256 [0-9a-f]{12} -> None"):
        check_snapshot(load("fp16"), snapshot)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (json.dumps({"file": "best.pt", "sha256": 64 * "a"}), {"file": "best.pt", "sha256": 64 * "a"}),
        (None, None),
        ("random", None),
        (json.dumps({"file": "best.pt"}), None),
        (json.dumps({"file": "best.pt", "sha256": "x"}), None),
        (json.dumps({"file": "../a\u202e", "sha256": 64 * "a"}), None),
        (json.dumps({"file": "a\u202e", "sha256": 64 * "a"}), {"file": "a\\u202e", "sha256": 64 * "a"}),
    ],
)
def test_the_start_of_a_file_is_read_from_its_metadata(value: str | None, known: dict[str, str] | None) -> None:
    """An ONNX file may come from anybody."""
    assert start_of({} if value is None else {"start": value}) == known
