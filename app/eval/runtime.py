"""ONNX Runtime without torch: opens a model with a provider, runs it, and reports which nodes ran on which provider."""

from __future__ import annotations

import ctypes
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore - compiled, without stubs

from app.coco.categories import CATEGORY_IDS, OFFICIAL_IDS
from app.core.config import UserError
from app.core.environment import cpu_name, n_cores
from app.core.files import printable
from app.core.mounts import only_seen
from app.eval.classes import category_ids, without_unlisted
from app.eval.contract import Input, Said, read_contract, read_input, refuse_foreign_data, shape_fits, wanted_shape
from app.eval.metadata import shortened

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# No TF32: it rounds inputs to 10 bits, so detections would differ between GPU and CPU and from GPU to GPU.
OPTIONS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}, CPU: {}}
FALL_BACKS = {CPU: [CPU], CUDA: [CUDA, CPU]}  # a node without a kernel for the first provider runs on the next
KERNEL_EVENT = "_kernel_time"  # ends the names of the profile's events that time the kernel of a node
# What ONNX Runtime raises for a file that it cannot load or run; the last four come from its Python binding.
FAILURES = (
    ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, ort_errors.InvalidArgument,
    ort_errors.NotImplemented, ort_errors.NoModel, ort_errors.NoSuchFile, ort_errors.EPFail, ort_errors.EngineError,
    ort_errors.RuntimeException, RuntimeError, ValueError, TypeError, MemoryError,
)  # fmt: skip
N_REASON = 120  # characters of the begin and of the end of a reason in a message
# Of the two ways to run two images of noise: both are float32, or FP16 in a foreign file.
BATCH_TOLERANCE = 0.01
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """An open ONNX file whose interface is that of its contract."""

    path: Path
    session: ort.InferenceSession
    input: Input
    contract: str  # raw, end2end or nms
    metadata: dict[str, str]
    category_ids: Sequence[int | None] = tuple(CATEGORY_IDS)  # of its classes; None: the annotations list no such class

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in px."""
        return self.input.size

    @property
    def imgsz(self) -> int | str:
        """Side of a square input in px; of another one height and width, as text."""
        height, width = self.size
        return height if height == width else f"{height} x {width}"

    @property
    def batch(self) -> int | None:
        """The fixed batch size; None if it is free."""
        return self.input.batch

    @property
    def label(self) -> str:
        return shortened(self.metadata.get("label", self.path.stem))

    @property
    def scheme(self) -> str | None:
        """None for a model that is not quantized; its metadata may hold 'null', as values that are no text are JSON."""
        scheme = self.metadata.get("scheme", "null")
        return None if scheme == "null" else shortened(scheme)

    @property
    def precision(self) -> str | None:
        """fp32, fp16, qcdq or int4; None if the file's metadata lack it."""
        precision = self.metadata.get("precision")
        return None if precision is None else shortened(precision)

    @property
    def provider(self) -> str:
        return self.session.get_providers()[0]

    def run(self, images: np.ndarray) -> np.ndarray:
        """images float32 [N,3,*size] RGB 0..1 -> float32 raw [N,4+nc,A] or end2end [N,K,6].

        Raises:
            UserError: ONNX Runtime fails, or the shape of the output is not that of the contract.
        """
        output = self._output(images)
        if not self._fits(output, len(images)):
            wanted = wanted_shape(self.contract, len(self.category_ids))
            raise UserError(f"{self.path}: {self.contract} output has the shape {list(output.shape)}, {wanted}")
        return without_unlisted(output, self.contract, self.category_ids)

    def takes_batches(self) -> bool:
        """Whether two images in one run give what each gives alone; a Reshape to a batch of 1 may lie in the graph.

        Raises:
            UserError: a single image cannot be run.
        """
        images = np.random.default_rng(0).random((2, 3, *self.size), np.float32)
        alone = [self._output(images[:1]), self._output(images[1:])]
        try:
            together = self._output(images)
        except UserError:
            return False
        if not self._fits(together, 2):
            return False
        return all(map(self._are_alike, together, np.concatenate(alone)))

    def _are_alike(self, output: np.ndarray, other: np.ndarray) -> bool:
        """Of end2end only the scores, which are sorted: noise has no order of boxes that rounding could not change."""
        if self.contract == "end2end":
            output, other = np.sort(output[:, 4]), np.sort(other[:, 4])
        tolerance = BATCH_TOLERANCE * (1 + np.abs(other))
        return bool((np.abs(output - other) <= tolerance).all())

    def _fits(self, output: np.ndarray, n_images: int) -> bool:
        return len(output) == n_images and shape_fits(self.contract, list(output.shape), len(self.category_ids))

    def _output(self, images: np.ndarray) -> np.ndarray:
        return run(self.path, self.session, self.input, images)


def run(path: Path, session: Any, port: Input, images: np.ndarray) -> np.ndarray:
    """The first output, float32, of an open session for images float32 [N,3,*size] RGB 0..1.

    Raises:
        UserError: ONNX Runtime fails.
    """
    try:
        outputs = session.run(None, port.feed(images))
    except FAILURES as error:
        raise UserError(
            f"{path} cannot be run by ONNX Runtime with {list(images.shape)} ({reason(error)}): export it again, "
            "give another --imgsz if its size is free, or --set eval.batch=1 if memory is short"
        ) from error
    with np.errstate(over="ignore"):  # of float64; what is then infinite is refused with its place
        return np.asarray(outputs[0]).astype(np.float32, copy=False)


def open_model(
    path: Path, provider: str, said: Said | None = None, categories: Mapping[str, int] = OFFICIAL_IDS
) -> Model:
    """Opens an ONNX file and checks that its interface is that of a known contract.

    Args:
        path: the file, of ours, of Ultralytics' exporter or of another.
        provider: 'auto', 'cpu' or 'cuda'.
        said: what the user says of the file.
        categories: name -> id of the annotations that it is scored on, in the order of the classes.

    Raises:
        UserError: the file is missing or not ONNX, has another contract or class list, or the provider is unusable.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "is missing"
        raise UserError(
            f"{path} {what}: give the path of an ONNX file; 'make export' makes those of a run{only_seen()}"
        )
    try:
        model = _open(path, choose_provider(provider), said or Said(), categories)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a name or text in it is no UTF-8 ({reason(error)}): download it again") from error
    if model.batch is None and not model.takes_batches():
        log.warning("%s: its batch is free, but only one image can be run at a time: run one by one", model.label)
        model = replace(model, input=replace(model.input, batch=1))
    if model.input.type == "tensor(uint8)":
        log.info("%s: its input is uint8: it gets RGB from 0 to 255", model.label)
    return model


def _open(path: Path, provider: str, said: Said, categories: Mapping[str, int]) -> Model:
    refuse_foreign_data(path)
    session = open_session(path, provider, ort.SessionOptions())
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    port = read_input(path, session.get_inputs(), metadata, said)
    one_batch = np.zeros((port.batch or 1, 3, *port.size), np.float32)
    output = read_contract(
        path, session.get_outputs(), lambda: list(run(path, session, port, one_batch).shape), metadata, said
    )
    ids = category_ids(path, output, metadata, said, categories)
    return Model(path, session, port, output.contract, metadata, ids)


def open_session(path: Path, provider: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """Opens a session on `provider`, the name of an execution provider; sets threads and logging in `options`.

    Raises:
        UserError: ONNX Runtime cannot load the file, or uses another provider.
    """
    options.intra_op_num_threads = n_cores()
    # On a GPU errors only: without one the CUDA build warns about device discovery. On a CPU nothing: an error that
    # stops a run is raised as well, and its text, which may be a stranger's, becomes printable in our message.
    options.log_severity_level = 4 if provider == CPU else 3
    ort.set_default_logger_severity(options.log_severity_level)
    if provider != CPU:
        ort.preload_dlls()  # finds cuBLAS and cuDNN in torch's wheels without importing torch
    wanted: list[Any] = [(name, OPTIONS[name]) for name in FALL_BACKS[provider]]
    try:
        # Its fallback to the CPU would print the error, which may quote the file.
        fall_back: dict[str, Any] = {} if provider != CPU else {"enable_fallback": 0}
        session = ort.InferenceSession(str(path), options, providers=wanted, **fall_back)
    except FAILURES as error:
        raise UserError(
            f"{path} cannot be loaded by ONNX Runtime {ort.__version__} ({reason(error)}): "
            "download it, or export it again for this version"
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
        session.run(None, model.input.feed(images))
        profile = Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace")
    nodes: dict[str, list[str]] = {}
    for event in _events(model, profile):
        if event.get("cat") != "Node" or not event["name"].endswith(KERNEL_EVENT):
            continue
        node_name = event["name"].removesuffix(KERNEL_EVENT)
        facts = event["args"]
        nodes.setdefault(facts["provider"], []).append(f"{facts['op_name']} {node_name}")
    return nodes


def _events(model: Model, profile: str) -> list[dict[str, Any]]:
    """The events of a profile, one a line, without those of nodes whose names ONNX Runtime writes as no JSON."""
    events, n_unreadable = [], 0
    for line in profile.splitlines():
        try:
            events += json.loads(f"[{line.strip(' ,[]')}]")
        except ValueError:
            n_unreadable += 1
    if n_unreadable:
        log.warning("%s: odd names of nodes, %d lines of the profile cannot be read", model.label, n_unreadable)
    return events


def reason(error: BaseException) -> str:
    """The first line of an error of ONNX Runtime, which may quote the file: printable, and without its long middle.

    The middle is the signature of a C++ function; what is wrong stands at the end.
    """
    line = printable(str(error).strip().partition("\n")[0])
    if len(line) > 2 * N_REASON:
        line = f"{line[:N_REASON]} ... {line[-N_REASON:]}"
    return line or type(error).__name__


def choose_provider(wanted: str) -> str:
    """'auto' (CUDA if it can be used), 'cpu' or 'cuda' -> name of the execution provider.

    Raises a UserError if 'cuda' cannot be used.
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


def n_decoders(model: Model) -> int:
    """Threads that decode images: one a core if a GPU runs the model; else few, as ONNX Runtime needs the cores."""
    return max(1, n_cores() // 8) if model.provider == CPU else min(16, n_cores())


def describe_runtime(model: Model) -> dict[str, Any]:
    """Runtime and device of the model, for metrics.json.

    `nodes_on_cpu` are the nodes for which a GPU provider has no kernel; None if the provider is the CPU.
    """
    on_cpu = None
    if model.provider != CPU:
        images = np.zeros((model.batch or 1, 3, *model.size), np.float32)
        on_cpu = sorted(nodes_by_provider(model, images).get(CPU, []))
    if on_cpu:
        names = printable(", ".join(on_cpu))
        log.warning("%s: %d nodes run on the CPU: %s", model.path.name, len(on_cpu), names)
    return {
        "onnxruntime": ort.__version__,
        "provider": model.provider,
        "device": cpu_name() if model.provider == CPU else gpu_name(),
        "intra_op_threads": n_cores(),
        "n_nodes_on_cpu": None if on_cpu is None else len(on_cpu),
        "nodes_on_cpu": on_cpu,
    }
