"""Is the machine fit for training? Device, GPU architecture and shared memory, checked before the GPU is taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from app.config import Config, UserError

PREFETCH_BATCHES = 4  # batches each loader process keeps ahead (ultralytics/data/build.py build_dataloader, 8.4.190)


def check_device(config: Config) -> str:
    """Resolves train.device for Ultralytics: 'cpu' or the index of a GPU.

    Raises:
        UserError: no such GPU, a GPU that this torch build has no kernels for, or too little shared memory.
    """
    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    index = 0 if wanted == "auto" else int(wanted)
    n_gpus = torch.cuda.device_count()
    if index >= n_gpus:
        raise UserError(
            f"train.device={wanted}: torch sees {n_gpus} GPU(s); choose another, or cpu; in Docker use ACCEL=gpu"
        )
    archs = (torch._C._cuda_getArchFlags() or "").split()  # torch.cuda.get_arch_list() is empty without a GPU
    check_arch(torch.cuda.get_device_capability(index), archs, torch.__version__)
    check_shared_memory(config, Path("/dev/shm"))  # noqa: S108 - this is the folder that torch's loader uses
    return str(index)


def check_arch(capability: tuple[int, int], archs: list[str], torch_version: str) -> None:
    """A CUDA binary of major version X runs on X.y with y at least its own minor; PTX of any older one compiles."""
    major, minor = capability
    binaries = [arch.removeprefix("sm_") for arch in archs if arch.startswith("sm_")]
    runs = any(int(arch[:-1]) == major and int(arch[-1]) <= minor for arch in binaries if arch.isdigit())
    has_ptx = any(arch.startswith("compute_") for arch in archs)
    if not runs and not has_ptx:
        raise UserError(
            f"this GPU is sm_{major}{minor}, but torch {torch_version} holds only {' '.join(archs)}: "
            "rebuild the image with a torch that lists it (README, 'GPU architectures')"
        )


def check_shared_memory(config: Config, shm_dir: Path) -> None:
    """Loader processes hand batches over through shared memory; too little of it kills them with a bus error."""
    t = config.train
    need = t.workers * PREFETCH_BATCHES * t.batch * 3 * t.imgsz**2
    total = shutil.disk_usage(shm_dir).total if shm_dir.exists() else need
    if total < need:
        raise UserError(
            f"shared memory {shm_dir}: {total / 2**30:.1f} GiB, {t.workers} loader processes need {need / 2**30:.1f}: "
            "start the container with SHM_SIZE=16g, or lower train.workers"
        )
