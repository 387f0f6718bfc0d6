"""BatchNorm re-estimation against statistics worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from app.quant.batchnorm import reestimate_batchnorm


def small_net() -> Any:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03), nn.Dropout(0.5))
    net[1].running_mean.fill_(100.0)
    return net.eval()


def test_statistics_are_the_mean_over_batches() -> None:
    net = small_net()
    batches = [torch.rand(5, 3, 8, 8) + i for i in range(3)]
    with torch.no_grad():
        outputs = [net[0](batch) for batch in batches]
    means = torch.stack([out.mean(dim=(0, 2, 3)) for out in outputs]).mean(0)
    variances = torch.stack([out.var(dim=(0, 2, 3)) for out in outputs]).mean(0)
    assert reestimate_batchnorm(net, iter(batches)) == 3
    torch.testing.assert_close(net[1].running_mean, means)
    torch.testing.assert_close(net[1].running_var, variances)


def test_statistics_equal_pytorchs_cumulative_average_to_the_last_bit() -> None:
    net, reference = small_net(), small_net()
    reference.load_state_dict(net.state_dict())
    batches = [torch.rand(5, 3, 8, 8) + i for i in range(7)]
    reestimate_batchnorm(net, batches)
    norm = reference[1].train()
    norm.reset_running_stats()
    norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    for name, value in reference.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_nothing_but_the_statistics_changes() -> None:
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    reestimate_batchnorm(net, [torch.rand(2, 3, 8, 8)])
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert net[1].momentum == 0.03
    assert not any(layer.training for layer in net.modules())


def test_no_batches_change_nothing() -> None:
    net = small_net()
    assert reestimate_batchnorm(net, []) == 0
    assert (net[1].running_mean == 100.0).all()
