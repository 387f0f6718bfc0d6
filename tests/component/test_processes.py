"""What the processes of a training tell each other: on this machine's loopback, and never as pickles."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from app.train import processes
from app.train.processes import Ranks, _as_bytes, _padded, _store_on_loopback


def test_the_store_of_the_launcher_listens_on_the_loopback_alone() -> None:
    before = listening()
    store = _store_on_loopback()
    addresses = listening() - before
    assert addresses == {("127.0.0.1", store.port)}
    store.set("a", "b")
    assert store.get("a") == b"b"


def listening() -> set[tuple[str, int]]:
    """Addresses on which this process waits for connections."""
    connections = psutil.Process(os.getpid()).net_connections(kind="inet")
    return {(entry.laddr.ip, entry.laddr.port) for entry in connections if entry.status == psutil.CONN_LISTEN}


VALUES = [({"AP/raw": 0.1234567890123456, "x": float("nan")}, 0), (None, 15), True, ["batch 3 of 8", "the images"]]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_arrive_as_json(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    sent = list(_as_bytes(value))

    def receive(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        tensor.copy_(torch.tensor([len(sent)] if tensor.dtype == torch.int64 else sent))

    monkeypatch.setattr(dist, "broadcast", receive)
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    received = Ranks(rank=1, n=2).broadcast(None)
    assert _as_bytes(received) == _as_bytes(value)


def test_objects_with_code_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match="JSON"):
        _as_bytes(processes.Ranks())


def test_shorter_values_are_filled_up() -> None:
    assert bytes(_padded(b"[1]", 6).tolist()) == b"[1]   "
