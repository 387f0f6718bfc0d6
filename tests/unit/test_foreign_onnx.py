"""ONNX files from the field: what their metadata, their shapes or their users say is scored; the rest is one line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from app.__main__ import evaluate
from app.__main__ import parse as parse_arguments
from app.coco.categories import NAMES
from app.coco.score import standalone_dataset
from app.core.config import CONF_DIR, UserError, load
from app.core.files import read_json
from app.eval.contract import Said
from app.eval.evaluate import evaluate_file, evaluate_standalone, scores_folder
from app.eval.metadata import LONGEST_CHARS, as_names, parse, read_names, size_of
from app.eval.runtime import CPU, nodes_by_provider, open_model
from tests.support.eval_fixtures import SETTINGS, raw_output, truth_box, write_coco, write_model

HIT = (8.0, 8.0, 24.0, 20.0, 0.9, 0)
END2END = np.array([HIT, *[(0.0, 0.0, 0.0, 0.0, 0.0, -1)] * 20])  # some exporters pad with class -1
RAW = raw_output(HIT)
ULTRALYTICS = {"task": "detect", "stride": "32", "imgsz": "[32, 32]", "names": str(dict(enumerate(NAMES)))}
COCO = Said(names=NAMES)


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    boxes = [truth_box(image_id, [16.0, 8.0, 32.0, 24.0]) for image_id in (1, 2, 3)]
    return write_coco(tmp_path / "coco", dict.fromkeys((1, 2, 3), (0, 0, 255)), boxes)


def scored(coco_dir: Path, bias: np.ndarray, said: Said | None = None, **options: Any) -> dict[str, Any]:
    path = write_model(coco_dir.parent / "m.onnx", bias, **options)
    return evaluate_file(path, standalone_dataset(coco_dir, "val2017"), coco_dir.parent / "out", SETTINGS, said)


SAYS_ENOUGH = {
    "authors' exporter": (END2END, "end2end", {}),
    "authors' exporter, free": (END2END, "end2end", {"out_shape": ["batch", "k", "anchors"], "imgsz": "side"}),
    "Ultralytics without end2end": (END2END, "end2end", {"metadata": ULTRALYTICS | {"args": "{'batch': 1}"}}),
    "Ultralytics, all free": (
        END2END, "end2end", {"metadata": ULTRALYTICS | {"end2end": "True"}, "out_shape": ["n", "k", "c"]}
    ),
    "arguments that are no Python": (END2END, "end2end", {"metadata": ULTRALYTICS | {"args": "{nms: true"}}),
    "Ultralytics, one2many, all free": (RAW, "nms", {"out_shape": ["n", "k", "c"]}),
    "Ultralytics, one2many": (RAW, "nms", {"metadata": ULTRALYTICS | {"end2end": "False"}}),
    "names as a list": (END2END, "end2end", {"metadata": ULTRALYTICS | {"names": str(NAMES)}}),
    "names as JSON list": (END2END, "end2end", {"metadata": ULTRALYTICS | {"names": json.dumps(NAMES)}}),
    "names as JSON dict": (
        END2END, "end2end", {"metadata": ULTRALYTICS | {"names": json.dumps(dict(enumerate(NAMES)))}}
    ),
    "names as str(dict) in JSON": (
        END2END, "end2end", {"metadata": ULTRALYTICS | {"names": json.dumps(str(dict(enumerate(NAMES))))}}
    ),
    "float16 in and out": (RAW, "nms", {"type": TensorProto.FLOAT16, "out_type": TensorProto.FLOAT16}),
    "float64 in and out": (RAW, "nms", {"type": TensorProto.DOUBLE, "out_type": TensorProto.DOUBLE}),
    "uint8 input": (RAW, "nms", {"type": TensorProto.UINT8}),
    "another input name": (RAW, "nms", {"name": "input.1"}),
    "only one image at a time": (RAW, "nms", {"baked": True}),
    "only the contract is ours": (RAW, "raw", {"metadata": {"contract": "raw"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAYS_ENOUGH)
def test_file_that_says_enough_is_scored(coco_dir: Path, case: str) -> None:
    bias, contract, options = SAYS_ENOUGH[case]
    metrics = scored(coco_dir, bias, **({"metadata": ULTRALYTICS} | options))
    assert (metrics["model"]["contract"], metrics["model"]["imgsz"]) == (contract, 32)
    assert metrics["coco"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(("contract", "bias"), [("raw", RAW), ("nms", RAW), ("end2end", END2END)])
def test_user_says_what_the_file_does_not(coco_dir: Path, contract: str, bias: np.ndarray) -> None:
    said = Said(contract, NAMES, 32)
    metrics = scored(coco_dir, bias, said, metadata={}, imgsz="side", name="x")
    assert (metrics["model"]["contract"], metrics["coco"]["AP"]) == (contract, pytest.approx(1.0))


def test_user_outweighs_the_file(coco_dir: Path) -> None:
    metadata = ULTRALYTICS | {"names": str([name.title() for name in NAMES]), "end2end": "True"}
    assert scored(coco_dir, RAW, Said("raw", NAMES), metadata=metadata)["model"]["contract"] == "raw"


OTHER_NAMES = [name if name != "airplane" else "aeroplane" for name in NAMES]
REFUSED = {
    "nothing said of raw": (RAW, COCO, {"metadata": {}}, r"--contract: raw .* nms .* or end2end"),
    "names unsaid": (END2END, None, {"metadata": {}}, r"name no classes: .* --names conf/coco\.names"),
    "free side": (RAW, Said("raw", NAMES), {"metadata": {}, "imgsz": "side"}, r"say the side in px with --imgsz"),
    "other names": (
        RAW, None, {"metadata": ULTRALYTICS | {"names": str(OTHER_NAMES)}}, "class 4 is aeroplane, in COCO airplane"
    ),
    "fewer names": (RAW, None, {"metadata": ULTRALYTICS | {"names": str(NAMES[:20])}}, r"\(there are 20\)"),
    "other names by user": (RAW, Said("raw", OTHER_NAMES), {}, "--names are not the 80 COCO classes"),
    "names with a gap": (
        RAW, None, {"metadata": ULTRALYTICS | {"names": "{0: 'person', 2: 'car'}"}}, "'names' cannot be read"
    ),
    "nested names": (RAW, None, {"metadata": ULTRALYTICS | {"names": "[" * 5000}}, "'names' cannot be read"),
    "long names": (RAW, None, {"metadata": ULTRALYTICS | {"names": "x" * 10**6}}, "has 1,000,000 characters"),
    "power": (RAW, None, {"metadata": ULTRALYTICS | {"names": "9**9**9**9"}}, "neither JSON nor a Python value"),
    "another task": (RAW, None, {"metadata": ULTRALYTICS | {"task": "seg\x1b[31m"}}, r"task seg\\x1b\[31m: it must"),
    "side that contradicts": (RAW, Said("raw", NAMES, 64), {}, r"--imgsz 64; both must be the size"),
    "no side": (RAW, Said("raw", NAMES, 0), {"imgsz": "side"}, r"say the side in px"),
    "giant side": (RAW, Said("raw", NAMES, 10**9), {"imgsz": "side"}, "no batch of images that can be run"),
    "no batch": (RAW, None, {"batch": 0}, "no batch of images that can be run"),
    "giant batch": (RAW, None, {"batch": 10**9}, "no batch of images that can be run"),
    "four channels": (RAW, None, {"metadata": {"contract": "raw", "imgsz": "[1, 2, 3]"}, "imgsz": "side"}, "--imgsz"),
    "no rows and columns": (RAW, None, {"imgsz": ()}, "input images has 2 axes"),  # ONNX Runtime 1.26 would abort
    "int output": (RAW, None, {"out_type": TensorProto.INT32}, r"tensor\(int32\), the contract 'raw'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_remedy_is_that_of_the_file(coco_dir: Path, case: str) -> None:
    bias, said, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        scored(coco_dir, bias, said, **options)
    assert str(error.value).isprintable()
    assert "make export" not in str(error.value)
    assert not (coco_dir.parent / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1.0, 1.0, 9.0, 9.0, 0.5, -1), "row 2 of the end2end output has the class -1, not a whole number from 0 to"),
        ((1.0, 1.0, 9.0, 9.0, 0.5, 80), "row 2 of the end2end output has the class 80,"),
        ((1.0, 1.0, 9.0, 9.0, 0.5, 0.5), "row 2 of the end2end output has the class 0.5,"),
        ((1.0, 1.0, 9.0, 9.0, 0.5, 3e38), "row 2 of the end2end output has the class 3e+38,"),
        ((1.0, 1.0, 9.0, 9.0, 7.5, 1), "row 2 of the end2end output has the score 7.5, which is above 1"),
        ((1.0, 1.0, 9.0, 9.0, 0.5, np.nan), "not finite (nan at [2, 5] of [22, 6])"),
        ((1.0, -np.inf, 9.0, 9.0, 0.5, 0), "not finite (-inf at [2, 1] of [22, 6])"),
        ((1.0, 1.0, 9.0, 9.0, np.nan, 0), "not finite (nan at [2, 4] of [22, 6])"),
    ],
)  # fmt: skip
def test_row_that_is_no_detection_is_named(coco_dir: Path, row: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        scored(coco_dir, np.array([*END2END[:2], row, *END2END[2:]]), metadata=ULTRALYTICS)
    assert not (coco_dir.parent / "out" / "metrics.json").exists()


@pytest.mark.parametrize("contract", ["raw", "nms"])
@pytest.mark.parametrize(("logit", "limits"), [(-4.0, "-4 to 0.9"), (3.0, "0 to 3")])
def test_logits_are_named(coco_dir: Path, contract: str, logit: float, limits: str) -> None:
    raw = RAW.copy()
    raw[4:, 5] = logit  # the best score of an anchor is looked at
    with pytest.raises(UserError, match=f"scores from {limits}, .* these are logits"):
        scored(coco_dir, raw, contract=contract)


def test_boxes_that_are_shares_are_doubted(coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    scored(coco_dir, raw_output((0.25, 0.25, 0.75, 0.6, 0.9, 0)))
    assert any("are its boxes shares of the image instead of px?" in line for line in caplog.messages)
    caplog.clear()
    scored(coco_dir, RAW)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_rectangle(coco_dir: Path) -> None:
    """64 x 48 px in an input of 24 rows and 64 columns: halved, 16 px of padding on both sides."""
    metrics = scored(
        coco_dir, raw_output((24.0, 4.0, 40.0, 16.0, 0.9, 0)), imgsz=(24, 64), metadata={"contract": "raw"}
    )
    assert metrics["model"]["imgsz"] == "24 x 64"
    assert metrics["coco"]["AP"] == pytest.approx(1.0)


def test_uint8_input_gets_the_bytes_of_the_image(coco_dir: Path) -> None:
    """The score of class 0 is the share of red in what the graph gets: 255 of 255 for the red images."""
    weight = np.zeros((84, 21, 3))
    weight[4, 0, 0] = 1 / 255
    bias = raw_output((*HIT[:4], 0.0, 0))
    path = write_model(coco_dir / "m.onnx", bias, weight=weight, type=TensorProto.UINT8)
    model = open_model(path, "cpu")
    images = np.ones((1, 3, 32, 32), np.float32) * np.float32(114) / np.float32(255)
    assert model.run(images)[0, 4, 0] == pytest.approx(114 / 255)
    assert set(model.input.feed(images)["images"].ravel()) == {114}


def test_one_by_one_is_said(coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    metrics = scored(coco_dir, RAW, baked=True)
    assert metrics["settings"]["batch"] == 1
    assert [line for line in caplog.messages if "run one by one" in line]


@pytest.mark.parametrize("name", ["plain", 'quo"te', "ctl\x1b\n", "back\\slash"])
def test_profile_of_nodes_with_odd_names(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "m.onnx", RAW, batch=1)
    model = onnx.load(path)
    for number, node in enumerate(model.graph.node[:-1]):
        node.name = f"{name}{number}"
    model.graph.node[-1].name = "sound"
    onnx.save(model, path)
    nodes = nodes_by_provider(open_model(path, "cpu"), np.zeros((1, 3, 32, 32), np.float32))
    assert "Cast sound" in nodes[CPU]
    assert any("plain" in node for node in nodes[CPU]) == (name == "plain")


def test_text_that_is_no_utf8_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "m.onnx", RAW, name="NAME", metadata={"contract": "raw", "label": "LABEL"})
    content = path.read_bytes()
    for text in (b"NAME", b"LABEL"):
        path.write_bytes(content.replace(text, b"\xff\x1b" + text[2:]))
        with pytest.raises(UserError, match=r"UTF-8|utf-8"):
            open_model(path, "cpu")
    assert capfd.readouterr() == ("", "")  # ONNX Runtime says nothing by itself


class Mixing:
    """A session with a free batch that adds the first image of the batch to all: no error, and no wrong shape."""

    def run(self, _names: None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        (images,) = feeds.values()
        means = (images + images[:1]).mean(axis=(2, 3)).sum(axis=1)
        return [means[:, None, None] * 100 + np.zeros((len(images), 84, 21), np.float32)]


def test_batch_that_mixes_its_images_is_not_used(coco_dir: Path) -> None:
    model = open_model(write_model(coco_dir / "m.onnx", RAW), "cpu")
    assert model.takes_batches()
    object.__setattr__(model, "session", Mixing())
    assert not model.takes_batches()


def test_label_and_name_cannot_steer_the_terminal(coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata = {"contract": "raw", "label": "\x1b]0;x\x07 net\n\u202e", "precision": "\x1b[2J"}
    caplog.set_level(logging.INFO)
    metrics = scored(coco_dir, RAW, metadata=metadata)
    assert metrics["model"]["label"] == r"\x1b]0;x\x07 net\n\u202e"
    assert metrics["model"]["precision"] == r"\x1b[2J"
    assert all(line.isprintable() for line in caplog.messages)


def test_skip_broken_leaves_out_what_cannot_be_used(coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model(coco_dir / "m.onnx", RAW)
    (coco_dir / "val2017" / "000000000002.png").write_bytes(b"text")
    annotation_file = coco_dir / "annotations" / "instances_val2017.json"
    tree = json.loads(annotation_file.read_text())
    tree["annotations"][2]["bbox"] = [9, 0, -1, 1]
    annotation_file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"image id 3: .* --set data\.skip_broken=true"):
        standalone_dataset(coco_dir, "val2017")
    config = load("qat", [], ["eval.provider=cpu", "eval.latency_runs=1", "data.skip_broken=true"])
    metrics = evaluate_standalone(config, path, standalone_dataset(coco_dir, "val2017", True), coco_dir / "out")
    facts = metrics["dataset"]
    assert (facts["n_images"], facts["n_images_listed"], facts["subset"]) == (1, 3, True)
    assert metrics["coco"]["AP"] == pytest.approx(1.0)
    first, second = [line for line in caplog.messages if "left out" in line]
    assert "1 images left out, the first: image id 3: " in first
    assert "1 of 2 images left out, the first: image " in second
    (coco_dir / "val2017" / "000000000001.png").unlink()
    with pytest.raises(UserError, match="no image of val2017 can be used"):
        evaluate_standalone(config, path, standalone_dataset(coco_dir, "val2017", True), coco_dir / "out")


def test_command_line(coco_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.environment.isolate_libraries", lambda _folder: None)
    path = write_model(tmp_path / "m.onnx", RAW, metadata={}, imgsz="side")
    where = ["--runs-dir", tmp_path / "runs", "--onnx", path, "--coco-dir", coco_dir, "--out", tmp_path / "out"]
    said = ["--contract", "raw", "--names", CONF_DIR / "coco.names", "--imgsz", "32"]
    settings = ["--set", "eval.provider=cpu", "--set", "eval.latency_runs=1"]
    evaluate(parse_arguments(["eval", *map(str, [*where, *said, *settings])]))
    assert read_json(tmp_path / "out" / "metrics.json", "eval")["coco"]["AP"] == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"eval\.max_images = 0"):
        evaluate(parse_arguments(["eval", *map(str, where), "--max-images", "0"]))


def test_without_a_folder_the_dataset_is_that_of_the_settings_and_the_score_has_a_place(
    coco_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.core.environment.isolate_libraries", lambda _folder: None)
    path = write_model(tmp_path / "my model.onnx", RAW, metadata={}, imgsz="side")
    said = ["--contract", "raw", "--names", str(CONF_DIR / "coco.names"), "--imgsz", "32"]
    settings = ["--set", "eval.provider=cpu", "--set", "eval.latency_runs=1", "--set", f"data.coco_dir={coco_dir}"]
    words = ["eval", "--runs-dir", str(tmp_path / "runs"), "--onnx", str(path), *said, *settings]
    evaluate(parse_arguments(words))
    out_dir = tmp_path / "runs" / "eval" / "my_model"
    assert read_json(out_dir / "metrics.json", "eval")["coco"]["AP"] == pytest.approx(1.0)
    evaluate(parse_arguments(words))  # the same file: its score is replaced
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"runs/eval/my_model holds the score of another my model\.onnx: .*--force"):
        evaluate(parse_arguments(words))
    assert scores_folder(path, tmp_path / "runs", force=True) == out_dir


def test_image_that_is_a_link_is_scored(coco_dir: Path) -> None:
    image = coco_dir / "val2017" / "000000000002.png"
    image.rename(coco_dir.parent / "blob")
    image.symlink_to(coco_dir.parent / "blob")
    assert scored(coco_dir, RAW)["coco"]["AP"] == pytest.approx(1.0)


def test_parser_of_values() -> None:
    assert [parse(text) for text in ("[160, 160]", "(1,)", "'a'", "{0: 'a'}", "null")] == [
        [160, 160], (1,), "a", {0: "a"}, None,
    ]  # fmt: skip
    assert as_names({"1": "b", "0": "a"}) == as_names("['a', 'b']") == as_names({0: "a", 1: "b"}) == ["a", "b"]
    sizes = ["160", "[160, 96]", "[160]", "[1, 2, 3]", "[1.5, 2]", "[true, 2]", "abc", "[[1]]", "{}", "null", "[]"]
    assert [size_of({"imgsz": text}) for text in sizes] == [(160, 160), (160, 96), (160, 160)] + [None] * 8
    assert size_of({}) is None


HOSTILE = [
    "-" * 90_000 + "1", "[" * 90_000, "(" * 199 + ")" * 199, "not " * 20_000 + "1", "1+" * 40_000 + "1",
    "lambda:" * 14_000 + "1", "a." * 45_000 + "b", "9" * 9_000, "9**9**9", "{[]: 1}", "{**{}}", "\0", "\ud800",
    "f'{1}'", "__import__('os').system('false')", "1 if 1else 2", "x" * (LONGEST_CHARS + 1), "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12].encode("unicode_escape").decode())
def test_hostile_text_is_one_line(text: str, recwarn: pytest.WarningsRecorder) -> None:
    try:
        parse(text)
    except UserError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200
    assert not recwarn.list


def test_names_from_a_file(tmp_path: Path) -> None:
    assert read_names(CONF_DIR / "coco.names") == NAMES
    contents = {
        "lines.txt": "\n".join(NAMES) + "\r\n\n", "list.json": json.dumps(NAMES),
        "dict.txt": str(dict(enumerate(NAMES))),
        "coco.yaml": "names:\n" + "".join(f"  {number}: {name}\n" for number, name in enumerate(NAMES)),
    }  # fmt: skip
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        assert read_names(tmp_path / name) == NAMES
    for name, text in {"none.txt": "\n", "other.yaml": "nc: 80", "bad.json": "[1, 2]", "cut.json": "['a"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            read_names(tmp_path / name)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path / "binary", tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=f"--names {path}: "):
            read_names(path)
