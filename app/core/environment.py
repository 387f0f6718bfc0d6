"""Code version, machine and libraries of this process, and the settings that libraries read from the environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import Any

from app.core.files import sha256

REPO_DIR = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "ultralytics-opencv-headless", "brevitas", "onnx", "onnxruntime-gpu", "pycocotools", "numpy"
)  # fmt: skip
GIT_S = 20  # seconds that git may take to name the revision

GPU_FACTS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")


def code_version() -> str:
    """Git revision with '-dirty' where tracked files differ; in the image the build's revision; else 'unknown'."""
    if revision := os.environ.get("APP_REVISION"):
        return revision
    git = ["git", "-C", str(REPO_DIR), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, check=True, timeout=GIT_S)
    except (FileNotFoundError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def environment() -> dict[str, Any]:
    """Machine and software of this process, for env.json. Imports nothing heavy; the GPU is asked by nvidia-smi."""
    lock = REPO_DIR / "requirements.lock"
    return {
        "code_version": code_version(),
        "lock_sha256": sha256(lock) if lock.exists() else None,
        "image": os.environ.get("APP_IMAGE"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpus": nvidia_smi(GPU_FACTS),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": " ".join([Path(sys.executable).name, "-m", "app", *sys.argv[1:]]),
        "time_utc": utc_now(),
    }


def nvidia_smi(fields: tuple[str, ...]) -> list[str]:
    """The values of `fields` for every GPU, one line a GPU; empty where the machine has none."""
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


def isolate_libraries(cache_dir: Path) -> None:
    """Points Ultralytics and Matplotlib at the cache folder and takes Ultralytics off the network.

    Must run before the first `import ultralytics`: utils/__init__.py (8.4.190) reads these variables when imported.
    The link to Matplotlib's own font keeps check_font() from downloading Arial.ttf.
    """
    config_dir = (cache_dir / "ultralytics").resolve()
    font = config_dir / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        YOLO_CONFIG_DIR=str(config_dir), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false"
    )
    # Brevitas drops the names of a tensor at every quantization; the warning is about naming them.
    warnings.filterwarnings("ignore", message="Named tensors", category=UserWarning)
    # Brevitas looks for a package of rotations, which are not used here.
    warnings.filterwarnings("ignore", message="fast_hadamard_transform package not found", category=UserWarning)
    # torch.onnx.export saves and restores the flags of all backends, that of Intel GPUs too (torch 2.10).
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)
    # More loader processes than cores are slower and not wrong; the report has both numbers (train.workers, cpu_count).
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    os.environ.setdefault("MPLCONFIGDIR", str((cache_dir / "matplotlib").resolve()))
    # OpenMP's threads otherwise spin for a millisecond while they wait: beside a busy process a step took 3.7 times as
    # long as alone. With 1,000 turns it takes 2.5 times as long there, and a tenth more alone (two cores).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("USER", "user")  # torchvision asks getpass.getuser(), which fails for a uid without a name
    spec = util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None and not font.exists():
        link = font.with_name(f".Arial.{os.getpid()}")
        link.symlink_to(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
        link.replace(font)
