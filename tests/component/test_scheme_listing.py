"""python -m app schemes on a small network: bits, shares and bytes, worked out by hand."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.__main__ import main
from app.core.config import load
from app.core.scheme import builtin_names
from app.schemes.listing import list_layers, list_schemes
from tests.support.markdown_tables import row, table
from tests.support.scheme_files import scheme_of, write_rules
from tests.support.tiny import tiny_network

# 216, 576 and 1,152 weights before the head, which has 65,120 twice: 4,096 of them in its last convolution of boxes.
RULES = [("model.0.conv", 8), ("model.1.conv", 2, "tensor"), ("model.3.*cv2.0.2", "float"), ("*", 4)]
N_LEARNED = 216 + 576 + 1152 + 2 * 65120
N_CONVS = 3 + 2 * 8 + 1
LAYER = ("shape", "bits", "scales", "weights", "share", "bytes")


@pytest.fixture(autouse=True)
def tiny(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with tiny_network(), caplog.at_level(logging.INFO):
        yield


def test_every_layer_with_its_bits_its_share_and_its_bytes(caplog: pytest.LogCaptureFixture) -> None:
    list_layers(load("qat"), scheme_of(*RULES))
    page = "\n".join(caplog.messages)
    assert len(table(page, *LAYER)) == N_CONVS
    assert row(page, "model.0.conv", *LAYER) == ["8x3x3x3", "8", "8", "216", "0.163%", "248"]
    assert row(page, "model.1.conv", *LAYER) == ["8x8x3x3", "2", "1", "576", "0.436%", "292"]
    assert row(page, "model.2.conv", *LAYER) == ["16x8x3x3", "4", "16", "1,152", "0.872%", "640"]
    assert row(page, "model.3.one2one_cv2.0.2", *LAYER) == ["64x64x1x1", "float", "0", "4,096", "3.099%", "16,384"]
    assert row(page, "model.3.cv2.0.2", *LAYER) == ["64x64x1x1", "float", "0", "4,096", "3.099%", "-"]
    assert row(page, "model.3.dfl.conv", *LAYER) == ["1x16x1x1", "float", "0", "16", "-", "64"]
    assert row(page, "model.3.dfl.conv", "why")[0].startswith("not a learned weight")
    assert row(page, "model.0.conv", "why") == ["a test's model.0.conv"]
    assert f"sha256 of its rules {scheme_of(*RULES).sha256[:12]}" in page


def test_a_scheme_sums_up(caplog: pytest.LogCaptureFixture) -> None:
    list_layers(load("qat"), scheme_of(*RULES))
    columns = ("share of the weights by bits", "INT4 bytes", "QCDQ bytes", "FP32 bytes", "INT4 / FP32")
    shares = (576, N_LEARNED - 216 - 576 - 2 * 4096, 216, 2 * 4096)
    told = ", ".join(f"{bits}: {100 * n / N_LEARNED:.2f}%" for bits, n in zip((2, 4, 8, "float"), shares, strict=True))
    # The head in the file: 61,024 weights at 4 bits with 464 scales, 4,096 in float; and DFL's 16 in float.
    int4 = 248 + 292 + 640 + 61024 // 2 + 464 * 4 + 4096 * 4 + 16 * 4
    qcdq = 248 + (576 + 4) + (1152 + 64) + 61024 + 464 * 4 + 4096 * 4 + 16 * 4
    fp32 = (216 + 576 + 1152 + 65120 + 16) * 4
    assert (int4, qcdq, fp32) == (49_996, 81_372, 268_320)
    page = "\n".join(caplog.messages)
    assert row(page, "toy", *columns) == [told, "49,996", "81,372", "268,320", "0.1863"]


def test_built_in_schemes_that_fit_stand_side_by_side(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = ["w4a16", "w4a16-dfl", "w8a16"]
    monkeypatch.setattr("app.schemes.listing.builtin_names", lambda: general)
    assert set(general) < set(builtin_names())
    list_schemes(load("qat"))
    page = "\n".join(caplog.messages)
    assert list(table(page, "INT4 bytes")) == general
    assert row(page, "w8a16", "share of the weights by bits") == ["8: 100.00%"]


@pytest.mark.parametrize(
    ("rules", "said"), [([("*", 4)], ""), ([("model.7", 4), ("*", 4)], "'model.7' matches no layer")]
)
def test_the_command_takes_a_file_and_refuses_one_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rules: list[Any], said: str
) -> None:
    file = write_rules(tmp_path / "mine.yaml", *rules)
    monkeypatch.setattr("app.core.environment.isolate_libraries", lambda cache_dir: None)
    words = ["app", "schemes", "--scheme", str(file), "--model", "yolov10s.yaml", "--runs-dir", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == (2 if said else 0)
    page = "\n".join(caplog.messages)
    assert said in page
    assert ("scheme mine on yolov10s.yaml" in page) == (not said)
