"""The processes of one training, one a device: how they are started, who they are, and their collectives."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from app.core.config import Config, UserError
from app.train.guard import GuardStop
from app.train.interrupt import Interrupted, PeerLost


def explain(error: RuntimeError, config: Config) -> None:
    """Returns where `error` is none of these.

    Raises:
        PeerLost: another process of this training has gone.
        UserError: too little GPU memory, or a loader process that died or hangs.
    """
    explain_lost_peer(error)
    t = config.train
    if isinstance(error, torch.OutOfMemoryError):
        raise UserError(
            f"train.batch={t.batch} at {t.imgsz} px does not fit in GPU memory: set train.batch={t.batch // 2}; "
            f"gradients still accumulate to {config.hyp.nbs} images a step"
        ) from error
    if str(error).startswith("DataLoader"):  # not one that only passes on an error of our own
        raise UserError(
            f"a loader process died or hangs ({str(error).splitlines()[0]}): memory or shared memory may be short; "
            "lower train.workers, or start the container with a larger SHM_SIZE"
        ) from error


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


T = TypeVar("T")
AGREED = (GuardStop, Interrupted)  # raised by all processes at the same step
STEP_WAIT_S = 660.0  # for another process within a step: a little more than a batch may take to load (loader.py)
LONG_WAIT_S = 7200.0  # for the first process: it prepares the data, and validates alone


@dataclass(frozen=True)
class Ranks:
    """This process among `n`; `local` counts on this machine. Alone, every word returns at once.

    Words are spoken by all processes in the same order. Small ones go over TCP (gloo): no wait for the GPU, and a
    process that has died is noticed at once.
    """

    rank: int = 0
    n: int = 1
    local: int = 0
    n_local: int = 1
    control: Any = None
    parent: int = 0

    @property
    def is_first(self) -> bool:
        """The one that writes files and log, and validates."""
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher has died: nobody would stop the others, or start them again."""
        return self.n > 1 and os.getppid() != self.parent

    def most(self, values: list[int]) -> list[int]:
        """The largest of every value over all processes."""
        if self.n == 1:
            return values
        tensor = torch.tensor(values)
        with _peers():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def wait(self) -> None:
        """For all processes, LONG_WAIT_S at most."""
        if self.n > 1:
            with _peers():
                dist.monitored_barrier(self.control, timeout=timedelta(seconds=LONG_WAIT_S))

    def share(self, value: T) -> T:
        """The first process's value, plain and small; the others wait for it, as in `wait`."""
        if self.n == 1:
            return value
        values = [value]
        self.wait()
        with _peers():
            dist.broadcast_object_list(values, group=self.control, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, plain and small, by rank."""
        values = [value] * self.n
        if self.n > 1:
            with _peers():
                dist.all_gather_object(values, value, group=self.control)
        return values

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place, on the tensor's own device; does not wait for a GPU."""
        if self.n > 1:
            dist.all_reduce(tensor)
        return tensor

    def parallel(self, model: nn.Module, may_skip_parameters: bool) -> nn.Module:
        """DistributedDataParallel around a model that lies on its device.

        Buffers stay each process's own, as in Ultralytics: a training forward does not read BatchNorm's statistics.
        """
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=may_skip_parameters,
        )


ALONE = Ranks()


def is_launched() -> bool:
    """Whether torchrun, or app/train/processes.py, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextlib.contextmanager
def joined(devices: list[str]) -> Iterator[Ranks]:
    """Meets the other processes that torchrun has started, and leaves together with them; alone otherwise.

    Args:
        devices: of the processes on this machine: GPU numbers (they speak over NCCL), or 'cpu' (gloo).

    Raises:
        PeerLost: another process does not come, ends early or hangs.
    """
    if not is_launched():
        yield ALONE
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, n, local, n_local = (int(os.environ[name]) for name in names)
    on_gpus = "cpu" not in devices
    if on_gpus and local < len(devices):  # NCCL's first word goes over the current GPU; train() refuses one too many
        torch.cuda.set_device(int(devices[local]))
    with _peers():
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(seconds=STEP_WAIT_S))
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=STEP_WAIT_S))
    ranks = Ranks(rank, n, local, n_local, control, os.getppid())
    try:
        yield ranks
    except AGREED:
        ranks.wait()  # a launcher stops all when one has ended: the first must have saved
        raise
    # No collective operation here: gloo's threads let go of its tensors later, and end a Python that has ended first.
    ranks.wait()
    dist.destroy_process_group()


def explain_lost_peer(error: RuntimeError) -> None:
    """Raises PeerLost if it is what a collective operation says when a process has gone."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        first_line = str(error).strip().splitlines()[0]
        raise PeerLost(
            f"another process of this training has ended or hangs ({first_line}); the same command goes on from the "
            "last checkpoint"
        ) from error


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        explain_lost_peer(error)
        raise
