"""ONNX Runtime: opens a model with the provider asked for, runs it, says which nodes ran where. No torch."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore - compiled, without stubs

from app.core.config import UserError
from app.core.environment import nvidia_smi
from app.eval.contract import Promise, read_promise, refuse_foreign_data, shape_fits, wanted_shape

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# TF32 rounds inputs to 10 bits: detections would differ from the CPU's, between machines and from the QDQ codes.
OPTIONS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}, CPU: {}}
FALL_BACKS = {CPU: [CPU], CUDA: [CUDA, CPU]}  # nodes that a provider has no kernel for go to the next one
KERNEL_EVENT = "_kernel_time"  # ends the name of a profile's event: the time inside the kernel of a node
GPU_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "pstate")
CPUFREQ_DIR = Path("/sys/devices/system/cpu/cpu0/cpufreq")
CPU_CLOCKS = ("scaling_governor", "scaling_min_freq", "scaling_max_freq")
BROKEN_FILE = (
    ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """An open ONNX file that keeps its contract."""

    path: Path
    session: ort.InferenceSession
    promise: Promise
    metadata: dict[str, str]

    @property
    def contract(self) -> str:
        return self.promise.contract

    @property
    def imgsz(self) -> int:
        return self.promise.imgsz

    @property
    def batch(self) -> int | None:
        """The fixed batch size, None where it is free."""
        return self.promise.batch

    @property
    def label(self) -> str:
        return self.metadata.get("label", self.path.stem)

    @property
    def scheme(self) -> str | None:
        """None for a model that is not quantized: its file may say 'null', as metadata that is no text is JSON."""
        scheme = self.metadata.get("scheme", "null")
        return None if scheme == "null" else scheme

    @property
    def precision(self) -> str | None:
        """fp32, fp16, qcdq or int4; None where the file does not say."""
        return self.metadata.get("precision")

    @property
    def provider(self) -> str:
        return self.session.get_providers()[0]

    def run(self, images: np.ndarray) -> np.ndarray:
        """images float32 [N,3,imgsz,imgsz] RGB 0..1 -> raw [N,84,A] or end2end [N,K,6].

        Raises:
            UserError: the output has another shape than the contract says.
        """
        output = np.asarray(self.session.run(None, {self.promise.input_name: images})[0])
        if len(output) != len(images) or not shape_fits(self.contract, list(output.shape)):
            raise UserError(
                f"{self.path}: {self.contract} output has the shape {list(output.shape)}, {wanted_shape(self.contract)}"
            )
        return output


def open_model(path: Path, provider: str) -> Model:
    """Opens an ONNX file and checks that it keeps one of the contracts.

    Args:
        path: the file; its metadata is ours, or that of Ultralytics' exporter.
        provider: 'auto', 'cpu' or 'cuda'.

    Raises:
        UserError: no such file, not an ONNX model, another contract or class list, provider not usable.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run 'make export' first")
    refuse_foreign_data(path)
    session = open_session(path, choose_provider(provider), ort.SessionOptions())
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return Model(path, session, read_promise(path, session, metadata), metadata)


def open_session(path: Path, provider: str, options: ort.SessionOptions) -> ort.InferenceSession:
    options.intra_op_num_threads = n_cores()
    # The CUDA build warns about device discovery where there is no GPU. Errors while a file is loaded are still shown.
    options.log_severity_level = 3
    ort.set_default_logger_severity(3)
    if provider != CPU:
        ort.preload_dlls()  # finds cuBLAS and cuDNN in torch's wheels without importing torch
    wanted: list[Any] = [(name, OPTIONS[name]) for name in FALL_BACKS[provider]]
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted)
    except BROKEN_FILE as error:
        raise UserError(
            f"{path} cannot be loaded by ONNX Runtime ({first_line(error)}): "
            "export it again with 'make export ARGS=--force'"
        ) from error
    # In its first run cuDNN logs an error for every FP16 convolution that its newer interface leaves to the older one.
    # What stops a run is raised besides being logged.
    ort.set_default_logger_severity(4)
    if session.get_providers()[0] != provider:
        raise UserError(
            f"ONNX Runtime gave {session.get_providers()[0]} instead of {provider} (its libraries missing?): "
            "mend the installation or use --set eval.provider=cpu"
        )
    return session


def nodes_by_provider(model: Model, images: np.ndarray) -> dict[str, list[str]]:
    """Provider -> 'OpType name' of the nodes that it ran for images [N,3,S,S], from ONNX Runtime's own profile."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model.path, model.provider, options)
        session.run(None, {model.promise.input_name: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes: dict[str, list[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL_EVENT):
            node_name = event["name"].removesuffix(KERNEL_EVENT)
            nodes.setdefault(event["args"]["provider"], []).append(f"{event['args']['op_name']} {node_name}")
    return nodes


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def choose_provider(wanted: str) -> str:
    """'auto', 'cpu' or 'cuda' -> name of the execution provider; auto is cuda where it can be used.

    onnxruntime-gpu lists CUDA even where there is no GPU.

    Raises:
        UserError: cuda is asked for and cannot be used.
    """
    has_gpu = gpu_name() is not None
    if wanted == "auto":
        return CUDA if has_gpu and CUDA in ort.get_available_providers() else CPU
    if wanted != "cpu" and not (has_gpu and PROVIDERS[wanted] in ort.get_available_providers()):
        raise UserError(f"eval.provider={wanted}: no usable GPU here: use --set eval.provider=cpu, in Docker ACCEL=gpu")
    return PROVIDERS[wanted]


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
    names = cpuinfo_values("model name")
    return names[0] if names else platform.processor() or platform.machine()


def clocks(provider: str) -> dict[str, str]:
    """Clocks and limits at this moment, with their units, in the words of the GPU's driver or of the kernel.

    Several GPUs give their values one after another. On a CPU these are the MHz of each core as /proc/cpuinfo has them,
    and of core 0 the governor and its range in kHz; a virtual machine often has neither.
    """
    if provider != CPU:
        rows = [row.split(", ") for row in nvidia_smi(GPU_CLOCKS)]
        columns = zip(*rows, strict=True)
        return {name: "; ".join(values) for name, values in zip(GPU_CLOCKS, columns, strict=False)}
    values = {}
    for name in CPU_CLOCKS:
        path = CPUFREQ_DIR / name
        if path.exists():
            values[name] = path.read_text(encoding="utf-8").strip()
    if mhz := cpuinfo_values("cpu MHz"):
        values["MHz"] = ", ".join(mhz)
    return values


def cpuinfo_values(key: str) -> list[str]:
    """The values of a key of /proc/cpuinfo, one a core."""
    return [line.partition(":")[2].strip() for line in cpuinfo() if line.startswith(key)]


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def n_cores() -> int:
    """Cores that this process may use; os.cpu_count() counts those of the whole machine."""
    return len(os.sched_getaffinity(0))


def n_decoders(model: Model) -> int:
    """Threads that read images: one a core when a GPU computes, else so few that ONNX Runtime keeps its cores."""
    return max(1, n_cores() // 8) if model.provider == CPU else min(16, n_cores())


def describe_runtime(model: Model) -> dict[str, Any]:
    """What ran the model. `nodes_on_cpu` names what a GPU provider left to the CPU; None where all is on the CPU."""
    images = np.zeros((model.batch or 1, 3, model.imgsz, model.imgsz), np.float32)
    on_cpu = None if model.provider == CPU else sorted(nodes_by_provider(model, images).get(CPU, []))
    if on_cpu:
        log.warning("%s: %d nodes run on the CPU: %s", model.path.name, len(on_cpu), ", ".join(on_cpu))
    return {
        "onnxruntime": ort.__version__,
        "provider": model.provider,
        "device": cpu_name() if model.provider == CPU else gpu_name(),
        "intra_op_threads": n_cores(),
        "n_nodes_on_cpu": None if on_cpu is None else len(on_cpu),
        "nodes_on_cpu": on_cpu,
    }
