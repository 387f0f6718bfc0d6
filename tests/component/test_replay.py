"""Forwards as CUDA graphs, as far as that goes without a GPU; the rest is in tests/gpu/test_replay_gpu.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph, whose replays do what the calls do."""
    monkeypatch.setattr(replay, "Replay", lambda work: work)


def test_reestimation_by_sums_equals_the_cumulative_average(calls: None) -> None:
    batches = [torch.rand(n, 3, 8, 8) * 3 + i for i, n in enumerate((5, 5, 5, 2))]
    ours, theirs = two_norms(), two_norms()
    assert reestimate_by_replay(ours, batches) == reestimate_batchnorm(theirs, batches) == 4
    for (name, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert [ours[i].momentum for i in (1, 4)] == [0.03, 0.1]  # pyright: ignore
    assert all(layer.training for layer in ours.modules())


def test_reestimation_on_no_images_changes_nothing(calls: None) -> None:
    net = two_norms()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert reestimate_by_replay(net, []) == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_cannot_be_captured_is_called_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    given = list[float]()
    replay_of = Replay(lambda tensor: given.append(float(tensor)))  # no CUDA graph on a CPU
    for i in range(4):
        replay_of(torch.tensor(float(i)))
    assert given == [0.0, 1.0, 2.0, 3.0]
    (line,) = [record.message for record in caplog.records if "train.graph" in record.message]
    assert "BatchNorm is re-estimated without (" in line
