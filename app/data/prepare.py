"""The data stage: from a COCO folder to a checked YOLO view, a seeded choice of images, dataset file and provenance."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import yaml

from app.coco.annotations import NAMES
from app.coco.dataset import (
    ANNOTATIONS,
    BUILTIN_TITLE,
    COCO_2017,
    LAYOUT,
    SPLITS,
    annotation_path,
    coco_title,
    hash_ids,
)
from app.core.config import BUILTIN_DATASET, Config, Data, UserError, difference, shown
from app.core.files import explain_full_disk, read_json, sha256, write_json, write_text
from app.core.run import RunRoot, record_stage
from app.data.synthetic import VERSION, draw_coco_subset
from app.data.view import Entries, build_view, is_current, read_chosen, read_index, view_dir

log = logging.getLogger(__name__)
N_SHOWN_FAULTS = 5
OTHER_RUN = "take another RUN=name, or start the run over with ARGS=--force"


def prepare(config: Config, run: RunRoot, force: bool) -> None:
    """Writes dataset/coco.yaml, train.txt, val.txt and provenance.json of a run, and the view that all runs share.

    It never writes to the dataset. With `force` every image is checked again; the new view holds for all runs.

    Raises:
        UserError: the dataset cannot be used, the run root was made with other data, or no space is left.
    """
    recorded = read_json(run.provenance, "data") if run.provenance.exists() and not force else None
    coco_dir = locate(config.data.coco_dir, run.cache_dir)
    if recorded:
        check_same_settings(run, recorded, config.data, coco_dir)
    run.cache_dir.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(run.cache_dir, "the labels of all of COCO take about 1 GiB in 123,000 files; make room"):
        if config.data.coco_dir == BUILTIN_DATASET:
            draw_coco_subset(coco_dir)
        digests = hash_annotations(coco_dir)
        view = view_dir(run.cache_dir.resolve(), coco_dir, digests)
        if recorded and recorded["view_dir"] == str(view) and view.exists():
            log.info("data: done already (%s)", describe(recorded))
            return
        if force or not is_current(view, coco_dir):
            build_view(view, coco_dir, digests)
        provenance = assemble(config.data, coco_dir, view, digests)
        if recorded:
            check_same_images(run, recorded, provenance)
        write_dataset_files(run, view, provenance)
        record_stage(run, "data", {"coco_dir": str(coco_dir), "title": provenance["title"]})
    log.info("data: %s", describe(provenance))


def locate(coco_dir: str, cache_dir: Path) -> Path:
    """Absolute dataset folder: the built-in one for the word coco-subset, else `coco_dir` from the current folder."""
    if coco_dir == BUILTIN_DATASET:
        return cache_dir.resolve() / f"{BUILTIN_DATASET}-v{VERSION}"
    return Path(coco_dir).resolve()


def check_same_settings(run: RunRoot, recorded: dict[str, Any], data: Data, coco_dir: Path) -> None:
    """Refuses settings other than those that the run was made with.

    The same folder may be written in several ways, so folders are compared by their absolute paths.

    Raises:
        UserError: lists old -> new for every setting that has changed.
    """
    old, new = recorded["settings"], data.model_dump()
    if recorded["coco_dir"] == str(coco_dir):
        old = old | {"coco_dir": new["coco_dir"]}
    differences = difference({"data": old}, {"data": new})
    if differences:
        raise UserError(f"{run.root} was made with other data settings ({shown(differences)}): {OTHER_RUN}")


def check_same_images(run: RunRoot, recorded: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Refuses a dataset with other annotations or images than the run was made with; its place may have changed.

    Raises:
        UserError: names the split and the hash that differs.
    """
    for split, new in provenance["splits"].items():
        old = recorded["splits"][split]
        for key in ("annotation_sha256", "image_ids_sha256"):
            if old[key] != new[key]:
                raise UserError(
                    f"{run.root} was made with another {new['name']} of {provenance['coco_dir']} "
                    f"({key} {old[key][:8]} -> {new[key][:8]}): {OTHER_RUN}"
                )


def hash_annotations(coco_dir: Path) -> dict[str, str]:
    """SHA-256 of the annotation files, by the name of the split (train2017, val2017).

    Raises:
        UserError: the folder does not have COCO's layout, or an annotation file may not be read.
    """
    check_layout(coco_dir)
    try:
        return {name: sha256(annotation_path(coco_dir, name)) for name in SPLITS.values()}
    except PermissionError as error:
        raise UserError(f"{error.filename} may not be read by this user: change its permissions") from error


def check_layout(coco_dir: Path) -> None:
    """Raises a UserError if a folder of COCO's layout or an annotation file is missing."""
    if not coco_dir.is_dir():
        raise UserError(f"no COCO folder at {coco_dir}: give COCO_DIR=path, or run 'make download-coco'")
    for name in (*SPLITS.values(), ANNOTATIONS):
        if not (coco_dir / name).is_dir():
            raise UserError(
                f"{coco_dir} has no {name}/: it must hold {LAYOUT} as {COCO_2017} does; "
                "give COCO_DIR=path, or run 'make download-coco'"
            )
    for name in SPLITS.values():
        path = annotation_path(coco_dir, name)
        if not path.is_file():
            raise UserError(f"{path} is missing: unpack annotations_trainval2017.zip into {coco_dir}")


def assemble(data: Data, coco_dir: Path, view: Path, digests: dict[str, str]) -> dict[str, Any]:
    """The content of provenance.json: what the dataset is, and which of its images the run uses.

    Raises:
        UserError: broken images without data.skip_broken, or more images asked for than there are.
    """
    n_wanted = {"train": data.n_train, "val": data.n_val}
    splits = {}
    for split, name in SPLITS.items():
        entries = read_index(view, split)
        broken = [entry for entry in entries if entry["fault"]]
        if broken and not data.skip_broken:
            raise UserError(
                f"{len(broken):,} of {len(entries):,} images in {coco_dir / name} cannot be used: "
                f"{name_faults(broken)}; repair them, or go on without them with --set data.skip_broken=true"
            )
        sound = [entry for entry in entries if not entry["fault"]]
        used = choose(sound, n_wanted[split], split, data.seed)
        splits[split] = {
            "name": name,
            "annotation_file": str(annotation_path(coco_dir, name)),
            "annotation_sha256": digests[name],
            **count(entries, broken, used),
        }
    return {
        "title": title(data, splits),
        "coco_dir": str(coco_dir),
        "builtin": data.coco_dir == BUILTIN_DATASET,
        "view_dir": str(view),
        "seed": data.seed,
        "skip_broken": data.skip_broken,
        "settings": data.model_dump(),
        "splits": splits,
    }


def choose(sound: Entries, n_wanted: int | None, split: str, seed: int) -> Entries:
    """A seeded choice of `n_wanted` usable images, or all of them for None, in the order of their ids.

    Raises:
        UserError: fewer images are usable than wanted, or none.
    """
    if not sound:
        raise UserError(f"no image of {SPLITS[split]} can be used: repair the dataset")
    if n_wanted is None:
        return sound
    if n_wanted > len(sound):
        raise UserError(
            f"data.n_{split}={n_wanted}: {SPLITS[split]} has {len(sound):,} usable images; ask for at most as many"
        )
    all_ids = [entry["id"] for entry in sound]
    chosen = set(random.Random(seed).sample(all_ids, n_wanted))  # noqa: S311 - a reproducible choice, no secret
    return [entry for entry in sound if entry["id"] in chosen]


def count(entries: Entries, broken: Entries, used: Entries) -> dict[str, Any]:
    """Counts over a split for provenance.json, and the ids of its used images.

    `entries` are all images that the annotation file lists; `broken` and `used` are parts of them.
    """
    ids = [entry["id"] for entry in used]
    n_without_objects = len([entry for entry in used if entry["n_boxes"] == 0])
    return {
        "n_listed": len(entries),
        "n_images": len(used),
        "n_broken": len(broken),
        "broken": [{"file": entry["file"], "reason": entry["fault"]} for entry in broken],
        "n_annotations": total(used, "n_annotations"),
        "n_crowd": total(used, "n_crowd"),
        "n_degenerate_boxes": total(used, "n_degenerate"),
        "n_without_objects": n_without_objects,
        "subset": len(used) < len(entries) - len(broken),
        "image_ids_sha256": hash_ids(ids),
        "image_ids": ids if len(used) < len(entries) else None,
    }


def total(entries: Entries, key: str) -> int:
    return sum(entry[key] for entry in entries)


def name_faults(broken: Entries) -> str:
    """The first faults, each after its file name, for a message."""
    faults = [f"{entry['file']} {entry['fault']}" for entry in broken[:N_SHOWN_FAULTS]]
    if len(broken) > N_SHOWN_FAULTS:
        faults.append("...")
    return "; ".join(faults)


def title(data: Data, splits: dict[str, Any]) -> str:
    """The name of the dataset in a report; `splits` are those of provenance.json."""
    if data.coco_dir == BUILTIN_DATASET:
        return BUILTIN_TITLE
    n_listed = {facts["name"]: facts["n_listed"] for facts in splits.values()}
    return coco_title(n_listed)


def write_dataset_files(run: RunRoot, view: Path, provenance: dict[str, Any]) -> None:
    """Writes train.txt, val.txt and coco.yaml, and provenance.json last: if that exists, the others are complete."""
    dataset: dict[str, Any] = {"path": str(view)}
    for split, facts in provenance["splits"].items():
        image_dir = view / "images" / facts["name"]
        entries = read_chosen(view, split, facts["image_ids"])
        lines = [f"{image_dir / entry['file']}\n" for entry in entries]
        path = (run.provenance.parent / f"{split}.txt").resolve()
        write_text(path, "".join(lines))
        dataset[split] = str(path)
    dataset["names"] = dict(enumerate(NAMES))
    write_text(run.dataset_yaml, yaml.safe_dump(dataset, sort_keys=False))
    write_json(run.provenance, provenance)


def describe(provenance: dict[str, Any]) -> str:
    """One line for the log: 'COCO 2017, train2017: 118,287 images, 860,001 annotations (10,777 crowd); val2017: ...'"""
    parts = []
    for split in provenance["splits"].values():
        seeded = f" of {split['n_listed']:,}, seed {provenance['seed']}" if split["subset"] else ""
        skipped = f", {split['n_broken']} broken ones skipped" if split["n_broken"] else ""
        parts.append(
            f"{split['name']}: {split['n_images']:,} images{seeded}, {split['n_annotations']:,} annotations "
            f"({split['n_crowd']:,} crowd), {split['n_without_objects']:,} without objects{skipped}"
        )
    return f"{provenance['title']}, " + "; ".join(parts)
