"""What a training takes without a GPU: the formula by hand, the measured step, and when it stops before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.core.config import Config, UserError, load
from app.train import estimate
from app.train.estimate import Images, Measured, check_affordable, is_light, judge, measure, memory_bytes, seconds
from tests.support.settle import settle
from tests.support.tiny import tiny_network

GIB, DAY_S = 2**30, 86_400
MEASURED = Measured(parameters=1_000_000, saved_bytes=50e6, step_s=2.0, forward_s=0.5)


def config(variant: str, *sets: str) -> Config:
    sizes = ("train.epochs=10", "train.batch=4", "train.imgsz=320", "train.bn_batches=8", "train.val_every=2")
    return load(variant, sets=[*sizes, *sets])


def test_memory_by_hand() -> None:
    """12 copies of a million weights, 15 for qat; 4 images with a fifth on top; 32 images of 320 px as bytes, or 20."""
    float_weights, activations, pixels = 48e6, 240e6, 3 * 320 * 320
    assert memory_bytes(config("fp16"), MEASURED, Images(100, 10)) == float_weights + activations + 32 * pixels
    assert memory_bytes(config("qat"), MEASURED, Images(20, 10)) == 60e6 + activations + 20 * pixels


def test_time_by_hand() -> None:
    """Ten epochs of 100 steps of 2 s; every second one has (3 * 10 + 32) forwards of half a second."""
    assert seconds(config("fp16"), MEASURED, Images(100, 10)) == 10 * 100 * 2 + 5 * 62 * 0.5


@pytest.mark.parametrize(
    ("overlay", "images", "light"),
    [("conf/smoke.yaml", Images(256, 64), True), (None, Images(256, 64), False), (None, Images(118_287, 5_000), False)],
)
def test_the_smoke_is_never_measured(overlay: str | None, images: Images, light: bool) -> None:
    for variant in ("fp16", "qat"):
        assert is_light(load(variant, [Path(overlay)] if overlay else []), images) is light


def measured_with(px: int) -> Measured:
    with tiny_network():
        return measure(load("qat", sets=[f"train.imgsz={px}"]))


def test_the_measured_step_grows_with_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three convolutions keep input and output; a network of 64 px, and one of 128 px measured at 64."""
    monkeypatch.setattr(estimate, "MEASURED_PX", 64)
    small, large = measured_with(64), measured_with(128)
    assert large.saved_bytes == 4 * small.saved_bytes > 4 * 8 * 32 * 32 * 4
    assert small.parameters == large.parameters > 1000
    assert small.step_s > small.forward_s > 0


def test_measuring_leaves_no_trace_in_a_training(runs_dir: Path) -> None:
    """The weights that a training begins with are drawn from its seed, whatever was drawn before."""
    from app.quant.model import build

    with tiny_network():
        before = build(load("qat"))[0].state_dict()
        measured_with(64)
        after = build(load("qat"))[0].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("images", "available", "fault"),
    [
        (Images(100, 10), GIB, None),
        (Images(100, 10), 10**8, r"about 0\.3 GiB of memory \(0\.1 are available\) and 35:55"),
        (Images(40_000, 10), GIB, r"9 d 6 h.*ARGS=--yes"),  # 10 * 40,000 * 2 s and a little
    ],
)
def test_too_much_stops_unless_it_is_accepted(
    images: Images, available: int, fault: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    if fault is None:
        judge(config("fp16"), MEASURED, images, available, accepted=False)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        return
    with pytest.raises(UserError, match=fault):
        judge(config("fp16"), MEASURED, images, available, accepted=False)
    judge(config("fp16"), MEASURED, images, available, accepted=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_has_begun_goes_on_unasked(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = settle(runs_dir, "begun", "fp16", {"train.batch": 4096})
    monkeypatch.setattr(estimate, "measure", lambda config: MEASURED)
    monkeypatch.setattr(estimate, "available_bytes", lambda: 0)
    with pytest.raises(UserError, match="GiB of memory"):
        check_affordable(settings, run, force=False, accepted=False)
    last = run.variant_dir("fp16") / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    check_affordable(settings, run, force=False, accepted=False)
    with pytest.raises(UserError, match="GiB of memory"):
        check_affordable(settings, run, force=True, accepted=False)
