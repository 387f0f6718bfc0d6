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

from app.coco.dataset import source_at
from app.coco.detail import Metrics, choose
from app.coco.images import read_image
from app.coco.score import read_results
from app.core.config import Report
from app.core.curves import COLOURS
from app.core.run import RunRoot
from app.report.evidence import name_of
from app.report.figures import draw, literal
from app.report.tables import plain

PANEL_COLOURS = (COLOURS[2], COLOURS[0], COLOURS[1])  # ground truth, baseline, quantized
PANEL_INCH = 3.1  # width of a panel
LABEL_SHARE = 0.06  # height of a label in that of its image
MAX_RATIO = 3.0  # height of a row in widths of a panel; a taller photo is drawn narrower
MAX_INCH = 540  # a JPEG has at most 65,535 px
MAX_SIDE_PX = 480  # larger photos are shrunk: each is a few centimetres wide on the page


def gallery(run: RunRoot, pair: tuple[Metrics, Metrics], facts: dict[str, Any], truth: COCO, settings: Report) -> str:
    """Draws figures/gallery-<dir>.jpg and -dark.jpg for (baseline, quantized); returns the Markdown block.

    `facts` are those of `analyse`; the chosen images are added to them.
    """
    base, other = pair
    old, new = facts["variants"][base["dir"]], facts["variants"][other["dir"]]
    chosen = choose(old["f1_by_image"], new["f1_by_image"], settings.gallery_images, settings.gallery_seed)
    rows = [{"image_id": int(image_id), "why": why, "f1_difference": change} for image_id, why, change in chosen]
    new["gallery"] = rows
    names = {number: category["name"] for number, category in truth.cats.items()}
    ids = {row["image_id"] for row in rows}
    columns: dict[str, Any] = {
        "ground truth": truth.imgToAnns,
        name_of(base): detections(Path(base["path"]), old["best_score"], ids, names),
        name_of(other): detections(Path(other["path"]), new["best_score"], ids, names),
    }
    text = (
        f"**Val images, {plain(name_of(base))} and {plain(name_of(other))}.** Each shows its boxes from the score at "
        f"which its own F1 over the whole split is best ({old['best_score']:.3f} and {new['best_score']:.3f}). Chosen "
        f"by the change of F1 in the image at IoU {facts['iou_of_f1']}: largest losses, largest gains, random (seed "
        f"{settings.gallery_seed})."
    )
    dataset = base["dataset"]
    folder = source_at(Path(dataset["coco_dir"]), dataset["split"], dataset).images_dir
    images = {image_id: folder / truth.imgs[image_id]["file_name"] for image_id in ids}
    file = f"gallery-{other['dir']}.jpg"
    return draw(run.figures_dir, file, text, lambda: gallery_figure(rows, images, columns, names))


def detections(
    folder: Path, min_score: float, image_ids: set[int], names: dict[int, str]
) -> dict[int, list[dict[str, Any]]]:
    """Image id -> the boxes of detections.json with at least that score, the best last (drawn on top).

    `names` are those of the categories that the annotations list: COCOeval scores no others, and none is drawn.
    """
    rows = read_results(folder / "detections.json", image_ids)
    shown = rows[(rows[:, 6] >= min_score) & np.isin(rows[:, 1], list(names))]
    boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for image_id, category_id, *box, score in shown[np.argsort(shown[:, 6], kind="stable")].tolist():
        boxes[int(image_id)].append({"category_id": int(category_id), "bbox": box, "score": score})
    return boxes


def gallery_figure(
    rows: list[dict[str, Any]], images: dict[int, Path], columns: dict[str, Any], names: dict[int, str]
) -> Figure:
    """One row an image, one column each for the ground truth and the variants."""
    # As training and eval see a photo: turned as its EXIF says, 16-bit greys made 8-bit, OpenCV's BGR made RGB.
    pictures = [Image.fromarray(read_image(images[row["image_id"]])[:, :, ::-1]) for row in rows]
    heights = [min(photo.height / photo.width, MAX_RATIO) for photo in pictures]
    height = min(0.4 + PANEL_INCH * sum(heights) + 0.1 * len(rows), MAX_INCH)
    figure = Figure(figsize=(10, height), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, photo, line in zip(rows, pictures, grid, strict=True):
        pixels = np.asarray(shrunk(photo))
        for axes, (title, boxes), colour in zip(line, columns.items(), PANEL_COLOURS, strict=True):
            axes.imshow(pixels, extent=(0, photo.width, photo.height, 0))
            axes.set(xticks=[], yticks=[], title=title if row is rows[0] else "")
            axes.spines[:].set_visible(False)
            draw_boxes(axes, boxes[row["image_id"]], names, colour)
        line[0].set_ylabel(f"{row['why']}, F1 {row['f1_difference']:+.2f}\nimage {row['image_id']}")
    return figure


def shrunk(photo: Image.Image) -> Image.Image:
    scale = min(1.0, MAX_SIDE_PX / max(photo.size))
    width, height = round(photo.width * scale), round(photo.height * scale)
    return photo.resize((max(1, width), max(1, height)))


def draw_boxes(axes: Axes, boxes: list[dict[str, Any]], names: dict[int, str], colour: str) -> None:
    """Boxes x,y,w,h in px of the picture, each with its class, its score or 'crowd'."""
    axes.autoscale(False)
    for box in boxes:
        x, y, width, height = box["bbox"]
        is_crowd = bool(box.get("iscrowd"))
        patch = Rectangle((x, y), width, height, fill=False, color=colour, lw=1.6, ls="--" if is_crowd else "-")
        patch.set_path_effects([withStroke(linewidth=3, foreground="white")])  # seen on any background
        axes.add_patch(patch)
        text = literal(names[box["category_id"]])
        if "score" in box:
            text += f" {box['score']:.2f}"
        elif is_crowd:
            text += " crowd"
        is_at_border = y <= LABEL_SHARE * axes.get_ylim()[0]  # above the box there is no room in the image
        place = "top" if is_at_border else "bottom"
        label = axes.text(x, y, text, color="white", fontsize=7, va=place, clip_on=True)
        label.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1})
