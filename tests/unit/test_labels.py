"""Labels: written and read back, in the page's order, with their folders and file names."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.config import load
from app.core.labels import BASELINE, FOREIGN, FP16, Label, by_label, scored_name, today
from app.core.scheme import builtin_names

SCHEMES = builtin_names()
CONTRACTS = ("raw", "end2end")
FLOAT = [
    Label("baseline", packing=packing, contract=contract) for packing, contract in product(("", "fp16"), CONTRACTS)
]
CHECKPOINTS = [
    *(Label("qat", scheme) for scheme in SCHEMES),
    *(Label("ptq", scheme, bn) for scheme, bn in product(SCHEMES, (False, True))),
]
QUANTIZED = [
    Label(label.method, label.scheme, label.bn, packing, contract)
    for label, packing, contract in product(CHECKPOINTS, ("", "int4"), CONTRACTS)
]


@pytest.mark.parametrize("label", [FP16, *FLOAT, *QUANTIZED], ids=str)
def test_a_label_is_read_as_it_was_written(label: Label) -> None:
    assert Label.parse(str(label)) == label


def test_every_label_has_a_text_and_folder_and_file_of_its_own() -> None:
    labels = [*FLOAT, *QUANTIZED]
    for name_of in (str, lambda label: label.scores_dir, lambda label: label.file_name("yolov10m")):
        assert len({name_of(label) for label in labels}) == len(labels)


NEAR = ("fp16", "fp16-half", "baseline-int4", "baseline-bn", "qat", "ptq", "qat-", "ptq--bn", "qat-a-half")


@given(st.text() | st.sampled_from(NEAR))
def test_any_text_comes_back(text: str) -> None:
    label = Label.parse(text)
    assert str(label) == text
    assert by_label(text) == label.order


WORDS = st.sampled_from(
    ("fp16", "baseline", "qat", "ptq", "w4a16", "mixed", "bn", "half", "int4", "end2end", "raw", "")
)


@given(st.lists(WORDS, min_size=1).map("-".join))
def test_any_text_of_our_words_comes_back(text: str) -> None:
    assert str(Label.parse(text)) == text


OTHERS = (
    "", "net", "qat", "ptq-", "fp16-int4", "fp16-bn", "fp16-end2end", "baseline-end2end-fp16", "baseline-int4",
    "baseline-half", "FP16", "Baseline", "a\nb",
)  # fmt: skip


@pytest.mark.parametrize("text", OTHERS)
def test_other_text_is_foreign(text: str) -> None:
    label = Label.parse(text)
    assert (label.method, label.is_quantized, label.is_repacked) == (FOREIGN, False, False)


# text: precision, scores, file, checkpoint
NAMES = {
    "baseline": ("fp32", "baseline-coco", "yolov10m-baseline-fp32.onnx", "fp16"),
    "baseline-fp16": ("fp16", "baseline-fp16-coco", "yolov10m-baseline-fp16.onnx", "fp16"),
    "baseline-end2end": ("fp32", "baseline-end2end-coco", "yolov10m-baseline-fp32-end2end.onnx", "fp16"),
    "baseline-fp16-end2end": ("fp16", "baseline-fp16-end2end-coco", "yolov10m-baseline-fp16-end2end.onnx", "fp16"),
    "qat-w4a16": ("qcdq", "qat-w4a16-coco", "yolov10m-w4a16-qcdq-qat.onnx", "qat-w4a16"),
    "qat-w4a16-mixed-int4": (
        "int4", "qat-w4a16-mixed-int4-coco", "yolov10m-w4a16-mixed-int4-qat.onnx", "qat-w4a16-mixed",
    ),
    "qat-w8a16-end2end": ("qcdq", "qat-w8a16-end2end-coco", "yolov10m-w8a16-qcdq-qat-end2end.onnx", "qat-w8a16"),
    "qat-w4a16-int4-end2end": (
        "int4", "qat-w4a16-int4-end2end-coco", "yolov10m-w4a16-int4-qat-end2end.onnx", "qat-w4a16",
    ),
    "ptq-w4a16": ("qcdq", "ptq-w4a16-coco", "yolov10m-w4a16-qcdq-ptq.onnx", "ptq-w4a16"),
    "ptq-w4a16-mixed-bn": (
        "qcdq", "ptq-w4a16-mixed-bn-coco", "yolov10m-w4a16-mixed-qcdq-ptq-bn.onnx", "ptq-w4a16-mixed-bn",
    ),
    "ptq-w4a16-bn-int4": ("int4", "ptq-w4a16-bn-int4-coco", "yolov10m-w4a16-int4-ptq-bn.onnx", "ptq-w4a16-bn"),
}  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_names_that_users_see(text: str) -> None:
    precision, scores_dir, file, checkpoint = NAMES[text]
    label = Label.parse(text)
    assert label.precision == precision
    assert label.scores_dir == scores_dir
    assert scored_name(label.scores_dir) == text  # one name for the row, the column and the folder
    assert label.file_name("yolov10m") == file
    assert str(label.checkpoint) == checkpoint
    assert label.is_repacked == (text not in ("baseline", checkpoint))
    assert label.is_quantized == (not text.startswith("baseline"))


def test_only_the_file_of_fp16_has_another_name_than_its_training() -> None:
    assert (str(FP16), str(BASELINE), FP16.is_repacked, BASELINE.is_repacked) == ("fp16", "baseline", False, False)
    assert all(label.traced == label for label in [*FLOAT, *CHECKPOINTS])


OLD_NAMES = {
    "fp16": "baseline", "fp16-half": "baseline-fp16", "fp16-end2end": "baseline-end2end",
    "fp16-half-end2end": "baseline-fp16-end2end", "baseline-half": "baseline-fp16", "qat-w4a16-int4": "qat-w4a16-int4",
    "anything": "anything",
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_files_of_older_runs_have_the_names_of_today(old: str, new: str) -> None:
    assert today(old) == new == scored_name(f"{old}-coco")


def test_order_is_the_baseline_then_each_scheme_with_ptq_before_qat_then_foreign_files() -> None:
    ordered = [
        "baseline", "baseline-end2end", "baseline-fp16", "baseline-fp16-end2end", "fp16", "ptq-w4a16", "ptq-w4a16-bn",
        "qat-w4a16", "qat-w4a16-end2end", "qat-w4a16-int4", "ptq-w4a16-mixed", "ptq-w4a16-mixed-bn", "qat-w4a16-mixed",
        "qat-w8a16", "anything", "best",
    ]  # fmt: skip
    shuffled = sorted(ordered)
    assert shuffled != ordered
    assert sorted(shuffled, key=by_label) == ordered


@pytest.mark.parametrize("scheme", SCHEMES)
def test_configurations_have_the_labels_of_their_checkpoints(scheme: str) -> None:
    assert load("fp16").label == str(FP16)
    assert Label.parse(load("qat", sets=[f"quant.scheme={scheme}"]).label) == Label("qat", scheme)
