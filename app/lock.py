"""One process at a time writes to a run root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from app.config import UserError
from app.run import RunRoot, utc_now


@contextlib.contextmanager
def hold(run: RunRoot, stage: str) -> Iterator[None]:
    """Holds the run root for this process, and clears it of what a killed process left half-written.

    The lock is POSIX's: it belongs to the process alone, not to its loader processes, and the kernel takes it away when
    the process dies, however that happens. It lies in the shared cache, so that a refused input leaves no run root.

    Raises:
        UserError: another process holds it; the message names that.
    """
    path = run.cache_dir / "locks" / run.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"{run.root} is in use by {file.read().strip()}: let it end, or take another RUN=name"
            ) from error
        file.truncate(0)
        file.write(f"'{stage}' (process {os.getpid()} on {socket.gethostname()}, since {utc_now()})\n")
        file.flush()
        for part in run.root.rglob(".*.part"):
            part.unlink()
        yield
