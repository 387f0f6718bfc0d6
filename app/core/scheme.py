"""Schemes: how many bits each layer gets, as an ordered list of rules in a YAML file; conf/schemes/ has the usual ones.

The label of a scheme is its file's name. What a scheme computes is its content: patterns, bits, granularity and range.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from app.core.errors import UserError, describe
from app.core.files import write_text
from app.core.labels import DISTILLED, SCORES_ENDING, Label
from app.core.mounts import in_container, only_seen
from app.core.shapes import model_at, value_at
from app.core.yaml_files import load_yaml, merge

SCHEME = "quant.scheme"
SCHEMES_DIR = Path(__file__).resolve().parents[2] / "conf" / "schemes"
BITS = range(2, 9)
FLOAT = "float"
MAX_NAME = 40  # characters: names of folders and files are made of it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
GRANULARITIES = {
    "channel": "one scale for each output channel, its abs-max over the largest code",
    "tensor": "one scale for the whole layer, its abs-max over the largest code",
    "decoupled": "the earlier recipe, 4 bits alone: one trained scale for the whole layer, apart from the codes' step",
}
NARROW, FULL = "narrow", "full"  # range of the codes: -7..7 or -8..7 at 4 bits
FORM = "a list of entries with pattern, bits, granularity and why, as conf/schemes/w4a16-mixed.yaml is"
log = logging.getLogger(__name__)


def _bits(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value != FLOAT and not (is_number and value in BITS):
        raise ValueError(f"choose {BITS[0]} to {BITS[-1]}, or {FLOAT}")
    return value


class Rule(BaseModel):
    """Layers whose name matches `pattern` (fnmatch) get `bits`, or stay in float; the first rule that matches wins.

    `granularity` says how many scales a layer has, see GRANULARITIES; None for a layer in float. `range` is that of the
    codes: narrow (-7..7 at 4 bits, the abs-max is 7 steps) or full (-8..7, the abs-max is 8 steps and, where it is
    positive, clipped to 7), Brevitas' narrow_range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    pattern: str = Field(min_length=1)
    bits: Annotated[int | Literal["float"], BeforeValidator(_bits)]
    granularity: Literal["channel", "tensor", "decoupled"] | None = None
    why: str
    range: Literal["narrow", "full"] = NARROW

    @model_validator(mode="after")
    def _has_a_granularity_with_bits(self) -> Rule:
        if (self.granularity is None) != (self.bits == FLOAT):
            takes = "takes no" if self.bits == FLOAT else "needs a"
            raise ValueError(f"bits {self.bits} {takes} granularity (channel or tensor)")
        if self.granularity == "decoupled" and self.bits != 4:
            raise ValueError("granularity decoupled is for 4 bits alone")
        if self.range == FULL and (self.bits == FLOAT or self.granularity == "decoupled"):
            raise ValueError("range full is for bits by channel or tensor")
        return self

    def __str__(self) -> str:
        bits = "in float" if self.bits == FLOAT else f"at {self.bits} bits by {self.granularity}"
        return f"{self.pattern} {bits}{', full range' if self.range == FULL else ''}"

    @property
    def content(self) -> list[Any]:
        """What the rule computes, for a hash; that of a narrow range is the one from before there were two."""
        return [self.pattern, self.bits, self.granularity, *([FULL] if self.range == FULL else [])]


def _name(name: str) -> str:
    """Checks a label, which becomes part of the names of folders and files."""
    labels = [Label(method, name) for method in ("qat", "ptq")]
    is_read_back = all(Label.parse(str(label)) == label for label in labels)
    if (
        not NAME.fullmatch(name)
        or len(name) > MAX_NAME
        or not is_read_back
        or name.endswith((SCORES_ENDING, DISTILLED))
    ):
        raise ValueError(
            f"the file's name '{name[:MAX_NAME]}' is the label of the scheme: use at most {MAX_NAME} letters, digits, "
            f"'.', '_' and '-', none of the endings -bn, -int4, -end2end, {DISTILLED} and {SCORES_ENDING}"
        )
    return name


class Scheme(BaseModel):
    """A table of rules under its label."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, AfterValidator(_name)]
    rules: tuple[Rule, ...] = Field(min_length=1)

    def __str__(self) -> str:
        return self.name

    @property
    def sha256(self) -> str:
        """Hash of what the rules compute; neither the file's place nor a reason is part of it."""
        content = [rule.content for rule in self.rules]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def has_trained_scales(self) -> bool:
        return any(rule.granularity == "decoupled" for rule in self.rules)


def builtin_names() -> list[str]:
    return sorted(file.stem for file in SCHEMES_DIR.glob("*.yaml"))


def find_scheme(value: Any) -> Any:
    """The value of quant.scheme as it is written -> the scheme; a scheme that is spelled out is left as it is.

    Raises:
        ValueError: neither the name of a built-in scheme nor a readable scheme file.
    """
    if isinstance(value, dict | Scheme):
        return value
    try:
        if is_file(value):
            return of_file(Path(value))
        if value in builtin_names():
            return read_scheme(SCHEMES_DIR / f"{value}.yaml")
    except UserError as error:
        raise ValueError(str(error)) from error
    raise ValueError(f"choose one of {', '.join(builtin_names())}, or name a file such as my.yaml")


def is_file(value: Any) -> bool:
    """Whether a value of quant.scheme names a file and not a built-in scheme."""
    return isinstance(value, str) and (value.endswith((".yaml", ".yml")) or "/" in value)


def of_file(file: Path) -> Scheme:
    """The scheme of a user's file.

    Raises:
        UserError: the file cannot be read, is no scheme, or has the name of a built-in scheme with another content.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist{only_seen()}: name a YAML file as those in conf/schemes/")
    scheme = read_scheme(file)
    namesakes = [name for name in builtin_names() if name.lower() == scheme.name.lower()]
    for name in namesakes:
        if read_scheme(SCHEMES_DIR / f"{name}.yaml").sha256 != scheme.sha256:
            raise UserError(f"{file} has the name of the built-in scheme {name} and other rules: rename the file")
    return scheme


def read_scheme(file: Path) -> Scheme:
    """Reads a scheme file; raises a UserError that lists every problem with its entry."""
    entries = load_yaml(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file} is no scheme: write {FORM}")
    try:
        return Scheme.model_validate({"name": file.stem, "rules": entries})
    except ValidationError as error:
        raise UserError(f"{file}: {'; '.join(_told(problem, entries) for problem in error.errors())}") from error


def _told(problem: Any, entries: list[dict[str, Any]]) -> str:
    """One problem of a scheme file, with the number and the pattern of its entry."""
    part, *within = problem["loc"]
    if part == "name":
        return describe({**problem, "loc": ()}, ())
    if not within:
        return f"it has no entry: write {FORM}"
    place, *keys = within
    told = describe({**problem, "loc": keys}, ())
    if problem["type"] == "missing":
        told = f"{keys[0]} is missing"
    if problem["type"] == "extra_forbidden":
        told = f"unknown key {keys[0]}, an entry has {', '.join(Rule.model_fields)}"
    return f"entry {place + 1} ({entries[place].get('pattern')}): {told}"


def keep_scheme(scheme: Scheme, folder: Path) -> None:
    """Writes a copy of the scheme file into a variant's folder, from where it can be read again under its label."""
    entries = [rule.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for rule in scheme.rules]
    write_text(_copy(folder, scheme.name), yaml.safe_dump(entries, sort_keys=False, width=120))


def kept_scheme(folder: Path, name: str) -> Scheme | None:
    """The scheme whose copy a variant's folder holds; None where there is none."""
    file = _copy(folder, name)
    return read_scheme(file) if file.exists() else None


def _copy(folder: Path, name: str) -> Path:
    return folder / "scheme" / f"{name}.yaml"


def with_kept_scheme(tree: dict[str, Any], run_root: Path | None) -> dict[str, Any]:
    """The tree of a configuration; in place of a scheme file that is gone it names the copy that the run keeps.

    Raises:
        UserError: in a container, which cannot tell a file that is gone from one that it does not see.
    """
    file = value_at(tree, SCHEME)
    if run_root is None or not is_file(file) or Path(file).exists():
        return tree
    folders = sorted(run_root.glob("*"), reverse=True)  # that of the training, qat-..., before those of ptq-...
    copies = [copy for folder in folders if (copy := _copy(folder, Path(file).stem)).exists()]
    if not copies:
        return tree
    copy = str(copies[0])
    if in_container():
        raise UserError(
            f"{file} does not exist{only_seen()}: give it as ARGS='--set quant.scheme=FILE', "
            f"or if it is gone the run's copy, {copy}"
        )
    log.warning("%s does not exist: the scheme is read from the run's copy, %s", file, copy)
    return merge(tree, {"quant": {"scheme": copy}})


def scheme_in(tree: dict[str, Any]) -> Scheme | None:
    """The scheme of a dumped configuration; None where it spells out none."""
    return model_at(tree, SCHEME, Scheme)


def changed_rules(old: Scheme | None, new: Scheme | None) -> tuple[str, str] | None:
    """The rules that only one of two schemes has, as texts; None where both compute the same, or one is not known."""
    if old is None or new is None or old.sha256 == new.sha256:
        return None
    before, after = list(map(str, old.rules)), list(map(str, new.rules))
    gone = [rule for rule in before if rule not in after]
    added = [rule for rule in after if rule not in before]
    if not (gone or added):  # the same rules in another order
        gone, added = before, after
    return f"{old} ({'; '.join(gone) or 'no such rule'})", f"{new} ({'; '.join(added) or 'no such rule'})"
