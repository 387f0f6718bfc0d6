"""The data stage: from a COCO folder to a checked YOLO view, a seeded choice of images, dataset file and provenance."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from app.coco.categories import listed_names
from app.coco.dataset import COCO_2017, Sources
from app.coco.layout import describe_source, find_sources
from app.coco.split import LEAST_SHARE
from app.core.config import BUILTIN_DATASET, Config, Data, UserError
from app.core.differences import WITHOUT_EFFECT, difference, shown
from app.core.files import read_json, sha256, write_json, write_text
from app.core.os_errors import explain_os_errors
from app.core.run import PROVENANCE_SHAPE, RunRoot, record_stage
from app.data.provenance import assemble, describe
from app.data.synthetic import VERSION, draw_coco_subset
from app.data.view import Indices, build_view, chosen, make_current, read_indices, view_dir

log = logging.getLogger(__name__)
SHAPE = {**PROVENANCE_SHAPE, "settings": dict[str, Any], "settings.coco_dir": str}
# What runs of earlier versions have not recorded.
NOT_YET: dict[str, Any] = {
    "strict": False, "train_images": None, "train_annotations": None, "val_images": None, "val_annotations": None
}  # fmt: skip
OTHER_RUN = "take another RUN=name, or start the run over with ARGS=--force"


def prepare(config: Config, run: RunRoot, force: bool, says_done: bool = True) -> None:
    """Writes dataset/coco.yaml, train.txt, val.txt and provenance.json of a run, and the view that all runs share.

    It never writes to the dataset. Images that have changed since they were checked are checked again, with `force`
    all of them; the view holds for all runs. Where nothing was to do it is silent, unless `says_done`.

    Raises:
        UserError: the dataset cannot be used, the run root was made with other data, or no space is left.
    """
    recorded = read_json(run.provenance, "data", SHAPE) if run.provenance.exists() and not force else None
    if recorded:
        old, new = {"data": recorded["settings"]}, {"data": config.data.model_dump()}
        if differences := difference(old, new, tuple(WITHOUT_EFFECT)):
            raise UserError(f"{run.root} was made with other data settings ({shown(differences)}): {OTHER_RUN}")
    provenance = make_ready(config.data, run, recorded, force)
    if provenance != recorded:
        log.info("data: %s", describe(provenance))
    elif says_done:
        log.info("data: done already (%s)", describe(provenance))


def prepared(run: RunRoot, given_dir: str = BUILTIN_DATASET) -> dict[str, Any]:
    """The content of provenance.json, for a stage that reads the view: what has gone of the view is built again.

    `given_dir` is data.coco_dir of the command: where the dataset is now, if it is no longer where it was.

    Raises:
        UserError: the data stage has not run, or the dataset is not the one that it has seen.
    """
    recorded = read_json(run.provenance, "data", SHAPE)
    try:
        data = Data.model_validate({**NOT_YET, **recorded["settings"]})
    except ValidationError as error:
        raise UserError(f"{run.provenance} was written by another version of this program: {OTHER_RUN}") from error
    if data.coco_dir != BUILTIN_DATASET:
        place = given_dir if has_moved(recorded, given_dir) else recorded["coco_dir"]
        data = data.model_copy(update={"coco_dir": place})
    return make_ready(data, run, recorded)


def has_moved(recorded: dict[str, Any], given_dir: str) -> bool:
    """Whether a dataset is no longer where it was, and the command says where it is; its hashes say if that is it."""
    is_drawn = BUILTIN_DATASET in (given_dir, recorded["settings"]["coco_dir"])
    return not is_drawn and not Path(recorded["coco_dir"]).is_dir()


def follow(run: RunRoot, given_dir: str) -> None:
    """Records where the dataset is, if it has moved, for a stage that reads images without the view."""
    if has_moved(read_json(run.provenance, "data", SHAPE), given_dir):
        prepared(run, given_dir)


def make_ready(data: Data, run: RunRoot, recorded: dict[str, Any] | None, force: bool = False) -> dict[str, Any]:
    """Makes the view current and writes what the run lacks; returns the content of provenance.json.

    `recorded` is what it was so far; the dataset may lie at another place now, if it is the same.
    """
    run.cache_dir.mkdir(parents=True, exist_ok=True)
    with explain_os_errors(run.cache_dir, "the labels of all of COCO take about 1 GiB in 123,000 files; make room"):
        coco_dir = find(data.coco_dir, run.cache_dir)
        sources = find_sources(coco_dir, data)
        digests = hash_annotations(sources)
        view = view_dir(run.cache_dir.resolve(), sources, digests)
        if force:
            build_view(view, sources, digests)
        indices = read_indices(view, sources) if force else make_current(view, sources, digests)
        tell_doubts(indices, data.strict, is_new=recorded is None)
        provenance = assemble(data, coco_dir, sources, indices, digests) | {"view_dir": str(view)}
        if recorded is None and not provenance["builtin"]:
            tell_layout(sources, coco_dir, provenance)
        if recorded:
            check_same_images(run, recorded, provenance)
            provenance = carried_over(recorded, provenance)
        write_dataset_files(run, view, indices, provenance)
        if provenance != recorded:
            write_json(run.provenance, provenance)
            record_stage(run, "data", {"coco_dir": str(coco_dir), "title": provenance["title"]})
    return provenance


def find(coco_dir: str, cache_dir: Path) -> Path:
    """As `locate`; the built-in dataset is drawn where it is missing."""
    place = locate(coco_dir, cache_dir)
    if coco_dir == BUILTIN_DATASET:
        draw_coco_subset(place)
    return place


def locate(coco_dir: str, cache_dir: Path) -> Path:
    """Absolute dataset folder: the drawn one for the word coco-subset, else `coco_dir` from the current folder."""
    if coco_dir == BUILTIN_DATASET:
        return cache_dir.resolve() / f"drawn-shapes-v{VERSION}"
    return Path(coco_dir).resolve()


def check_same_images(run: RunRoot, recorded: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Raises a UserError if the annotations or images are others than those that the run was made with."""
    for split, new in provenance["splits"].items():
        old = recorded["splits"][split]
        for key in ("annotation_sha256", "image_ids_sha256", "images_sha256"):
            if key in old and old[key] != new[key]:  # the last is not in a run of an earlier version
                raise UserError(
                    f"{run.root} was made with another {new['name']} of {provenance['coco_dir']} "
                    f"({key} {old[key][:8]} -> {new[key][:8]}): {OTHER_RUN}"
                )


def carried_over(recorded: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """The new provenance of a run with what it keeps of the old one: how the folder was named, where it lay before."""
    earlier = recorded.get("earlier_coco_dirs", [])
    if recorded["coco_dir"] != provenance["coco_dir"]:
        return provenance | {"earlier_coco_dirs": [*earlier, recorded["coco_dir"]]}
    settings = provenance["settings"] | {"coco_dir": recorded["settings"]["coco_dir"]}
    return provenance | {"settings": settings, "earlier_coco_dirs": earlier}


def tell_layout(sources: Sources, coco_dir: Path, provenance: dict[str, Any]) -> None:
    """Says once where the dataset's files were found, and which classes they have."""
    places = [f"{role}: {describe_source(source, coco_dir)}" for role, source in sources.items()]
    log.info("data: %s: %s", coco_dir, "; ".join(places))
    if provenance["title"] != COCO_2017:
        names = provenance["names"]
        log.info("data: %d classes: %s", len(names), listed_names(names))
    for name in provenance["left_out"]:
        log.info("data: category 0, '%s', is the unused supercategory of all others: left out", name)


def tell_doubts(indices: Indices, strict: bool, is_new: bool) -> None:
    """Warns of what is doubtful in the annotations, for a new run; with data.strict it is a UserError."""
    lines = [line for index in indices.values() for line in index["doubts"]]
    lines += images_in_both(indices)
    if lines and strict:
        raise UserError(f"{'; '.join(lines)}; to go on all the same, give --set data.strict=false")
    for line in lines if is_new else []:
        log.warning("warning: %s", line)


def images_in_both(indices: Indices) -> list[str]:
    """A line if more than a few images of val are images of train, under whatever names."""
    val = indices["val"]["images"]
    of_train = {entry["content"] for entry in indices["train"]["images"] if entry["content"]}
    repeated = [entry["file"] for entry in val if entry["content"] in of_train]
    if len(repeated) <= LEAST_SHARE * len(val):
        return []
    return [
        f"{len(repeated):,} of {len(val):,} val images are train images too (first: {repeated[0]}): AP on images that "
        "were trained on says nothing about others; keep the two apart"
    ]


def hash_annotations(sources: Sources) -> dict[str, str]:
    """SHA-256 of the annotation files, by 'train' and 'val'; raises a UserError if one may not be read."""
    try:
        return {role: sha256(source.annotation_file) for role, source in sources.items()}
    except PermissionError as error:
        raise UserError(f"{error.filename} may not be read by this user: change its permissions") from error


def write_dataset_files(run: RunRoot, view: Path, indices: Indices, provenance: dict[str, Any]) -> None:
    """Writes train.txt, val.txt and coco.yaml where they have another content, whoever wrote them."""
    dataset: dict[str, Any] = {"path": str(view)}
    texts = {}
    for split, facts in provenance["splits"].items():
        image_dir = view / "images" / facts["name"]
        entries = chosen(indices[split]["images"], facts["image_ids"])
        path = (run.provenance.parent / f"{split}.txt").resolve()
        texts[path] = "".join(f"{image_dir}/{entry['file']}\n" for entry in entries)
        dataset[split] = str(path)
    dataset["names"] = dict(enumerate(provenance["names"]))
    texts[run.dataset_yaml] = yaml.safe_dump(dataset, sort_keys=False)
    for path, text in texts.items():
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
