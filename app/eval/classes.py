"""Which class of an ONNX file is which category of the annotations: by name, where the file or its user says names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from app.coco.categories import OFFICIAL_IDS, listed_names
from app.core.config import UserError
from app.core.files import printable
from app.eval.contract import N_BOX_ROWS, Output, Said, wanted_shape
from app.eval.metadata import names_of, shortened

SAY_COCO = "if its classes are COCO's 80 in their order all the same, say so with --names conf/coco.names"
SAY_OWN = "if they mean the same, say so with --names FILE: the annotations' name of each of its classes, one a line"
log = logging.getLogger(__name__)


def category_ids(
    path: Path, output: Output, metadata: Mapping[str, str], said: Said, categories: Mapping[str, int]
) -> list[int | None]:
    """The category id of every class of a file; None for a class that the annotations do not list.

    `categories` are name -> id of the annotations, in the order of the classes. What the user says of names outweighs
    the metadata. A file that keeps to our contract and names no classes has those of the annotations.

    Raises:
        UserError: the names cannot be read, do not fit the output, or are others than those of the annotations; or a
            file of another program names none.
    """
    remedy = SAY_COCO if categories == OFFICIAL_IDS else SAY_OWN
    try:
        names = said.names or names_of(metadata)
    except UserError as error:
        raise UserError(f"{path}: metadata 'names' cannot be read ({error}): {remedy}") from error
    source = "--names" if said.names else "metadata 'names'"
    if names is None:
        if "contract" not in metadata:
            raise UserError(f"{path}: its metadata name no classes: {remedy}")
        names, source = list(categories), "the annotations' categories"
    has_other_shape = output.n_classes not in (None, len(names))
    if has_other_shape and names == list(categories):
        wanted = wanted_shape(output.contract, len(names))
        raise UserError(f"{path}: its output has {output.n_classes:,} classes, {wanted}")
    only_here, only_there = _differences(names, categories)
    if has_other_shape or (only_here and only_there):  # another spelling, or another model
        raise UserError(_others(path, names, categories, source))
    if only_here:
        log.info(
            "%s: %d of its %d classes are not in the annotations, their detections are left out: %s",
            printable(path.name), len(only_here), len(names), shortened(listed_names(only_here)),
        )  # fmt: skip
    if only_there:
        log.warning(
            "%s: it has no class for %d of the %d categories of the annotations, whose AP is 0: %s",
            printable(path.name), len(only_there), len(categories), shortened(listed_names(only_there)),
        )  # fmt: skip
    return [categories.get(name) for name in names]


def without_unlisted(output: np.ndarray, contract: str, ids: Sequence[int | None]) -> np.ndarray:
    """The output with score 0 for classes that are not scored: they take no place among the best detections.

    The graph of an end2end file has chosen already.
    """
    rows = [N_BOX_ROWS + index for index, category_id in enumerate(ids) if category_id is None]
    if not rows or contract == "end2end":
        return output
    output = output.copy()
    output[:, rows] = 0
    return output


def _differences(names: list[str], categories: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The names that only the file has, and those that only the annotations have."""
    only_here = [name for name in names if name not in categories]
    return only_here, [name for name in categories if name not in names]


def _others(path: Path, names: list[str], categories: Mapping[str, int], source: str) -> str:
    """The message about names that are not those of the annotations."""
    if categories == OFFICIAL_IDS:
        where = _first_difference(names, categories)
        return f"{path}: {source} are not the 80 COCO classes in their order ({where}): another model; {SAY_COCO}"
    only_here, only_there = (shortened(listed_names(only)) for only in _differences(names, categories))
    where = f"{len(names):,}, only there {only_here or '-'}; only in the annotations {only_there or '-'}"
    return f"{path}: {source} are not the {len(categories):,} categories of the annotations ({where}); {SAY_OWN}"


def _first_difference(names: list[str], categories: Mapping[str, int]) -> str:
    """The first class in which names differ from COCO's."""
    for number, (name, official) in enumerate(zip(names, categories, strict=False)):
        if name != official:
            return f"class {number} is {shortened(name)}, in COCO {official}"
    return f"there are {len(names):,}"
