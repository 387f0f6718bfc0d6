"""Checkpoints to start from: our own, and pickles of whole networks, of which nothing is executed."""

from __future__ import annotations

import os
import subprocess
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from app.core.config import UserError, load
from app.core.start import of_file
from app.quant.model import build, cpu_state_dict, save_checkpoint
from app.quant.start import read_start
from app.quant.weights import Weights, fit
from tests.support.export_run import TINY, network

TINY_MODEL = "yolov10n.yaml"  # inside `network(TINY)`


def tiny(n_classes: int = 80) -> DetectionModel:
    """Random weights as a training leaves them: BatchNorm has seen something, and all are numbers of FP16."""
    torch.manual_seed(3)
    with network(TINY):
        model = DetectionModel(TINY_MODEL, nc=n_classes, verbose=False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.uniform_(-1, 1)
    return model.half().float()


def read(content: Any, path: Path, **options: Any) -> Weights:
    torch.save(content, path, **options)
    return read_start(of_file(path))


def assert_equal(tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    wanted = model.state_dict()
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name].to(tensor.dtype), tensor), name


# --- forms -----------------------------------------------------------------------------------------------------------


def test_what_ultralytics_saves_is_read_with_names_and_size(tmp_path: Path) -> None:
    """By its own code, with FP16 weights; BatchNorm's statistics too."""
    with network(TINY):
        yolo = YOLO(TINY_MODEL, task="detect")
    yolo.model = tiny()
    yolo.model.names = {0: "bolt", 1: "nut", **{n: f"c{n}" for n in range(2, 80)}}
    yolo.ckpt = {"train_args": {"imgsz": 160, "task": "detect"}}
    path = tmp_path / "best.pt"
    yolo.save(path)
    weights = read_start(of_file(path))
    assert weights.tensors["model.0.conv.weight"].dtype == torch.float16
    assert_equal(weights.tensors, tiny())
    assert weights.names is not None
    assert (weights.names[:2], weights.n_classes, weights.imgsz) == (["bolt", "nut"], 80, 160)


def odd_facts() -> dict[str, Any]:
    """What older files hold beside a network."""
    counts: defaultdict[str, int] = defaultdict(int)
    counts["x"] = 1
    return {"best_fitness": np.float64(0.5), "date": Path("x"), "counts": counts, "seen": {1, 2}, "epoch": -1}


FORMS: dict[str, Callable[[DetectionModel], Any]] = {
    "published": lambda model: {"model": model, "ema": None, **odd_facts()},
    "in training": lambda model: {"model": None, "ema": model, "optimizer": {"state": {}}, **odd_facts()},
    "the network alone": lambda model: model,
    "state_dict": lambda model: model.state_dict(),
    "its layers alone": lambda model: model.model.state_dict(),
    "of DataParallel": lambda model: {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
    "of a wrapper": lambda model: {"model": OrderedDict((f"model.{k}", v) for k, v in model.state_dict().items())},
    "its EMA": lambda model: {"ema": {"module": model.state_dict(), "updates": 3}},
    "half": lambda model: {"model": model.half()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(tmp_path: Path, form: str) -> None:
    assert_equal(read(FORMS[form](tiny()), tmp_path / "x.pt").tensors, tiny())


def test_a_state_dict_from_before_torch_wrote_zips(tmp_path: Path) -> None:
    content = {"state_dict": tiny().state_dict(), **odd_facts()}
    weights = read(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_equal(weights.tensors, tiny())


def test_own_checkpoints(tmp_path: Path) -> None:
    """Of a last.pt before its first validation the EMA; of a QAT training the float weights, without learned scales."""
    config = load("qat", sets=["quant.learned_scale=true"])
    with network(TINY):
        model, _ = build(config, ["bolt", "nut"])
    state = cpu_state_dict(model)
    entries = {"scored": state, "names": ["bolt", "nut"], "epoch": 2}
    path = tmp_path / "best.pt"
    save_checkpoint(path, config, entries)
    weights = read_start(of_file(path))
    assert weights.is_quantized and (weights.names, weights.imgsz) == (["bolt", "nut"], 640)
    with network(TINY):
        assert weights.tensors.keys() == DetectionModel(TINY_MODEL, nc=2, verbose=False).state_dict().keys()
    save_checkpoint(path, load("fp16"), {"scored": {}, "ema": cpu_state_dict(tiny()), "epoch": -1})
    assert_equal(read_start(of_file(path)).tensors, tiny())


# --- what is refused -------------------------------------------------------------------------------------------------


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def spring(trap: str) -> dict[str, Any]:
    """A function of a module that nobody knows as hostile."""
    Path(trap).touch()
    return {}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside a network"])
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.call, spring])
def test_nothing_of_a_hostile_pickle_runs(
    tmp_path: Path, function: Callable[..., Any], is_alone: bool, is_zip: bool
) -> None:
    trap, path = tmp_path / "trap", tmp_path / "best.pt"
    arguments = {
        os.system: f"touch {trap}", subprocess.call: ["touch", str(trap)], spring: str(trap)
    }  # fmt: skip
    hostile = Runs(function, arguments.get(function, f"open({str(trap)!r}, 'w')"))
    content = hostile if is_alone else {"model": tiny().state_dict(), "extra": hostile}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap works"
    trap.unlink()
    if function is spring and not is_alone:
        assert_equal(read_start(of_file(path)).tensors, tiny())
    else:
        said = "holds no network" if function is spring else r"names \w+\.\w+, which no network needs: refused"
        with pytest.raises(UserError, match=said):
            read_start(of_file(path))
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path, is_zip: bool, share: float) -> None:
    path = tmp_path / "best.pt"
    torch.save({"model": tiny().state_dict()}, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(path, "cannot be read as a checkpoint")


def assert_refused(path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read_start(of_file(path))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"<html>", b"PK\3\4", b"\x80\x02N.", b"\x08\x07onnx"])
def test_another_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    assert_refused(path, "cannot be read as a checkpoint")


def looped() -> nn.Module:
    module = nn.Module()
    module._modules["again"] = module
    return module


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "numbers": (lambda: [1, 2], "holds no network"),
    "no tensor": (lambda: {"model": {"a": 1}}, "holds no network"),
    "a module that holds itself": (lambda: {"model": looped()}, "holds no network"),
    "another task": (lambda: {"model": ClassificationModel("yolov8n-cls.yaml", verbose=False)}, "ClassificationModel"),
    "by its arguments": (lambda: {"model": tiny(), "train_args": {"task": "segment"}}, "for the task segment"),
    "nan": (lambda: {"model": poisoned()}, r"holds NaN or infinity in model\.0\.conv\.weight"),
}


def poisoned() -> DetectionModel:
    model = tiny()
    model.state_dict()["model.0.conv.weight"][0] = float("nan")
    return model


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_network_for_detection_is_one_line(tmp_path: Path, other: str) -> None:
    content, said = OTHERS[other]
    path = tmp_path / "best.pt"
    torch.save(content(), path)
    assert_refused(path, said)


def test_a_file_that_has_changed_since_it_was_named(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save(tiny(), path)
    start = of_file(path)
    torch.save(tiny(5), path)
    with pytest.raises(UserError, match="is another file than when this run began"):
        read_start(start)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("yolov10s.yaml", r"holds yolov10s, not yolov10n: take --set model=yolov10s\.yaml"),
        ("yolov8n.yaml", r"holds no YOLOv10 but yolov8n\.yaml: it has no one2one head"),
    ],
)
def test_another_size_or_architecture_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str
) -> None:
    monkeypatch.setattr(Detect, "legacy", Detect.legacy)  # YOLOv8 changes it for all networks that are built later
    weights = read({"model": DetectionModel(model, nc=2, verbose=False)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=said):
        fit(DetectionModel("yolov10n.yaml", nc=2, verbose=False), weights, "yolov10n.yaml")


def test_folded_batchnorm_is_named(tmp_path: Path) -> None:
    torch.save({"model": tiny().fuse()}, tmp_path / "best.pt")
    assert_refused(tmp_path / "best.pt", r"without BatchNorm, it was folded \(fuse\)")


# --- classes ---------------------------------------------------------------------------------------------------------


def fitted(model: DetectionModel, names: list[str], own: list[str], path: Path) -> DetectionModel:
    """A network for the classes `own` with the weights of `model`, whose classes are `names`."""
    model.names = dict(enumerate(names))
    weights = read({"model": model}, path)
    other = tiny(len(own))
    other.names = dict(enumerate(own))
    nn.init.zeros_(other.model[-1].one2one_cv3[0][2].weight)
    fit(other, weights, TINY_MODEL)
    return other


def test_another_number_of_classes_leaves_the_class_layers_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TINY's class branch is as wide for 2 classes as for 3, so only its last convolutions differ."""
    caplog.set_level("INFO")
    source = tiny(3)
    model = fitted(source, ["a", "b", "c"], ["a", "b"], tmp_path / "x.pt")
    assert caplog.messages[-1] == (
        "x.pt has 3 classes, the dataset 2: 12 tensors of the head's class layers begin with random numbers"
    )
    assert not model.model[-1].one2one_cv3[0][2].weight.any(), "as it was"
    given = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.shape != given[name].shape or torch.equal(tensor, given[name]), name


def test_the_same_classes_in_another_order_are_put_in_that_of_the_dataset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = tiny(3)
    model = fitted(source, ["a", "b", "c"], ["c", "a", "b"], tmp_path / "x.pt")
    assert "in another order" in caplog.text
    for head in ("cv3", "one2one_cv3"):
        for given, placed in zip(getattr(source.model[-1], head), getattr(model.model[-1], head), strict=True):
            assert torch.equal(placed[2].weight, given[2].weight[[2, 0, 1]])
            assert torch.equal(placed[2].bias, given[2].bias[[2, 0, 1]])
    assert torch.equal(model.model[-1].one2one_cv2[0][2].weight, source.model[-1].one2one_cv2[0][2].weight)


def test_other_names_are_told_and_taken_in_their_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny(2)
    model = fitted(source, ["Bolt", "nut"], ["bolt", "nut"], tmp_path / "x.pt")
    assert "classes of other names (Bolt)" in caplog.text
    assert_equal(model.state_dict(), source)


def test_a_checkpoint_of_ours_that_is_damaged_keeps_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, load("fp16"), {"scored": cpu_state_dict(tiny()), "epoch": 0})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(path, "its checksum does not fit")
