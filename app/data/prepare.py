"""The data stage: COCO folder -> checked YOLO view, seeded choice of images, dataset file and provenance."""

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
    """Makes dataset/coco.yaml, train.txt, val.txt and provenance.json of a run; the view is shared by all runs.

    Never writes to the dataset. With `force` every image is checked again, for all runs.

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
    """Absolute dataset folder; the word coco-subset means the built-in one, relative paths the current folder."""
    if coco_dir == BUILTIN_DATASET:
        return cache_dir.resolve() / f"{BUILTIN_DATASET}-v{VERSION}"
    return Path(coco_dir).resolve()


def check_same_settings(run: RunRoot, recorded: dict[str, Any], data: Data, coco_dir: Path) -> None:
    """A UserError that lists old -> new where a setting has changed; one folder may be named in several ways."""
    old, new = recorded["settings"], data.model_dump()
    if recorded["coco_dir"] == str(coco_dir):
        old = old | {"coco_dir": new["coco_dir"]}
    if differences := difference({"data": old}, {"data": new}):
        raise UserError(f"{run.root} was made with other data settings ({shown(differences)}): {OTHER_RUN}")


def check_same_images(run: RunRoot, recorded: dict[str, Any], provenance: dict[str, Any]) -> None:
    """A run whose folder or view has moved goes on; one whose dataset has changed does not."""
    for split, new in provenance["splits"].items():
        old = recorded["splits"][split]
        for key in ("annotation_sha256", "image_ids_sha256"):
            if old[key] != new[key]:
                raise UserError(
                    f"{run.root} was made with another {new['name']} of {provenance['coco_dir']} "
                    f"({key} {old[key][:8]} -> {new[key][:8]}): {OTHER_RUN}"
                )


def hash_annotations(coco_dir: Path) -> dict[str, str]:
    """Name of a split (train2017, val2017) -> SHA-256 of its annotation file.

    Raises:
        UserError: the folder does not have COCO's layout, or an annotation file may not be read.
    """
    check_layout(coco_dir)
    try:
        return {name: sha256(annotation_path(coco_dir, name)) for name in SPLITS.values()}
    except PermissionError as error:
        raise UserError(f"{error.filename} may not be read by this user: change its permissions") from error


def check_layout(coco_dir: Path) -> None:
    """A UserError where a folder of COCO's layout or an annotation file is missing."""
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
    wanted = {"train": data.n_train, "val": data.n_val}
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
        used = choose(sound, wanted[split], split, data.seed)
        file = {"name": name, "annotation_file": str(annotation_path(coco_dir, name))}
        splits[split] = file | {"annotation_sha256": digests[name]} | count(entries, broken, used)
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
    """All usable images, or a seeded choice of n_wanted among them; in the order of their ids."""
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
    """What the used images of a split hold, and which they are. `entries` are all listed, in the order of their ids."""
    ids = [entry["id"] for entry in used]
    return {
        "n_listed": len(entries),
        "n_images": len(used),
        "n_broken": len(broken),
        "broken": [{"file": entry["file"], "reason": entry["fault"]} for entry in broken],
        "n_annotations": sum(entry["n_annotations"] for entry in used),
        "n_crowd": sum(entry["n_crowd"] for entry in used),
        "n_degenerate_boxes": sum(entry["n_degenerate"] for entry in used),
        "n_without_objects": sum(entry["n_boxes"] == 0 for entry in used),
        "subset": len(used) < len(entries) - len(broken),
        "image_ids_sha256": hash_ids(ids),
        "image_ids": ids if len(used) < len(entries) else None,
    }


def name_faults(broken: Entries) -> str:
    """The first faults, each with its file, for a message."""
    faults = [f"{entry['file']} {entry['fault']}" for entry in broken[:N_SHOWN_FAULTS]]
    more = ["..."] if len(broken) > N_SHOWN_FAULTS else []
    return "; ".join(faults + more)


def title(data: Data, splits: dict[str, Any]) -> str:
    """What the dataset may be called in a report; `splits` are those of provenance.json."""
    if data.coco_dir == BUILTIN_DATASET:
        return BUILTIN_TITLE
    return coco_title({facts["name"]: facts["n_listed"] for facts in splits.values()})


def write_dataset_files(run: RunRoot, view: Path, provenance: dict[str, Any]) -> None:
    """Writes train.txt, val.txt, coco.yaml and last provenance.json: where that stands, the others are complete."""
    dataset: dict[str, Any] = {"path": str(view)}
    for split, facts in provenance["splits"].items():
        image_dir = view / "images" / facts["name"]
        entries = read_chosen(view, split, facts["image_ids"])
        path = (run.provenance.parent / f"{split}.txt").resolve()
        write_text(path, "".join(f"{image_dir / entry['file']}\n" for entry in entries))
        dataset[split] = str(path)
    dataset["names"] = dict(enumerate(NAMES))
    write_text(run.dataset_yaml, yaml.safe_dump(dataset, sort_keys=False))
    write_json(run.provenance, provenance)


def describe(provenance: dict[str, Any]) -> str:
    """'COCO 2017, train2017: 118,287 images, 860,001 annotations (10,777 crowd); val2017: ...'"""
    parts = []
    for split in provenance["splits"].values():
        seeded = f" of {split['n_listed']:,}, seed {provenance['seed']}" if split["subset"] else ""
        skipped = f", {split['n_broken']} broken ones skipped" if split["n_broken"] else ""
        parts.append(
            f"{split['name']}: {split['n_images']:,} images{seeded}, {split['n_annotations']:,} annotations "
            f"({split['n_crowd']:,} crowd), {split['n_without_objects']:,} without objects{skipped}"
        )
    return f"{provenance['title']}, " + "; ".join(parts)
