"""Checks before a training takes the GPU; a stand-in for torch.cuda's answers, no GPU needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.core.config import UserError, load
from app.train import device
from app.train.processes import Ranks
from app.train.trainer import Trainer
from tests.support.settle import settle

CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # what torch 2.10.0+cu128 lists


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, n_gpus: int, capability: tuple[int, int] = (12, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: " ".join(CU128))


def pretend_shared_memory(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=int(gib * 2**30)))


@pytest.mark.parametrize(
    ("wanted", "n_gpus", "expected"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 1, ["0"]),
        ("auto", 4, ["0", "1", "2", "3"]),  # all that make's GPUS=4 shows
        ("cpu", 1, ["cpu"]),
        ("cpu,cpu", 1, ["cpu", "cpu"]),
        ("1", 2, ["1"]),
        ("2,0", 3, ["2", "0"]),
    ],
)
def test_device_is_resolved(monkeypatch: pytest.MonkeyPatch, wanted: str, n_gpus: int, expected: list[str]) -> None:
    pretend_gpus(monkeypatch, n_gpus)
    pretend_shared_memory(monkeypatch, gib=8)
    assert device.check_devices(load("fp16", sets=[f"train.device={wanted}"])) == expected


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, n_gpus=1)
    with pytest.raises(UserError, match=r"train.device=0,1: torch sees 1 GPU.*GPUS=n.*ACCEL=gpu"):
        device.check_devices(load("fp16", sets=["train.device=0,1"]))


def test_gpu_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, n_gpus=2)
    with pytest.raises(UserError, match=r"train.device=1,1 names a GPU twice"):
        device.check_devices(load("fp16", sets=["train.device=1,1"]))


def test_gpu_that_torch_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, n_gpus=1, capability=(6, 1))
    with pytest.raises(UserError, match=r"this GPU is sm_61, but torch \S+ holds only sm_70 .*rebuild the image"):
        device.check_devices(load("fp16"))


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, n_gpus=1)
    pretend_shared_memory(monkeypatch, gib=0.0625)  # Docker's default, 64 MiB
    with pytest.raises(UserError, match=r"shm: 0.1 GiB, 8 loader processes need 3.5: .*SHM_SIZE=4g"):
        device.check_devices(load("fp16"))


def test_a_training_on_the_cpu_takes_the_cores_it_may_use(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "threads", "fp16", {"data.n_train": 8, "data.n_val": 8})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5, 7, 9, 11})
    monkeypatch.setattr("app.core.environment.groups_above", lambda controller: [])
    before = torch.get_num_threads()
    try:
        assert Trainer(config, run, "cpu").facts()["torch_threads"] == 6
        assert Trainer(config, run, "cpu", Ranks(n=2, n_local=2)).facts()["torch_threads"] == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((12, 0), CU128, True),
        ((8, 9), CU128, True),  # sm_86 code runs on 8.9
        ((8, 7), ["sm_89"], False),  # code of a newer minor version does not
        ((9, 0), ["sm_80"], False),  # nor code of another major version
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX compiles for newer GPUs
        ((8, 6), ["sm_90", "compute_90"], False),  # not for older ones
        ((10, 3), ["sm_90a"], False),
        ((9, 0), [], False),  # a torch for the CPU
    ],
)
def test_architectures(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    if runs:
        device.check_arch(capability, archs, torch.__version__)
        return
    with pytest.raises(UserError, match=f"sm_{capability[0]}{capability[1]}"):
        device.check_arch(capability, archs, torch.__version__)


def test_smoke_fits_into_docker_default_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_shared_memory(monkeypatch, gib=0.0625)
    config = load("fp16", [Path(__file__).parents[2] / "conf" / "smoke.yaml"])
    device.check_shared_memory(config, tmp_path)
