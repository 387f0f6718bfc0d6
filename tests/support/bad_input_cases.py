"""The table of bad inputs: what is broken, and the exact line that the user reads; test_bad_input.py runs it.

In the lines, COCO stands for the dataset folder.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.bad_annotation_cases import CATEGORIES, IDS, JSON, TRAIN_JSON, Case, first, twice
from tests.support.data_fixtures import annotation_file, claiming_png, edit, write_image

LAYOUT = (
    "it must hold train2017/, val2017/ and annotations/ as COCO 2017 does; give COCO_DIR=path, "
    "or run 'make download-coco'"
)
REPAIR = "repair them, or go on without them with --set data.skip_broken=true"


def nothing(coco_dir: Path) -> None:
    """The folder stays sound: the fault lies in the settings."""


def image_1(coco_dir: Path) -> Path:
    return coco_dir / "train2017" / "000000000001.jpg"


def cut(coco_dir: Path) -> None:
    image_1(coco_dir).write_bytes(image_1(coco_dir).read_bytes()[:-100])


def cut_png(coco_dir: Path) -> None:
    path = image_1(coco_dir).with_suffix(".png")
    write_image(path, (40, 30))
    path.write_bytes(path.read_bytes()[:40])
    first("images", file_name=path.name)(coco_dir)


def dead_link(path: Path) -> None:
    """Puts a link to nowhere in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to("/not/there")


def pipe(coco_dir: Path) -> None:
    image_1(coco_dir).unlink()
    os.mkfifo(image_1(coco_dir))


def claim(coco_dir: Path, width: int, height: int) -> None:
    """Puts a PNG there whose header claims a size, in a few bytes, and lists the image with this size."""
    path = image_1(coco_dir).with_suffix(".png")
    path.write_bytes(claiming_png(width, height))
    first("images", file_name=path.name, width=width, height=height)(coco_dir)


def claim_another_size(coco_dir: Path) -> None:
    claim(coco_dir, 9000, 9000)
    first("images", width=40, height=30)(coco_dir)


def in_shares(found: dict[str, Any]) -> None:
    for box in found["annotations"]:
        box["bbox"] = [0.25, 0.25, 0.5, 0.5]


def all_crowds(found: dict[str, Any]) -> None:
    for box in found["annotations"]:
        box["iscrowd"] = 1


def link_in_a_circle(coco_dir: Path) -> None:
    image_1(coco_dir).unlink()
    image_1(coco_dir).symlink_to(image_1(coco_dir).name)


NOWHERE = "a link to /not/there, which is not there (a container sees nothing outside the dataset)"


def unusable(reason: str, file_name: str = "000000000001.jpg") -> str:
    return f"1 of 2 images in COCO/train2017 cannot be used: {file_name} {reason}; {REPAIR}"


def corners(coco_dir: Path) -> None:
    """Writes ten boxes as x1, y1, x2, y2."""

    def change(found: dict[str, Any]) -> None:
        box = found["annotations"][0]
        found["annotations"] = [box | {"id": number, "bbox": [number, 3, 28 + number, 25]} for number in range(1, 11)]

    edit(coco_dir, change)


def only_annotations(coco_dir: Path) -> None:
    for name in ("train2017", "val2017"):
        shutil.rmtree(coco_dir / name)
        annotation_file(coco_dir, name).unlink()


def as_roboflow(coco_dir: Path) -> None:
    """Leaves train/ as Roboflow has it, and nothing of val."""
    (coco_dir / "train2017").rename(coco_dir / "train")
    annotation_file(coco_dir).rename(coco_dir / "train" / "_annotations.coco.json")
    shutil.rmtree(coco_dir / "val2017")
    shutil.rmtree(coco_dir / "annotations")


KNOWN = (
    "train2017/, val2017/ and annotations/ as COCO 2017 does, train/ and valid/ with _annotations.coco.json "
    "(Roboflow), or train/ and val/ with annotations/instances_default.json (CVAT)"
)
SAY = "say where they are with data.train_images, data.train_annotations, data.val_images and data.val_annotations"
FOLDER = [
    Case(
        "another layout", only_annotations,
        f"COCO holds no dataset in a known layout: it must hold {KNOWN}; {SAY}, give another COCO_DIR=path, or run "
        "'make download-coco'",
    ),
    Case(
        "train images without val images", as_roboflow,
        "COCO has train images (train/ with train/_annotations.coco.json) and no val images: export them too, or "
        f"{SAY}",
    ),
    Case(
        "images without annotations", nothing,
        "data.train_images is given without data.train_annotations: give both", ("data.train_images=train2017",),
    ),
    Case(
        "annotations that are not there", nothing, "COCO/no.json is missing: it must list the images of val",
        ("data.val_images=val2017", "data.val_annotations=no.json"),
    ),
    Case(
        "one annotation file for train and val", nothing,
        "train and val have the same annotations, COCO/annotations/instances_train2017.json: AP would be that of "
        "images trained on; name a file of other images with data.val_images and data.val_annotations",
        tuple(
            f"data.{role}_{what}" for role in ("train", "val")
            for what in ("images=train2017", "annotations=annotations/instances_train2017.json")
        ),
    ),
    Case("no COCO folder", shutil.rmtree, "no COCO folder at COCO: give COCO_DIR=path, or run 'make download-coco'"),
    Case("no train2017/", lambda coco: shutil.rmtree(coco / "train2017"), f"COCO has no train2017/: {LAYOUT}"),
    Case("no val2017/", lambda coco: shutil.rmtree(coco / "val2017"), f"COCO has no val2017/: {LAYOUT}"),
    Case("no annotations/", lambda coco: shutil.rmtree(coco / "annotations"), f"COCO has no annotations/: {LAYOUT}"),
    Case(
        "annotation file missing", lambda coco: annotation_file(coco).unlink(),
        f"{TRAIN_JSON} is missing: unpack annotations_trainval2017.zip into COCO",
    ),
    Case(
        "folder that is a dead link", lambda coco: dead_link(coco / "val2017"),
        f"COCO/val2017 is {NOWHERE}: make the link anew, or give another COCO_DIR=path",
    ),
    Case(
        "annotation file that is a dead link", lambda coco: dead_link(annotation_file(coco)),
        f"{TRAIN_JSON} is {NOWHERE}: make the link anew, or give another COCO_DIR=path",
    ),
]  # fmt: skip

FILES = [
    Case(
        "image listed but missing", lambda coco: image_1(coco).unlink(),
        unusable("cannot be read (No such file or directory)"),
    ),
    Case("image of 0 bytes", lambda coco: image_1(coco).write_bytes(b""), unusable("is empty")),
    Case("JPEG cut off", cut, unusable("is cut off or damaged")),
    Case("PNG cut off", cut_png, unusable("cannot be decoded", "000000000001.png")),
    Case(
        "text named .jpg", lambda coco: image_1(coco).write_text("<html>404</html>"),
        unusable("cannot be decoded"),
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
    Case("dead link", lambda coco: dead_link(image_1(coco)), unusable(f"is {NOWHERE}")),
    Case("pipe in place of an image", pipe, unusable("is a pipe, socket or device, not a file")),
    Case(
        "image of more pixels than are decoded", lambda coco: claim(coco, 30_000, 30_000),
        unusable("has more pixels than the 178,956,970 that are decoded: shrink it", "000000000001.png"),
    ),
    Case(
        "large image of another size", claim_another_size,
        unusable("has 9000 x 9000 px, the annotations say 40 x 30", "000000000001.png"),
    ),
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

CORNERS = [
    Case(
        "boxes that are corners",
        corners,
        f"{TRAIN_JSON}: 4 of 10 boxes reach over the border of their images, and all could be x1, y1, x2, y2: COCO's "
        "are x, y, width, height in px, write them so",
    ),
]

BOXES = [
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
]  # fmt: skip

GO_ON = "to go on all the same, give --set data.strict=false"
STRICT = ("data.strict=true",)
DOUBTS = [
    Case(
        "box over the border", first("annotations", bbox=[30, 3, 20, 6]),
        f"{TRAIN_JSON}: 1 of 4 boxes reach over the border of their image (first: 000000000001.jpg) and were clipped "
        f"to it: check that they are x, y, width, height in px of this size; {GO_ON}", STRICT,
    ),
    Case(
        "boxes in shares of the image", lambda coco: edit(coco, in_shares),
        f"{TRAIN_JSON}: 3 of 3 boxes have no number above 1 (first: 000000000001.jpg): COCO's are x, y, w, h in px, "
        f"not shares of the image; multiply them; {GO_ON}", STRICT,
    ),
    Case(
        "annotation with a copy", twice("annotations", id=5),
        f"{TRAIN_JSON}: 1 of 3 boxes repeat another of their image and class exactly (first: 000000000001.jpg), and "
        f"only one of two can be found: delete the copies; {GO_ON}", STRICT,
    ),
    Case(
        "only crowds", lambda coco: edit(coco, all_crowds),
        f"{TRAIN_JSON}: 4 of 4 annotations have iscrowd=1 (first: 000000000001.jpg); crowds are neither learnt nor "
        f"scored: set iscrowd to 0 where an annotation is one object; {GO_ON}", STRICT,
    ),
    Case(
        "no annotations", lambda coco: edit(coco, lambda found: found.update(annotations=[])),
        f"{TRAIN_JSON}: it lists no annotations, so there is nothing to learn: check the export; {GO_ON}", STRICT,
    ),
]  # fmt: skip

SETTINGS = [
    Case(
        "nothing to score", lambda coco: edit(coco, all_crowds, "val2017"),
        "1 images of COCO/val2017 have no object to score (1 annotations, 1 of them crowds, the others without area): "
        "mend the annotations, or choose more images with data.n_val",
    ),
    Case(
        "path of no letters", nothing, "configuration: data.coco_dir = '': give the path of a folder",
        ("data.coco_dir=",),
    ),
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
        "configuration: quant.scheme = 'w3a16': choose one of w4a16, w4a16-decoupled, w4a16-dfl, w4a16-full, "
        "w4a16-mixed, w4a16-mixed-dw, w4a16-per-tensor, w8a16, or name a file such as my.yaml",
        ("quant.scheme=w3a16",),
    ),
    Case(
        "scheme file that is not there", nothing,
        "configuration: quant.scheme = 'my.yaml': my.yaml does not exist: name a YAML file as those in conf/schemes/",
        ("quant.scheme=my.yaml",),
    ),
    Case(
        "checkpoint to start from that is not there", nothing,
        "configuration: train.weights = 'best.pt': best.pt does not exist: name a checkpoint such as best.pt",
        ("train.weights=best.pt",),
    ),
    Case(
        "warm-up from FP16 without one in float", nothing,
        "configuration: quant: warmup_from takes warmup_bits=float and a warmup_share: it is an FP16 training's epochs",
        ("quant.warmup_from=runs/full/fp16/weights/epoch200.pt",),
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


@dataclass(frozen=True)
class Argument:
    """A command line that the parser refuses, without `python -m app`, and the line expected."""

    name: str
    args: tuple[str, ...]
    line: str


NONE = "unrecognized arguments"
ARGUMENTS = [
    Argument(
        "setting without --set", ("train", "--variant", "qat", "train.epochs=3"),
        f"{NONE}: train.epochs=3: a setting is written --set train.epochs=3",
    ),
    Argument(
        "option that is cut short", ("all", "--forc"), f"{NONE}: --forc: --help lists the arguments",
    ),
    Argument(
        "setting as an option", ("all", "--epochs", "3"),
        f"{NONE}: --epochs 3: a setting is written --set train.epochs=3",
    ),
    Argument(
        "setting without its section, which two have", ("all", "--force", "seed=3"),
        f"{NONE}: seed=3: a setting is written --set data.seed=3 or --set train.seed=3",
    ),
    Argument(
        "setting that there is not", ("data", "train.epoch=3"),
        f"{NONE}: train.epoch=3: a setting is written --set key=value; conf/base.yaml lists the keys",
    ),
    Argument(
        "option that there is not", ("data", "--what", "a"), f"{NONE}: --what a: --help lists the arguments",
    ),
    Argument(
        "option that is missing, called as a setting is", ("import-weights", "--run", "x"),
        "the following arguments are required: --weights: --help lists the arguments",
    ),
    Argument(
        "no turn of a bench", ("bench", "train", "--rounds", "0"),
        "argument --rounds: '0' is too few: give 1 or more: --help lists the arguments",
    ),
    Argument(
        "time without an end", ("estimate", "--for-s", "inf"),
        "argument --for-s: 'inf' is no time: give a number of seconds above 0: --help lists the arguments",
    ),
    Argument(
        "time that is no number", ("bench", "rehearsal", "--draw-s", "nan"),
        "argument --draw-s: 'nan' is no time: give a number of seconds above 0: --help lists the arguments",
    ),
    Argument(
        "time below 0", ("bench", "stability", "--for-s=-1"),
        "argument --for-s: '-1' is no time: give a number of seconds above 0: --help lists the arguments",
    ),
    Argument(
        "compare without runs", ("compare", "", ""),
        "argument left: name two runs or scored folders, A=runs/a B=runs/b: --help lists the arguments",
    ),
]  # fmt: skip

CASES = [*FOLDER, *JSON, *CATEGORIES, *IDS, *CORNERS, *FILES, *BOXES, *DOUBTS, *SETTINGS]
