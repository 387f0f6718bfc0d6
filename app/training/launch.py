"""One process a device: the train stage started again, once for each, by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

log = logging.getLogger(__name__)


def launch(n: int, arguments: list[str]) -> int:
    """Runs `python -m app` with these arguments in n processes of this machine and waits for them.

    When one fails, the launcher stops the others: TERM, KILL after 30 s. SIGINT and SIGTERM are passed on.

    Returns:
        exit code: 0; that of the process that failed; or 128 + signal after a signal of ours.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):  # say all of it in tables
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # a container without a network cannot look itself up
        os.environ.setdefault(name, "lo")
    with tempfile.TemporaryDirectory(prefix="launch-") as log_dir:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=n, max_restarts=0, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", signals_to_handle="SIGTERM,SIGINT",
            logs_specs=DefaultLogsSpecs(log_dir, redirects=Std.OUT),  # gloo's chatter; our lines go to stderr
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "app", *arguments)
        except SignalException as stop:
            return 128 + stop.sigval
        except ChildFailedError as error:
            return _explain(error, n)
    return 0


def _explain(error: ChildFailedError, n: int) -> int:
    """Says which process failed first, unless it has said so itself; returns its exit code."""
    failures: list[ProcessFailure] = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
    killed = [failure for failure in failures if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
    first = (killed or failures)[0]
    if first.exitcode < 0:
        log.error(
            "process %d of %d was killed by %s (short of memory?), the others were stopped: the same command goes on "
            "from the last checkpoint",
            first.local_rank + 1, n, signal.Signals(-first.exitcode).name,
        )  # fmt: skip
        return 1
    return first.exitcode
