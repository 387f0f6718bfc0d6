"""Foreign ONNX files by chance: metadata, shapes, outputs and flipped bits end in a result or in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.coco.categories import CATEGORY_IDS, NAMES
from app.coco.detections import results, select
from app.coco.images import place
from app.core.config import UserError
from app.eval.contract import CONTRACTS, INPUT_TYPES, LARGEST_INPUT, Said, read_contract, read_input
from app.eval.metadata import names_of, parse, size_of
from app.eval.runtime import Model, open_model
from tests.support.eval_fixtures import SETTINGS, raw_output, write_model

N_METADATA, N_TEXTS, N_OUTPUTS, N_FLIPPED = 100, 150, 60, 150
FUZZ = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}

SOUND_TEXTS = (
    str(dict(enumerate(NAMES))), str(NAMES), "[640, 640]", "160", "{'batch': 1, 'nms': True}", "True", "detect", "raw"
)  # fmt: skip
BRACKETS = st.builds(lambda opening, n: opening * n, st.sampled_from(["[", "(", "{", "-", "not ", "{1:", "1+"]),
                     st.integers(1, 20_000))  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn) -> str:
    """A sound text in which a few characters were replaced, or that was cut."""
    text = list(draw(st.sampled_from(SOUND_TEXTS)))
    for _ in range(draw(st.integers(0, 3))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.characters())
    return "".join(text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text)


TEXTS = st.text() | changed() | BRACKETS | VALUES.map(repr)
KEYS = ("contract", "task", "stride", "names", "imgsz", "args", "end2end", "label", "scheme", "precision")
METADATA = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, TEXTS))
DIMENSIONS = st.sampled_from([1, 3, 6, 84, 300, 640]) | st.integers(-(2**63), 2**63) | st.none() | st.text(max_size=3)
TYPES = st.sampled_from([*INPUT_TYPES, "tensor(int64)", "seq(tensor(float))"])
PORTS = st.builds(
    SimpleNamespace, name=st.text(max_size=5), type=TYPES, shape=st.lists(DIMENSIONS, min_size=2, max_size=4)
)
SESSIONS = st.builds(
    lambda inputs, outputs: SimpleNamespace(get_inputs=lambda: inputs, get_outputs=lambda: outputs),
    st.lists(PORTS, min_size=1, max_size=2), st.lists(PORTS, min_size=1, max_size=2),
)  # fmt: skip
SAID = st.builds(
    Said, st.none() | st.sampled_from(CONTRACTS), st.none() | st.just(NAMES), st.none() | st.integers(-1, 2**70)
)


def result_or_line(work: Callable[[], Any]) -> Any:
    """What `work` returns; None if it ends in one line for the user. Anything else that it raises is a fault."""
    try:
        return work()
    except UserError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        return None


@settings(max_examples=N_METADATA, **FUZZ)
@given(METADATA, SESSIONS, SAID)
def test_metadata_and_shapes(metadata: dict[str, str], session: Any, said: Said) -> None:
    path = Path("m.onnx")
    shape = session.get_inputs()[0].shape  # any; it stands for that of a run
    port = result_or_line(lambda: read_input(path, session.get_inputs(), metadata, said))
    contract = result_or_line(lambda: read_contract(path, session.get_outputs(), lambda: shape, metadata, said))
    assert port is None or 0 < (port.batch or 1) * 3 * port.size[0] * port.size[1] <= LARGEST_INPUT
    if port and contract:
        assert contract in CONTRACTS
        model = Model(path, session, port, contract, metadata)
        assert all(text is None or text.isprintable() for text in (model.label, model.scheme, model.precision))


@settings(max_examples=N_TEXTS, **FUZZ)
@given(TEXTS)
def test_texts(text: str) -> None:
    result_or_line(lambda: parse(text))
    names = result_or_line(lambda: names_of({"names": text}))
    assert names is None or all(isinstance(name, str) for name in names)
    size = size_of({"imgsz": text})
    assert size is None or len(size) == 2


FLOATS = st.floats(width=32) | st.sampled_from([0.0, 0.5, 1.0, -1.0, 79.0, 80.0, 3.4e38, np.nan, np.inf])
PROBABILITIES = st.floats(0, 1, width=32)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    contract = draw(st.sampled_from(CONTRACTS))
    n = draw(st.integers(0, 12))
    shape = (n, 6) if contract == "end2end" else (84, n)
    elements = draw(st.sampled_from([FLOATS, PROBABILITIES, PROBABILITIES.map(np.float32) | st.just(79.0)]))
    return contract, draw(hnp.arrays(np.float32, shape, elements=elements, fill=draw(st.sampled_from([None, FLOATS]))))


@settings(max_examples=N_OUTPUTS, **FUZZ)
@given(outputs(), st.integers(1, 5), st.sampled_from([0.0, 0.001, 0.9]))
def test_outputs(case: tuple[str, np.ndarray], max_det: int, conf: float) -> None:
    contract, output = case
    changes = SETTINGS.model_copy(update={"max_det": max_det, "conf": conf})
    rows = result_or_line(lambda: results(1, select(output, contract, changes), place(64, 48, 32)))
    for row in rows or []:
        assert row["category_id"] in CATEGORY_IDS
        assert np.isfinite([*row["bbox"], row["score"]]).all()
    assert rows is None or len(rows) <= max_det


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {"task": "detect", "stride": "32", "imgsz": "[32, 32]", "names": str(dict(enumerate(NAMES)))}
    return write_model(tmp_path_factory.mktemp("flipped") / "m.onnx", raw_output(n_anchors=2), metadata=metadata)


@settings(max_examples=N_FLIPPED, **FUZZ)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits(file: Path, flips: list[tuple[float, int]]) -> None:
    """In the metadata, which are the last part of the file; a graph is ONNX Runtime's to check."""
    content = bytearray(file.read_bytes())
    start = content.index(b"task") - 4
    for place_of_flip, bit in flips:
        content[start + int(place_of_flip * (len(content) - start))] ^= 1 << bit
    path = file.with_name("flipped.onnx")
    path.write_bytes(content)
    model = result_or_line(lambda: open_model(path, "cpu"))
    assert model is None or (model.contract, model.imgsz) == ("nms", 32)
