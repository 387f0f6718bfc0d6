"""ONNX Runtime: opens a model with the provider asked for, checks its contract, runs it, times it. No torch."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore - compiled, without stubs

from app.coco import NAMES
from app.config import Eval, UserError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CONTRACTS = ("raw", "end2end")
N_CLASSES = len(NAMES)
BROKEN_FILE = (
    ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """An open ONNX file that keeps the contract. `batch` is the fixed batch size, None where it is free."""

    path: Path
    session: ort.InferenceSession
    input_name: str
    contract: str
    imgsz: int
    batch: int | None
    metadata: dict[str, str]

    @property
    def label(self) -> str:
        return self.metadata.get("label", self.path.stem)

    @property
    def scheme(self) -> str | None:
        """Metadata values are JSON where they are no plain text: the baseline's scheme reads 'null'."""
        scheme = self.metadata.get("scheme", "null")
        return None if scheme == "null" else scheme

    @property
    def provider(self) -> str:
        return self.session.get_providers()[0]

    def run(self, images: np.ndarray) -> np.ndarray:
        """images float32 [N,3,imgsz,imgsz] RGB 0..1 -> raw [N,84,A] or end2end [N,K,6].

        Raises:
            UserError: the output has another shape than the contract says.
        """
        output = np.asarray(self.session.run(None, {self.input_name: images})[0])
        if len(output) != len(images) or not shape_fits(self.contract, list(output.shape)):
            raise UserError(
                f"{self.path}: {self.contract} output has the shape {list(output.shape)}, {wanted_shape(self)}"
            )
        return output


def open_model(path: Path, provider: str) -> Model:
    """Opens an ONNX file and checks that it keeps one of the two contracts.

    Args:
        path: the file; its metadata_props must say `contract`, and `imgsz` where height and width are free.
        provider: 'auto', 'cpu' or 'cuda'.

    Raises:
        UserError: no such file, not an ONNX model, another contract or class list, provider not usable.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run 'make export' first")
    session = open_session(path, choose_provider(provider))
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    if metadata.get("contract") not in CONTRACTS:
        raise UserError(
            f"{path}: metadata 'contract' is {metadata.get('contract', 'missing')}, it must be raw or end2end: "
            "export it with 'make export'"
        )
    names = metadata.get("names")
    if names is not None and names != json.dumps(NAMES):
        raise UserError(f"{path}: metadata 'names' are not the {N_CLASSES} COCO classes in their order: another model")
    model = Model(path, session, *check_input(path, session, metadata), metadata)
    check_output(model)
    return model


def open_session(path: Path, provider: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_cores()
    # The CUDA build warns about device discovery where there is no GPU; errors still show.
    options.log_severity_level = 3
    ort.set_default_logger_severity(3)
    if provider == CUDA:
        ort.preload_dlls()  # finds cuBLAS and cuDNN in torch's wheels without importing torch
    # TF32 rounds inputs to 10 bits: detections would differ from the CPU's, between machines and from the QDQ codes.
    wanted: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted)
    except BROKEN_FILE as error:
        raise UserError(
            f"{path} cannot be loaded by ONNX Runtime ({first_line(error)}): "
            "export it again with 'make export ARGS=--force'"
        ) from error
    if session.get_providers()[0] != provider:
        raise UserError(
            f"ONNX Runtime gave {session.get_providers()[0]} instead of {provider} (CUDA or cuDNN libraries missing?): "
            "mend the installation or use --set eval.provider=cpu"
        )
    return session


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def choose_provider(wanted: str) -> str:
    """'auto', 'cpu' or 'cuda' -> name of the execution provider; onnxruntime-gpu lists CUDA even without a GPU."""
    usable = CUDA in ort.get_available_providers() and gpu_name() is not None
    if wanted == "cuda" and not usable:
        raise UserError("eval.provider=cuda: no usable GPU here: use --set eval.provider=cpu, in Docker ACCEL=gpu")
    return CUDA if usable and wanted != "cpu" else CPU


def gpu_name() -> str | None:
    """Name of the first GPU that this process may use, asked from the driver; None without driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    return name.value.decode() if not driver.cuDeviceGetName(name, len(name), device) else None


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def n_cores() -> int:
    """Cores that this process may use; os.cpu_count() counts those of the whole machine."""
    return len(os.sched_getaffinity(0))


def n_decoders(model: Model) -> int:
    """Threads that read images: all cores when a GPU computes, else so few that ONNX Runtime keeps its own."""
    return min(16, n_cores()) if model.provider == CUDA else max(1, n_cores() // 8)


def describe_runtime(model: Model) -> dict[str, Any]:
    return {
        "onnxruntime": ort.__version__,
        "provider": model.provider,
        "device": gpu_name() if model.provider == CUDA else cpu_name(),
        "intra_op_threads": n_cores(),
    }


def check_input(
    path: Path, session: ort.InferenceSession, metadata: dict[str, str]
) -> tuple[str, str, int, int | None]:
    """Returns input name, contract, imgsz in px and the fixed batch size or None."""
    inputs = session.get_inputs()
    if [i.name for i in inputs] != ["images"] or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{i.name} {i.type}" for i in inputs)
        raise UserError(
            f"{path}: inputs are {found}; the contract is one input 'images', tensor(float), also in FP16 files"
        )
    shape = inputs[0].shape
    imgsz = int(metadata["imgsz"]) if metadata.get("imgsz", "").isdigit() else None
    fixed = {side for side in shape[2:] if isinstance(side, int)}
    if len(shape) != 4 or shape[1] != 3 or len(fixed | ({imgsz} - {None})) != 1:
        raise UserError(
            f"{path}: input shape {shape}, metadata imgsz {imgsz}; the contract is [N,3,imgsz,imgsz], square"
        )
    batch = shape[0] if isinstance(shape[0], int) else None
    return inputs[0].name, metadata["contract"], imgsz or fixed.pop(), batch


def check_output(model: Model) -> None:
    outputs = model.session.get_outputs()
    shapes = [output.shape for output in outputs]
    if len(outputs) != 1 or outputs[0].type != "tensor(float)" or not shape_fits(model.contract, shapes[0]):
        types = ", ".join(output.type for output in outputs)
        raise UserError(f"{model.path}: outputs are {shapes} {types}, {wanted_shape(model)}")


def shape_fits(contract: str, shape: list[Any]) -> bool:
    """Sides that are free (names or None in ONNX) fit anything."""
    side, size = (1, 4 + N_CLASSES) if contract == "raw" else (2, 6)
    return len(shape) == 3 and (shape[side] == size or not isinstance(shape[side], int))


def wanted_shape(model: Model) -> str:
    shape = f"[N,{4 + N_CLASSES},A]" if model.contract == "raw" else "[N,300,6]"
    return f"the contract '{model.contract}' is one float32 output {shape}: a model of other classes or another task"


def measure_latency(model: Model, image: np.ndarray, settings: Eval) -> dict[str, Any]:
    """Times session.run alone on one preprocessed image [3,H,W]: batch 1, or the file's own where that is fixed.

    Returns:
        batch, warmup and runs (counts), mean, p50, p90 and p99 (ms per run).
    """
    images = np.repeat(image[None], model.batch or 1, axis=0)
    times_ms = []
    for _ in range(settings.latency_warmup + settings.latency_runs):
        start = time.perf_counter()
        model.session.run(None, {model.input_name: images})
        times_ms.append((time.perf_counter() - start) * 1e3)
    timed = np.array(times_ms[settings.latency_warmup :])
    percentiles = {f"p{q}": float(np.percentile(timed, q)) for q in (50, 90, 99)}
    counts = {"batch": len(images), "warmup": settings.latency_warmup, "runs": settings.latency_runs}
    return {**counts, "mean": float(timed.mean()), **percentiles}
