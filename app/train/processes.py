"""The processes of one training, one a device: the launcher, the process group, and its collectives."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from app.core.answers import SIGNALS
from app.core.child import PROGRAM, signal_name, signals_passed_on
from app.core.environment import launched_as
from app.train.guard import GuardStop
from app.train.interrupt import Interrupt, Interrupted, PeerLost

T = TypeVar("T")
RAISED_BY_ALL = (GuardStop, Interrupted)  # all ranks raise these at the same step
STEP_TIMEOUT_S = 660.0  # of a collective within a step: a little more than a batch may take to load (loader.py)
LONG_TIMEOUT_S = 7200.0  # of a wait for rank 0, which prepares the data and validates alone
POLL_S = 0.1  # between two looks at the ranks
PEERS_S = 10.0  # in which the other ranks of one that has ended may end by themselves
STOP_S = 30.0  # between the TERM to a rank that goes on all the same, and the KILL
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among `n`, and the collectives of all of them. `local` and `n_local` count on this machine.

    With one process each collective returns at once. All ranks must call them in the same order. Those of small values
    use gloo over TCP: they do not wait for the GPU, and notice at once when a process has died.
    """

    rank: int = 0
    n: int = 1
    local: int = 0
    n_local: int = 1
    control: Any = None
    parent: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and log, and validates."""
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher has died. Nobody would stop the other processes then, or start them again."""
        return self.n > 1 and os.getppid() != self.parent

    def maximum(self, values: list[int]) -> list[int]:
        """The largest of every value over all ranks."""
        if self.n == 1:
            return values
        tensor = torch.tensor(values)
        with _lost_peers_explained():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def barrier(self) -> None:
        """Waits for all ranks, LONG_TIMEOUT_S at most."""
        if self.n > 1:
            with _lost_peers_explained():
                dist.monitored_barrier(self.control, timeout=timedelta(seconds=LONG_TIMEOUT_S))

    def broadcast(self, value: T) -> T:
        """The value of rank 0, as JSON knows it and small. The other ranks wait for it as `barrier` does."""
        if self.n == 1:
            return value
        text = _as_bytes(value) if self.is_main else b""
        self.barrier()
        with _lost_peers_explained():
            size = torch.tensor([len(text)])
            dist.broadcast(size, 0, group=self.control)
            content = _padded(text, int(size))
            dist.broadcast(content, 0, group=self.control)
        return value if self.is_main else json.loads(bytes(content.tolist()))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, as JSON knows them and small, in the order of the ranks."""
        if self.n == 1:
            return [value]
        text = _as_bytes(value)
        size = max(self.maximum([len(text)]))
        contents = [_padded(b"", size) for _ in range(self.n)]
        with _lost_peers_explained():
            dist.all_gather(contents, _padded(text, size), group=self.control)
        return [json.loads(bytes(content.tolist())) for content in contents]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place, on the tensor's own device; does not wait for a GPU."""
        if self.n > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_together(self, tensors: list[torch.Tensor]) -> None:
        """Sum over all ranks of each tensor, in place, as one collective. All ranks give tensors of the same shapes."""
        if self.n == 1 or not tensors:
            return
        flat = self.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def share(self, model: nn.Module) -> None:
        """Gives the model of every rank the parameters and buffers of rank 0's."""
        if self.n > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


ALONE = Ranks()


def on_main(ranks: Ranks, interrupt: Interrupt, save: Callable[[], None], work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and broadcasts its result; a signal during it saves at once and ends all ranks."""

    def save_and_end_all() -> None:
        save()
        ranks.broadcast((None, interrupt.signal))

    result = None
    if ranks.is_main:
        with interrupt.at_once(save_and_end_all):
            result = work()
    result, signal_number = ranks.broadcast((result, 0))
    if signal_number:
        raise Interrupted(signal_number)
    return cast(T, result)


def _as_bytes(value: Any) -> bytes:
    """JSON and no pickle: what arrives from the network must not be able to run code."""
    return json.dumps(value).encode()


def _padded(text: bytes, size: int) -> torch.Tensor:
    """The bytes as uint8 [size], with blanks behind them, which JSON ignores."""
    return torch.tensor(list(text.ljust(size)), dtype=torch.uint8)


@contextlib.contextmanager
def process_group(devices: list[str]) -> Iterator[Ranks]:
    """Joins the process group of torchrun's processes, and leaves the group together with them; else yields ALONE.

    Args:
        devices: of the processes on this machine: GPU numbers (collectives use NCCL), or 'cpu' (gloo).

    Raises:
        PeerLost: another process does not come, ends early or hangs.
    """
    launched = launched_as()
    if launched is None:
        yield ALONE
        return
    rank, n, local, n_local = launched
    on_gpus = "cpu" not in devices
    if on_gpus and local < len(devices):  # NCCL begins on the current GPU; train() refuses one process too many
        torch.cuda.set_device(int(devices[local]))
    timeout = timedelta(seconds=STEP_TIMEOUT_S)
    with _lost_peers_explained():
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    ranks = Ranks(rank, n, local, n_local, control, os.getppid())
    try:
        yield ranks
    except RAISED_BY_ALL:
        ranks.barrier()  # a launcher stops all processes when one has ended: rank 0 must have saved
        raise
    # A barrier and no collective of tensors: gloo's threads release tensors later, and crash a Python that has ended.
    ranks.barrier()
    dist.destroy_process_group()


def _store_on_loopback() -> TCPStore:
    """The store in which the processes of `launch` find each other. By itself torch's listens on all addresses."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def explain_lost_peer(error: RuntimeError) -> None:
    """Raises PeerLost if `error` is what a collective raises when another process has gone."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        first_line = str(error).strip().splitlines()[0]
        raise PeerLost(
            f"another process of this training has ended or hangs ({first_line}); the same command goes on from the "
            "last checkpoint"
        ) from error


@contextlib.contextmanager
def _lost_peers_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        explain_lost_peer(error)
        raise


def launch(n: int, arguments: list[str]) -> int:
    """Runs `python -m app` with these arguments in n processes of this machine and waits for them.

    Signals are passed on to all ranks, once each, and the ranks decide what to save, however long that takes. torchrun
    would kill them after 30 s (PContext.close, torch 2.10). When one rank fails, the launcher stops the others.

    Returns:
        exit code: 0, or that of the rank that failed.
    """
    store = _store_on_loopback()  # it lives as long as this process
    ranks = [_start(rank, n, store.port, arguments) for rank in range(n)]
    with signals_passed_on(*ranks):
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(POLL_S)
        _wait(ranks, PEERS_S)
        codes = [rank.poll() or 0 for rank in ranks]  # a rank that is stopped below has not failed
        for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
            for rank in ranks:
                stop(rank)
            _wait(ranks, STOP_S)
    return _exit_code(codes)


def _start(rank: int, n: int, port: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    """A rank with torchrun's variables. It uses the loopback: a container without a network cannot look itself up."""
    variables = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    return subprocess.Popen(
        [sys.executable, *PROGRAM, *arguments],
        env={**defaults, **os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.DEVNULL,  # gloo writes to stdout, we to stderr
        start_new_session=True,  # else a terminal's Ctrl-C would reach it a second time
    )


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Waits until all ranks have ended, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(deadline - time.monotonic(), 0))


def _exit_code(codes: list[int]) -> int:
    """Exit code of the launcher: the largest one, as a rank ends with 1 because another one has ended (PeerLost).

    If a signal killed a rank, it is 1, and a line says which one.
    """
    for rank, code in enumerate(codes):
        if code < 0 and -code not in SIGNALS:
            log.error(
                "process %d of %d was killed by %s, the others were stopped: the same command goes on from the last "
                "checkpoint", rank + 1, len(codes), signal_name(-code),
            )  # fmt: skip
            return 1
    return max(128 - code if code < 0 else code for code in codes)
