"""YAML of the user, and how one tree is laid over another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from app.core.errors import UserError

YAML_FAULTS = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)  # PyYAML 6 of !!int and such


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping; raises a UserError as `load_yaml`, or if the file holds something else."""
    tree = load_yaml(file)
    if not isinstance(tree, dict):
        raise UserError(f"{file} must be a mapping of sections, see conf/base.yaml")
    return tree


def load_yaml(file: Path) -> Any:
    """Reads a YAML file; raises a UserError if it cannot be read, is not YAML, or gives a key twice."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {file}: {error}") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key that a mapping gives twice is an error: the first value would be lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: Any = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"'{name}' stands in lines {lines[name]} and {line}: write it once")
            lines[name] = line
        return node


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: it is not YAML, gives a key twice, or a value is not what its tag says; the reason is one line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a safe loader
    except (yaml.YAMLError, *YAML_FAULTS) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A copy of `below` with the values of `above`: mappings merge key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        are_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if are_mappings else value
    return merged
