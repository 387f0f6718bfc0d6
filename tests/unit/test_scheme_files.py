"""Scheme files: what is read, what each mistake says, and what of a scheme is part of a configuration."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.config import UserError, dump, load, validate
from app.core.differences import config_hash, difference, flatten, shown
from app.core.labels import Label
from app.core.mounts import MOUNTS
from app.core.run import RunRoot
from app.core.scheme import Scheme, builtin_names, find_scheme, keep_scheme, kept_scheme, read_scheme
from tests.support.scheme_files import scheme_of, write_rules

ONE = "- {pattern: '*', bits: 4, granularity: channel, why: all}\n"


def qat(file: Path | str, *sets: str, run_root: Path | None = None):
    return load("qat", [], [f"quant.scheme={file}", *sets], run_root)


def scheme(file: Path | str) -> Scheme:
    quant = qat(file).quant
    assert quant is not None
    return quant.scheme


# --- the built-in ones -----------------------------------------------------------------------------------------------


def test_built_in_schemes_are_files_of_the_same_form() -> None:
    assert builtin_names() == [
        "w4a16", "w4a16-decoupled", "w4a16-dfl", "w4a16-full", "w4a16-mixed", "w4a16-mixed-dw", "w4a16-per-tensor",
        "w8a16",
    ]  # fmt: skip
    for name in builtin_names():
        assert scheme(name).name == name
        assert scheme(f"conf/schemes/{name}.yaml") == scheme(name)


def test_mixed_dw_is_mixed_with_entries_between() -> None:
    mixed, with_depthwise = scheme("w4a16-mixed").rules, scheme("w4a16-mixed-dw").rules
    assert (*with_depthwise[:2], with_depthwise[-1]) == mixed
    assert {(rule.bits, rule.granularity) for rule in with_depthwise[2:-1]} == {(8, "channel")}


# --- a file of one's own ---------------------------------------------------------------------------------------------


def test_the_label_is_the_name_of_the_file(tmp_path: Path) -> None:
    file = write_rules(tmp_path / "my_own.v2.yaml", ("a", 2), ("b", "float"), ("*", 8, "tensor"))
    config = qat(file)
    assert config.label == "qat-my_own.v2"
    assert config.quant is not None
    rules = [(rule.pattern, rule.bits, rule.granularity, rule.why) for rule in config.quant.scheme.rules]
    assert rules == [
        ("a", 2, "channel", "a test's a"), ("b", "float", None, "a test's b"), ("*", 8, "tensor", "a test's *")
    ]  # fmt: skip


def test_the_path_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "a #1: x"
    assert scheme(write_rules(folder / "s.yml", ("*", 4))).name == "s"


FORM = "write a list of entries with pattern, bits, granularity and why, as conf/schemes/w4a16-mixed.yaml is"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"is no scheme: {FORM}"),
        ("pattern: '*'\n", f"is no scheme: {FORM}"),
        ("- a\n", f"is no scheme: {FORM}"),
        ("[]", f"my.yaml: it has no entry: {FORM}"),
        ("[1", "my.yaml is not valid YAML"),
        (f"{ONE}  bits: 3", "my.yaml is not valid YAML"),
        (ONE.replace("4", "9"), "my.yaml: entry 1 (*): bits = 9: choose 2 to 8, or float"),
        (ONE.replace("4", "1"), "my.yaml: entry 1 (*): bits = 1: choose 2 to 8, or float"),
        (ONE.replace("4", "true"), "my.yaml: entry 1 (*): bits = True: choose 2 to 8, or float"),
        (ONE.replace("4", "4.5"), "my.yaml: entry 1 (*): bits = 4.5: choose 2 to 8, or float"),
        (ONE.replace("4", "[4]"), "my.yaml: entry 1 (*): bits = [4]: choose 2 to 8, or float"),
        (ONE.replace("4", "float"), "my.yaml: entry 1 (*): bits float takes no granularity (channel or tensor)"),
        (ONE.replace("granularity: channel, ", ""), "entry 1 (*): bits 4 needs a granularity (channel or tensor)"),
        (ONE.replace("channel", "row"), "entry 1 (*): granularity = 'row': Input should be 'channel', 'tensor' or"),
        (ONE.replace("4", "8").replace("channel", "decoupled"), "granularity decoupled is for 4 bits alone"),
        (ONE.replace("why", "range: wide, why"), "entry 1 (*): range = 'wide': Input should be 'narrow' or 'full'"),
        (ONE.replace("why", "range: full, why").replace("4", "float").replace("granularity: channel, ", ""),
         "my.yaml: entry 1 (*): range full is for bits by channel or tensor"),
        (ONE.replace("why", "range: full, why").replace("channel", "decoupled"), "range full is for bits by channel"),
        (f"{ONE}{ONE.replace('why', 'because')}", "my.yaml: entry 2 (*): why is missing; entry 2 (*): unknown key "
         "because, an entry has pattern, bits, granularity, why"),
        (ONE.replace("pattern: '*', ", ""), "my.yaml: entry 1 (None): pattern is missing"),
        (ONE.replace("'*'", "''"), "my.yaml: entry 1 (): pattern = '': String should have at least 1 character"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_entry(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        qat(file)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"my\.yaml does not exist: name a YAML file as those in conf/schemes/"):
        qat(tmp_path / "my.yaml")
    with pytest.raises(UserError, match="cannot read the configuration file"):
        qat(f"{tmp_path}/")
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read the configuration file"):
        qat(tmp_path / "my.yaml")


@pytest.mark.parametrize("value", ["null", "", "4", "w4a16 ", "W4A16"])
def test_a_name_that_is_not_built_in(value: str) -> None:
    with pytest.raises(UserError, match=r"choose one of w4a16, .*, w8a16, or name a file such as my\.yaml"):
        qat(value)


@pytest.mark.parametrize("name", ["w4a16", "W4A16", "w4a16-mixed"])
def test_a_file_with_the_name_of_a_built_in_scheme_has_its_rules(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"has the name of the built-in scheme {name.lower()} and other rules: rename"):
        qat(write_rules(tmp_path / f"{name}.yaml", ("*", 5)))
    assert scheme(write_rules(tmp_path / "w8a16.yaml", ("*", 8))).sha256 == scheme("w8a16").sha256


@pytest.mark.parametrize("name", ["my-bn", "my-int4", "my-end2end", "my-coco", ".my", "a b", "ä", "-x", "x" * 41])
def test_a_name_that_no_label_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="the label of the scheme: use at most 40 letters, digits"):
        qat(write_rules(tmp_path / f"{name}.yaml", ("*", 5)))


@settings(derandomize=True, deadline=None, database=None)
@given(st.text(st.sampled_from("ab4._-"), min_size=1, max_size=8) | st.sampled_from(("a-bn-half", "bn", "int4")))
def test_every_accepted_name_is_read_back_from_its_labels(name: str) -> None:
    try:
        accepted = scheme_of(("*", 4), name=name).name
    except ValueError:
        return
    for label in (Label("qat", accepted), Label("ptq", accepted, bn=True), Label("qat", accepted, packing="int4")):
        assert Label.parse(str(label)) == label


# --- in a configuration ----------------------------------------------------------------------------------------------


def test_the_hash_is_of_what_the_rules_compute(tmp_path: Path) -> None:
    file = write_rules(tmp_path / "a" / "my.yaml", ("x", "float"), ("*", 4))
    content = b'[["x", "float", null], ["*", 4, "channel"]]'
    assert scheme(file).sha256 == hashlib.sha256(content).hexdigest()
    moved = write_rules(tmp_path / "b" / "my.yaml", ("x", "float"), ("*", 4))
    moved.write_text(f"# a comment\n{moved.read_text()}".replace("a test's", "another reason for"))
    assert config_hash(qat(moved)) == config_hash(qat(file))
    assert difference(qat(moved), qat(file)) == {}
    for rules in ((("x", 3), ("*", 4)), (("x", "float"), ("*", 4, "tensor")), (("*", 4), ("x", "float"))):
        assert config_hash(qat(write_rules(moved, *rules))) != config_hash(qat(file))


def test_a_full_range_is_part_of_the_hash_and_a_narrow_one_is_the_default(tmp_path: Path) -> None:
    file = write_rules(tmp_path / "my.yaml", ("*", 4, "channel", "full"))
    full = qat(file)
    assert scheme(file).sha256 == hashlib.sha256(b'[["*", 4, "channel", "full"]]').hexdigest()
    keep_scheme(scheme(file), tmp_path)
    assert kept_scheme(tmp_path, "my") == scheme(file)
    narrow = qat(write_rules(file, ("*", 4, "channel", "narrow")))
    keep_scheme(scheme(file), tmp_path)
    assert "range" not in (tmp_path / "scheme" / "my.yaml").read_text()
    assert narrow == qat(write_rules(file, ("*", 4)))
    said = "quant.scheme: my (* at 4 bits by channel, full range) -> my (* at 4 bits by channel)"
    assert shown(difference(full, narrow)) == said


def test_a_changed_file_differs_in_its_rules_alone(tmp_path: Path) -> None:
    file = write_rules(tmp_path / "my.yaml", ("a", 8), ("b", "float"), ("*", 4))
    before = qat(file)
    after = qat(write_rules(file, ("a", 6, "tensor"), ("*", 4)))
    said = "quant.scheme: my (a at 8 bits by channel; b in float) -> my (a at 6 bits by tensor)"
    assert shown(difference(before, after)) == said
    reordered = qat(write_rules(file, ("*", 4), ("a", 8), ("b", "float")))
    order = "my (a at 8 bits by channel; b in float; * at 4 bits by channel)"
    assert difference(before, reordered)["quant.scheme"][0] == order
    assert shown(difference(before, qat(write_rules(file, ("a", 8), ("*", 4))))).endswith("-> my (no such rule)")
    assert difference(before, after, ignore=("quant",)) == {}
    assert difference(before, qat("w8a16"))["quant.scheme"] == ("my", "w8a16")


def test_tables_show_the_label_and_a_snapshot_holds_the_rules(tmp_path: Path) -> None:
    file = write_rules(tmp_path / "my.yaml", ("a", 2), ("*", "float"))
    config = qat(file)
    assert flatten(config)["quant.scheme"] == "my"
    file.unlink()
    tree = yaml.safe_load(dump(config))
    assert validate(tree) == config
    assert flatten(tree)["quant.scheme"] == "my"
    assert difference(tree, config) == {}


def test_a_snapshot_that_names_a_built_in_scheme_is_read() -> None:
    tree = {**load("qat").model_dump(mode="json")}
    tree["quant"] = {**tree["quant"], "scheme": "w4a16-mixed"}
    assert validate(tree) == qat("w4a16-mixed")
    assert difference(tree, qat("w4a16-mixed")) == {}


def test_a_run_keeps_a_copy_for_when_the_file_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunRoot(tmp_path / "runs", "r")
    file = write_rules(tmp_path / "my.yaml", ("a", 2), ("*", "float"))
    config = qat(file)
    assert config.quant is not None
    keep_scheme(config.quant.scheme, run.variant_dir("qat-my"))
    keep_scheme(scheme_of(("*", 8), name="my"), run.variant_dir("ptq-my"))  # an older one
    keep_scheme(scheme_of(("*", 8), name="other"), run.variant_dir("qat-other"))
    assert kept_scheme(run.variant_dir("qat-my"), "my") == config.quant.scheme
    assert kept_scheme(run.variant_dir("qat-my"), "other") is None
    file.unlink()
    with caplog.at_level(logging.WARNING):
        assert qat(file, run_root=run.root) == config
    copy = run.root / "qat-my" / "scheme" / "my.yaml"
    assert caplog.messages == [f"{file} does not exist: the scheme is read from the run's copy, {copy}"]
    assert read_scheme(copy) == config.quant.scheme
    with pytest.raises(UserError, match="does not exist"):
        qat(tmp_path / "third.yaml", run_root=run.root)
    write_rules(file, ("*", 3))
    assert qat(file, run_root=run.root) != config  # a file that is there is taken


def test_a_container_that_does_not_see_the_file_takes_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may be there, outside, with other rules than those of the copy."""
    run = RunRoot(tmp_path / "runs", "r")
    keep_scheme(scheme_of(("*", 8), name="my"), run.variant_dir("qat-my"))
    assert str(qat("/not/seen/my.yaml", run_root=run.root).label) == "qat-my"
    monkeypatch.setenv(MOUNTS, "/src=.")
    with pytest.raises(
        UserError, match=r"^/not/seen/my.yaml does not exist \(the container sees only .*\): give it as ARGS="
    ):
        qat("/not/seen/my.yaml", run_root=run.root)


def test_a_scheme_is_found_as_it_is() -> None:
    assert find_scheme(scheme("w4a16")) is not None
    with pytest.raises(ValueError, match="choose one of"):
        find_scheme(4)
