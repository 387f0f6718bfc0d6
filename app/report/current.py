"""Whether the page of a run is as new as what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.coco.dataset import source_at
from app.core.config import Report, UserError
from app.core.environment import REPO_DIR
from app.core.files import read_json
from app.core.run import PROVENANCE_SHAPE, RECORD_SHAPE, RunRoot
from app.report.spread import ROWS

APART = ("run.json",)  # the record itself, which has what `state` gives


def is_current(run: RunRoot, settings: Report) -> bool:
    """Whether nothing has changed since the report stage wrote the page: no file of the run, the page included, no
    setting, not the annotations of the val split, and not this program."""
    if not run.run_json.exists():
        return False
    recorded = read_json(run.run_json, "data", RECORD_SHAPE)["stages"].get("report", {})
    return recorded.get("state") == state(run, settings)


def state(run: RunRoot, settings: Report) -> str:
    """SHA-256 (16 hex digits) over all that a page depends on; files of the run count by name, size and time."""
    files = sorted(path for path in run.root.rglob("*") if path.is_file() and path.name not in APART)
    parts: list[Any] = [settings.model_dump(mode="json"), program(), list(stamps([*files, *val_annotations(run)]))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def program() -> str:
    """SHA-256 over the source of this program, the versions of its packages and the spread of seeds that it knows."""
    digest = hashlib.sha256()
    for path in [*sorted((REPO_DIR / "app").rglob("*.py")), REPO_DIR / "requirements.lock", ROWS]:
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def stamps(paths: Iterable[Path]) -> Iterable[tuple[str, int, int]]:
    """Name, size in bytes and time of the last change in ns of every file."""
    for path in paths:
        status = path.stat()
        yield str(path), status.st_size, status.st_mtime_ns


def val_annotations(run: RunRoot) -> list[Path]:
    """The annotations of the val split, where they are on this machine: without them a page has fewer figures."""
    try:
        provenance = read_json(run.provenance, "data", PROVENANCE_SHAPE)
    except UserError:
        return []
    split = provenance["splits"]["val"]
    path = source_at(Path(provenance["coco_dir"]), split["name"], split).annotation_file
    return [path] if path.is_file() else []
