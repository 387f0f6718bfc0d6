"""The content of provenance.json: what the dataset is, and which of its images a run uses."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.coco.dataset import (
    BUILTIN_TITLE,
    DRAWN_TITLE,
    Sources,
    hash_contents,
    hash_ids,
    mended_in,
    title_of,
)
from app.coco.split import unlisted_line
from app.core.config import BUILTIN_DATASET, Data, UserError
from app.data.view import Entries, Indices

N_SHOWN_FAULTS = 5
N_SHOWN_CHARACTERS = 255  # of a file name


def assemble(data: Data, coco_dir: Path, sources: Sources, indices: Indices, digests: dict[str, str]) -> dict[str, Any]:
    """The content of provenance.json: what the dataset is, and which of its images the run uses.

    Raises:
        UserError: broken images, or annotations of images that are not listed, without data.skip_broken; more images
            asked for than there are, or no object to score.
    """
    n_wanted = {"train": data.n_train, "val": data.n_val}
    splits = {}
    for split, source in sources.items():
        index, entries = indices[split], indices[split]["images"]
        broken = [entry for entry in entries if entry["fault"]]
        if index["unlisted"] and not data.skip_broken:
            raise UserError(unlisted_line(source.annotation_file, index["n_unlisted"], index["unlisted"][0]))
        if broken and not data.skip_broken:
            raise UserError(
                f"{len(broken):,} of {len(entries):,} images in {source.images_dir} cannot be used: "
                f"{name_faults(broken)}; repair them, or go on without them with --set data.skip_broken=true"
            )
        sound = [entry for entry in entries if not entry["fault"]]
        used = choose(sound, n_wanted[split], data.seed, split, source.name)
        if split == "val" and not total(used, "n_boxes"):
            raise UserError(none_to_score(used, source.images_dir))
        splits[split] = {
            "name": source.name,
            "annotation_file": str(source.annotation_file),
            "annotation_sha256": digests[split],
            **source.place(coco_dir),
            **count(entries, broken, used),
            "n_unlisted": index["n_unlisted"],
            "notes": index["notes"],
        }
    return {
        "title": title(data, splits, indices),
        "names": indices["train"]["names"],
        "left_out": indices["train"]["left_out"],
        "coco_dir": str(coco_dir),
        "earlier_coco_dirs": [],
        "builtin": data.coco_dir == BUILTIN_DATASET,
        "seed": data.seed,
        "skip_broken": data.skip_broken,
        "settings": data.model_dump(),
        "splits": splits,
    }


def choose(sound: Entries, n_wanted: int | None, seed: int, role: str, name: str) -> Entries:
    """A seeded choice of `n_wanted` usable images, or all of them for None, in the order of their ids.

    Raises a UserError with role and name of the split if fewer images are usable than wanted, or none.
    """
    if not sound:
        raise UserError(f"no image of {name} can be used: repair the dataset")
    if n_wanted is None:
        return sound
    if n_wanted > len(sound):
        raise UserError(f"data.n_{role}={n_wanted}: {name} has {len(sound):,} usable images; ask for at most as many")
    chosen = {entry["id"] for entry in seeded_choice(sound, n_wanted, seed, lambda entry: entry["n_boxes"] > 0)}
    return [entry for entry in sound if entry["id"] in chosen]


def seeded_choice(images: Entries, n: int, seed: int, has_objects: Callable[[dict[str, Any]], bool]) -> Entries:
    """`n` images at random. Where none of them has objects, the first image that has some takes the last one's place:
    objects may be rare, and without one there would be no AP."""
    chosen = random.Random(seed).sample(images, n)  # noqa: S311 - a reproducible choice, no secret
    if not any(map(has_objects, chosen)):
        chosen[-1] = next(filter(has_objects, images), chosen[-1])
    return chosen


def none_to_score(used: Entries, image_dir: Path) -> str:
    """The message about images without an object that a score can count: after training there would be no AP."""
    n_annotations, n_crowd = total(used, "n_annotations"), total(used, "n_crowd")
    return (
        f"{len(used):,} images of {image_dir} have no object to score ({n_annotations:,} annotations, {n_crowd:,} of "
        "them crowds, the others without area): mend the annotations, or choose more images with data.n_val"
    )


def count(entries: Entries, broken: Entries, used: Entries) -> dict[str, Any]:
    """Counts over a split for provenance.json, and the ids of its used images.

    `entries` are all images that the annotation file lists; `broken` and `used` are parts of them.
    """
    ids = [entry["id"] for entry in used]
    return {
        "n_listed": len(entries),
        "n_images": len(used),
        "n_broken": len(broken),
        "broken": [{"file": entry["file"], "reason": entry["fault"]} for entry in broken],
        "n_annotations": total(used, "n_annotations"),
        "n_crowd": total(used, "n_crowd"),
        "n_degenerate_boxes": total(used, "n_degenerate"),
        "n_clipped": total(used, "n_clipped"),
        "n_dropped": total(used, "n_dropped"),
        "n_without_objects": sum(entry["n_boxes"] == 0 for entry in used),
        "subset": len(used) < len(entries) - len(broken),
        "image_ids_sha256": hash_ids(ids),
        "images_sha256": hash_contents({entry["id"]: entry["content"] for entry in used}),
        "image_ids": ids if len(used) < len(entries) else None,
    }


def total(entries: Entries, key: str) -> int:
    return sum(entry[key] for entry in entries)


def name_faults(broken: Entries) -> str:
    """The first faults, each after its file name, for a message."""
    faults = [f"{entry['file'][:N_SHOWN_CHARACTERS]} {entry['fault']}" for entry in broken[:N_SHOWN_FAULTS]]
    if len(broken) > N_SHOWN_FAULTS:
        faults.append("...")
    return "; ".join(faults)


def title(data: Data, splits: dict[str, Any], indices: Indices) -> str:
    """The name of the dataset in a report; `splits` are those of provenance.json."""
    if data.coco_dir == BUILTIN_DATASET:
        return BUILTIN_TITLE
    if any(index["drawn"] for index in indices.values()):
        return DRAWN_TITLE
    listed = {}
    for role, facts in splits.items():
        listed[facts["name"]] = (facts["n_listed"], total(indices[role]["images"], "n_annotations"))
    is_official = all(index["is_official"] for index in indices.values())
    return title_of(indices["train"]["names"], listed, is_official)


def describe(provenance: dict[str, Any]) -> str:
    """One line for the log: 'COCO 2017, train2017: 118,287 images, 860,001 annotations (10,777 crowd); val2017: ...'

    What was mended in the annotations stands behind its split.
    """
    parts = []
    for split in provenance["splits"].values():
        seeded = f" of {split['n_listed']:,}, seed {provenance['seed']}" if split["subset"] else ""
        skipped = f", {split['n_broken']} broken ones skipped" if split["n_broken"] else ""
        mended = "".join(f", {n:,} {what}" for what, n in mended_in(split).items())
        parts.append(
            f"{split['name']}: {split['n_images']:,} images{seeded}, {split['n_annotations']:,} annotations "
            f"({split['n_crowd']:,} crowd), {split['n_without_objects']:,} without objects{skipped}{mended}"
        )
    return f"{provenance['title']}, " + "; ".join(parts)
