"""COCO 2017's 80 categories, and what a dataset of its own classes lists in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from app.coco.entries import NOT_COCO, shown, whole
from app.core.config import UserError

# Supercategory: official category ids and names, in the order of the ids. The n-th of them is class n of the network.
_OFFICIAL = {
    "person": "1 person",
    "vehicle": "2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat",
    "outdoor": "10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench",
    "animal": "16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe",
    "accessory": "27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase",
    "sports": "34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball "
    "glove, 41 skateboard, 42 surfboard, 43 tennis racket",
    "kitchen": "44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl",
    "food": "52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 "
    "pizza, 60 donut, 61 cake",
    "furniture": "62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet",
    "electronic": "72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone",
    "appliance": "78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator",
    "indoor": "84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush",
}
Categories = list[dict[str, Any]]  # entries of `categories` in an annotation file, in the order of their ids
MAX_NAME = 200  # characters of a class name
N_SHOWN_NAMES = 5  # of each side, in a message about two lists that differ


def _categories() -> Categories:
    """The entries of `categories` in an official instances_*.json."""
    categories = []
    for supercategory, members in _OFFICIAL.items():
        for member in members.split(", "):
            category_id, name = member.split(" ", 1)
            categories.append({"supercategory": supercategory, "id": int(category_id), "name": name})
    return categories


CATEGORIES = _categories()
CATEGORY_IDS: list[int] = [category["id"] for category in CATEGORIES]
NAMES: list[str] = [category["name"] for category in CATEGORIES]


def ids_by_name(categories: Iterable[Any]) -> dict[str, int]:
    """Name -> id, in the order of the classes."""
    return {category["name"]: category["id"] for category in categories}


OFFICIAL_IDS = ids_by_name(CATEGORIES)


def check_categories(file: Path, entries: Iterable[Any]) -> Categories:
    """The entries in the order of their ids, with whole ids and without blanks around their names.

    Raises a UserError if an id is no whole number or is listed twice, or a name cannot be shown.
    """
    by_id: dict[int, dict[str, Any]] = {}
    for category in entries:
        given = category.get("id") if isinstance(category, dict) else None
        category_id = whole(given)
        if category_id is None:
            raise UserError(f"{file}: category id {shown(given)} is not a whole number from 0 to 2^53: {NOT_COCO}")
        name = category.get("name")
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
            raise UserError(f"{file}: category {category_id} is named {shown(name)}: give it 1 to {MAX_NAME} letters")
        if category_id in by_id:
            raise UserError(f"{file}: category id {category_id} is listed twice: mend the categories")
        by_id[category_id] = {**category, "id": category_id, "name": name.strip()}
    return [by_id[category_id] for category_id in sorted(by_id)]


def without_placeholder(categories: Categories, used: Collection[int]) -> Categories:
    """The categories without Roboflow's category 0, which stands for the supercategory of all others.

    It is one only if no annotation is of it; `used` are the ids that annotations are of.
    """
    if len(categories) < 2:
        return categories
    first, *others = categories
    is_top = first.get("supercategory") in (None, "", "none", first["name"])
    if first["id"] or 0 in used or not is_top:
        return categories
    is_parent = all(category.get("supercategory") == first["name"] for category in others)
    return others if is_parent else categories


def check_names(file: Path, categories: Categories) -> None:
    """Raises a UserError if two categories have one name: results are told apart by it."""
    seen: dict[str, int] = {}
    for category in categories:
        name, category_id = category["name"], category["id"]
        if name in seen:
            raise UserError(f"{file}: categories {seen[name]} and {category_id} are both {shown(name)}: rename one")
        seen[name] = category_id


def listed_names(names: Iterable[str]) -> str:
    """The first names for a message."""
    all_names = list(names)
    more = f" and {len(all_names) - N_SHOWN_NAMES} more" if len(all_names) > N_SHOWN_NAMES else ""
    return ", ".join(map(repr, all_names[:N_SHOWN_NAMES])) + more
