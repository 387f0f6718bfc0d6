"""The run root: every path in one place, atomic writes, the record of code and machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from app.config import UserError

REPO_DIR = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchvision", "ultralytics-opencv-headless", "brevitas", "onnx", "onnxruntime-gpu", "pycocotools", "numpy"
)  # fmt: skip
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: ulimit -f, or a file system of small files
GIT_S = 20  # seconds that git may take to name the revision

GPU_FACTS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")


@dataclass(frozen=True)
class RunRoot:
    """Paths of runs/<name>. Stages talk only through these files."""

    runs_dir: Path
    name: str

    @property
    def root(self) -> Path:
        return self.runs_dir / self.name

    @property
    def cache_dir(self) -> Path:
        """Shared by all runs: the drawn coco-subset, YOLO views, Ultralytics' settings."""
        return self.runs_dir / ".cache"

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def dataset_yaml(self) -> Path:
        return self.root / "dataset" / "coco.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "dataset" / "provenance.json"

    def variant_dir(self, label: str) -> Path:
        """Folder of a trained variant; label is fp16 or qat-<scheme>."""
        return self.root / label

    def best(self, label: str) -> Path:
        """Checkpoint of the variant as it is exported."""
        return self.variant_dir(label) / "weights" / "best.pt"

    def trained_labels(self) -> list[str]:
        """Labels of the variants whose training has finished, fp16 first."""
        labels = sorted(path.parent.name for path in self.root.glob("*/done.json"))
        return sorted(labels, key=lambda label: label != "fp16")

    @property
    def onnx_dir(self) -> Path:
        return self.root / "onnx"

    @property
    def summary(self) -> Path:
        return self.root / "summary.md"

    @property
    def figures_dir(self) -> Path:
        return self.root / "figures"


def open_run(name: str, runs_dir: Path) -> RunRoot:
    """Checks the name of a run; nothing is created before a stage has something to write."""
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name.startswith("."):
        raise UserError(f"--run '{name}': use letters, digits, '.', '_' and '-' (it becomes a folder under {runs_dir})")
    return RunRoot(runs_dir, name)


@contextlib.contextmanager
def explain_full_disk(folder: Path, need: str) -> Iterator[None]:
    """Turns 'no space left' inside the block into a UserError that names the folder, its free space and the need."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK_ERRNOS:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise UserError(f"no space left in {folder} ({free:,.0f} MiB free): {need}") from error


def write_atomic(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to disk, then renames it over `path`.

    A crash or a full disk leaves the old file whole and, short of kill -9, no temporary file behind. With `previous`
    the file that is replaced stays under that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        flush(part)
        if previous and path.exists():
            keep(path, previous)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    flush(path.parent)  # else the new name may not outlive a power failure


def flush(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep(path: Path, second: Path) -> None:
    """A second name for the file, so that it never lacks the first one; a copy where there are no hard links."""
    part = second.with_name(f".{second.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            part.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, part)
        part.replace(second)
    finally:
        part.unlink(missing_ok=True)  # rename leaves it where both names led to one file already


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path, made_by: str) -> Any:
    """Reads a JSON file of the run root; `made_by` names the make target that writes it, for the message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: run 'make {made_by}' first") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: delete it and run 'make {made_by}' again") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """What the driver says of every GPU, one line each, values in the order of `fields`; empty where there is none."""
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


def record_stage(run: RunRoot, stage: str, facts: dict[str, Any]) -> None:
    """Enters what a stage did, when and with what into run.json."""
    record = read_json(run.run_json, "data") if run.run_json.exists() else {"name": run.name, "stages": {}}
    record["stages"][stage] = {"time_utc": utc_now(), "code_version": code_version(), **facts}
    write_json(run.run_json, record)


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
