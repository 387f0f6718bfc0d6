"""ONNX Runtime without torch: opens a model with a provider, runs it, and reports which nodes ran on which provider."""

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
# No TF32: it rounds inputs to 10 bits, so detections would differ between GPU and CPU and from GPU to GPU.
OPTIONS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}, CPU: {}}
FALL_BACKS = {CPU: [CPU], CUDA: [CUDA, CPU]}  # a node without a kernel for the first provider runs on the next
KERNEL_EVENT = "_kernel_time"  # ends the names of the profile's events that time the kernel of a node
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
    """An open ONNX file whose interface is that of its contract."""

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
        """The fixed batch size; None if it is free."""
        return self.promise.batch

    @property
    def label(self) -> str:
        return self.metadata.get("label", self.path.stem)

    @property
    def scheme(self) -> str | None:
        """None for a model that is not quantized; its metadata may hold 'null', as values that are no text are JSON."""
        scheme = self.metadata.get("scheme", "null")
        return None if scheme == "null" else scheme

    @property
    def precision(self) -> str | None:
        """fp32, fp16, qcdq or int4; None if the file's metadata lack it."""
        return self.metadata.get("precision")

    @property
    def provider(self) -> str:
        return self.session.get_providers()[0]

    def run(self, images: np.ndarray) -> np.ndarray:
        """images float32 [N,3,imgsz,imgsz] RGB 0..1 -> raw [N,84,A] or end2end [N,K,6].

        Raises:
            UserError: the shape of the output is not that of the contract.
        """
        output = np.asarray(self.session.run(None, {self.promise.input_name: images})[0])
        if len(output) != len(images) or not shape_fits(self.contract, list(output.shape)):
            raise UserError(
                f"{self.path}: {self.contract} output has the shape {list(output.shape)}, {wanted_shape(self.contract)}"
            )
        return output


def open_model(path: Path, provider: str) -> Model:
    """Opens an ONNX file and checks that its interface is that of a known contract.

    Args:
        path: the file; its metadata are ours, or those of Ultralytics' exporter.
        provider: 'auto', 'cpu' or 'cuda'.

    Raises:
        UserError: the file is missing or not ONNX, has another contract or class list, or the provider is unusable.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run 'make export' first")
    refuse_foreign_data(path)
    session = open_session(path, choose_provider(provider), ort.SessionOptions())
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return Model(path, session, read_promise(path, session, metadata), metadata)


def open_session(path: Path, provider: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """Opens a session on `provider`, the name of an execution provider; sets threads and logging in `options`.

    Raises:
        UserError: ONNX Runtime cannot load the file, or uses another provider.
    """
    options.intra_op_num_threads = n_cores()
    # Errors only: without a GPU the CUDA build warns about device discovery.
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
    # Not even errors: in the first run cuDNN logs one for every FP16 convolution that its newer interface leaves to the
    # older one. An error that stops a run is raised as well.
    ort.set_default_logger_severity(4)
    if session.get_providers()[0] != provider:
        raise UserError(
            f"ONNX Runtime gave {session.get_providers()[0]} instead of {provider} (its libraries missing?): "
            "mend the installation or use --set eval.provider=cpu"
        )
    return session


def nodes_by_provider(model: Model, images: np.ndarray) -> dict[str, list[str]]:
    """The nodes that each provider ran for images [N,3,S,S], as 'OpType name', from ONNX Runtime's profile."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model.path, model.provider, options)
        session.run(None, {model.promise.input_name: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes: dict[str, list[str]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(KERNEL_EVENT):
            continue
        node_name = event["name"].removesuffix(KERNEL_EVENT)
        facts = event["args"]
        nodes.setdefault(facts["provider"], []).append(f"{facts['op_name']} {node_name}")
    return nodes


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def choose_provider(wanted: str) -> str:
    """'auto', 'cpu' or 'cuda' -> name of the execution provider; 'auto' is CUDA if it can be used.

    Raises:
        UserError: 'cuda' cannot be used.
    """
    # onnxruntime-gpu lists CUDA as available also on a machine without a GPU.
    has_cuda = gpu_name() is not None and CUDA in ort.get_available_providers()
    if wanted == "auto":
        return CUDA if has_cuda else CPU
    if wanted == "cuda" and not has_cuda:
        raise UserError(f"eval.provider={wanted}: no usable GPU here: use --set eval.provider=cpu, in Docker ACCEL=gpu")
    return PROVIDERS[wanted]


def gpu_name() -> str | None:
    """Name of the first GPU that this process may use, from the driver; None without driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    # Each call returns 0 or the number of an error.
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode()


def cpu_name() -> str:
    names = cpuinfo_values("model name")
    if names:
        return names[0]
    return platform.processor() or platform.machine()


def clocks(provider: str) -> dict[str, str]:
    """Clocks and limits at this moment, with their units, under the names of nvidia-smi or of the Linux kernel.

    The values of several GPUs are joined by '; '. On a CPU these are the MHz of each core from /proc/cpuinfo, and the
    governor of core 0 with its range in kHz; a virtual machine often has neither.
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
    mhz = cpuinfo_values("cpu MHz")
    if mhz:
        values["MHz"] = ", ".join(mhz)
    return values


def cpuinfo_values(key: str) -> list[str]:
    """The values of a key of /proc/cpuinfo, one a core."""
    return [line.partition(":")[2].strip() for line in cpuinfo() if line.startswith(key)]


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def n_cores() -> int:
    """Cores that this process may use; os.cpu_count() counts all cores of the machine."""
    return len(os.sched_getaffinity(0))


def n_decoders(model: Model) -> int:
    """Threads that decode images: one a core if a GPU runs the model; else few, as ONNX Runtime needs the cores."""
    return max(1, n_cores() // 8) if model.provider == CPU else min(16, n_cores())


def describe_runtime(model: Model) -> dict[str, Any]:
    """Runtime and device of the model, for metrics.json.

    `nodes_on_cpu` are the nodes for which a GPU provider has no kernel; None if the provider is the CPU.
    """
    on_cpu = None
    if model.provider != CPU:
        images = np.zeros((model.batch or 1, 3, model.imgsz, model.imgsz), np.float32)
        on_cpu = sorted(nodes_by_provider(model, images).get(CPU, []))
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
