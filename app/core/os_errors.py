"""What the operating system refuses, as one line with the remedy: permission, full disk, missing file, dead mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from app.core.errors import UserError
from app.core.mounts import in_container, only_seen

log = logging.getLogger(__name__)
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: ulimit -f, or a file system of small files
HELD_ERRNOS = (errno.EAGAIN, errno.EACCES)  # another process holds the lock; POSIX allows both
NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EPERM, errno.ESTALE)
DENIED_ERRNOS = (errno.EACCES, errno.EPERM)
UNSEEN_ERRNOS = (errno.ENOENT, errno.EROFS)  # in a container also of what lies elsewhere outside
OTHER_PATH = "give another path"
NOT_READY = "check the disk or mount it again; then the same command goes on"
# What is said of the path, and the remedy.
REMEDIES = {
    errno.EROFS: f"is on a read-only file system: mount it writable, or {OTHER_PATH} (--runs-dir, --out, --to)",
    errno.ENOENT: f"is missing: put it back, or {OTHER_PATH}",
    errno.ENOTDIR: f"leads through a file where a folder is needed: move that file away, or {OTHER_PATH}",
    errno.EISDIR: f"is a folder where a file is needed: move it away, or {OTHER_PATH}",
    errno.EEXIST: f"is there already and is not a folder: move it away, or {OTHER_PATH}",
    errno.ENOTEMPTY: "is a folder that another process writes to: end that process",
    errno.ENAMETOOLONG: "has a longer name than the file system takes: choose a shorter one",
    errno.ELOOP: "is a link that leads back to itself: make the link anew",
    errno.EINVAL: "has a name, or is used in a way, that its file system does not know: use a folder on another disk",
    errno.ENOTSUP: "needs what its file system does not have (links or locks): use a folder on another disk",
    errno.EXDEV: f"reaches from one disk to another: {OTHER_PATH}",
    **dict.fromkeys((errno.ENXIO, errno.ENODEV), f"is not a regular file: {OTHER_PATH}"),
    errno.ESTALE: f"is on a network file system that has lost it: {NOT_READY}",
    errno.EIO: f"cannot be read or written, its disk fails: {NOT_READY}",
    **dict.fromkeys((errno.ENOTCONN, errno.EHOSTDOWN), f"is on a mount that is gone: {NOT_READY}"),
    errno.EREMOTEIO: f"is on a mount that fails: {NOT_READY}",
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "is in use by another process: end that process"),
    errno.EMFILE: "cannot be opened, too many files are open: raise the limit (ulimit -n), or lower train.workers",
    errno.ENFILE: "cannot be opened, too many files are open on this machine: end other processes",
    errno.ENOMEM: "cannot be used, memory is short: end other processes, or lower train.batch and train.workers",
}


@contextlib.contextmanager
def explain_os_errors(folder: Path, need: str) -> Iterator[None]:
    """Turns an error of the operating system inside the block into a UserError that names path and remedy.

    The block writes to `folder`; `need` says what to do when no space is left in it.
    """
    try:
        yield
    except OSError as error:
        line = explanation(error, folder, need)
        if line is None:
            raise
        raise UserError(line) from error


def lock(file: IO[Any], take: Callable[[IO[Any], int], object] = fcntl.lockf) -> bool:
    """Takes a lock that ends with the process; False, with a warning, where the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_ERRNOS:
            raise BlockingIOError(*error.args) from error
        if error.errno not in NO_LOCK_ERRNOS:
            raise
        log.warning("%s: its file system has no locks; see to it that no other process works there", file.name)
        return False
    return True


@contextlib.contextmanager
def only_one(folder: Path, work: str) -> Iterator[None]:
    """Makes the folder and locks it, because two processes would write to the same files; `work` is a noun: download.

    Raises a UserError if another process holds the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW: a link that somebody has put there leads to a file that is not ours.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.fdopen(os.open(folder / f".{work}.lock", flags, 0o644), "w")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): give a folder of yours with --to DIR") from error
    with file:
        try:
            lock(file, fcntl.flock)
        except BlockingIOError as error:
            raise UserError(f"another {work} into {folder} is running: let it finish, or stop it") from error
        yield


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(_nearest(folder.resolve())).free


def explanation(error: OSError, folder: Path, need: str) -> str | None:
    """One line for the user; None where the error names neither a file nor a reason that its user can mend."""
    if error.errno in FULL_DISK_ERRNOS:
        return f"no space left in {folder} ({_room(folder)}): {need}"
    path = _path_of(error)
    if path is None:
        return None
    if error.errno in DENIED_ERRNOS:
        return _denied(path)
    remedy = REMEDIES.get(error.errno or 0)
    seen = only_seen() if error.errno in UNSEEN_ERRNOS else ""
    return f"{path} {remedy}{seen}" if remedy else None


def _path_of(error: OSError) -> Path | None:
    """The file that the error is about; of a rename or a link, whose source was just made, the target."""
    name = error.filename2 or error.filename
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes | Path) else None


def _room(folder: Path) -> str:
    disk = os.statvfs(_nearest(folder))
    free = f"{disk.f_bavail * disk.f_frsize / 2**20:,.0f} MiB free"
    no_inodes = disk.f_files > 0 and disk.f_favail == 0
    return f"{free}, but it takes no more files" if no_inodes else free


def _denied(path: Path) -> str:
    """Who may not do what: the file itself may be closed, or the folder that it is to be made in."""
    uid = os.getuid()
    if _exists(path) and not os.access(path, os.R_OK):
        return f"{path} may not be read by this user (uid {uid}): {_permission_remedy(path)}"
    place = path if path.is_file() and not os.access(path, os.W_OK) else _nearest(path.parent)
    return f"{path} may not be written by this user (uid {uid}): {_permission_remedy(place)}"


def _permission_remedy(place: Path) -> str:
    owner, group = place.stat().st_uid, place.stat().st_gid
    if owner != os.getuid() and in_container():
        return (
            f"{place} belongs to uid {owner}; run as that user (export APP_UID={owner} APP_GID={group}; make does it), "
            f"or make it yours (sudo chown -R {os.getuid()} {place})"
        )
    if owner != os.getuid():
        return f"{place} belongs to uid {owner}; make it yours (sudo chown -R {os.getuid()} {place}), or {OTHER_PATH}"
    return (
        f"change the permissions of {place} (chmod u+rwX) or {OTHER_PATH}; in a container SELinux needs :z at the mount"
    )


def _nearest(path: Path) -> Path:
    """The path itself or, where it is not there or hidden, the first folder above it that can be seen."""
    while not _exists(path) and path != path.parent:
        path = path.parent
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no permission to look, or a dead mount
        return False
