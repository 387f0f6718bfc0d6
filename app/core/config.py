"""The configuration: typed and frozen sections, which reject unknown keys.

`load` merges conf/base.yaml and conf/hyp.scratch.yaml, the variant's file, the user's overlays, and --set; a later one
overrides an earlier one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.core.errors import UserError, describe
from app.core.labels import DISTILLED, FP16, Label
from app.core.scheme import Scheme, find_scheme, with_kept_scheme
from app.core.start import Start, check_path, find_start, path_or_none, with_known_start
from app.core.yaml_files import merge, parse_yaml, read_yaml

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
BUILTIN_DATASET = "coco-subset"
VARIANTS = ("fp16", "qat")
MAX_SEED = 2**32 - 1  # NumPy's largest
DEVICES = re.compile(r"auto|cpu(,cpu)*|[0-9]{1,4}(,[0-9]{1,4})*")
MODELS = tuple(f"yolov10{size}.yaml" for size in "nsmblx")


class IsPath:
    """Marks a field whose value is a path: --set takes its text as it is, whatever YAML would make of it."""


def _device(value: Any) -> str:
    """train.device as text; YAML reads 0 as a number."""
    if not DEVICES.fullmatch(str(value)):
        raise ValueError("choose auto, cpu, or the numbers of GPUs such as 0 or 0,1")
    return str(value)


def _model(value: Any) -> str:
    if value not in MODELS:
        raise ValueError(f"choose one of {', '.join(MODELS)}")
    return value


PathOrNone = Annotated[str | None, IsPath(), BeforeValidator(path_or_none)]


class Section(BaseModel):
    """Base of all sections: frozen, and a key that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    coco_dir: Annotated[str, IsPath(), BeforeValidator(check_path)]
    train_images: PathOrNone
    train_annotations: PathOrNone
    val_images: PathOrNone
    val_annotations: PathOrNone
    n_train: int | None = Field(gt=0)
    n_val: int | None = Field(gt=0)
    seed: int = Field(ge=0, le=MAX_SEED)
    skip_broken: bool
    strict: bool


class Train(Section):
    weights: Annotated[Start | None, IsPath(), BeforeValidator(find_start)]
    epochs: int = Field(gt=0)
    batch: int = Field(gt=0)
    imgsz: int = Field(ge=32, multiple_of=32)
    seed: int = Field(ge=0, le=MAX_SEED)
    deterministic: bool
    amp: bool
    workers: int = Field(ge=0)
    device: Annotated[str, BeforeValidator(_device)]
    cache: bool
    graph: bool
    kernels: bool
    bn_batches: int = Field(ge=0)
    val_every: int = Field(gt=0)
    save_every_s: float = Field(gt=0)
    save_period: int = Field(ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    ema_tau: float = Field(gt=0)


class Hyp(Section):
    """Arguments of Ultralytics' trainer that make up the recipe, with Ultralytics' names and meanings."""

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
    copy_paste: float
    close_mosaic: int = Field(ge=0)
    nbs: int = Field(gt=0)

    @field_validator("copy_paste")
    @classmethod
    def _only_outlines_can_be_pasted(cls, share: float) -> float:
        if share:
            raise ValueError("it pastes objects along their outlines, and the labels are boxes: 0 alone is possible")
        return share


class Quant(Section):
    scheme: Annotated[Scheme, IsPath(), BeforeValidator(find_scheme)]
    fast_path: bool
    learned_scale: bool
    warmup_share: float = Field(ge=0, lt=1)
    warmup_bits: Literal["float", 8]
    warmup_from: PathOrNone
    averaged_scales: bool
    dampening: float = Field(ge=0)
    freeze_threshold: float = Field(ge=0, lt=1)
    freeze_momentum: float = Field(gt=0, le=1)
    correction_epochs: Literal[0, 1]
    correction_lr: float = Field(gt=0)
    distill: float = Field(ge=0)
    teacher: PathOrNone

    @model_validator(mode="after")
    def _only_a_float_warmup_is_fp16(self) -> Quant:
        if self.warmup_from and not (self.warmup_share and self.warmup_bits == "float"):
            raise ValueError("warmup_from takes warmup_bits=float and a warmup_share: it is an FP16 training's epochs")
        return self

    @model_validator(mode="after")
    def _only_decoupled_scales_are_left_out(self) -> Quant:
        if not self.averaged_scales and not self.scheme.has_trained_scales:
            raise ValueError(
                "averaged_scales=false is for scheme w4a16-decoupled: no other has trained scales to leave out"
            )
        return self

    @model_validator(mode="after")
    def _only_a_distillation_has_a_teacher(self) -> Quant:
        if self.teacher and not self.distill:
            raise ValueError("teacher takes a distill above 0: it is the weight of the teacher's loss")
        return self

    def without_options(self) -> Quant:
        """The scheme alone: plain Brevitas layers, and every option off that changes a training."""
        off: dict[str, Any] = {"fast_path": False, "learned_scale": False, "averaged_scales": True}
        off |= {"dampening": 0.0, "freeze_threshold": 0.0}
        off |= {"warmup_share": 0.0, "warmup_from": None, "correction_epochs": 0, "distill": 0.0, "teacher": None}
        return self.model_copy(update=off)


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
    gallery_seed: int = Field(ge=0, le=MAX_SEED)


class Sensitivity(Section):
    images: int = Field(gt=0)
    images_other_bits: int = Field(gt=0)
    bn_images: int = Field(gt=1)
    batch_images: int = Field(gt=0)
    choice_seed: int = Field(ge=0, le=MAX_SEED)
    measure: Literal["shift", "loss"]
    random_schemes: int = Field(ge=0)
    against: list[str]


class Config(Section):
    """The resolved configuration of one variant. `quant` is None for fp16."""

    variant: Literal["fp16", "qat"]
    model: Annotated[str, BeforeValidator(_model)]
    data: Data
    train: Train
    hyp: Hyp
    quant: Quant | None
    guard: Guard
    export: Export
    eval: Eval
    report: Report
    sensitivity: Sensitivity

    @model_validator(mode="after")
    def _qat_has_a_scheme(self) -> Config:
        if self.variant == "qat" and self.quant is None:
            raise ValueError("quant: the qat variant needs this section, see conf/base.yaml")
        return self

    @property
    def label(self) -> str:
        """Name of the variant's folder in the run root: fp16, qat-<scheme> or qat-<scheme>-distilled."""
        if self.quant is None:
            return str(FP16)
        return str(Label("qat", self.quant.scheme.name + (DISTILLED if self.quant.distill else "")))

    @property
    def model_name(self) -> str:
        """Name of the architecture, as files bear it: yolov10m."""
        return Path(self.model).stem

    @property
    def n_quant_warmup_epochs(self) -> int:
        """Number of first epochs, at quant.warmup_bits; only the later ones, at the scheme's bits, can be the best."""
        return int(self.quant.warmup_share * self.train.epochs) if self.quant else 0

    @property
    def warmup_from(self) -> Path | None:
        """Checkpoint of an FP16 training that replaces the warm-up epochs; None: this training runs them, if any."""
        return Path(self.quant.warmup_from) if self.quant and self.quant.warmup_from else None


SECTIONS = (Data, Train, Hyp, Quant, Guard, Export, Eval, Report, Sensitivity)


def load(
    variant: str, overlays: list[Path] | None = None, sets: list[str] | None = None, run_root: Path | None = None
) -> Config:
    """Resolves the configuration of one variant.

    Args:
        variant: 'fp16' or 'qat'.
        overlays: YAML files that override the defaults, in this order.
        sets: 'key=value' strings with dotted keys and YAML values, applied last.
        run_root: folder of the run, whose copy of a scheme file, or hash of a checkpoint to start from, is taken where
            the file is gone.

    Raises:
        UserError: an unknown key, a wrong value or an unreadable file; the message lists every problem.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant '{variant}': choose one of {', '.join(VARIANTS)}")
    layers = [CONF_DIR / name for name in ("base.yaml", "hyp.scratch.yaml", f"{variant}.yaml")]
    tree: dict[str, Any] = {}
    for file in [*layers, *(overlays or [])]:
        tree = merge(tree, read_yaml(file))
    for item in sets or []:
        tree = merge(tree, parse_set(item))
    if tree["variant"] != variant:
        raise UserError(f"variant={tree['variant']}: this is no setting, the stage or --variant {variant} says it")
    config = validate(with_known_start(with_kept_scheme(tree, run_root), run_root))
    return config.model_copy(update={"quant": None}) if variant == "fp16" else config


def parse_set(item: str) -> dict[str, Any]:
    """'train.epochs=3' -> {'train': {'epochs': 3}}; the value is YAML, but a path is the text as it is."""
    key, separator, text = item.partition("=")
    names = key.strip().split(".")
    if not separator or not key:
        raise UserError(f"--set {item}: write it as key=value, for example --set train.epochs=3")
    try:
        value = text if _is_path(names) else parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {item}: the value is not valid YAML") from error
    tree: Any = value
    for part in reversed(names):
        tree = {part: tree}
    return tree


def _is_path(names: list[str]) -> bool:
    """Whether the value of this key is a path."""
    fields = {section.__name__.lower(): section.model_fields for section in SECTIONS}
    field = fields.get(names[0], {}).get(names[-1]) if len(names) == 2 else None
    return field is not None and any(isinstance(mark, IsPath) for mark in field.metadata)


def validate(tree: dict[str, Any]) -> Config:
    """Tree of plain values -> Config; raises a UserError that lists all unknown keys and wrong values."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [describe(problem, known_keys()) for problem in error.errors()]
        raise UserError(f"configuration: {'; '.join(problems)}") from error


def known_keys() -> set[str]:
    """All dotted keys of Config, sections included."""
    keys = set(Config.model_fields)
    for section in SECTIONS:
        keys |= {f"{section.__name__.lower()}.{field}" for field in section.model_fields}
    return keys


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `validate(yaml.safe_load(...))` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
