"""Where the weights of a training come from: random numbers, or a checkpoint that train.weights names.

What tells two starts apart is the SHA-256 of the file, whatever its name and place.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.core.errors import UserError
from app.core.files import sha256
from app.core.mounts import only_seen
from app.core.shapes import model_at, value_at
from app.core.yaml_files import merge, read_yaml

WEIGHTS = "train.weights"
RANDOM = "from random weights"
LFS_POINTER = b"version https://git-lfs"  # how the text begins that stands for a file which git lfs has not fetched
SHOWN_DIGITS = 12  # of a hash in a sentence; configuration and JSON have all 64
log = logging.getLogger(__name__)


def check_path(value: Any) -> Any:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("give the path of a folder")
    return value


def path_or_none(value: Any) -> Any:
    """The word null means no file, from --set too."""
    return None if value == "null" else check_path(value)


class Start(BaseModel):
    """A checkpoint to start from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Annotated[str, BeforeValidator(check_path)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    def __str__(self) -> str:
        return told(self.facts)

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def facts(self) -> dict[str, str]:
        """For run.json, done.json and the record of an ONNX file."""
        return {"file": self.name, "sha256": self.sha256}


def told(facts: dict[str, str] | None) -> str:
    """'from best.pt, sha256 0123456789ab', or 'from random weights' for None."""
    if facts is None:
        return RANDOM
    return f"from {facts['file']}, sha256 {facts['sha256'][:SHOWN_DIGITS]}"


def find_start(value: Any) -> Any:
    """The value of train.weights as it is written -> the start; one that is spelled out is left as it is.

    Raises:
        ValueError: there is no such file, or it is the pointer of git lfs.
    """
    if isinstance(value, dict | Start) or path_or_none(value) is None:
        return None if value == "null" else value
    try:
        return of_file(Path(value))
    except (UserError, TypeError) as error:
        raise ValueError(str(error)) from error


def of_file(path: Path) -> Start:
    """The start that a file is; raises a UserError if there is no such file, or if it is the pointer of git lfs."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}{only_seen()}: name a checkpoint such as best.pt")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is the pointer of git lfs and not the checkpoint: fetch it with 'git lfs pull'")
    return Start(path=str(path), sha256=sha256(path))


def start_in(tree: dict[str, Any]) -> Start | None:
    """The start of a dumped configuration; None for random weights, and where it is not spelled out."""
    return model_at(tree, WEIGHTS, Start)


def with_known_start(tree: dict[str, Any], run_root: Path | None) -> dict[str, Any]:
    """The tree of a configuration; a checkpoint that is gone stands there as the run's trainings have recorded it.

    A training that has begun does not need it again.
    """
    file = value_at(tree, WEIGHTS)
    if run_root is None or not isinstance(file, str) or Path(file).exists():
        return tree
    for snapshot in sorted(run_root.glob("*/config.yaml")):
        known = start_in(read_yaml(snapshot))
        if known and known.name == Path(file).name:
            log.warning("%s does not exist: what was started %s goes on from its own checkpoint", file, known)
            return merge(tree, {"train": {"weights": known.model_dump()}})
    return tree
