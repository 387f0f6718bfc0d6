"""Code version, machine and packages of this process, and the environment variables that libraries read."""

from __future__ import annotations

import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from app.core.cgroups import groups_above
from app.core.config import UserError
from app.core.files import sha256, write_atomic
from app.core.mounts import as_known

REPO_DIR = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "ultralytics-opencv-headless", "brevitas", "onnx", "onnxruntime-gpu", "pycocotools", "numpy"
)  # fmt: skip
GIT_S = 20  # seconds that git may take to name the revision

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
GPU_FACTS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
GPU_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "pstate")
CPUFREQ_DIR = Path("/sys/devices/system/cpu/cpu0/cpufreq")
CPU_CLOCKS = ("scaling_governor", "scaling_min_freq", "scaling_max_freq")


def code_version() -> str:
    """Git revision, with '-dirty' if tracked files differ; in the image that of its build; 'unknown' without git."""
    if revision := os.environ.get("APP_REVISION"):
        return revision
    git = ["git", "-C", str(REPO_DIR), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, check=True, timeout=GIT_S)
    except (FileNotFoundError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def environment() -> dict[str, Any]:
    """Machine and software of this process, for env.json. Imports nothing heavy: nvidia-smi describes the GPUs."""
    lock = REPO_DIR / "requirements.lock"
    return {
        "code_version": code_version(),
        "lock_sha256": sha256(lock) if lock.exists() else None,
        "image": os.environ.get("APP_IMAGE"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **hardware(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": shlex.join([Path(sys.executable).name, "-m", "app", *map(as_known, sys.argv[1:])]),
        "time_utc": utc_now(),
    }


def hardware() -> dict[str, Any]:
    """Processors and GPUs, on which the time of work depends."""
    return {"cpu": cpu_name(), "cpu_count": os.cpu_count(), "gpus": nvidia_smi(GPU_FACTS)}


def nvidia_smi(fields: tuple[str, ...]) -> list[str]:
    """The values of `fields` for every GPU, one line a GPU; empty if the machine has none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return result.stdout.strip().splitlines()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def launched_as() -> tuple[int, int, int, int] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of one of several processes; None for a process alone.

    Raises:
        UserError: the variables say that there are several processes, but are not those of torchrun.
    """
    if not has_ranks():
        return None
    missing = [name for name in (*RANK_VARIABLES, *RENDEZVOUS_VARIABLES) if name not in os.environ]
    values = [os.environ.get(name, "") for name in (*RANK_VARIABLES, "MASTER_PORT")]
    if not missing and all(value.isascii() and value.isdigit() for value in values):
        rank, n, local, n_local, _ = map(int, values)
        if rank < n and local < n_local <= n:
            return (rank, n, local, n_local) if n > 1 else None
    what = f"without {', '.join(missing)}" if missing else "with values that do not fit together"
    raise UserError(
        f"the environment says {_ranks()} {what}: start the processes with torchrun (docs/running.md), or unset "
        "RANK and WORLD_SIZE to train in one process"
    )


def check_is_alone(stage: str) -> None:
    """Raises a UserError if this process is one of several, which would all write the same files."""
    if has_ranks():
        raise UserError(f"the environment says {_ranks()}, but {stage} runs in one process: unset RANK and WORLD_SIZE")


def has_ranks() -> bool:
    """Whether the environment says that there are several processes."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _ranks() -> str:
    return f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']}"


def isolate_libraries(cache_dir: Path) -> None:
    """Makes Ultralytics and Matplotlib use the cache folder, work without network and screen, and see no other ranks.

    Must run before the first `import ultralytics`: utils/__init__.py (8.4.190) reads these variables when imported.
    Arial.ttf becomes a copy of a font of Matplotlib, so that Ultralytics' check_font() does not download it.
    """
    config_dir = (cache_dir / "ultralytics").resolve()
    font = config_dir / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        YOLO_CONFIG_DIR=str(config_dir), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false",
        MPLBACKEND="agg",
    )  # fmt: skip
    if launched_as() is None:  # a wrapper's variables, of which Ultralytics would make ranks
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    # Brevitas removes the names of a tensor at every quantization, and torch warns of any use of named tensors.
    warnings.filterwarnings("ignore", message="Named tensors", category=UserWarning)
    # Brevitas looks for a package for rotations, which are not used here.
    warnings.filterwarnings("ignore", message="fast_hadamard_transform package not found", category=UserWarning)
    # torch.onnx.export saves and restores the flags of all backends, also that of Intel GPUs (torch 2.10).
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)
    # More loader processes than cores are slower and not wrong; the report has both numbers (train.workers, cpu_count).
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    os.environ.setdefault("MPLCONFIGDIR", str((cache_dir / "matplotlib").resolve()))
    # By default OpenMP's threads spin for a millisecond while they wait. Then a step takes 3.7 times as long beside a
    # busy process as alone (two cores). With 1,000 spins it takes 2.5 times as long, and alone a tenth longer.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OMP_NUM_THREADS", str(n_cores()))  # Ultralytics would set 1 when it is imported (8.4.190)
    os.environ.setdefault("USER", "user")  # torchvision asks getpass.getuser(), which fails for a uid without a name
    spec = util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None and not font.exists():
        source = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        write_atomic(font, lambda part: shutil.copyfile(source, part))


def n_cores() -> int:
    """Cores that this process may use (taskset, a cpuset, docker's --cpus); os.cpu_count() has all of the machine.

    OMP_NUM_THREADS says nothing: it may be the 1 that Ultralytics sets when it is imported (8.4.190).
    """
    return min([len(os.sched_getaffinity(0)), *_cpu_limits()])


def _cpu_limits() -> Iterator[int]:
    """Cores that the quotas of the cgroups above this process come to; a part of one counts as one."""
    for group in groups_above("cpu"):
        if group.version == 1:
            quota, period = group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")
        else:
            quota, _, period = (group.read("cpu.max") or "max").partition(" ")
        if quota and period and quota not in ("max", "-1"):
            yield math.ceil(int(quota) / int(period))


def n_threads(n_processes: int) -> int:
    """Threads that compute on the CPU, in one of so many processes that share these cores."""
    return max(n_cores() // n_processes, 1)


def cpu_name() -> str:
    names = cpuinfo_values("model name")
    return names[0] if names else platform.processor() or platform.machine()


def clocks(on_gpu: bool) -> dict[str, str]:
    """Clocks and limits at this moment, with their units, under the names of nvidia-smi or of the Linux kernel.

    The values of several GPUs are joined by '; '. Without a GPU these are the MHz of each core from /proc/cpuinfo, and
    the governor of core 0 with its range in kHz; a virtual machine often has neither.
    """
    if on_gpu:
        columns = zip(*(row.split(", ") for row in nvidia_smi(GPU_CLOCKS)), strict=True)
        return {name: "; ".join(values) for name, values in zip(GPU_CLOCKS, columns, strict=False)}
    paths = [CPUFREQ_DIR / name for name in CPU_CLOCKS]
    values = {path.name: path.read_text(encoding="utf-8").strip() for path in paths if path.exists()}
    if mhz := cpuinfo_values("cpu MHz"):
        values["MHz"] = ", ".join(mhz)
    return values


def cpuinfo_values(key: str) -> list[str]:
    """The values of a key of /proc/cpuinfo, one a core."""
    return [line.partition(":")[2].strip() for line in cpuinfo() if line.startswith(key)]


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
