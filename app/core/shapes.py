"""Shapes of foreign JSON and YAML: which keys a reader takes, and of which type their values have to be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AllowInfNan, BaseModel, Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

M = TypeVar("M", bound=BaseModel)
# Dotted key -> type of its value, as pydantic checks it without conversion. "" is the tree itself; a key that ends in
# "?" may be missing.
Shape = Mapping[str, Any]
Count = Annotated[int, Field(ge=0, le=2**53)]
Id = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]  # of an image
Number = FiniteFloat
NumberOrNone = Annotated[float | None, AllowInfNan(False)]
Positive = Annotated[int, Field(gt=0, le=2**53)]
FolderName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
PathText = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[^\x00/]+$", max_length=255)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
N_SHOWN = 3  # misfits in a message
_ABSENT = object()  # the value of a key that is not there


def misfits(tree: Any, shape: Shape) -> list[str]:
    """What keeps a tree from having the shape, for a message; empty where nothing does."""
    missing, faults = [], []
    for dotted, kind in shape.items():
        key = dotted.removesuffix("?")
        value = value_at(tree, key, _ABSENT)
        if value is not _ABSENT:
            faults += _faults(value, key, kind)
        elif key == dotted:
            missing.append(key)
    if missing:
        return [f"lacks {', '.join(missing)}"]
    return [*faults[:N_SHOWN], "..."] if len(faults) > N_SHOWN else faults


def value_at(tree: Any, dotted: str, default: Any = None) -> Any:
    """The value of a dotted key, however broken the tree is."""
    for key in dotted.split(".") if dotted else []:
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def model_at(tree: Any, dotted: str, model: type[M]) -> M | None:
    """The value of a dotted key as a pydantic model; None where it is not one."""
    try:
        return model.model_validate(value_at(tree, dotted))
    except ValidationError:
        return None


def _faults(value: Any, dotted: str, kind: Any) -> list[str]:
    try:
        _checker(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(filter(None, [dotted, *map(str, first["loc"])])) or "the whole"
        return [f"{where}: {first['msg']}"]
    return []


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
