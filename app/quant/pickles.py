"""Reads checkpoints that are pickles of whole networks, as Ultralytics publishes them, without executing any of it.

PyTorch's restricted unpickler (weights_only) builds tensors and plain values and refuses every other class. Here each
class that a file names is allowed under its name, and an `Inert` stands in its place.
"""

from __future__ import annotations

import io
import re
from typing import Any

import torch
from torch._weights_only_unpickler import get_globals_in_pkl

from app.core.config import UserError

ZIP_BEGIN = b"PK\3\4"
# Before version 1.6 of 2020 torch.save wrote no ZIP: magic number, protocol, system, object and names of storages,
# each a pickle. Of such files PyTorch's unpickler reads state_dicts, and refuses pickled networks.
N_LEGACY_PICKLES = 5
# What no network needs. Others are not executed either; these are refused, so that their user learns of it.
HOSTILE = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|importlib|runpy|code|ctypes|webbrowser|pickle|marshal|commands)\..*"
    r"|builtins\.(eval|exec|compile|open|__import__|input|breakpoint)"
)
MAX_MODULES = 20_000  # of a network; YOLOv10x has 1,100


class Inert:
    """Stands for an object of a class, or the result of a function, that a pickle names; runs nothing of it."""

    kind = ""  # the full name of the class
    state: Any = None  # what the pickle gives the object

    def __init__(self, *args: Any) -> None:
        pass

    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def unpickle(data: bytes, path: Any) -> Any:
    """Content of a file of torch.save: tensors on the CPU, plain values, and an `Inert` for everything else.

    Raises:
        UserError: it is cut off, damaged or no such file, or names what executes programs. The message names `path`.
    """
    try:
        names = _names(data)
        if hostile := sorted(filter(HOSTILE.fullmatch, names)):
            raise UserError(f"{path} names {hostile[0]}, which no network needs: refused, nothing was executed")
        stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch's reader and unpickler raise whatever a damaged file leads them to
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is cut off, damaged or another file"
        ) from error


def _names(data: bytes) -> set[str]:
    """Full names of the classes and functions of a file that PyTorch does not allow by itself."""
    file = io.BytesIO(data)
    if data.startswith(ZIP_BEGIN):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    names: set[str] = set()
    for _ in range(N_LEGACY_PICKLES):
        names |= get_globals_in_pkl(file)
    return names - {"collections.OrderedDict"}


def _stand_in(name: str) -> Any:
    """What the unpickler calls in place of the class or function of this name."""
    if name == "collections.defaultdict":  # entries are set into it
        return _default_dict
    return type("Inert", (Inert,), {"kind": name})


def _default_dict(*args: Any) -> dict[Any, Any]:
    return {}


def mapping(value: Any) -> dict[Any, Any]:
    """The value, if it is a dictionary, or the attributes of an `Inert`; else an empty dictionary."""
    value = value.state if isinstance(value, Inert) else value
    return value if isinstance(value, dict) else {}


def tensors_of(module: Inert) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a pickled module under the names of its state_dict."""
    tensors: dict[str, torch.Tensor] = {}
    waiting = [("", module)]
    for _ in range(MAX_MODULES):
        if not waiting:
            break
        prefix, part = waiting.pop()
        state = mapping(part)
        passing = state.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, tensor in mapping(state.get(group)).items():
                if isinstance(tensor, torch.Tensor) and name not in passing:
                    tensors[f"{prefix}{name}"] = tensor.detach()
        for name, child in mapping(state.get("_modules")).items():
            if isinstance(child, Inert):
                waiting.append((f"{prefix}{name}.", child))
    return tensors
