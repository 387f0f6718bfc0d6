"""COCO's ground truth and score: which images are scored, and the twelve numbers of pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco.annotations import parse_instances, read_source
from app.coco.categories import without_placeholder
from app.coco.dataset import (
    COCO_2017,
    DRAWN_TITLE,
    OFFICIAL_SIZES,
    SPLITS,
    Dataset,
    hash_contents,
    hash_ids,
    title_of,
)
from app.coco.entries import name_fault
from app.coco.images import content_hash
from app.coco.layout import describe_source, find_split
from app.coco.split import unlisted_line
from app.core.config import Data, UserError
from app.core.files import sha256
from app.core.results import AP_FREQUENT, FREQUENT_BOXES

STATS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
_Untyped: Any = COCOeval  # its stubs lack _gts and _dts
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFile:
    """One image to score; width and height are those of the annotations, in px."""

    id: int
    path: Path
    width: int
    height: int


def standalone_dataset(
    coco_dir: Path, split: str | None, skip_broken: bool = False, data: Data | None = None
) -> Dataset:
    """All images of a split of a dataset, for an evaluation without a run; reads and checks its annotations.

    Args:
        coco_dir: its folder, in a layout that app.coco.layout knows.
        split: the name of a folder of images; None: that of val.
        skip_broken: leaves out what cannot be used of the annotations, instead of refusing the whole.
        data: where the files of val lie, if data.val_images says it.

    Raises:
        UserError: the folder is missing, or `make data` would refuse the annotations.
    """
    source = find_split(coco_dir, split, data)
    listed = read_source(source)
    if source.name != SPLITS["val"]:
        log.info("eval: %s: %s", coco_dir, describe_source(source, coco_dir))
    image_ids = None
    if listed.unlisted:
        line = unlisted_line(listed.file, len(listed.unlisted), listed.unlisted[0])
        if not skip_broken:
            raise UserError(line)
        log.warning("%s: %d annotations of unlisted images left out", listed.file, len(listed.unlisted))
    if listed.problems:
        image_id, problem = next(iter(listed.problems.items()))
        first = f"image id {image_id}: {problem}"
        if not skip_broken:
            remedy = "mend the annotations, or go on without it with --set data.skip_broken=true"
            raise UserError(f"{listed.file}: {first}: {remedy}")
        log.warning("%s: %d images left out, the first: %s", listed.file, len(listed.problems), first)
        image_ids = [image["id"] for image in listed.images if image["id"] not in listed.problems]
    names = [category["name"] for category in without_placeholder(listed.categories, listed.used)]
    counts = {source.name: (len(listed.images), listed.n_annotations.total())}
    title = DRAWN_TITLE if listed.is_drawn else title_of(names, counts, listed.is_official)
    return Dataset(coco_dir, source.name, image_ids, title, source)


def load_truth(annotation_file: Path, images_dir: Path | None = None, part: str | None = None) -> COCO:
    """Reads an annotation file for COCOeval, mended as training sees it; arguments as for `read_instances`.

    Raises:
        UserError: the file does not hold COCO instances, or COCOeval would silently compute wrong numbers from it.
    """
    truth: Any = COCO()
    truth.dataset = parse_instances(annotation_file, images_dir, part).tree
    with quiet():
        truth.createIndex()
    return truth


def truth_of(dataset: Dataset) -> COCO:
    """`load_truth` of a dataset."""
    return load_truth(dataset.annotation_file, dataset.images_dir, dataset.source.part)


def usable_ids(truth: COCO, dataset: Dataset) -> list[int]:
    """Sorted ids of the images that may be scored.

    Raises:
        UserError: one is not listed, or its file name leads out of the dataset: a run may come from somebody else.
    """
    image_ids = sorted(truth.imgs if dataset.image_ids is None else dataset.image_ids)
    if unknown := set(image_ids) - set(truth.imgs):
        raise UserError(f"{dataset.annotation_file} does not list image {min(unknown)}: run 'make data ARGS=--force'")
    for image_id in image_ids:
        if reason := name_fault(truth.imgs[image_id]["file_name"]):
            raise UserError(f"{dataset.annotation_file}: image id {image_id}: {reason}: run 'make data ARGS=--force'")
    return image_ids


def first_of(image_ids: list[int], max_images: int | None) -> list[int]:
    """Sorted ids of the first `max_images` (None: all) in a random order that depends only on the ids."""
    order = sorted(image_ids)
    random.Random(0).shuffle(order)  # noqa: S311 - a reproducible choice, no secret
    return sorted(order[:max_images])


def image_files(truth: COCO, dataset: Dataset, image_ids: list[int]) -> list[ImageFile]:
    """The images to score, in the order of `image_ids`."""
    images = []
    for image_id in image_ids:
        entry = truth.imgs[image_id]
        path = dataset.images_dir / entry["file_name"]
        images.append(ImageFile(image_id, path, entry["width"], entry["height"]))
    return images


def check_images(truth: COCO, dataset: Dataset, image_ids: list[int]) -> None:
    """Raises a UserError if images of a dataset whose `images_sha256` is known have changed, or cannot be read."""
    if dataset.images_sha256 is None:
        return
    contents = {image.id: content_hash(image.path) for image in image_files(truth, dataset, image_ids)}
    if hash_contents(contents) != dataset.images_sha256:
        raise UserError(
            f"images in {dataset.images_dir} have changed since 'make data': restore them, or take another RUN=name "
            "for a run on the new ones"
        )


def describe_dataset(truth: COCO, dataset: Dataset, image_ids: list[int]) -> dict[str, Any]:
    """What was scored, for metrics.json; `subset` is true if a listed image is left out."""
    n_listed = len(truth.imgs)
    n_official = OFFICIAL_SIZES[SPLITS["val"]]
    official = dataset.title == COCO_2017 and dataset.split == SPLITS["val"]
    return {
        "title": dataset.title,
        "coco_dir": str(dataset.coco_dir),
        "split": dataset.split,
        **dataset.source.place(dataset.coco_dir),
        "annotation_sha256": sha256(dataset.annotation_file),
        "n_images": len(image_ids),
        "n_images_listed": n_listed,
        "n_annotations": len(truth.getAnnIds(imgIds=image_ids)),
        "n_frequent_classes": len(frequent_classes(truth, image_ids)),
        "subset": len(image_ids) < n_listed,
        "image_ids": image_ids if len(image_ids) < n_listed else None,
        "image_ids_sha256": hash_ids(image_ids),
        "images_sha256": dataset.images_sha256,
        "complete_coco_val": official and len(image_ids) == n_listed == n_official,
    }


def score(truth: COCO, detections_path: Path, image_ids: list[int]) -> dict[str, float | None]:
    """The twelve numbers of COCOeval for a results file: 0..1, or None if there is nothing to measure.

    Where there are frequent classes, AP_FREQUENT too: the mean of their APs, from the same precision as AP.
    All `image_ids` count, those without objects or detections too. COCOeval keeps a dict for each detection, and one
    for each image, class and size: gigabytes on COCO val2017. Here it gets one class at a time, with the same result.
    """
    detections = read_results(detections_path)
    if not truth.getCatIds():
        return dict.fromkeys(STATS)
    precision, recall = [], []
    with quiet():
        for category_id in sorted(truth.getCatIds()):
            matcher = class_matcher(truth, detections, category_id, image_ids)
            matcher.evaluate()
            matcher.accumulate()
            precision.append(matcher.eval["precision"])  # [IoU, recall, class, size, detections]
            recall.append(matcher.eval["recall"])  # [IoU, class, size, detections]
        evaluation: Any = COCOeval(iouType="bbox")
        evaluation.eval = {"precision": np.concatenate(precision, axis=2), "recall": np.concatenate(recall, axis=1)}
        evaluation.summarize()
    stats = zip(STATS, np.asarray(evaluation.stats).tolist(), strict=True)
    numbers = {name: None if number == -1 else number for name, number in stats}
    frequent = np.isin(sorted(truth.getCatIds()), frequent_classes(truth, image_ids))
    if frequent.any():
        numbers[AP_FREQUENT] = float(evaluation.eval["precision"][:, :, frequent, 0, -1].mean())
    return numbers


def frequent_classes(truth: COCO, image_ids: list[int]) -> list[int]:
    """Ids of the categories with FREQUENT_BOXES objects or more in these images; crowds do not count."""
    counts: Counter[int] = Counter()
    entries: Any = truth.loadAnns(truth.getAnnIds(imgIds=image_ids))
    for entry in entries:
        counts[entry["category_id"]] += not entry.get("iscrowd")
    return [category_id for category_id, n in counts.items() if n >= FREQUENT_BOXES]


def read_results(detections_path: Path, image_ids: Collection[int] | None = None) -> np.ndarray:
    """COCO results -> [n,7]: image id, category id, x, y, w, h (px), score; of `image_ids` alone, None: of all images.

    Raises a UserError if the file is missing or does not hold COCO results.
    """
    try:
        try:
            parts = read_lines(detections_path, image_ids)
        except ValueError:  # another program wrote the file, with rows that spread over several lines
            parts = [as_array(json.loads(detections_path.read_text(encoding="utf-8")))]
        rows = np.concatenate([np.zeros((0, 7)), *parts])
        if not np.isfinite(rows).all():  # Python's JSON reader takes NaN and Infinity
            raise ValueError("a number is not finite")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{detections_path} is missing or no COCO results: run 'make eval ARGS=--force'") from error
    return rows if image_ids is None else rows[np.isin(rows[:, 0], list(image_ids))]


def read_lines(detections_path: Path, image_ids: Collection[int] | None) -> list[np.ndarray]:
    """Reads results as our evaluator writes them, with whole rows on each line, so one line at a time is parsed.

    Lines that name none of `image_ids` are not parsed.
    """
    numbers = "|".join(map(str, image_ids or []))
    wanted = re.compile("" if image_ids is None else rf'"image_id"\s*:\s*(?:{numbers})\b')
    parts = []
    with open(detections_path, encoding="utf-8") as file:
        for line in file:
            if wanted.search(line):
                rows = line.strip().strip("[],")
                parts.append(as_array(json.loads(f"[{rows}]")))
    return parts


def as_array(rows: list[dict[str, Any]]) -> np.ndarray:
    """Rows of COCO's results format -> [n,7] with the columns of `read_results`."""
    values = [(row["image_id"], row["category_id"], *row["bbox"], row["score"]) for row in rows]
    return np.array(values, float).reshape(-1, 7)


class Matcher(_Untyped):
    """COCOeval with the same results, several times faster on a detector's 300 boxes an image.

    On COCO val2017 an image has objects of 3 classes and detections of up to 80. Where it has no object of a class,
    every detection of it is false at every IoU, and nothing has to be matched.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:
        return super().computeIoU(imgId, catId) if self._gts[imgId, catId] else []

    def evaluateImg(self, imgId: int, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:
        """One image, class and range of areas; what pycocotools 2.0.11 gives, in the keys that `accumulate` reads."""
        if self._gts[imgId, catId]:
            return super().evaluateImg(imgId, catId, aRng, maxDet)
        found = self._dts[imgId, catId]
        if not found:
            return None
        best_first = sorted(found, key=lambda detection: -detection["score"])[:maxDet]
        n_ious = len(self.params.iouThrs)
        is_outside = np.array([[not aRng[0] <= detection["area"] <= aRng[1] for detection in best_first]])
        return {
            "image_id": imgId,
            "dtMatches": np.zeros((n_ious, len(best_first))),
            "dtScores": [detection["score"] for detection in best_first],
            "gtIgnore": np.zeros(0),
            "dtIgnore": is_outside.repeat(n_ious, axis=0),
        }


def class_matcher(truth: COCO, detections: np.ndarray, category_id: int, image_ids: list[int]) -> Any:
    """COCOeval for one class, which has computed nothing yet; `detections` come from read_results."""
    annotations = []
    rows = detections[detections[:, 1] == category_id].tolist()
    for number, (image_id, _, x, y, w, h, confidence) in enumerate(rows, start=1):
        annotation = {"id": number, "image_id": int(image_id), "category_id": category_id}
        annotation |= {"bbox": [x, y, w, h], "area": w * h, "score": confidence}
        annotations.append(annotation)
    matcher: Any = Matcher(truth, with_annotations(truth, annotations), "bbox")
    matcher.params.imgIds, matcher.params.catIds = image_ids, [category_id]
    return matcher


def with_annotations(truth: COCO, annotations: list[dict[str, Any]]) -> COCO:
    """A COCO object with the images and categories of `truth` and a model's detections as its annotations."""
    results: Any = COCO()
    results.dataset = {**truth.dataset, "annotations": annotations}
    results.createIndex()
    return results


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Redirects the output of pycocotools to the log, at level debug."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    log.debug("%s", printed.getvalue().rstrip())
