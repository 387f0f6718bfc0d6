"""Files and folders that are written atomically: to a temporary name, which is then renamed. JSON files and hashes."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.core.errors import UserError
from app.core.shapes import Shape, misfits

ABANDONED_S = 2 * 24 * 3600.0
NOT_EMPTY_ERRNOS = (errno.ENOTEMPTY, errno.EEXIST)  # a rename to a folder that is not empty; POSIX allows both
NO_LINK_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of a symbolic link on exFAT, and on CIFS
# A folder cannot be flushed on CIFS, FUSE and exFAT.
NO_SYNC_ERRNOS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EISDIR)


def write_atomic(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to disk, then renames it over `path`.

    After a crash or a full disk the old file is unchanged; only kill -9 leaves the temporary file behind. With
    `previous` the file that is replaced is kept under that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        flush(part)
        if previous and path.exists():
            keep(path, previous)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _flush_names(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False, alone: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which the block fills; after the block it is renamed to `path`.

    So `path` is never half-filled. If another process has created it in the meantime, that folder is kept; `replace`
    replaces an older one. `alone`: the caller holds a lock, so what is half-filled is of a killed process, and goes.
    """
    mark = f".{path.name}" if alone else f".{path.name}.{os.getpid()}"
    part, old = path.with_name(f"{mark}.part"), path.with_name(f"{mark}.old")
    for folder in (part, old, *_left_behind(path)):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if replace:
            with contextlib.suppress(FileNotFoundError):
                path.rename(old)
        try:
            part.rename(path)
        except OSError as error:
            if error.errno not in NOT_EMPTY_ERRNOS:
                raise
    finally:
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)


def _left_behind(path: Path) -> list[Path]:
    """Half-filled folders for `path` of processes that were killed: no process works on one for so long."""
    newest = time.time() - ABANDONED_S
    name = glob.escape(path.name)
    folders = []
    for folder in [*path.parent.glob(f".{name}.*.part"), *path.parent.glob(f".{name}.*.old")]:
        with contextlib.suppress(FileNotFoundError):  # another process has cleared it away
            if folder.is_dir() and folder.stat().st_mtime < newest:
                folders.append(folder)
    return folders


def flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_names(folder: Path) -> None:
    """Makes new names in a folder survive a power failure, where the file system can."""
    try:
        flush(folder)
    except OSError as error:
        if error.errno not in NO_SYNC_ERRNOS:
            raise


def keep(path: Path, second: Path) -> None:
    """Gives a file a second name by a hard link, or by a copy if the file system has no hard links."""
    part = second.with_name(f".{second.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            part.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, part)
        part.replace(second)
    finally:
        part.unlink(missing_ok=True)  # rename does nothing if both names are links to the same file


def make_link(path: Path, target: Path) -> None:
    """Makes a symbolic link; raises a UserError where the file system of the runs has none."""
    try:
        path.symlink_to(target)
    except OSError as error:
        if error.errno not in NO_LINK_ERRNOS:
            raise
        raise UserError(f"{path}: its file system has no symbolic links: put runs/ on another disk") from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path, made_by: str, shape: Shape | None = None) -> Any:
    """Reads a JSON file of the run root, which anybody may have written; `made_by` is the make target that writes it.

    Raises a UserError if the file is missing, is not JSON, or has another shape (None: any will do).
    """
    again = f"delete it and run 'make {made_by}' again"
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(tree, ensure_ascii=False).encode()  # half a character cannot be written into any page
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: run 'make {made_by}' first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {again}") from error
    if faults := shape and misfits(tree, shape):
        raise UserError(f"{path} is not what 'make {made_by}' writes ({'; '.join(faults)}): {again}")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def printable(text: object) -> str:
    """Text without control characters, line breaks and marks that turn its direction: each as its escape, \\x1b."""
    shown = [char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)]
    return "".join(shown)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
