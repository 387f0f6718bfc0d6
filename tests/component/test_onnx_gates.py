"""Gates of an ONNX file on outputs and graphs worked by hand: what they let pass, and what they must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from app.core.labels import BASELINE, Label
from app.export.gates import Tolerance, Truth, check_codes, check_half, check_parity, check_same_output
from tests.support.hand_graphs import half_graph, qcdq_graph
from tests.support.stand_in_session import OFF, ON, numbered_images, use_stand_in

N_IMAGES, N_ANCHORS, N_BEST = 3, 84, 10  # as many anchors as rows: a transposed output has the right shape
BOX_PX, SCORE = 1e-2, 1e-4  # tolerance of an FP32 file, from the design of the gates
HALF_BOX_PX, HALF_SCORE = 2.0, 1e-2
LABELS = {
    "fp32": BASELINE,
    "fp16": replace(BASELINE, packing="fp16"),
    "qcdq": Label("qat", "w4a16"),
    "int4": Label("qat", "w4a16", packing="int4"),
}
NO_ROUNDING = Tolerance(0.0, 0.0)
LEVELS = pytest.mark.parametrize(("level", "word"), [(OFF, "off"), (ON, "on")], ids=["off", "on"])
Change = Callable[[np.ndarray], np.ndarray]


def raw_outputs() -> np.ndarray:
    """Seeded raw outputs [3,84,A]: boxes of 4 to 60 px, scores that no two anchors share."""
    generator = np.random.default_rng(0)
    boxes = generator.uniform(4, 60, (N_IMAGES, 4, N_ANCHORS))
    scores = generator.permutation(N_IMAGES * 80 * N_ANCHORS).reshape(N_IMAGES, 80, N_ANCHORS) / 3e4 + 0.01
    return np.concatenate([boxes, scores], axis=1).astype(np.float32)


RAW = raw_outputs()


def end2end_outputs() -> np.ndarray:
    """The 10 best anchor-class pairs of the 10 best anchors, best first: [3,10,6]."""
    outputs = []
    for raw in RAW:
        anchors = np.argsort(-raw[4:].max(0))[:N_BEST]
        pairs = sorted(((raw[4 + c, a], c, a) for a in anchors for c in range(80)), reverse=True)[:N_BEST]
        outputs.append([[*corners(raw[:4, a]), score, c] for score, c, a in pairs])
    return np.array(outputs, np.float32)


def corners(box: np.ndarray) -> list[float]:
    cx, cy, w, h = box
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def truth(rounding: Tolerance = NO_ROUNDING) -> Truth:
    return Truth(numbered_images(N_IMAGES), RAW, {4: 1}, rounding)


def added(place: Any, amount: float) -> Change:
    def change(output: np.ndarray) -> np.ndarray:
        changed = output.copy()
        changed[place] += amount
        return changed

    return change


def swapped(axis: int, a: int, b: int) -> Change:
    def change(output: np.ndarray) -> np.ndarray:
        order = np.arange(output.shape[axis])
        order[[a, b]] = b, a
        return np.take(output, order, axis)

    return change


# --- parity ----------------------------------------------------------------------------------------------------------

WRONG_RAW = {
    "one box shifted": (added((1, 0, 7), 0.02), r"image 1, output cx of anchor 7$"),
    "one height": (added((2, 3, 83), -0.02), r"image 2, output h of anchor 83$"),
    "one score": (added((0, 4 + 79, 5), 2e-4), r"image 0, output toothbrush of anchor 5$"),
    "width and height swapped": (swapped(1, 2, 3), r"image 0, output [wh] of"),
    "two classes swapped": (swapped(1, 4, 6), r"image 0, output (person|car) of"),
    "two anchors swapped": (swapped(2, 0, 1), r"image 0, output \w+ of anchor [01]$"),
    "two images swapped": (swapped(0, 1, 2), r"image 1, "),
    "transposed head": (lambda output: output.transpose(0, 2, 1), r"image 0, "),
    "one value NaN": (added((2, 1, 3), float("nan")), r"image 2, output cy of anchor 3$"),
    "one score NaN": (added((0, 4, 0), float("nan")), r"image 0, output person of anchor 0$"),
}


@pytest.mark.parametrize("fault", WRONG_RAW)
@LEVELS
def test_wrong_raw_output_is_refused_at_either_level(
    monkeypatch: pytest.MonkeyPatch, level: Any, word: str, fault: str
) -> None:
    change, place = WRONG_RAW[fault]
    use_stand_in(monkeypatch, lambda stem, at, n: change(RAW) if at == level else RAW)
    with pytest.raises(RuntimeError, match=rf"^m\.onnx differs from torch .*graph optimisation {word}, {place}"):
        check_parity(Path("m.onnx"), truth(), LABELS["qcdq"])


WRONG_END2END = {
    "one box shifted": added((1, 4, 0), 0.02),
    "one score": added((0, 0, 4), 2e-4),
    "class of the next row": added((2, 3, 5), 1.0),
    "corners swapped": swapped(2, 0, 1),
    "best detection left out": lambda output: np.concatenate([output[:, 1:], output[:, -1:]], axis=1),
    "two images swapped": swapped(0, 1, 2),
    "one score NaN": added((2, 9, 4), float("nan")),
}


@pytest.mark.parametrize("fault", WRONG_END2END)
@LEVELS
def test_wrong_end2end_output_is_refused_at_either_level(
    monkeypatch: pytest.MonkeyPatch, level: Any, word: str, fault: str
) -> None:
    right = end2end_outputs()
    use_stand_in(monkeypatch, lambda stem, at, n: WRONG_END2END[fault](right) if at == level else right)
    with pytest.raises(RuntimeError, match=rf"graph optimisation {word}, image [012], detection \d"):
        check_parity(Path("m.onnx"), truth(), replace(LABELS["fp32"], contract="end2end"))


@pytest.mark.parametrize("contract", ["raw", "end2end"])
def test_right_output_passes_at_both_levels(monkeypatch: pytest.MonkeyPatch, contract: str) -> None:
    right = RAW if contract == "raw" else end2end_outputs()
    opened = use_stand_in(monkeypatch, lambda stem, level, n: right)
    figures = check_parity(Path("m.onnx"), truth(), replace(LABELS["fp32"], contract=contract))
    assert set(opened) == {("m", OFF), ("m", ON)}
    assert figures["n_images"] == N_IMAGES
    assert figures["max_box_px"] < BOX_PX / 100  # the corners are rounded once
    assert figures["max_score"] == 0.0
    assert figures["magnifies_rounding"] is False


def test_figures_are_the_largest_of_all_images_and_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {OFF: added((1, 0, 0), 0.004)(RAW), ON: added((2, 40, 9), -0.00005)(RAW)}
    use_stand_in(monkeypatch, lambda stem, level, n: changed[level])
    figures = check_parity(Path("m.onnx"), truth(), LABELS["int4"])
    assert figures["max_box_px"] == pytest.approx(0.004, rel=1e-2)  # 60 px in float32 have steps of 4e-6
    assert figures["max_score"] == pytest.approx(0.00005, rel=1e-2)
    assert (figures["allowed_box_px"], figures["allowed_score"]) == (BOX_PX, SCORE)


def test_batch_of_several_images_is_looked_at_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = swapped(0, 0, 1)(RAW)
    use_stand_in(monkeypatch, lambda stem, level, n: wrong if n > 1 else RAW, batch="batch")
    with pytest.raises(RuntimeError, match="graph optimisation off, image 0, "):
        check_parity(Path("m.onnx"), truth(), LABELS["fp32"])


@pytest.mark.parametrize(
    ("precision", "rounding", "box_px", "score"),
    [
        ("fp32", NO_ROUNDING, BOX_PX, SCORE),
        ("qcdq", NO_ROUNDING, BOX_PX, SCORE),
        ("int4", Tolerance(0.004, 0.0), 0.04, SCORE),  # ten times what torch itself moves by
        ("fp32", Tolerance(0.0, 3e-5), BOX_PX, 3e-4),
        ("fp16", NO_ROUNDING, HALF_BOX_PX, HALF_SCORE),
        ("fp16", Tolerance(1e-3, 1e-5), 8.192, 0.08192),  # FP16 rounds 2**13 times as coarsely
    ],
)
def test_tolerance_of_a_precision(precision: str, rounding: Tolerance, box_px: float, score: float) -> None:
    allowed = truth(rounding).allowed(precision)
    assert (allowed.box_px, allowed.score) == (pytest.approx(box_px), pytest.approx(score))


@pytest.mark.parametrize(("place", "amount"), [((0, 0, 0), 1.0), ((0, 9, 0), 5e-3)])
def test_half_precision_is_allowed_to_the_fp16_file_alone(
    monkeypatch: pytest.MonkeyPatch, place: Any, amount: float
) -> None:
    changed = added(place, amount)(RAW)
    use_stand_in(monkeypatch, lambda stem, level, n: changed)
    assert check_parity(Path("m.onnx"), truth(), LABELS["fp16"])["magnifies_rounding"] is False
    for precision in ("fp32", "qcdq", "int4"):
        with pytest.raises(RuntimeError, match="differs from torch"):
            check_parity(Path("m.onnx"), truth(), LABELS[precision])


# --- bit-equality ----------------------------------------------------------------------------------------------------


@LEVELS
def test_one_bit_of_difference_is_refused_at_either_level(
    monkeypatch: pytest.MonkeyPatch, level: Any, word: str
) -> None:
    changed = RAW.copy()
    changed[2, 5, 11] = np.nextafter(changed[2, 5, 11], np.float32(9))
    use_stand_in(monkeypatch, lambda stem, at, n: changed if (stem, at) == ("int4", level) else RAW)
    with pytest.raises(RuntimeError, match=rf"output \(2, 5, 11\) differs .*graph optimisation {word}$"):
        check_same_output(Path("int4.onnx"), Path("qcdq.onnx"), numbered_images(N_IMAGES))


def test_both_files_are_run_at_both_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = use_stand_in(monkeypatch, lambda stem, level, n: RAW)
    check_same_output(Path("int4.onnx"), Path("qcdq.onnx"), numbered_images(N_IMAGES))
    assert sorted(opened, key=str) == sorted(
        [(stem, level) for stem in ("int4", "qcdq") for level in (OFF, ON)], key=str
    )


# --- codes -----------------------------------------------------------------------------------------------------------

# Two channels with 3 and 5 different codes; together 6.
CODES = [[-7, 0, 7, 7, 7], [1, 2, -2, 0, 7]]


def saved(model: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    return path


def test_codes_are_counted_by_channel_and_layers_by_bits(tmp_path: Path) -> None:
    path = saved(qcdq_graph([(CODES, 7), ([[-127, 5, 4, 3, 2]], 127), ([[1, 1, 1, 1, 1]], 7)]), tmp_path)
    assert check_codes(path, {4: 2, 8: 1}) == {"layers": {"4": 2, "8": 1}, "max_codes_per_channel": 5}


@pytest.mark.parametrize(("code", "largest"), [(8, 7), (-8, 7), (-128, 127)])
def test_a_code_beyond_its_range_is_refused(tmp_path: Path, code: int, largest: int) -> None:
    path = saved(qcdq_graph([(CODES, 7), ([[code, 0]], largest)]), tmp_path)
    with pytest.raises(RuntimeError, match=rf"^m\.onnx: dequantize 1 holds codes beyond -{largest}\.\.{largest}$"):
        check_codes(path, {4: 1, 4 if largest == 7 else 8: 1})


def test_a_range_that_is_not_symmetric_is_refused(tmp_path: Path) -> None:
    path = saved(qcdq_graph([(CODES, 7)], low=-8), tmp_path)
    with pytest.raises(RuntimeError, match="dequantize 0 holds codes beyond"):
        check_codes(path, {4: 1})


def test_more_levels_than_the_bits_allow_are_refused(tmp_path: Path) -> None:
    """A range of -6..6 is 3 bits, which hold 7 levels: 13 in one channel are too many, 7 in each of two are not."""
    with pytest.raises(RuntimeError, match="dequantize 0 has 13 codes in a channel"):
        check_codes(saved(qcdq_graph([([[*range(-6, 7)]], 6)]), tmp_path), {3: 1})
    halves = [[*range(-6, 1)], [*range(7)]]
    assert check_codes(saved(qcdq_graph([(halves, 6)]), tmp_path), {3: 1})["max_codes_per_channel"] == 7


FULL_CODES = [[*range(-8, 8)], [*range(8), *range(8)]]  # 16 levels and 8


def test_sixteen_levels_pass_where_the_model_has_them(tmp_path: Path) -> None:
    path = saved(qcdq_graph([(FULL_CODES, 7)], low=-8), tmp_path)
    facts = {"layers": {"4": 1}, "max_codes_per_channel": 16, "full_range": {"4": 1}}
    assert check_codes(path, {4: 1}, {4: 1}) == facts
    with pytest.raises(RuntimeError, match=r"^m\.onnx: dequantize 0 holds codes beyond -8\.\.7$"):
        check_codes(path, {4: 1})
    with pytest.raises(RuntimeError, match=r"dequantize 0 holds codes beyond -8\.\.7$"):
        check_codes(path, {4: 1}, {8: 1})
    narrow = saved(qcdq_graph([(CODES, 7)]), tmp_path)
    with pytest.raises(RuntimeError, match=r"layers of full range by bits \{\}; the model has \{4: 1\}$"):
        check_codes(narrow, {4: 1}, {4: 1})
    two = saved(qcdq_graph([(FULL_CODES, 7), (FULL_CODES, 7)], low=-8), tmp_path)
    with pytest.raises(RuntimeError, match=r"layers of full range by bits \{4: 2\}; the model has \{4: 1\}$"):
        check_codes(two, {4: 2}, {4: 1})


@pytest.mark.parametrize(
    ("codes", "low", "largest"),
    [([-9, *range(-8, 8)], -8, 7), ([*range(-8, 9)], -8, 7), ([*range(-8, 9)], -8, 8), ([*range(-9, 8)], -9, 7)],
)
def test_seventeen_levels_are_refused_at_any_range(tmp_path: Path, codes: list[int], low: int, largest: int) -> None:
    path = saved(qcdq_graph([([codes], largest)], low=low), tmp_path)
    with pytest.raises(RuntimeError, match=rf"dequantize 0 (holds codes beyond {low}\.\.{largest}|has 17 codes)"):
        check_codes(path, {4: 1}, {4: 1})


@pytest.mark.parametrize("layers", [{4: 1}, {4: 3}, {8: 2}, {4: 1, 8: 1}, {}])
def test_another_number_of_layers_is_refused(tmp_path: Path, layers: dict[int, int]) -> None:
    path = saved(qcdq_graph([(CODES, 7), ([[1, 2]], 7)]), tmp_path)
    with pytest.raises(RuntimeError, match=r"2 DequantizeLinear nodes, layers by bits \{4: 2\}"):
        check_codes(path, layers)


# --- half ------------------------------------------------------------------------------------------------------------

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def test_half_file_is_counted_by_hand(tmp_path: Path) -> None:
    """Two convolutions of 2 x 3 FP16 weights, one with a bias; DFL's 16 weights and two constants stay FP32."""
    facts = check_half(saved(half_graph([HALF, HALF], bias=HALF), tmp_path))
    assert facts == {"learned_convolutions": 2, "float16_initializers": 3, "float32_values": 18}


@pytest.mark.parametrize(
    ("kinds", "bias", "wrong"), [([SINGLE, HALF], HALF, 0), ([HALF, SINGLE], HALF, 1), ([HALF, HALF], SINGLE, 0)]
)
def test_a_convolution_in_single_precision_is_refused(tmp_path: Path, kinds: list[int], bias: int, wrong: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^m\.onnx: conv {wrong} has weights that are not FP16$"):
        check_half(saved(half_graph(kinds, bias), tmp_path))
