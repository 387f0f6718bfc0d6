"""Whether the machine can train: device, GPU architecture and shared memory, checked before the GPU is used."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from app.core.config import Config, UserError

# Each loader process of training keeps 4 batches ahead, each one of validation 2 of double size; both stay alive
# (ultralytics/data/build.py build_dataloader and engine/trainer.py, 8.4.190). Beside them those of
# BnImages keep 4 while they draw.
BATCHES_PER_WORKER = 4 + 2 * 2 + 4
NO_ROOM = ("out of memory", "ALLOC_FAILED")  # how CUDA, NCCL and cuBLAS say it, whose errors have no class of their own


def check_devices(config: Config) -> list[str]:
    """Resolves train.device: one name for each process of a training, 'cpu' or the index of a GPU for Ultralytics.

    Raises:
        UserError: no such GPU, a GPU that this torch build has no kernels for, or too little shared memory.
    """
    wanted, n_gpus = config.train.device, torch.cuda.device_count()
    if wanted == "auto":
        wanted = ",".join(map(str, range(n_gpus))) or "cpu"
    devices = wanted.split(",")
    gpus = [int(device) for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise UserError(f"train.device={wanted} names a GPU twice: one process trains on each")
    for index in gpus:
        if index >= n_gpus:
            raise UserError(
                f"train.device={wanted}: torch sees {n_gpus} GPU(s); choose another, or cpu; make shows a job GPUS=n "
                "of them (1), in Docker with ACCEL=gpu"
            )
        archs = (torch._C._cuda_getArchFlags() or "").split()  # torch.cuda.get_arch_list() is empty without a GPU
        check_arch(torch.cuda.get_device_capability(index), archs, torch.__version__)
    if gpus:
        check_shared_memory(config, Path("/dev/shm"))  # noqa: S108 - this is the folder that torch's loader uses
    return devices


def check_arch(capability: tuple[int, int], archs: list[str], torch_version: str) -> None:
    """A CUDA binary sm_XY runs on major version X from minor Y on; PTX compute_XY compiles on XY and everything newer.

    Raises:
        UserError: `archs` (as torch lists them, e.g. sm_90, sm_120, compute_120) hold nothing for this GPU.
    """
    major, minor = capability
    if not any(_runs(arch, major, minor) for arch in archs):
        raise UserError(
            f"this GPU is sm_{major}{minor}, but torch {torch_version} holds only {' '.join(archs)}: "
            "rebuild the image with a torch that lists it (docs/container.md, 'GPU architectures')"
        )


def _runs(arch: str, major: int, minor: int) -> bool:
    kind, _, number = arch.partition("_")
    if not number.isdigit():  # sm_90a and the like run on that one chip alone; torch lists them beside the plain one
        return False
    built_for = divmod(int(number), 10)
    if kind == "compute":
        return built_for <= (major, minor)
    return built_for[0] == major and built_for[1] <= minor


def check_shared_memory(config: Config, shm_dir: Path) -> None:
    """Loader processes hand batches over through shared memory; too little of it kills them with a bus error."""
    train = config.train
    batch_bytes = train.batch * 3 * train.imgsz**2
    need = train.workers * BATCHES_PER_WORKER * batch_bytes
    total = shutil.disk_usage(shm_dir).total if shm_dir.exists() else need
    if total < need:
        raise UserError(
            f"shared memory {shm_dir}: {total / 2**30:.1f} GiB, {train.workers} loader processes need "
            f"{need / 2**30:.1f}: start the container with SHM_SIZE={math.ceil(need / 2**30)}g, or lower train.workers"
        )


def explain_memory(error: RuntimeError, config: Config, has_begun: bool) -> None:
    """Turns out-of-memory and loader errors of a training into UserError; any other error passes.

    Args:
        has_begun: there is a checkpoint of it, which binds the training to its train.batch.
    """
    train = config.train
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_ROOM):
        raise UserError(
            f"train.batch={train.batch} at {train.imgsz} px does not fit in GPU memory: {_more_room(config, has_begun)}"
        ) from error
    if str(error).startswith("DataLoader"):  # a loader process that died; an error of our own has another text
        raise UserError(
            f"a loader process died or hangs ({str(error).splitlines()[0]}): memory or shared memory may be short; "
            "lower train.workers, or start the container with a larger SHM_SIZE"
        ) from error


def _more_room(config: Config, has_begun: bool) -> str:
    """What a user does who has too little GPU memory."""
    others = "end other programs on this GPU"
    if has_begun:
        return (
            f"{others}, and the same command goes on from the last checkpoint; another train.batch starts over, with "
            "ARGS=--force"
        )
    if config.train.batch == 1:
        return f"{others}, lower train.imgsz, or take a smaller model"
    return (
        f"set train.batch={config.train.batch // 2}, or {others}; gradients still accumulate to {config.hyp.nbs} "
        "images a step"
    )
