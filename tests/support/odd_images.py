"""A drawn COCO folder whose val images are what evaluators stumble over: EXIF rotation, grey, odd and tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from app.data.synthetic import draw_coco_subset

ODD_SIZES = {2: (161, 97), 3: (40, 30), 4: (97, 161)}  # position among the val images -> width and height in px
EXIF_ORIENTATION, ROTATE_90 = 0x0112, 6


def draw_odd_images(coco_dir: Path) -> None:
    """Eight val images: 0 is stored on its side with an EXIF tag, 1 is grey, 2 to 4 have odd sizes, 5 has no objects,
    6 has a crowd among them."""
    draw_coco_subset(coco_dir, n_train=2, n_val=8)
    file = coco_dir / "annotations" / "instances_val2017.json"
    tree = json.loads(file.read_text())
    for position, entry in enumerate(tree["images"]):
        path = coco_dir / "val2017" / entry["file_name"]
        image = Image.open(path).convert("RGB")
        if position == 0:
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = ROTATE_90
            Image.fromarray(np.rot90(np.asarray(image))).save(path, quality=95, exif=exif)
        if position == 1:
            image.convert("L").save(path, quality=95)
        if position in ODD_SIZES:
            width, height = ODD_SIZES[position]
            image.resize((width, height)).save(path, quality=95)
            for box in (a for a in tree["annotations"] if a["image_id"] == entry["id"]):
                scale = [width / entry["width"], height / entry["height"]] * 2
                box["bbox"] = (np.array(box["bbox"]) * scale).tolist()
                box["area"] = box["bbox"][2] * box["bbox"][3]
                box["segmentation"] = []
            entry |= {"width": width, "height": height}
    ids = [entry["id"] for entry in tree["images"]]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != ids[5]]
    crowd = {"image_id": ids[6], "category_id": 1, "bbox": [0, 0, 60, 60], "area": 3600, "iscrowd": 1}
    tree["annotations"].append(crowd | {"id": 10_000, "segmentation": {"counts": [0, 3600], "size": [60, 60]}})
    file.write_text(json.dumps(tree))
