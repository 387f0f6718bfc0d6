"""An ONNX Runtime session that checks the file's contract and uses the provider asked for, or stops."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from app.coco import NAMES
from app.config import Eval, UserError
from app.run import sha256

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Session:
    """A file ready to run. `batch` is None where it is free."""

    ort_session: ort.InferenceSession
    contract: str
    imgsz: int
    batch: int | None
    model_facts: dict[str, Any]
    runtime_facts: dict[str, Any]

    def run(self, images: np.ndarray) -> np.ndarray:
        """[N,3,S,S] float32 -> output of N or, where the file's batch is fixed and N smaller, more images."""
        if self.batch and len(images) < self.batch:
            images = np.concatenate([images, np.zeros((self.batch - len(images), *images.shape[1:]), np.float32)])
        return np.asarray(self.ort_session.run(None, {"images": images})[0])


def open_session(path: Path, settings: Eval) -> Session:
    """Loads a file.

    Raises:
        UserError: not an ONNX file of the contract, or a provider that cannot be had.
    """
    provider = choose_provider(settings.provider)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # without a GPU the CUDA build warns about device discovery at every session
    if provider == PROVIDERS["cuda"]:
        ort.preload_dlls()  # finds cuBLAS and cuDNN of the nvidia-* wheels
    start = time.perf_counter()
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no base class below Exception
        raise UserError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}: {str(error)[:200]}") from error
    if session.get_providers()[0] != provider:
        raise UserError(
            f"{provider} was asked for, ONNX Runtime uses {session.get_providers()[0]}: eval.provider=cpu runs there"
        )
    metadata = session.get_modelmeta().custom_metadata_map
    contract, imgsz, batch = check_contract(path, session, metadata)
    return Session(
        session, contract, imgsz, batch,
        {
            "file": path.name, "sha256": sha256(path), "size_bytes": path.stat().st_size,
            "label": metadata.get("label", path.stem), "scheme": json.loads(metadata.get("scheme", "null") or "null") if metadata.get("scheme") == "null" else metadata.get("scheme"),
            "contract": contract, "imgsz": imgsz,
        },
        {
            "onnxruntime": ort.__version__, "provider": provider, "device": device_name(provider),
            "session_load_s": round(time.perf_counter() - start, 4), "graph_optimization": "all",
        },
    )  # fmt: skip


def choose_provider(wanted: str) -> str:
    """The CUDA build lists its provider on machines without a GPU too, so the device itself is asked for."""
    has_gpu = PROVIDERS["cuda"] in ort.get_available_providers() and bool(gpu_names())
    if wanted == "cuda" and not has_gpu:
        raise UserError("eval.provider=cuda, but ONNX Runtime finds no NVIDIA GPU here: use eval.provider=cpu or auto")
    return PROVIDERS["cuda"] if has_gpu and wanted != "cpu" else PROVIDERS["cpu"]


def gpu_names() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else []


def device_name(provider: str) -> str:
    if provider == PROVIDERS["cuda"]:
        return gpu_names()[0]
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def check_contract(path: Path, session: ort.InferenceSession, metadata: dict[str, str]) -> tuple[str, int, int | None]:
    """Contract, side of the square in px, and batch (None: free), from the metadata and the shapes, which must agree."""
    contract, names = metadata.get("contract"), metadata.get("names")
    if contract not in ("raw", "end2end") or not names or "imgsz" not in metadata:
        raise UserError(f"{path} carries no metadata contract/imgsz/names: export it with 'make export'")
    if json.loads(names) != NAMES:
        raise UserError(f"{path} was made for other classes than COCO's 80: it cannot be scored here")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].name != "images" or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise UserError(f"{path}: the contract asks for one input 'images', float32 [N,3,H,W]")
    imgsz = int(metadata["imgsz"])
    batch, *rest = inputs[0].shape
    fixed = [value for value in rest[1:] if isinstance(value, int)]
    columns = (4 + len(NAMES), None) if contract == "raw" else (None, 6)
    shape = outputs[0].shape
    wrong = len(outputs) != 1 or len(shape) != 3 or any(
        want is not None and isinstance(got, int) and got != want for want, got in zip(columns, shape[1:], strict=True)
    )  # fmt: skip
    if wrong or any(value != imgsz for value in fixed):
        raise UserError(f"{path}: shapes {inputs[0].shape} -> {shape} do not fit contract '{contract}' at {imgsz} px")
    return contract, imgsz, batch if isinstance(batch, int) else None
