"""UserError, and a configuration's problems in the user's words."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

MIN_SIMILARITY = 0.7  # of two names, for "did you mean"
_SHORT = reprlib.Repr()  # of values in a message, however long or deep they are
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line that names the cause and the remedy; exit code 2."""


def describe(problem: Any, known_keys: Iterable[str]) -> str:
    """One problem of a pydantic ValidationError; `known_keys` are dotted, sections included."""
    names = [str(part) for part in problem["loc"]]
    key, value = ".".join(names), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key or repr(key)}, {_advice(names, sorted(known_keys))}"
    if problem["type"] != "value_error":
        return f"{key} = {_SHORT.repr(value)}: {problem['msg']}"
    reason = problem["ctx"]["error"]  # raised by a validator of this file, for one value or for a section
    if not names:
        return str(reason)
    return f"{key}: {reason}" if isinstance(value, dict) else f"{key} = {_SHORT.repr(value)}: {reason}"


def _advice(names: list[str], keys: list[str]) -> str:
    """What may be meant by an unknown key, given as the names on the way to it."""
    dotted = next((name for name in names if "." in name), None)
    if dotted is not None:
        section, _, key = dotted.partition(".")
        return f"write a key below its section: '{section}:', and indented in the next line '{key}: ...'"
    section = names[0] if len(names) > 1 else ""
    in_section = [key for key in keys if key.rpartition(".")[0] == section]
    for candidates in (in_section, keys):
        by_name = {key.rpartition(".")[2]: key for key in candidates}
        if close := difflib.get_close_matches(names[-1], by_name, n=1, cutoff=MIN_SIMILARITY):
            return f"did you mean {by_name[close[0]]}?"
    return "see conf/base.yaml for all keys"
