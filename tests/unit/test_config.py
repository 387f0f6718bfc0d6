"""Configuration: layers, rejection of unknown keys, and what fp16 and qat may differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core.config import (
    CONF_DIR,
    Config,
    Hyp,
    Quant,
    Section,
    UserError,
    dump,
    load,
    merge,
    parse_set,
    read_yaml,
    validate,
)
from app.core.differences import WITHOUT_EFFECT, config_hash, difference, flatten

OVERLAYS = sorted(set(CONF_DIR.glob("*.yaml")) - {CONF_DIR / "base.yaml"})
OTHER_HYP = ("optimizer", "perspective", "close_mosaic", "nbs")  # keys of hyp that cannot be 0.77
# Another valid value for every key; some need a second key beside it, which the unchanged configuration gets too.
CHANGED = {
    "variant": "fp16", "model": "yolov10n.yaml",
    "data.coco_dir": "elsewhere", "data.n_train": 7, "data.n_val": 7, "data.seed": 1, "data.skip_broken": True,
    "data.strict": True, "data.train_images": "a", "data.train_annotations": "b", "data.val_images": "c",
    "data.val_annotations": "d",
    "train.weights": {"path": "best.pt", "sha256": 64 * "7"},
    "train.epochs": 7, "train.batch": 7, "train.imgsz": 32, "train.seed": 1, "train.deterministic": False,
    "train.amp": False, "train.workers": 7, "train.device": "cpu", "train.cache": True,
    "train.graph": False, "train.kernels": False, "train.bn_batches": 7,
    "train.val_every": 7, "train.save_every_s": 7.0, "train.save_period": 7, "train.ema_decay": 0.7,
    "train.ema_tau": 7.0,
    "hyp.optimizer": "AdamW", "hyp.perspective": 0.0007, "hyp.close_mosaic": 7, "hyp.nbs": 7,
    **{f"hyp.{key}": 0.77 for key in Hyp.model_fields if key not in OTHER_HYP},
    "quant.scheme": "w8a16", "quant.fast_path": False, "quant.learned_scale": True, "quant.warmup_share": 0.7,
    "quant.warmup_bits": "float", "quant.warmup_from": "epoch7.pt", "quant.averaged_scales": False,
    "quant.dampening": 0.7, "quant.freeze_threshold": 0.7, "quant.freeze_momentum": 0.7, "quant.correction_epochs": 1,
    "quant.correction_lr": 0.7, "quant.distill": 0.7, "quant.teacher": "best.pt",
    "guard.collapse": "off", "guard.share": 0.7, "guard.divergence": "off", "guard.n_validations": 7,
    "guard.max_rollbacks": 7,
    "export.opset": 13, "export.dynamic": True, "export.contracts": ["end2end"], "export.optimize": False,
    "eval.provider": "cpu", "eval.batch": 7, "eval.conf": 0.7, "eval.max_det": 7, "eval.max_images": 7,
    "eval.latency_warmup": 7, "eval.latency_runs": 7,
    "report.min_ap50": 0.7, "report.min_share_of_best": 0.7, "report.gallery_images": 7, "report.gallery_seed": 7,
    "sensitivity.images": 7, "sensitivity.images_other_bits": 7, "sensitivity.bn_images": 7,
    "sensitivity.batch_images": 7, "sensitivity.choice_seed": 7, "sensitivity.measure": "loss",
    "sensitivity.random_schemes": 7, "sensitivity.against": ["a"],
}  # fmt: skip
NEEDED = {
    "quant.warmup_from": {"quant.warmup_share": 0.5, "quant.warmup_bits": "float"},
    "quant.averaged_scales": {"quant.scheme": "w4a16-decoupled"},
    "quant.teacher": {"quant.distill": 1.0},
}


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.name)
@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_every_conf_file_loads(file: Path, variant: str) -> None:
    overlays = [] if file.stem in ("fp16", "qat") else [file]
    assert load(variant, overlays).variant == variant


def test_variants_differ_only_in_variant_and_quant() -> None:
    sets = ["quant.scheme=w8a16", "train.epochs=7"]
    differences = difference(load("fp16", [], sets), load("qat", [], sets))
    null_by_default = ("warmup_from", "teacher")
    of_quant = (f"quant.{key}" for key in Quant.model_fields if key not in null_by_default)
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


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch, did you mean train.epochs?"),
        ("trian.epochs=3", "unknown key trian"),
        ("train.epochs=0", "train.epochs = 0"),
        ("train.epochs=many", "train.epochs = 'many'"),
        ("train.imgsz=100", "multiple of 32"),
        (
            "quant.scheme=w3a16",
            "quant.scheme = 'w3a16': choose one of w4a16, w4a16-decoupled, w4a16-dfl, w4a16-full, ",
        ),
        ("train.device=gpu", "train.device = 'gpu'"),
        ("train.device=0,cpu", "train.device = '0,cpu'"),
        ("model=yolov8m.yaml", "model = 'yolov8m.yaml'"),
        ("train.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("train.epochs=[1", "not valid YAML"),
        ("train=3", "train = 3"),
        ("train.patience=3", "unknown key train.patience, see conf/base.yaml"),
        ("train.lr0=0.1", "unknown key train.lr0, did you mean hyp.lr0?"),
        ("train.optimizer=SGD", "did you mean hyp.optimizer?"),
        ("train={batch.size: 3}", "write a key below its section: 'batch:'"),
        ("model=yolov8m.yaml", "choose one of yolov10n.yaml, yolov10s.yaml, "),
        ("train.device=gpu", "choose auto, cpu, or the numbers of GPUs such as 0 or 0,1"),
        ("train.seed=4294967296", "train.seed = 4294967296"),
        ("hyp.lr0=.inf", "finite"),
        ("hyp.copy_paste=0.5", "along their outlines, and the labels are boxes"),
        ("variant=int8", "variant=int8: this is no setting"),
        ("train.epochs=!!timestamp x", "not valid YAML"),
        ("train.epochs=2020-13-45", "not valid YAML"),
        ("train.epochs=" + "[" * 3000, "not valid YAML"),
        (f"train.epochs={'9' * 5000}", "not valid YAML"),
        ("=", "write it as key=value"),
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


def test_a_dotted_key_in_a_file_says_how_to_write_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train.epochs: 3\n")
    with pytest.raises(UserError, match=r"key train\.epochs, write a key below its section: 'train:', .*'epochs: ...'"):
        load("qat", [file])


def test_qat_without_its_section_is_refused() -> None:
    with pytest.raises(UserError, match="quant: the qat variant needs this section"):
        load("qat", [], ["quant=null"])


def test_a_value_of_any_size_is_shown_short(tmp_path: Path) -> None:
    file = tmp_path / "laughs.yaml"
    levels = ["a0: &a0 [1, 2]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file.write_text("\n".join(levels) + "\ntrain: {epochs: *a11}\n")
    with pytest.raises(UserError) as error:
        load("qat", [file])
    assert len(str(error.value)) < 3000


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


def test_every_key_is_in_the_hash_or_has_a_reason_not_to_be() -> None:
    assert set(CHANGED) == set(flatten(load("qat")))
    assert all(reason.endswith(".") and len(reason) > 20 for reason in WITHOUT_EFFECT.values())
    for name in WITHOUT_EFFECT:
        assert name in CHANGED or any(key.startswith(f"{name}.") for key in CHANGED)


@pytest.mark.parametrize("key", sorted(set(CHANGED) - {"hyp.copy_paste"}))
def test_hash_changes_with_the_keys_that_have_an_effect_alone(key: str) -> None:
    before = with_values(load("qat"), NEEDED.get(key, {}))
    after = with_values(before, {key: CHANGED[key]})
    assert set(difference(before, after)) == {key}
    has_effect = key not in WITHOUT_EFFECT and key.split(".")[0] not in WITHOUT_EFFECT
    assert (config_hash(before) != config_hash(after)) == has_effect


def test_hash_of_the_variants_differs() -> None:
    assert config_hash(load("fp16")) != config_hash(load("qat"))


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values of dotted keys, checked."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    return validate(tree)


def test_no_default_is_in_the_code() -> None:
    sections = [Config, *(type(value) for _, value in load("qat") if isinstance(value, Section))]
    optional = [name for section in sections for name, field in section.model_fields.items() if not field.is_required()]
    assert len(sections) == 10
    assert optional == []


@pytest.mark.parametrize("key", sorted(set(CHANGED) - {"variant"}))
def test_a_snapshot_without_a_key_is_refused(key: str) -> None:
    tree = load("qat").model_dump(mode="json")
    section, _, name = key.rpartition(".")
    del (tree[section] if section else tree)[name]
    with pytest.raises(UserError, match=key):
        validate(tree)


def test_an_option_switched_off_leaves_the_scheme() -> None:
    sets = ["scheme=w4a16-mixed", "learned_scale=true", "warmup_share=0.5", "dampening=0.1", "freeze_threshold=0.1"]
    sets += ["warmup_bits=float", "warmup_from=epoch7.pt", "correction_epochs=1"]
    quant = load("qat", sets=[f"quant.{item}" for item in sets]).quant
    plain = load("qat", sets=["quant.scheme=w4a16-mixed", "quant.fast_path=false", "quant.warmup_bits=float"]).quant
    assert quant is not None
    assert quant.without_options() == plain


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("fp16").train.epochs = 3  # type: ignore[misc]


def test_a_key_of_an_earlier_version_is_an_error() -> None:
    tree = load("qat").model_dump(mode="json")
    with pytest.raises(UserError, match=r"unknown key quant\.warmup_epochs"):
        validate(merge(tree, {"quant": {"warmup_epochs": 0}}))


@pytest.mark.parametrize(("share", "n_epochs"), [(0.0, 0), (0.67, 2), (0.99, 2)])
def test_a_warm_up_leaves_epochs_for_the_scheme(share: float, n_epochs: int) -> None:
    sets = ["train.epochs=3", f"quant.warmup_share={share}"]
    assert load("qat", sets=sets).n_quant_warmup_epochs == n_epochs
    assert load("fp16", sets=sets).n_quant_warmup_epochs == 0


@pytest.mark.parametrize("path", ["DIR #2", "DIR: x", "~", "null", "1e3", "'a'", "[1", "*", "ä b"])
def test_a_path_is_a_path_whatever_stands_in_it(path: str) -> None:
    assert load("qat", sets=[f"data.coco_dir={path}"]).data.coco_dir == path


@pytest.mark.parametrize("again", ["train:\n  batch: 2\n", "train: {}\n"])
def test_a_section_given_twice_is_refused(tmp_path: Path, again: str) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(f"train:\n  epochs: 1\n{again}")
    with pytest.raises(UserError, match=r"'train' stands in lines 1 and 3: write it once"):
        load("qat", [file])
    file.write_text("train:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(UserError, match=r"'epochs' stands in lines 2 and 3"):
        load("qat", [file])
