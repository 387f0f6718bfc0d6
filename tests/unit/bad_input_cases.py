"""The table of bad inputs: what is broken, and the exact line that the user reads; test_bad_input.py runs it.

In the lines, COCO stands for the dataset folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from data_fixtures import annotation_file, edit, write_image, write_tree

from app.config import Quant

NOT_COCO = "give an instances file of COCO 2017, or of a dataset in its layout and categories"
TRAIN_JSON = "COCO/annotations/instances_train2017.json"
LAYOUT = (
    "it must hold train2017/, val2017/ and annotations/ as COCO 2017 does; give COCO_DIR=path, "
    "or run 'make download-coco'"
)
REPAIR = "repair them, or go on without them with --set data.skip_broken=true"
SCHEMES = [repr(name) for name in get_args(Quant.model_fields["scheme"].annotation)]


@dataclass(frozen=True)
class Case:
    """One way to spoil the folder of data_fixtures, the line expected, and settings that go with it."""

    name: str
    spoil: Callable[[Path], object]
    line: str
    sets: tuple[str, ...] = ()


def nothing(coco_dir: Path) -> None:
    """The folder stays sound: the fault lies in the settings."""


def image_1(coco_dir: Path) -> Path:
    return coco_dir / "train2017" / "000000000001.jpg"


def text(content: str) -> Callable[[Path], object]:
    return lambda coco_dir: annotation_file(coco_dir).write_text(content)


def tree(content: Any) -> Callable[[Path], object]:
    return lambda coco_dir: write_tree(coco_dir, "train2017", content)


def first(kind: str, **changes: Any) -> Callable[[Path], object]:
    """Changes keys of the first image, annotation or category of train2017."""
    return lambda coco_dir: edit(coco_dir, lambda found: found[kind][0].update(changes))


def without(kind: str, key: str) -> Callable[[Path], object]:
    return lambda coco_dir: edit(coco_dir, lambda found: found[kind][0].pop(key))


def twice(kind: str, **changes: Any) -> Callable[[Path], object]:
    """Lists the first entry once more, with other values for some keys."""
    return lambda coco_dir: edit(coco_dir, lambda found: found[kind].append(found[kind][0] | changes))


def cut(coco_dir: Path) -> None:
    image_1(coco_dir).write_bytes(image_1(coco_dir).read_bytes()[:-100])


def cut_png(coco_dir: Path) -> None:
    path = image_1(coco_dir).with_suffix(".png")
    write_image(path, (40, 30))
    path.write_bytes(path.read_bytes()[:40])
    first("images", file_name=path.name)(coco_dir)


def link_out(coco_dir: Path) -> None:
    image_1(coco_dir).rename(coco_dir.parent / "secret.jpg")
    image_1(coco_dir).symlink_to(coco_dir.parent / "secret.jpg")


def link_in_a_circle(coco_dir: Path) -> None:
    image_1(coco_dir).unlink()
    image_1(coco_dir).symlink_to(image_1(coco_dir).name)


def unusable(reason: str, file_name: str = "000000000001.jpg") -> str:
    return f"1 of 2 images in COCO/train2017 cannot be used: {file_name} {reason}; {REPAIR}"


FOLDER = [
    Case("no COCO folder", shutil.rmtree, "no COCO folder at COCO: give COCO_DIR=path, or run 'make download-coco'"),
    Case("no train2017/", lambda coco: shutil.rmtree(coco / "train2017"), f"COCO has no train2017/: {LAYOUT}"),
    Case("no val2017/", lambda coco: shutil.rmtree(coco / "val2017"), f"COCO has no val2017/: {LAYOUT}"),
    Case("no annotations/", lambda coco: shutil.rmtree(coco / "annotations"), f"COCO has no annotations/: {LAYOUT}"),
    Case(
        "annotation file missing", lambda coco: annotation_file(coco).unlink(),
        f"{TRAIN_JSON} is missing: unpack annotations_trainval2017.zip into COCO",
    ),
]  # fmt: skip

JSON = [
    Case(
        "annotation file empty", text(""),
        f"{TRAIN_JSON} is not readable JSON (Expecting value: line 1 column 1 (char 0)): "
        "unpack the official annotations again",
    ),
    Case(
        "annotation file cut off", text('{"images": [{"id": 1'),
        f"{TRAIN_JSON} is not readable JSON (Expecting ',' delimiter: line 1 column 21 (char 20)): "
        "unpack the official annotations again",
    ),
    Case(
        "annotation file is not UTF-8", lambda coco: annotation_file(coco).write_bytes(b'{"images": "\xff"}'),
        f"{TRAIN_JSON} is not readable JSON ('utf-8' codec can't decode byte 0xff in position 12: invalid start byte): "
        "unpack the official annotations again",
    ),
    Case("JSON of another kind", tree([1, 2]), f"{TRAIN_JSON} has no list 'images': {NOT_COCO}"),
    Case(
        "captions instead of instances", tree({"images": [{}], "annotations": []}),
        f"{TRAIN_JSON} has no list 'categories': {NOT_COCO}",
    ),
    Case(
        "annotations are no list", tree({"images": [{}], "annotations": {}, "categories": []}),
        f"{TRAIN_JSON} has no list 'annotations': {NOT_COCO}",
    ),
    Case(
        "no images listed", tree({"images": [], "annotations": [], "categories": []}),
        f"{TRAIN_JSON} lists no images: {NOT_COCO}",
    ),
]  # fmt: skip

CATEGORIES = [
    Case(
        "category id that COCO has not", first("categories", id=12),
        f"{TRAIN_JSON}: category id 12 is not among the 80 official COCO ids: {NOT_COCO}",
    ),
    Case(
        "category id is text", first("categories", id="1"),
        f"{TRAIN_JSON}: category id '1' is not among the 80 official COCO ids: {NOT_COCO}",
    ),
    Case(
        "category with another name", first("categories", name="pedestrian"),
        f"{TRAIN_JSON}: category 1 is 'pedestrian', in COCO it is 'person': {NOT_COCO}",
    ),
    Case(
        "annotation of an unknown category", first("annotations", category_id=12),
        f"{TRAIN_JSON}: annotation 1 has unknown category id 12: {NOT_COCO}",
    ),
    Case(
        "annotation whose category is a float", first("annotations", category_id=1.0),
        f"{TRAIN_JSON}: annotation 1 has unknown category id 1.0: {NOT_COCO}",
    ),
]  # fmt: skip

IDS = [
    Case(
        "image id listed twice", twice("images", file_name="x.jpg"),
        f"{TRAIN_JSON}: image id 1 or file name x.jpg is listed twice: mend the annotations",
    ),
    Case(
        "file name listed twice", lambda coco: edit(coco, lambda found: [
            found["images"][0].update(file_name="same.jpg"), found["images"][1].update(file_name="same.png")
        ]),
        f"{TRAIN_JSON}: image id 2 or file name same.png is listed twice: mend the annotations",
    ),
    Case(
        "image id too large for a float", first("images", id=2**53 + 1),
        f"{TRAIN_JSON}: image id 9007199254740993 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is a float", first("images", id=1.5),
        f"{TRAIN_JSON}: image id 1.5 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is true", first("images", id=True),
        f"{TRAIN_JSON}: image id True is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is text", first("images", id="1"),
        f"{TRAIN_JSON}: image id '1' is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is negative", first("images", id=-1),
        f"{TRAIN_JSON}: image id -1 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "number in the file name is not the id", first("images", file_name="000000000007.jpg"),
        f"{TRAIN_JSON}: image id 1 has the file name 000000000007.jpg: mend the ids",
    ),
    Case(
        "annotation of an unknown image", first("annotations", image_id=77),
        f"{TRAIN_JSON}: annotation 1 is for unknown image id 77: {NOT_COCO}",
    ),
    Case(
        "annotation id given twice", twice("annotations"),
        f"{TRAIN_JSON}: annotation id 1 is given twice: number the annotations from 1",
    ),
    Case(
        "annotation id 0", first("annotations", id=0),
        f"{TRAIN_JSON}: annotation id 0 is not a whole number from 1 to 2^53: number them from 1",
    ),
    Case(
        "annotation without area", without("annotations", "area"),
        f"{TRAIN_JSON}: annotation 0 lacks one of id, image_id, category_id, bbox, area, iscrowd: {NOT_COCO}",
    ),
    Case(
        "iscrowd is neither 0 nor 1", first("annotations", iscrowd="no"),
        f"{TRAIN_JSON}: annotation 1 has iscrowd 'no', not 0 or 1: {NOT_COCO}",
    ),
    Case(
        "image entry without a size", without("images", "width"),
        f"{TRAIN_JSON}: an image entry lacks id, file_name, width or height: "
        "{'id': 1, 'file_name': '000000000001.jpg', 'height': 30}",
    ),
    Case(
        "image of no width", first("images", width=0),
        f"{TRAIN_JSON}: image 000000000001.jpg has size 0 x 30: mend the annotations",
    ),
    Case(
        "line break in a file name", first("images", file_name="a\nb.jpg"),
        f"{TRAIN_JSON}: image id 1 has file name 'a\\nb.jpg': {NOT_COCO}",
    ),
]  # fmt: skip

FILES = [
    Case(
        "image listed but missing", lambda coco: image_1(coco).unlink(),
        unusable("cannot be read (No such file or directory)"),
    ),
    Case("image of 0 bytes", lambda coco: image_1(coco).write_bytes(b""), unusable("is empty")),
    Case("JPEG cut off", cut, unusable("is cut off or damaged (a JPEG must end in FF D9)")),
    Case("PNG cut off", cut_png, unusable("cannot be decoded", "000000000001.png")),
    Case(
        "text named .jpg", lambda coco: image_1(coco).write_text("<html>404</html>"),
        unusable("is cut off or damaged (a JPEG must end in FF D9)"),
    ),
    Case(
        "noise named .jpg", lambda coco: image_1(coco).write_bytes(b"noise\xff\xd9"), unusable("cannot be decoded")
    ),
    Case(
        "image of another size", lambda coco: write_image(image_1(coco), (30, 40)),
        unusable("has 30 x 40 px, the annotations say 40 x 30"),
    ),
    Case(
        "folder in place of an image", lambda coco: [image_1(coco).unlink(), image_1(coco).mkdir()],
        unusable("cannot be read (Is a directory)"),
    ),
    Case("link out of the dataset", link_out, unusable("is a link out of the dataset")),
    Case("link that leads to itself", link_in_a_circle, unusable("cannot be read (Too many levels of symbolic links)")),
    Case(
        "file name climbs out", first("images", file_name="../../secret.jpg"),
        unusable("its file name leaves the image folder", "../../secret.jpg"),
    ),
    Case(
        "absolute file name", first("images", file_name="/etc/passwd"),
        unusable("its file name leaves the image folder", "/etc/passwd"),
    ),
]  # fmt: skip

BOXES = [
    Case(
        "box outside its image", first("annotations", bbox=[30, 3, 20, 6]),
        unusable("annotation 1: bbox [30, 3, 20, 6] lies outside its image of 40 x 30"),
    ),
    Case(
        "box of negative width", first("annotations", bbox=[4, 3, -2, 6]),
        unusable("annotation 1: bbox [4, 3, -2, 6] has a negative size"),
    ),
    Case(
        "negative area", first("annotations", area=-60.0),
        unusable("annotation 1: area -60.0 is not a finite number from 0 on"),
    ),
    Case(
        "area is NaN", first("annotations", area=float("nan")),
        unusable("annotation 1: area nan is not a finite number from 0 on"),
    ),
    Case(
        "NaN in a box", first("annotations", bbox=[4, float("nan"), 10, 6]),
        unusable("annotation 1: bbox [4, nan, 10, 6] is not four finite numbers"),
    ),
    Case(
        "infinity in a box", first("annotations", bbox=[4, 3, float("inf"), 6]),
        unusable("annotation 1: bbox [4, 3, inf, 6] is not four finite numbers"),
    ),
    Case(
        "number too large for a float in a box", first("annotations", bbox=[10**20, 3, 10, 6]),
        unusable("annotation 1: bbox [100000000000000000000, 3, 10, 6] is not four finite numbers"),
    ),
    Case(
        "box of three numbers", first("annotations", bbox=[4, 3, 10]),
        unusable("annotation 1: bbox [4, 3, 10] is not four finite numbers"),
    ),
    Case(
        "box of text", first("annotations", bbox=["4", 3, 10, 6]),
        unusable("annotation 1: bbox ['4', 3, 10, 6] is not four finite numbers"),
    ),
    Case(
        "box of a crowd outside its image", lambda coco: edit(
            coco, lambda found: found["annotations"][2].update(bbox=[-9, 0, 24, 8])
        ),
        unusable("annotation 3: bbox [-9, 0, 24, 8] lies outside its image of 24 x 32", "000000000002.jpg"),
    ),
]  # fmt: skip

SETTINGS = [
    Case(
        "more images asked for than there are", nothing,
        "data.n_train=3: train2017 has 2 usable images; ask for at most as many", ("data.n_train=3",),
    ),
    Case(
        "no image is left", lambda coco: [path.unlink() for path in (coco / "val2017").iterdir()],
        "no image of val2017 can be used: repair the dataset", ("data.skip_broken=true",),
    ),
    Case(
        "unknown key", nothing, "configuration: unknown key data.n_trian, did you mean data.n_train?",
        ("data.n_trian=3",),
    ),
    Case(
        "value out of range", nothing, "configuration: data.n_train = 0: Input should be greater than 0",
        ("data.n_train=0",),
    ),
    Case(
        "value of another kind", nothing,
        "configuration: train.epochs = 'many': Input should be a valid integer, unable to parse string as an integer",
        ("train.epochs=many",),
    ),
    Case(
        "unknown scheme", nothing,
        f"configuration: quant.scheme = 'w3a16': Input should be {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}",
        ("quant.scheme=w3a16",),
    ),
    Case(
        "setting without a value", nothing,
        "--set train.epochs: write it as key=value, for example --set train.epochs=3", ("train.epochs",),
    ),
    Case(
        "setting that is not YAML", nothing,
        "--set train.epochs=[1: the value is not valid YAML", ("train.epochs=[1",),
    ),
]  # fmt: skip

CASES = [*FOLDER, *JSON, *CATEGORIES, *IDS, *FILES, *BOXES, *SETTINGS]
