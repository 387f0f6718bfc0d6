"""Compare: two runs or two scored folders -> compare.md with figures: AP by class and size, and where they differ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from app.config import Report, UserError
from app.reporting.analysis import analyse
from app.reporting.evidence import COCO_NAMES, METRICS_KEYS, lacking
from app.reporting.figures import by_class, by_size
from app.reporting.findings import Metrics, describe_meter, meter
from app.reporting.gallery import gallery
from app.reporting.summary import describe
from app.run import RunRoot, read_json, write_json, write_text
from app.scoring.score import Dataset
from app.tables import markdown_table, number, plain, signed

KEYS = (*METRICS_KEYS, "dataset.coco_dir", "dataset.image_ids")
Pair = tuple[Metrics, Metrics]
log = logging.getLogger(__name__)


def compare(left: Path, right: Path, out_dir: Path, settings: Report) -> None:
    """Writes out_dir/compare.md, compare.json and figures/, and logs the first table.

    Args:
        left, right: two runs, whose rows are paired by the name of their folder, or two folders with a metrics.json.
        out_dir: what is there of an older comparison is replaced.
        settings: gallery_images and gallery_seed choose the pictures.

    Raises:
        UserError: nothing to compare, rows measured differently, or detections or images that are no longer there.
    """
    pairs = pair_up(left, right)
    rows = [m for pair in pairs for m in pair]
    check_meter(rows)
    facts, truth = analyse(scored_dataset(rows[0]), rows)
    out = RunRoot(out_dir.parent, out_dir.name)
    overall = table(pairs)
    blocks = [plain(f"# {left} and {right}"), describe(describe_meter(rows[0])), "\n".join(overall)]
    blocks.append(by_size(rows, out.figures_dir))
    for a, b in pairs:
        blocks += [plain(f"## {label(a)} and {label(b)}"), by_class(b, a, facts, out.figures_dir)]
        blocks.append("\n".join(class_table(a, b, facts)))
        if settings.gallery_images:
            blocks += [gallery(out, (a, b), facts, truth, settings), "\n".join(image_table(a, b, facts))]
    write_json(out_dir / "compare.json", {"rows": rows, "analysis": facts})
    write_text(out_dir / "compare.md", "\n\n".join(blocks) + "\n")
    for line in overall:
        log.info("%s", line)
    log.info("compare: %s", out_dir / "compare.md")


def pair_up(left: Path, right: Path) -> list[Pair]:
    """The rows to compare, with labels and folder names that tell the two sides apart."""
    if left.resolve() == right.resolve():
        raise UserError(f"{left} is compared with itself: name two runs or two scored folders")
    folders = [scored_folders(path) for path in (left, right)]
    if all((path / "metrics.json").exists() for path in (left, right)):
        pairs = [(folders[0][left.name], folders[1][right.name])]
    else:
        pairs = [(folders[0][name], folders[1][name]) for name in folders[0] if name in folders[1]]
        for name in sorted(folders[0].keys() ^ folders[1].keys()):
            log.info("compare: %s is in one of them only, left out", name)
    if not pairs:
        raise UserError(f"{left} and {right} have no scored folder of the same name: name two folders, runs/A/...-coco")
    return [told_apart(read_row(a), read_row(b)) for a, b in pairs]


def scored_folders(path: Path) -> dict[str, Path]:
    """Name -> folder: the folder itself, or all of a run."""
    found = (
        sorted(path.glob("*-coco/metrics.json")) if not (path / "metrics.json").exists() else [path / "metrics.json"]
    )
    if not found:
        raise UserError(f"{path} holds neither metrics.json nor *-coco/metrics.json: run 'make eval' first")
    return {file.parent.name: file.parent for file in found}


def read_row(folder: Path) -> Metrics:
    tree = read_json(folder / "metrics.json", "eval")
    if keys := lacking(tree, KEYS):
        raise UserError(f"{folder}/metrics.json lacks {', '.join(keys)}: score it again with 'make eval ARGS=--force'")
    return {**tree, "dir": folder.name, "path": str(folder)}


def told_apart(a: Metrics, b: Metrics) -> Pair:
    """Adds the run's name, or where that is the same too the path, to what is equal in both."""
    runs = [Path(m["path"]).resolve().parent.name for m in (a, b)]
    marks = runs if runs[0] != runs[1] else [m["path"] for m in (a, b)]
    if a["model"]["label"] == b["model"]["label"]:
        a, b = ({**m, "model": {**m["model"], "label": f"{m['model']['label']} ({mark})"}}
                for m, mark in zip((a, b), marks, strict=True))  # fmt: skip
    if a["dir"] == b["dir"]:
        a, b = ({**m, "dir": f"{side}-{m['dir']}"} for m, side in zip((a, b), ("left", "right"), strict=True))
    return a, b


def check_meter(rows: list[Metrics]) -> None:
    """Only what was measured alike may stand side by side."""
    for m in rows[1:]:
        if meter(m) != meter(rows[0]):
            first, other = describe_meter(rows[0]), describe_meter(m)
            keys = ", ".join(f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key])
            raise UserError(
                f"{rows[0]['path']} and {m['path']} were measured differently ({keys}): score both the same way"
            )


def scored_dataset(m: Metrics) -> Dataset:
    """The images and annotations as metrics.json names them; `analyse` holds the images against its hash."""
    facts = m["dataset"]
    coco_dir, split = Path(facts["coco_dir"]), facts["split"]
    file = coco_dir / "annotations" / f"instances_{split}.json"
    return Dataset(coco_dir / split, file, split, facts["image_ids"], facts["title"])


def table(pairs: list[Pair]) -> list[str]:
    """The twelve numbers, file size and latency: both rows of a pair and the difference."""
    cells = [["", *(f"{label(m)}" for pair in pairs for m in pair), *("difference" for _ in pairs)]]
    for name in COCO_NAMES:
        values = [(a["coco"][name], b["coco"][name]) for a, b in pairs]
        cells.append([name, *(number(v) for pair in values for v in pair), *(signed(change(*pair)) for pair in values)])
    for name, value in (("file MB", size_mb), ("p50 ms", lambda m: m["latency_ms"]["p50"])):
        cells.append([name, *(f"{value(m):.2f}" for pair in pairs for m in pair), *("" for _ in pairs)])
    return markdown_table(cells)


def label(m: Metrics) -> str:
    return m["model"]["label"]


def size_mb(m: Metrics) -> float:
    return m["model"]["size_bytes"] / 1e6


def change(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def class_table(a: Metrics, b: Metrics, facts: dict[str, Any]) -> list[str]:
    """AP of every class that has objects, largest loss first."""
    old, new = (facts["variants"][m["dir"]]["ap_by_class"] for m in (a, b))
    names = sorted(old, key=lambda name: (new[name] - old[name], name))
    rows = [[name, number(old[name]), number(new[name]), signed(new[name] - old[name])] for name in names]
    return markdown_table([["class", label(a), label(b), "difference"], *rows])


def image_table(a: Metrics, b: Metrics, facts: dict[str, Any]) -> list[str]:
    """The images of the gallery with their F1."""
    old, new = (facts["variants"][m["dir"]] for m in (a, b))
    cells = [["image", "why", f"F1 {label(a)}", f"F1 {label(b)}", "difference"]]
    for row in new["gallery"]:
        key = str(row["image_id"])
        scores = [f"{side['f1_by_image'][key]:.2f}" for side in (old, new)]
        cells.append([key, row["why"], *scores, f"{row['f1_difference']:+.2f}"])
    return markdown_table(cells, text_columns=2)
