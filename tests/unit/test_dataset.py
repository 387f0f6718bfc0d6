"""Where a dataset's files lie, whose annotations it takes, and what it may be called."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.coco.dataset import (
    BUILTIN_TITLE,
    COCO_2017,
    OFFICIAL_ANNOTATIONS,
    OFFICIAL_SIZES,
    OTHER_COCO,
    Dataset,
    annotation_path,
    check_unchanged,
    coco_title,
    hash_ids,
)
from app.coco.score import standalone_dataset
from app.core.config import UserError
from app.core.files import sha256
from tests.support.data_fixtures import annotation, edit


def test_files_lie_where_coco_has_them() -> None:
    dataset = Dataset(Path("/coco"), "val2017", [2, 1], "a title")
    assert dataset.images_dir == Path("/coco/val2017")
    assert dataset.annotation_file == Path("/coco/annotations/instances_val2017.json")


def test_other_annotations_are_refused(tmp_path: Path) -> None:
    file = annotation_path(tmp_path, "val2017")
    file.parent.mkdir()
    file.write_text("{}")
    expected = sha256(file)
    dataset = Dataset(tmp_path, "val2017", None, "a title")
    assert check_unchanged(dataset, expected).annotation_file == file
    message = r"instances_val2017\.json is missing or has changed: run 'make data ARGS=--force'"
    file.write_text("[]")
    with pytest.raises(UserError, match=message):
        check_unchanged(dataset, expected)
    file.unlink()
    with pytest.raises(UserError, match=message):
        check_unchanged(dataset, expected)


@pytest.mark.parametrize(
    ("listed", "title"),
    [
        ({"train2017": (118_287, 860_001), "val2017": (5_000, 36_781)}, COCO_2017),
        ({"val2017": (5_000, 36_781)}, COCO_2017),
        ({"train2017": (118_287, 860_001), "val2017": (4_999, 36_781)}, OTHER_COCO),
        ({"train2017": (118_287, 860_001), "val2017": (5_000, 36_780)}, OTHER_COCO),  # its images under other labels
        ({"train2017": (118_287, 860_002), "val2017": (5_000, 36_781)}, OTHER_COCO),
        ({"test2017": (5_000, 36_781)}, OTHER_COCO),
    ],
)
def test_only_the_official_sizes_are_called_coco_2017(listed: dict[str, tuple[int, int]], title: str) -> None:
    assert coco_title(listed) == title


def test_other_labels_on_the_same_images_are_another_dataset(coco_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if COCO's val2017 were the tiny one, of one image with one annotation."""
    monkeypatch.setitem(OFFICIAL_SIZES, "val2017", 1)
    monkeypatch.setitem(OFFICIAL_ANNOTATIONS, "val2017", 1)
    assert standalone_dataset(coco_dir, "val2017").title == COCO_2017
    edit(coco_dir, lambda tree: tree["annotations"].append(annotation(2, 3, 59, [1, 2, 3, 4])), "val2017")
    assert standalone_dataset(coco_dir, "val2017").title == OTHER_COCO


def test_titles_stay_as_reports_show_them() -> None:
    titles = ("COCO 2017", "a COCO-format dataset, not COCO 2017", "drawn shapes (not COCO)")
    assert titles == (COCO_2017, OTHER_COCO, BUILTIN_TITLE)


def test_hash_of_ids_does_not_depend_on_their_order() -> None:
    assert hash_ids([3, 1, 20]) == hash_ids([20, 3, 1]) != hash_ids([1, 3])
