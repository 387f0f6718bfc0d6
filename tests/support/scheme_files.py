"""Scheme files of tests, and the built-in schemes replaced by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core import scheme
from app.core.scheme import Scheme

ShortRule = tuple[Any, ...]  # pattern, bits, the granularity where it is not channel, and the range where it is full


def entries(*rules: ShortRule) -> list[dict[str, Any]]:
    """The entries of a scheme file."""
    found = []
    for pattern, bits, *rest in rules:
        entry = {"pattern": pattern, "bits": bits, "why": f"a test's {pattern}"}
        if bits != "float":
            entry["granularity"] = rest[0] if rest else "channel"
        if len(rest) > 1:
            entry["range"] = rest[1]
        found.append(entry)
    return found


def scheme_of(*rules: ShortRule, name: str = "toy") -> Scheme:
    return Scheme.model_validate({"name": name, "rules": entries(*rules)})


def write_rules(file: Path, *rules: ShortRule) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(entries(*rules)), encoding="utf-8")
    return file


@contextmanager
def built_in(folder: Path, name: str, *rules: ShortRule) -> Iterator[None]:
    """Inside, the built-in schemes are this one; its file is written into `folder`."""
    write_rules(folder / f"{name}.yaml", *rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheme, "SCHEMES_DIR", folder)
        yield
