"""What tells two configurations apart, and which keys change nothing that a training computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from app.core.config import Config
from app.core.scheme import SCHEME, changed_rules, scheme_in
from app.core.start import SHOWN_DIGITS, WEIGHTS

# Keys and whole sections that do not change what a training computes, each with the reason. They are left out of
# `config_hash`, and an unfinished training can be resumed with other values of them.
WITHOUT_EFFECT = {
    "data.coco_dir": "The hashes of its annotations and of its images say which dataset it is, not its place.",
    **dict.fromkeys(
        ("data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations"),
        "As of data.coco_dir: the hashes say which images and annotations these are.",
    ),
    "data.strict": "It says whether a doubtful annotation file is refused.",
    "train.workers": "It chooses mosaic's partners, at random as before; a training may resume with another number.",
    "train.device": "It says where a training runs; a training may continue on other hardware, to within rounding.",
    "train.cache": "As of train.workers; images kept in RAM have the pixels of their files.",
    "train.save_every_s": "A resumed training equals an uninterrupted one, wherever its checkpoint was saved.",
    "train.save_period": "It only keeps copies of checkpoints.",
    "train.graph": "A graph computes what kernels one by one do, and BatchNorm's statistics to within rounding.",
    "train.kernels": "Its kernels compute what PyTorch's and Ultralytics' do, to within rounding.",
    "quant.fast_path": "Weights and gradients are bit-equal to those of plain Brevitas, by test.",
    "quant.teacher": "teacher.json has the hash of the checkpoint, which decides, and not its place.",
    "guard": "It says when a training that goes wrong stops, not what is computed until then.",
    "export": "Only the export stage reads it, after training.",
    "eval": "Only the eval stage reads it, after training.",
    "report": "Only the report stage reads it, after training.",
    "sensitivity": "Only the sensitivity stage reads it, after training.",
}


def flatten(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Plain values by dotted key, for tables: a scheme by its label, a checkpoint to start from by its hash.

    `quant` of fp16 is one key, with None.
    """
    flat: dict[str, Any] = {}
    for name, value in _tree(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    if isinstance(flat.get(SCHEME), dict):
        flat[SCHEME] = flat[SCHEME].get("name")
    if isinstance(flat.get(WEIGHTS), dict):
        flat[WEIGHTS] = f"sha256 {str(flat[WEIGHTS].get('sha256'))[:SHOWN_DIGITS]}"
    return flat


def _tree(config: Config | dict[str, Any]) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.model_dump(mode="json")


def difference(
    old: Config | dict[str, Any], new: Config | dict[str, Any], ignore: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """(old value, new value) by dotted key, where the two differ; `ignore` names keys and whole sections.

    Of two schemes with the same label the values are the rules that differ.
    """
    before, after = flatten(old), flatten(new)
    differences: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before | after):
        old_value, new_value = before.get(key), after.get(key)
        if old_value != new_value and not _is_named(key, ignore):
            differences[key] = (old_value, new_value)
    rules = changed_rules(scheme_in(_tree(old)), scheme_in(_tree(new)))
    if rules and SCHEME not in differences and not _is_named(SCHEME, ignore):
        differences[SCHEME] = rules
    return differences


def _is_named(key: str, names: Iterable[str]) -> bool:
    """Whether the dotted key, or its whole section, is among the names."""
    return key in names or key.split(".")[0] in names


def shown(differences: dict[str, tuple[Any, Any]]) -> str:
    """The result of `difference` as text for a message: 'key: old -> new, ...'."""
    return ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in differences.items())


def config_hash(config: Config) -> str:
    """SHA-256 (first 16 hex digits) over every key that changes what a training computes: all but WITHOUT_EFFECT."""
    flat = {key: value for key, value in flatten(config).items() if not _is_named(key, WITHOUT_EFFECT)}
    if config.quant:
        flat[SCHEME] = config.quant.scheme.sha256  # of its content, whatever the file's name and place
    if config.train.weights:
        flat[WEIGHTS] = config.train.weights.sha256
    else:
        del flat[WEIGHTS]  # the hash of a training from random weights is that from before there was this key
    if config.quant and not config.quant.distill:
        del flat["quant.distill"]  # the same
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]
