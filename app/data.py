"""The data stage: COCO folder -> checked YOLO view, seeded choice of images, dataset file and provenance."""

from __future__ import annotations

import hashlib
import logging
import random
from pathlib import Path
from typing import Any

import yaml

from app.coco import N_TRAIN, N_VAL, NAMES
from app.config import BUILTIN_DATASET, Config, UserError
from app.run import RunRoot, read_json, record_stage, sha256, write_json, write_text
from app.synthetic import VERSION, draw_coco_subset
from app.view import SPLITS, build_view, read_index, view_dir

log = logging.getLogger(__name__)
N_SHOWN_FAULTS = 5


def prepare(config: Config, run: RunRoot, force: bool) -> None:
    """Makes dataset/coco.yaml, train.txt, val.txt and provenance.json of a run; the view is shared by all runs.

    Never writes to the dataset.

    Raises:
        UserError: the dataset cannot be used, or the run root was made with other data settings.
    """
    settings = config.data.model_dump()
    recorded = read_json(run.provenance, "data") if run.provenance.exists() and not force else None
    if recorded:
        check_same_settings(run, recorded["settings"], settings)
    coco_dir = resolve(config.data.coco_dir, run.cache_dir)
    digests = {name: sha256(annotation_file(coco_dir, name)) for name in SPLITS.values()}
    view = view_dir(run.cache_dir.resolve(), coco_dir, digests)
    if recorded and recorded["view_dir"] == str(view) and view.exists():
        log.info("data: done already (%s)", describe(recorded))
        return
    if recorded:
        raise UserError(
            f"{coco_dir} is not the dataset that {run.root} was made with: take another RUN=name or --force"
        )
    build_view(view, coco_dir, digests)
    splits = {split: choose(config, view, coco_dir, split) for split in SPLITS}
    provenance = {
        "title": title(config, splits),
        "coco_dir": str(coco_dir),
        "builtin": config.data.coco_dir == BUILTIN_DATASET,
        "view_dir": str(view),
        "seed": config.data.seed,
        "skip_broken": config.data.skip_broken,
        "settings": settings,
        "splits": splits,
    }
    write_dataset_files(run, view, provenance)
    record_stage(run, "data", {"coco_dir": str(coco_dir), "title": provenance["title"]})
    log.info("data: %s", describe(provenance))


def check_same_settings(run: RunRoot, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [f"data.{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]
    if changed:
        raise UserError(
            f"{run.root} was made with other data settings ({', '.join(changed)}): take another RUN=name, or start the "
            "run over with ARGS=--force"
        )


def resolve(coco_dir: str, cache_dir: Path) -> Path:
    """Absolute dataset folder; the word coco-subset draws the built-in one.

    Raises:
        UserError: no folder, or a folder without COCO's layout.
    """
    if coco_dir == BUILTIN_DATASET:
        target_dir = cache_dir.resolve() / f"{BUILTIN_DATASET}-v{VERSION}"
        draw_coco_subset(target_dir)
        return target_dir
    path = Path(coco_dir).resolve()
    if not path.is_dir():
        raise UserError(f"no COCO folder at {path}: give COCO_DIR=path, or run 'make download-coco'")
    for name in (*SPLITS.values(), "annotations"):
        if not (path / name).is_dir():
            raise UserError(
                f"{path} has no {name}/: it must hold train2017/, val2017/ and annotations/ as COCO 2017 does"
            )
    return path


def annotation_file(coco_dir: Path, name: str) -> Path:
    path = coco_dir / "annotations" / f"instances_{name}.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: unpack annotations_trainval2017.zip into {coco_dir}")
    return path


def choose(config: Config, view: Path, coco_dir: Path, split: str) -> dict[str, Any]:
    """Decides which images of a split a run uses, and counts what is in them.

    Raises:
        UserError: broken images without data.skip_broken, or more images asked for than there are.
    """
    entries = read_index(view, split)
    broken = [entry for entry in entries if entry["fault"]]
    if broken and not config.data.skip_broken:
        raise UserError(
            f"{len(broken)} of {len(entries):,} images in {coco_dir / SPLITS[split]} cannot be used: "
            f"{name_faults(broken)}; repair them, or go on without them with --set data.skip_broken=true"
        )
    sound = [entry for entry in entries if not entry["fault"]]
    wanted = config.data.n_train if split == "train" else config.data.n_val
    if not sound or (wanted or 0) > len(sound):
        raise UserError(f"data.n_{split}={wanted}: {coco_dir / SPLITS[split]} has {len(sound):,} usable images")
    used = sound
    if wanted is not None and wanted < len(sound):
        ids = set(random.Random(config.data.seed).sample([entry["id"] for entry in sound], wanted))  # noqa: S311
        used = [entry for entry in sound if entry["id"] in ids]
    file = annotation_file(coco_dir, SPLITS[split])
    ids = [entry["id"] for entry in used]
    return {
        "name": SPLITS[split],
        "annotation_file": str(file),
        "annotation_sha256": sha256(file),
        "n_listed": len(entries),
        "n_images": len(used),
        "n_broken": len(broken),
        "broken": [{"file": entry["file"], "reason": entry["fault"]} for entry in broken],
        "n_annotations": sum(entry["n_annotations"] for entry in used),
        "n_crowd": sum(entry["n_crowd"] for entry in used),
        "n_degenerate_boxes": sum(entry["n_degenerate"] for entry in used),
        "n_without_objects": sum(entry["n_boxes"] == 0 for entry in used),
        "subset": len(used) < len(sound),
        "image_ids_sha256": hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest(),
        "image_ids": ids if len(used) < len(entries) else None,
    }


def name_faults(broken: list[dict[str, Any]]) -> str:
    shown = "; ".join(f"{entry['file']} {entry['fault']}" for entry in broken[:N_SHOWN_FAULTS])
    return shown + ("; ..." if len(broken) > N_SHOWN_FAULTS else "")


def title(config: Config, splits: dict[str, Any]) -> str:
    """What the dataset may be called in a report."""
    if config.data.coco_dir == BUILTIN_DATASET:
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
