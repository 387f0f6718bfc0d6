"""Configuration: typed, frozen, unknown keys rejected. load = base + hyp.scratch <- variant <- overlays <- --set."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from app.core.labels import BASELINE, Label

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
BUILTIN_DATASET = "coco-subset"
VARIANTS = ("fp16", "qat")
DEVICES = r"^(auto|cpu(,cpu)*|\d+(,\d+)*)$"
# Keys and whole sections that do not change what a training computes, each with the reason. They are left out of
# `config_hash`, and an unfinished training goes on with other values of them.
WITHOUT_EFFECT = {
    "train.workers": "Every image draws from a random stream of its own, whichever loader process reads it.",
    "train.device": "It says where a training runs; a training may continue on other hardware, to within rounding.",
    "train.cache": "Images kept in RAM have the pixels of their files.",
    "train.save_every_s": "A resumed training equals an uninterrupted one, wherever its checkpoint was saved.",
    "train.save_period": "It only keeps copies of checkpoints.",
    "train.graph": "A CUDA graph launches the kernels that would be launched one by one.",
    "quant.fast_path": "Weights and gradients are bit-equal to those of plain Brevitas, by test.",
    "guard": "It says when a training that goes wrong stops, not what is computed until then.",
    "export": "Only the export stage reads it, after training.",
    "eval": "Only the eval stage reads it, after training.",
    "report": "Only the report stage reads it, after training.",
}
MACHINE_KEYS = tuple(key for key in WITHOUT_EFFECT if "." in key)  # the single keys: how a training is computed


class UserError(Exception):
    """A mistake the user can mend: one line that names the thing and the remedy; exit code 2."""


class Section(BaseModel):
    """Base of all sections: frozen, and a key that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    coco_dir: str
    n_train: int | None = Field(gt=0)
    n_val: int | None = Field(gt=0)
    seed: int = Field(ge=0)
    skip_broken: bool


class Train(Section):
    epochs: int = Field(gt=0)
    batch: int = Field(gt=0)
    imgsz: int = Field(ge=32, multiple_of=32)
    seed: int = Field(ge=0)
    deterministic: bool
    amp: bool
    workers: int = Field(ge=0)
    device: Annotated[str, BeforeValidator(str)] = Field(pattern=DEVICES)  # YAML reads 0 as a number
    cache: bool
    graph: bool
    bn_batches: int = Field(ge=0)
    val_every: int = Field(gt=0)
    save_every_s: float = Field(gt=0)
    save_period: int = Field(ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    ema_tau: float = Field(gt=0)


class Hyp(Section):
    """Arguments of Ultralytics' trainer that make up the recipe; names and meaning are Ultralytics' own."""

    optimizer: Literal["SGD", "AdamW"]
    lr0: float = Field(gt=0)
    lrf: float = Field(gt=0, le=1)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    warmup_epochs: float = Field(ge=0)
    warmup_momentum: float = Field(ge=0, lt=1)
    warmup_bias_lr: float = Field(ge=0)
    hsv_h: float = Field(ge=0, le=1)
    hsv_s: float = Field(ge=0, le=1)
    hsv_v: float = Field(ge=0, le=1)
    degrees: float = Field(ge=0, le=180)
    translate: float = Field(ge=0, le=1)
    scale: float = Field(ge=0, lt=1)
    shear: float = Field(ge=0, le=180)
    perspective: float = Field(ge=0, le=0.001)
    flipud: float = Field(ge=0, le=1)
    fliplr: float = Field(ge=0, le=1)
    mosaic: float = Field(ge=0, le=1)
    mixup: float = Field(ge=0, le=1)
    copy_paste: float = Field(ge=0, le=1)
    close_mosaic: int = Field(ge=0)
    nbs: int = Field(gt=0)


class Quant(Section):
    scheme: Literal["w4a16", "w4a16-mixed", "w8a16", "w4a16-dfl", "w4a16-per-tensor", "w4a16-decoupled"]
    fast_path: bool
    learned_scale: bool
    warmup_share: float = Field(ge=0, lt=1)
    warmup_bits: Literal["float", 8]
    warmup_from: str | None
    averaged_scales: bool
    dampening: float = Field(ge=0)
    freeze_threshold: float = Field(ge=0, lt=1)
    freeze_momentum: float = Field(gt=0, le=1)
    correction_epochs: Literal[0, 1]
    correction_lr: float = Field(gt=0)

    @model_validator(mode="after")
    def _only_a_float_warmup_is_fp16(self) -> Quant:
        if self.warmup_from and not (self.warmup_share and self.warmup_bits == "float"):
            raise ValueError("warmup_from takes warmup_bits=float and a warmup_share: it is an FP16 training's epochs")
        return self

    @model_validator(mode="after")
    def _only_decoupled_scales_are_left_out(self) -> Quant:
        if not self.averaged_scales and self.scheme != "w4a16-decoupled":
            raise ValueError(
                "averaged_scales=false is for scheme w4a16-decoupled: no other has trained scales to leave out"
            )
        return self

    def without_options(self) -> Quant:
        """The scheme alone, computed by plain Brevitas, with every option off that changes a training."""
        off = {"learned_scale": False, "averaged_scales": True, "dampening": 0.0, "freeze_threshold": 0.0}
        no_more_epochs = {"warmup_share": 0.0, "warmup_from": None, "correction_epochs": 0}
        return self.model_copy(update={"fast_path": False, **off, **no_more_epochs})


class Guard(Section):
    collapse: Literal["off", "warn", "stop"]
    share: float = Field(gt=0, lt=1)
    divergence: Literal["off", "warn", "stop"]
    n_validations: int = Field(gt=0)
    max_rollbacks: int = Field(ge=0)


class Export(Section):
    opset: Literal[13, 14, 15, 16, 17, 18]
    dynamic: bool
    contracts: Annotated[list[Literal["raw", "end2end"]], Field(min_length=1)]
    optimize: bool


class Eval(Section):
    provider: Literal["auto", "cpu", "cuda"]
    batch: int = Field(gt=0)
    conf: float = Field(ge=0, lt=1)
    max_det: int = Field(gt=0)
    max_images: int | None = Field(gt=0)
    latency_warmup: int = Field(ge=0)
    latency_runs: int = Field(gt=0)


class Report(Section):
    min_ap50: float | None = Field(ge=0, le=1)
    min_share_of_best: float = Field(ge=0, le=1)
    gallery_images: int = Field(ge=0)
    gallery_seed: int = Field(ge=0)


class Config(Section):
    """The resolved configuration of one variant. `quant` is None for fp16."""

    variant: Literal["fp16", "qat"]
    model: str = Field(pattern=r"^yolov10[nsmblx]\.yaml$")
    data: Data
    train: Train
    hyp: Hyp
    quant: Quant | None
    guard: Guard
    export: Export
    eval: Eval
    report: Report

    @property
    def label(self) -> str:
        """Name of the variant's folder in the run root: fp16 or qat-<scheme>."""
        return str(Label("qat", self.quant.scheme) if self.quant else BASELINE)

    @property
    def n_warmup_epochs(self) -> int:
        """Epochs at quant.warmup_bits, before those at the bits of the scheme; what they score is not the result."""
        return int(self.quant.warmup_share * self.train.epochs) if self.quant else 0

    @property
    def warmup_from(self) -> Path | None:
        """Checkpoint of the FP16 training whose epochs are the warm-up; None: it is trained here, or there is none."""
        return Path(self.quant.warmup_from) if self.quant and self.quant.warmup_from else None


def load(variant: str, overlays: list[Path] | None = None, sets: list[str] | None = None) -> Config:
    """Resolves the configuration of one variant.

    Args:
        variant: 'fp16' or 'qat'.
        overlays: YAML files laid over the defaults, in order.
        sets: 'key=value' strings with dotted keys and YAML values, applied last.

    Raises:
        UserError: unknown key or value, unreadable file; the message lists every problem.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant '{variant}': choose one of {', '.join(VARIANTS)}")
    layers = [CONF_DIR / name for name in ("base.yaml", "hyp.scratch.yaml", f"{variant}.yaml")]
    tree: dict[str, Any] = {}
    for file in [*layers, *(overlays or [])]:
        tree = merge(tree, read_yaml(file))
    for item in sets or []:
        tree = merge(tree, parse_set(item))
    config = validate(tree)
    return config.model_copy(update={"quant": None}) if variant == "fp16" else config


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping (safe_load); an unreadable file or one that is no mapping is a UserError."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {file}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file} must be a mapping of sections, see conf/base.yaml")
    return tree


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lays one tree over another: mappings merge key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_set(item: str) -> dict[str, Any]:
    """'train.epochs=3' -> {'train': {'epochs': 3}}; the value is YAML."""
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise UserError(f"--set {item}: write it as key=value, for example --set train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {item}: the value is not valid YAML") from error
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def validate(tree: dict[str, Any]) -> Config:
    """Tree -> Config; all problems together in one UserError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise UserError(f"configuration: {'; '.join(problems)}") from error


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # a rule of ours over a whole section
        return f"{key}: {problem['ctx']['error']}"
    if problem["type"] != "extra_forbidden":
        return f"{key} = {problem['input']!r}: {problem['msg']}"
    close = difflib.get_close_matches(key, sorted(known_keys()), n=1)
    advice = f"did you mean {close[0]}?" if close else "see conf/base.yaml for all keys"
    return f"unknown key {key}, {advice}"


def known_keys() -> set[str]:
    """All dotted keys of Config, sections included."""
    keys = set(Config.model_fields)
    for section in (Data, Train, Hyp, Quant, Guard, Export, Eval, Report):
        keys |= {f"{section.__name__.lower()}.{field}" for field in section.model_fields}
    return keys


def flatten(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Dotted keys to plain values, for differences and tables; `quant` of fp16 is one key with value None."""
    flat: dict[str, Any] = {}
    tree = config if isinstance(config, dict) else config.model_dump(mode="json")
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def difference(
    old: Config | dict[str, Any], new: Config | dict[str, Any], ignore: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new); `ignore` names keys and whole sections."""
    before, after = flatten(old), flatten(new)
    differences = {}
    for key in sorted(before | after):
        values = before.get(key), after.get(key)
        if values[0] != values[1] and not _is_named(key, ignore):
            differences[key] = values
    return differences


def _is_named(key: str, names: Iterable[str]) -> bool:
    """Whether the dotted key, or its whole section, is among the names."""
    return key in names or key.split(".")[0] in names


def shown(differences: dict[str, tuple[Any, Any]]) -> str:
    """What `difference` gave, for a message."""
    return ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in differences.items())


def config_hash(config: Config) -> str:
    """SHA-256 (first 16 hex digits) over every key that changes what a training computes: all but WITHOUT_EFFECT."""
    flat = {key: value for key, value in flatten(config).items() if not _is_named(key, WITHOUT_EFFECT)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `validate(yaml.safe_load(...))` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
