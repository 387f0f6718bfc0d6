"""Compare: two runs or two scored folders -> compare.md with figures: AP by class and size, and where they differ."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

from app.coco.dataset import Dataset, check_unchanged, source_at
from app.coco.detail import Metrics, analyse
from app.core.config import Report, UserError
from app.core.files import read_json, write_json, write_text
from app.core.labels import FOREIGN, Label
from app.core.mounts import only_seen
from app.core.run import SWEEP_FILE, SWEEP_SHAPE, RunRoot
from app.core.shapes import Id, PathText, Shape, misfits
from app.core.start import told
from app.report.evidence import METRICS_SHAPE, as_row, name_of, scored_folders
from app.report.figures import by_class, by_size
from app.report.gallery import gallery
from app.report.groups import change, describe, describe_meter, frequent_line, meter, stats_of
from app.report.tables import MISSING, markdown_table, number, plain, signed

SHAPE: Shape = {**METRICS_SHAPE, "dataset.coco_dir": PathText, "dataset.image_ids": list[Id] | None}
Pair = tuple[Metrics, Metrics]
log = logging.getLogger(__name__)


def compare(left: Path, right: Path, out_dir: Path, settings: Report, coco_dir: str | None = None) -> None:
    """Writes out_dir/compare.md, compare.json and figures/, and logs the first table.

    Pairs of repacked files are in the tables alone: they hold the weights of another pair.

    Args:
        left, right: two runs, whose rows are paired by the name of their folder, or two folders with a metrics.json.
        out_dir: what is there of an older comparison is replaced.
        settings: gallery_images and gallery_seed choose the pictures.
        coco_dir: where the dataset is now, if it is no longer where it was scored.

    Raises:
        UserError: nothing to compare, rows measured differently, or detections or images that are no longer there.
    """
    places = [*([Path(coco_dir)] if coco_dir else []), out_dir.parent / ".cache"]
    pairs = [(found(old, places), found(new, places)) for old, new in pair_up(left, right)]
    rows = list(chain.from_iterable(pairs))
    check_meter(rows)
    analysed = [pair for pair in pairs if not all(own_label(metrics).is_repacked for metrics in pair)] or pairs
    rows_analysed = list(chain.from_iterable(analysed))
    facts, truth = analyse(scored_dataset(rows[0]), rows_analysed)
    out = RunRoot(out_dir.parent, out_dir.name)
    overall = table(pairs)
    blocks = [plain(f"# {left} and {right}"), describe(describe_meter(rows[0])), "\n".join(overall)]
    blocks += filter(None, [frequent_line(rows)])
    blocks.append(by_size(rows_analysed, out.figures_dir))
    for old, new in analysed:
        blocks.append(plain(f"## {name_of(old)} and {name_of(new)}"))
        blocks.append(by_class(new, old, facts, out.figures_dir))
        blocks.append("\n".join(class_table(old, new, facts)))
        if settings.gallery_images:
            blocks.append(gallery(out, (old, new), facts, truth, settings))
            blocks.append("\n".join(image_table(old, new, facts)))
    write_json(out_dir / "compare.json", {"rows": rows, "analysis": facts})
    write_text(out_dir / "compare.md", "\n\n".join(blocks) + "\n")
    for line in overall:
        log.info("%s", line)
    log.info("compare: %s", out_dir / "compare.md")


def pair_up(left: Path, right: Path) -> list[Pair]:
    """The rows to compare, with labels and folder names that tell the two sides apart."""
    if left.resolve() == right.resolve():
        raise UserError(f"{left} is compared with itself: name two runs or two scored folders")
    left_dirs, right_dirs = folders_of(left), folders_of(right)
    if is_scored(left) and is_scored(right):
        pairs = [(left_dirs[left.name], right_dirs[right.name])]
    else:
        in_both = [folder for folder in left_dirs if folder in right_dirs]
        pairs = [(left_dirs[folder], right_dirs[folder]) for folder in in_both]
        for folder in sorted(left_dirs.keys() ^ right_dirs.keys()):
            log.info("compare: %s is in one of them only, left out", folder)
    if not pairs:
        raise UserError(f"{left} and {right} have no scored folder of the same name: name two folders, runs/A/...-coco")
    return [told_apart(read_row(old), read_row(new)) for old, new in pairs]


def is_scored(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def folders_of(path: Path) -> dict[str, Path]:
    """Name -> folder: the folder itself, or all of a run."""
    if is_scored(path):
        return {path.name: path}
    if path.is_file():
        raise UserError(f"{path} is a file: name a run or a folder of it")
    if (path / SWEEP_FILE).exists():
        names = read_json(path / SWEEP_FILE, "sweep", SWEEP_SHAPE)["runs"]
        places = ", ".join(str(path.parent / name) for name in names)
        raise UserError(f"{path} is a sweep: name one of its runs ({places})")
    folders = scored_folders(path)
    if not folders:
        seen = "" if path.exists() else only_seen()
        raise UserError(f"{path} holds neither metrics.json nor *-coco/metrics.json: run 'make eval' first{seen}")
    return folders


def read_row(folder: Path) -> Metrics:
    tree = read_json(folder / "metrics.json", "eval")
    if faults := misfits(tree, SHAPE):
        raise UserError(f"{folder}/metrics.json {'; '.join(faults)}: score it again with 'make eval ARGS=--force'")
    return as_row(tree, folder)


def told_apart(old: Metrics, new: Metrics) -> Pair:
    """Adds the run's name, or where that is the same too the path, to what is equal in both."""
    old_mark, new_mark = [Path(metrics["path"]).resolve().parent.name for metrics in (old, new)]
    if old_mark == new_mark:
        old_mark, new_mark = old["path"], new["path"]
    if name_of(old) == name_of(new):
        old, new = renamed(old, old_mark), renamed(new, new_mark)
    if old["dir"] == new["dir"]:
        old, new = old | {"dir": f"left-{old['dir']}"}, new | {"dir": f"right-{new['dir']}"}
    return old, new


def own_label(metrics: Metrics) -> Label:
    """The label of a row before `renamed`."""
    return Label.parse(name_of(metrics).partition(" (")[0])


def renamed(metrics: Metrics, mark: str) -> Metrics:
    """A copy whose label has the mark in brackets."""
    return metrics | {"model": metrics["model"] | {"label": f"{name_of(metrics)} ({mark})"}}


def check_meter(rows: list[Metrics]) -> None:
    """Only what was measured alike may stand side by side."""
    for metrics in rows[1:]:
        if meter(metrics) == meter(rows[0]):
            continue
        first, other = describe_meter(rows[0]), describe_meter(metrics)
        differences = [f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key]]
        paths = f"{rows[0]['path']} and {metrics['path']}"
        raise UserError(f"{paths} were measured differently ({', '.join(differences)}): score both the same way")


def found(metrics: Metrics, places: list[Path]) -> Metrics:
    """The row with the folder where its dataset is: as it was scored or, if that is gone, one of `places` or in it.

    In a place lies the built-in dataset of a run that was made in a container, or without one.
    """
    recorded, split = Path(metrics["dataset"]["coco_dir"]), metrics["dataset"]["split"]
    in_places = [folder for place in places for folder in (place, place / recorded.name)]
    for folder in [recorded, *in_places]:
        if source_at(folder, split, metrics["dataset"]).annotation_file.is_file():
            return metrics | {"dataset": metrics["dataset"] | {"coco_dir": str(folder)}}
    return metrics


def scored_dataset(metrics: Metrics) -> Dataset:
    """The images and annotations as metrics.json names them; `analyse` holds the images against its hash."""
    facts = metrics["dataset"]
    coco_dir, name = Path(facts["coco_dir"]), facts["split"]
    dataset = Dataset(coco_dir, name, facts["image_ids"], facts["title"], source_at(coco_dir, name, facts))
    return check_unchanged(dataset, facts["annotation_sha256"])


def table(pairs: list[Pair]) -> list[str]:
    """The numbers of `stats_of`, file size and latency: both rows of a pair and the difference."""
    rows = list(chain.from_iterable(pairs))
    cells = [["", *map(name_of, rows), *["difference"] * len(pairs)]]
    for stat in stats_of(rows):
        values = [number(metrics["coco"].get(stat)) for metrics in rows]
        differences = [signed(change(old["coco"].get(stat), new["coco"].get(stat))) for old, new in pairs]
        cells.append([stat, *values, *differences])
    sizes = [number(metrics["model"]["size_bytes"] / 1e6, 2) for metrics in rows]
    times = [number(metrics["latency_ms"]["p50"], 2) for metrics in rows]
    no_differences = [""] * len(pairs)
    cells.append(["file MB", *sizes, *no_differences])
    cells.append(["p50 ms", *times, *no_differences])
    if any(metrics["model"].get("start") for metrics in rows):
        cells.append(["weights began", *map(began, rows), *no_differences])
    return markdown_table(cells)


def began(metrics: Metrics) -> str:
    """What the training of a file started from; of a file from elsewhere that is not known."""
    start = metrics["model"].get("start")
    return told(start) if start or own_label(metrics).method != FOREIGN else MISSING


def class_table(old: Metrics, new: Metrics, facts: dict[str, Any]) -> list[str]:
    """AP of every class that has objects, largest loss first."""
    variants = facts["variants"]
    old_aps, new_aps = variants[old["dir"]]["ap_by_class"], variants[new["dir"]]["ap_by_class"]
    differences = {category: new_aps[category] - old_aps[category] for category in old_aps}
    cells = [["class", name_of(old), name_of(new), "difference"]]
    for category in sorted(differences, key=lambda name: (differences[name], name)):
        values = [number(old_aps[category]), number(new_aps[category])]
        cells.append([category, *values, signed(differences[category])])
    return markdown_table(cells)


def image_table(old: Metrics, new: Metrics, facts: dict[str, Any]) -> list[str]:
    """The images of the gallery with their F1."""
    variants = facts["variants"]
    old_f1, new_f1 = variants[old["dir"]]["f1_by_image"], variants[new["dir"]]["f1_by_image"]
    cells = [["image", "why", f"F1 {name_of(old)}", f"F1 {name_of(new)}", "difference"]]
    for row in variants[new["dir"]]["gallery"]:
        key = str(row["image_id"])
        values = [number(old_f1[key], 2), number(new_f1[key], 2)]
        cells.append([key, row["why"], *values, f"{row['f1_difference']:+.2f}"])
    return markdown_table(cells, text_columns=2)
