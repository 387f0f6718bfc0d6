"""Gallery: val images with ground truth and the detections of two variants side by side, chosen by a stated rule."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from pycocotools.coco import COCO

from app.config import Report
from app.curves import COLOURS
from app.reporting.analysis import choose
from app.reporting.figures import draw
from app.reporting.findings import Metrics
from app.run import RunRoot, read_json
from app.tables import plain

PANEL_COLOURS = (COLOURS[2], COLOURS[0], COLOURS[1])  # ground truth, baseline, quantized
PANEL_INCH = 3.1  # width of a panel
LABEL_SHARE = 0.06  # height of a label in that of its image
MAX_SIDE_PX = 480  # larger photos are shrunk: each is a few centimetres wide on the page


def gallery(run: RunRoot, pair: tuple[Metrics, Metrics], facts: dict[str, Any], truth: COCO, settings: Report) -> str:
    """figures/gallery-<dir>.jpg and -dark.jpg for (baseline, quantized); enters its choice into `facts`."""
    base, other = (facts["variants"][m["dir"]] for m in pair)
    chosen = choose(base["f1_by_image"], other["f1_by_image"], settings.gallery_images, settings.gallery_seed)
    rows = [{"image_id": int(image_id), "why": why, "f1_difference": change} for image_id, why, change in chosen]
    base_name, name = (m["model"]["label"] for m in pair)
    other["gallery"] = rows
    columns: dict[str, Any] = {"ground truth": truth.imgToAnns}
    for m in pair:
        columns[m["model"]["label"]] = detections(Path(m["path"]), facts["variants"][m["dir"]]["best_score"])
    images_dir = Path(pair[0]["dataset"]["coco_dir"]) / pair[0]["dataset"]["split"]
    images = {row["image_id"]: images_dir / truth.imgs[row["image_id"]]["file_name"] for row in rows}
    text = (
        f"**Val images, {plain(base_name)} and {plain(name)}.** Each shows its boxes from the score at which its own "
        f"F1 over the whole split is best ({base['best_score']:.3f} and {other['best_score']:.3f}). Chosen by the "
        f"change of F1 in the image at IoU {facts['iou_of_f1']}: largest losses, largest gains, random (seed "
        f"{settings.gallery_seed})."
    )
    names = {number: category["name"] for number, category in truth.cats.items()}
    file = f"gallery-{pair[1]['dir']}.jpg"
    return draw(run.figures_dir, file, text, lambda: gallery_figure(rows, images, columns, names))


def detections(folder: Path, min_score: float) -> dict[int, list[dict[str, Any]]]:
    """Image id -> the boxes of detections.json with at least that score, the best last (drawn on top)."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(read_json(folder / "detections.json", "eval"), key=lambda row: row["score"]):
        if row["score"] >= min_score:
            found[row["image_id"]].append(row)
    return found


def gallery_figure(
    rows: list[dict[str, Any]], images: dict[int, Path], columns: dict[str, Any], names: dict[int, str]
) -> Figure:
    """One row an image, one column each for the ground truth and the variants."""
    pictures = {row["image_id"]: Image.open(images[row["image_id"]]).convert("RGB") for row in rows}
    heights = [picture.height / picture.width for picture in pictures.values()]
    figure = Figure(figsize=(10, 0.4 + PANEL_INCH * sum(heights) + 0.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, line in zip(rows, grid, strict=True):
        picture = pictures[row["image_id"]]
        scale = min(1.0, MAX_SIDE_PX / max(picture.size))
        small = picture.resize([max(1, round(side * scale)) for side in picture.size])
        for axes, (title, boxes), colour in zip(line, columns.items(), PANEL_COLOURS, strict=True):
            axes.imshow(np.asarray(small), extent=(0, picture.width, picture.height, 0))
            axes.set(xticks=[], yticks=[], title=title if row is rows[0] else "")
            axes.spines[:].set_visible(False)
            draw_boxes(axes, boxes[row["image_id"]], names, colour)
        line[0].set_ylabel(f"{row['why']}, F1 {row['f1_difference']:+.2f}\nimage {row['image_id']}")
    return figure


def draw_boxes(axes: Axes, boxes: list[dict[str, Any]], names: dict[int, str], colour: str) -> None:
    """Boxes x,y,w,h in px of the picture, each with its class, its score or 'crowd'."""
    axes.autoscale(False)
    for box in boxes:
        x, y, width, height = box["bbox"]
        crowd = bool(box.get("iscrowd"))
        line = "--" if crowd else "-"
        patch = Rectangle((x, y), width, height, fill=False, color=colour, lw=1.6, ls=line)
        patch.set_path_effects([withStroke(linewidth=3, foreground="white")])  # seen on any background
        axes.add_patch(patch)
        extra = f" {box['score']:.2f}" if "score" in box else " crowd" if crowd else ""
        place = (
            "bottom" if y > LABEL_SHARE * axes.get_ylim()[0] else "top"
        )  # inside the box at the image's upper border
        label = axes.text(x, y, names[box["category_id"]] + extra, color="white", fontsize=7, va=place, clip_on=True)
        label.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1})
