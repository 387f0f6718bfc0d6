"""The data stage: COCO folder -> checked YOLO view, seeded choice of images, dataset file and provenance."""

from __future__ import annotations

import hashlib
import logging
import random
from pathlib import Path
from typing import Any

import yaml

from app.coco.annotations import N_TRAIN, N_VAL, NAMES
from app.core.config import BUILTIN_DATASET, Config, Data, UserError
from app.core.files import explain_full_disk, read_json, sha256, write_json, write_text
from app.core.run import RunRoot, record_stage
from app.data.synthetic import VERSION, draw_coco_subset
from app.data.view import SPLITS, build_view, is_current, read_index, view_dir

log = logging.getLogger(__name__)
N_SHOWN_FAULTS = 5
OTHER_RUN = "take another RUN=name, or start the run over with ARGS=--force"
Entries = list[dict[str, Any]]  # of a view's index: one an image


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
    return (
        cache_dir.resolve() / f"{BUILTIN_DATASET}-v{VERSION}"
        if coco_dir == BUILTIN_DATASET
        else Path(coco_dir).resolve()
    )


def check_same_settings(run: RunRoot, recorded: dict[str, Any], data: Data, coco_dir: Path) -> None:
    """One folder may be named in several ways; any other difference is a UserError that lists old -> new."""
    old, new = recorded["settings"], data.model_dump()
    if recorded["coco_dir"] == str(coco_dir):
        old = old | {"coco_dir": new["coco_dir"]}
    changed = [f"data.{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]
    if changed:
        raise UserError(f"{run.root} was made with other data settings ({', '.join(changed)}): {OTHER_RUN}")


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
    """Split name -> SHA-256 of its annotation file."""
    try:
        return {name: sha256(path) for name, path in annotation_files(coco_dir).items()}
    except PermissionError as error:
        raise UserError(f"{error.filename} may not be read by this user: change its permissions") from error


def annotation_files(coco_dir: Path) -> dict[str, Path]:
    """Split name -> annotation file of a folder in COCO's layout.

    Raises:
        UserError: no folder, or one without train2017/, val2017/ or an annotation file.
    """
    if not coco_dir.is_dir():
        raise UserError(f"no COCO folder at {coco_dir}: give COCO_DIR=path, or run 'make download-coco'")
    for name in (*SPLITS.values(), "annotations"):
        if not (coco_dir / name).is_dir():
            raise UserError(
                f"{coco_dir} has no {name}/: it must hold train2017/, val2017/ and annotations/ as COCO 2017 does; "
                "give COCO_DIR=path, or run 'make download-coco'"
            )
    files = {name: coco_dir / "annotations" / f"instances_{name}.json" for name in SPLITS.values()}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} is missing: unpack annotations_trainval2017.zip into {coco_dir}")
    return files


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
        used = choose([entry for entry in entries if not entry["fault"]], wanted[split], split, data.seed)
        file = {"name": name, "annotation_file": str(annotation_files(coco_dir)[name])}
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
    ids = set(random.Random(seed).sample([entry["id"] for entry in sound], n_wanted))  # noqa: S311
    return [entry for entry in sound if entry["id"] in ids]


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
        "image_ids_sha256": hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest(),
        "image_ids": ids if len(used) < len(entries) else None,
    }


def name_faults(broken: Entries) -> str:
    shown = "; ".join(f"{entry['file']} {entry['fault']}" for entry in broken[:N_SHOWN_FAULTS])
    return shown + ("; ..." if len(broken) > N_SHOWN_FAULTS else "")


def title(data: Data, splits: dict[str, Any]) -> str:
    """What the dataset may be called in a report."""
    if data.coco_dir == BUILTIN_DATASET:
        return f"built-in {BUILTIN_DATASET}"
    official = (splits["train"]["n_listed"], splits["val"]["n_listed"]) == (N_TRAIN, N_VAL)
    return "COCO 2017" if official else "a COCO-format dataset, not COCO 2017"


def write_dataset_files(run: RunRoot, view: Path, provenance: dict[str, Any]) -> None:
    """provenance.json comes last: where it stands, the other files are complete."""
    lists = {}
    for split, facts in provenance["splits"].items():
        wanted = None if facts["image_ids"] is None else set(facts["image_ids"])
        entries = [entry for entry in read_index(view, split) if wanted is None or entry["id"] in wanted]
        lists[split] = (run.provenance.parent / f"{split}.txt").resolve()
        write_text(lists[split], "".join(f"{view / 'images' / facts['name'] / entry['file']}\n" for entry in entries))
    dataset = {
        "path": str(view),
        **{split: str(path) for split, path in lists.items()},
        "names": dict(enumerate(NAMES)),
    }
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
