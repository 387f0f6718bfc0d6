"""BatchNorm's re-estimation as a CUDA graph, without a GPU; tests/gpu/test_replay_gpu.py needs one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from app.core.config import UserError
from app.quant.batchnorm import reestimate_batchnorm
from app.train import replay
from app.train.replay import Replay, reestimate_by_replay


def two_norms() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03), nn.SiLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    )
    for norm in (net[1], net[4]):
        norm.running_mean.fill_(100.0)  # pyright: ignore
        norm.num_batches_tracked.fill_(7)  # pyright: ignore
    return net.train()


class Calls:
    """In the place of a Replay: each call is made, as a replay would compute the same."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __call__(self, given: torch.Tensor) -> None:
        self.work(given)

    def release(self) -> None:
        """There is no graph."""


def test_reestimation_by_sums_equals_the_cumulative_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "Replay", Calls)
    batches = [torch.rand(n, 3, 8, 8) * 3 + i for i, n in enumerate((5, 5, 5, 2))]
    ours, theirs = two_norms(), two_norms()
    assert reestimate_by_replay(ours, batches) == reestimate_batchnorm(theirs, batches) == 4
    for (name, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert [ours[i].momentum for i in (1, 4)] == [0.03, 0.1]  # pyright: ignore
    assert all(layer.training for layer in ours.modules())


def test_reestimation_on_no_images_changes_nothing() -> None:
    net = two_norms()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert reestimate_by_replay(net, []) == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to CUDA graphs of a GPU that is not there."""
    events = list[str]()

    class Capture:
        def __init__(self, graph: Any, **options: Any) -> None:
            assert options == {"capture_error_mode": "thread_local"}

        def __enter__(self) -> None:
            events.append("capture")

        def __exit__(self, *exc: object) -> None:
            events.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: events.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))
    return events


def test_after_another_shape_no_call_is_a_replay(graphs: list[str]) -> None:
    replay_of = Replay(lambda given: graphs.append(f"work {len(given)}"))
    for size in (3, 3, 3, 2, 3):
        replay_of(torch.zeros(size))
    replay_of.release()
    assert graphs == ["work 3", "capture", "work 3", "captured", "replay", "replay", "empty", "work 2", "work 3"]


def test_a_replay_reads_what_is_given(graphs: list[str]) -> None:
    replay_of = Replay(lambda given: None)
    for number in range(4):
        replay_of(torch.full((2,), float(number)))
        assert replay_of.given is not None
        assert replay_of.given.tolist() == [float(number)] * 2


def test_what_cannot_be_captured_says_how_to_go_on(graphs: list[str]) -> None:
    def work(given: torch.Tensor) -> None:
        if graphs:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    replay_of = Replay(work)
    replay_of(torch.zeros(2))
    with pytest.raises(UserError, match=r"\(operation not permitted when stream is capturing\): .*train.graph=false"):
        replay_of(torch.zeros(2))
