"""Configuration: layers, rejection of unknown keys, and what fp16 and qat may differ in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.core.config import (
    CONF_DIR,
    Quant,
    UserError,
    config_hash,
    difference,
    dump,
    load,
    merge,
    parse_set,
    read_yaml,
    validate,
)

OVERLAYS = sorted(set(CONF_DIR.glob("*.yaml")) - {CONF_DIR / "base.yaml"})
# YOLOv5's hyp.scratch, all its keys: each one is either used or has a reason in no_counterpart.
ORIGINAL_KEYS = (
    "lr0 lrf momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr box cls cls_pw obj obj_pw iou_t "
    "anchor_t fl_gamma hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup "
    "copy_paste"
).split()


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.name)
@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_every_conf_file_loads(file: Path, variant: str) -> None:
    overlays = [] if file.stem in ("fp16", "qat") else [file]
    assert load(variant, overlays).variant == variant


def test_variants_differ_only_in_variant_and_quant() -> None:
    sets = ["quant.scheme=w8a16", "train.epochs=7"]
    differences = difference(load("fp16", [], sets), load("qat", [], sets))
    of_quant = (f"quant.{key}" for key in Quant.model_fields if key != "warmup_from")  # which is null by default
    assert set(differences) == {"variant", *of_quant}
    assert differences["quant.scheme"] == (None, "w8a16")


def test_full_run_is_the_scratch_recipe() -> None:
    config = load("qat")
    assert (config.model, config.train.epochs, config.train.imgsz, config.train.amp) == (
        "yolov10m.yaml",
        300,
        640,
        True,
    )
    hyp = config.hyp
    assert (hyp.optimizer, hyp.lr0, hyp.lrf, hyp.momentum, hyp.weight_decay) == ("SGD", 0.01, 0.1, 0.937, 5e-4)
    assert (config.data.n_train, config.data.n_val, config.eval.max_images) == (None, None, None)


def test_every_original_key_is_used_or_explained() -> None:
    config = load("fp16")
    used = set(type(config.hyp).model_fields)
    assert set(ORIGINAL_KEYS) <= used | set(config.no_counterpart)
    assert not used & set(config.no_counterpart)
    assert all(len(reason) > 20 for _, reason in config.no_counterpart.values())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch, did you mean train.epochs?"),
        ("trian.epochs=3", "unknown key trian"),
        ("train.epochs=0", "train.epochs = 0"),
        ("train.epochs=many", "train.epochs = 'many'"),
        ("train.imgsz=100", "multiple of 32"),
        ("quant.scheme=w3a16", "'w4a16', 'w4a16-mixed', 'w8a16'"),
        ("train.device=gpu", "train.device = 'gpu'"),
        ("train.device=0,cpu", "train.device = '0,cpu'"),
        ("model=yolov8m.yaml", "model = 'yolov8m.yaml'"),
        ("train.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("train.epochs=[1", "not valid YAML"),
        ("train=3", "train = 3"),
    ],
)
@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_bad_setting_is_one_clear_line(variant: str, item: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(variant, [], [item])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_quant_settings_are_checked_for_fp16_too() -> None:
    with pytest.raises(UserError, match=r"did you mean quant\.scheme"):
        load("fp16", [], ["quant.shceme=w8a16"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not valid YAML"), ("- 1", "must be a mapping"), (None, "cannot")]
)
def test_bad_conf_file(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(file)


def test_unknown_variant() -> None:
    with pytest.raises(UserError, match="unknown variant 'int8'"):
        load("int8")


def test_set_wins_over_overlay_wins_over_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 5, batch: 4}")
    config = load("fp16", [file], ["train.epochs=6"])
    assert (config.train.epochs, config.train.batch, config.train.imgsz) == (6, 4, 640)


def test_merge_leaves_its_arguments_alone() -> None:
    below, above = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(below, above) == {"a": {"b": 3, "c": 2}}
    assert (below, above) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


def test_set_value_is_yaml() -> None:
    assert parse_set("data.n_val=null") == {"data": {"n_val": None}}
    assert parse_set("data.coco_dir=/a=b") == {"data": {"coco_dir": "/a=b"}}


def test_dump_reads_back_as_the_same_configuration() -> None:
    for variant in ("fp16", "qat"):
        config = load(variant, [CONF_DIR / "smoke.yaml"])
        assert validate(yaml.safe_load(dump(config))) == config


def test_hash_ignores_the_machine_only() -> None:
    base = config_hash(load("qat"))
    assert config_hash(load("qat", [], ["train.workers=1", "train.device=cpu", "train.cache=true"])) == base
    assert config_hash(load("qat", [], ["train.seed=1"])) != base
    assert config_hash(load("fp16")) != base


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("fp16").train.epochs = 3  # type: ignore[misc]


def test_runs_from_before_the_warm_up_share_can_be_read() -> None:
    tree = load("qat").model_dump(mode="json")
    del tree["quant"]["warmup_share"]
    tree["quant"] |= {"warmup_epochs": 0, "warmup_bits": "float"}
    assert validate(tree) == load("qat")
    tree["quant"]["warmup_epochs"] = 2
    with pytest.raises(UserError, match=r"warmup_epochs has become warmup_share, a share of train\.epochs"):
        validate(tree)


@pytest.mark.parametrize(("share", "n_epochs"), [(0.0, 0), (0.67, 2), (0.99, 2)])
def test_a_warm_up_leaves_epochs_for_the_scheme(share: float, n_epochs: int) -> None:
    sets = ["train.epochs=3", f"quant.warmup_share={share}"]
    assert load("qat", sets=sets).n_warmup_epochs == n_epochs
    assert load("fp16", sets=sets).n_warmup_epochs == 0
