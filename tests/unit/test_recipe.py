"""docs/recipe.md against conf/hyp.scratch.yaml: every key of YOLOv5's recipe is used with its value, or explained."""

from __future__ import annotations

import pytest
import yaml

from app.core.config import CONF_DIR, Hyp
from app.core.environment import REPO_DIR

# data/hyps/hyp.scratch.yaml of YOLOv5 v6.0
ORIGINAL = {
    "lr0": 0.01, "lrf": 0.1, "momentum": 0.937, "weight_decay": 0.0005, "warmup_epochs": 3.0, "warmup_momentum": 0.8,
    "warmup_bias_lr": 0.1, "box": 0.05, "cls": 0.5, "cls_pw": 1.0, "obj": 1.0, "obj_pw": 1.0, "iou_t": 0.2,
    "anchor_t": 4.0, "fl_gamma": 0.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "degrees": 0.0, "translate": 0.1,
    "scale": 0.5, "shear": 0.0, "perspective": 0.0, "flipud": 0.0, "fliplr": 0.5, "mosaic": 1.0, "mixup": 0.0,
    "copy_paste": 0.0,
}  # fmt: skip
NOT_SET = "-"
HYP = yaml.safe_load((CONF_DIR / "hyp.scratch.yaml").read_text(encoding="utf-8"))["hyp"]


def table(head: str) -> list[list[str]]:
    """Cells of the rows of the table in docs/recipe.md that begins with this head, without backquotes."""
    lines = (REPO_DIR / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(head) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def original_rows() -> list[list[str]]:
    return table("| original key | original value | here | why |")


def test_every_original_key_is_there_once() -> None:
    values = [(key, float(value)) for key, value, _, _ in original_rows()]
    assert values == list(ORIGINAL.items())


@pytest.mark.parametrize("row", original_rows(), ids=lambda row: row[0])
def test_a_key_has_the_value_of_the_yaml_or_no_counterpart(row: list[str]) -> None:
    key, _, here, why = row
    if here == NOT_SET:
        assert key not in Hyp.model_fields
        assert len(why) > 20
    else:
        assert HYP[key] == float(here)


def test_the_other_keys_of_the_yaml_are_there_too() -> None:
    rows = table("| key | value | why |")
    assert {key: value for key, value, _ in rows} == {key: str(HYP[key]) for key in HYP if key not in ORIGINAL}
    assert set(HYP) == set(Hyp.model_fields)
