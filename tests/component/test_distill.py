"""Distillation from the FP16 training: the loss by hand, and what a training with it computes, records and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.bench.soak import differences
from app.bench.stability import ARMS, check_arms, training_of
from app.coco.categories import NAMES
from app.core.config import Config, UserError, load
from app.core.differences import config_hash
from app.core.files import read_json, sha256, write_json
from app.core.run import RunRoot
from app.quant.model import load_checkpoint, load_scored
from app.report.evidence import Training
from app.report.findings import doubts_of_trainings
from app.train.distill import Teacher, divergences, read_teacher
from app.train.done import is_finished, make_ready
from app.train.graph import Passes
from app.train.processes import ALONE
from app.train.train import train
from tests.support.recorder import Recorder
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network, train_recorded

SETTINGS = {
    "data.n_train": 40, "data.n_val": 8, "train.batch": 8, "train.epochs": 3, "train.bn_batches": 2, "hyp.nbs": 16,
    "hyp.warmup_epochs": 1, "hyp.close_mosaic": 1, "train.ema_tau": 5,
}  # fmt: skip
WITH = {**SETTINGS, "quant.distill": 1.0}
LABEL = "qat-w4a16-distilled"
HEADS = ("one2many", "one2one")


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def fp16(runs_dir: Path) -> RunRoot:
    config, run = settle(runs_dir, "twin", "fp16", SETTINGS)
    train(config, run, force=False)
    return run


def beside(fp16: RunRoot, runs_dir: Path, name: str, settings: Mapping[str, Any] = WITH) -> tuple[Config, RunRoot]:
    """A run of its own with the same FP16 training."""
    config, run = settle(runs_dir, name, "qat", settings)
    if not run.variant_dir("fp16").exists():
        shutil.copytree(fp16.variant_dir("fp16"), run.variant_dir("fp16"))
    return config, run


# --- the loss --------------------------------------------------------------------------------------------------------


def logit(p: float) -> float:
    return log(p / (1 - p))


def heads(*scores: list[float], bins: tuple[float, float]) -> dict[str, torch.Tensor]:
    """One image, two classes, two anchors; each of the four sides of a box has two bins with these probabilities."""
    sides = torch.tensor([[log(bins[0])] * 2, [log(bins[1])] * 2]).repeat(4, 1)
    return {"scores": torch.tensor(scores)[None], "boxes": sides[None]}


# Probabilities of the two classes at two anchors: the teacher's 0.8, 0.5 and 0.2, 0.5, the student's 0.5 all over.
TEACHER = heads([logit(0.8), 0.0], [logit(0.2), 0.0], bins=(0.75, 0.25))
STUDENT = heads([0.0, 0.0], [0.0, 0.0], bins=(0.5, 0.5))
OF_CLASSES = 2 * (0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.5))
OF_SIDES = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
BEST = 0.8 + 0.5


def test_the_divergence_by_hand() -> None:
    divergence, best = divergences(TEACHER, STUDENT)
    assert divergence.item() == pytest.approx(OF_CLASSES + BEST * OF_SIDES, rel=1e-5)
    assert best.item() == pytest.approx(BEST, rel=1e-6)
    assert divergences(TEACHER, TEACHER)[0].item() == 0.0


class Fixed(torch.nn.Module):
    """A network with these outputs, whatever the image is."""

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.outputs = outputs
        self.model = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, images: torch.Tensor) -> Any:
        return {head: {name: part.repeat(len(images), 1, 1) for name, part in self.outputs.items()} for head in HEADS}


def test_heads_are_weighted_as_in_the_detection_loss_and_the_gradient_is_that_of_the_student_alone() -> None:
    """For two images: each head gives the divergence over the sum of best scores times 2; half of it, 0.7 + 0.2."""
    given = {head: {name: part.repeat(2, 1, 1).requires_grad_() for name, part in STUDENT.items()} for head in HEADS}
    teacher = Teacher(Fixed(TEACHER), 0.5, ALONE)
    loss = teacher.loss(torch.zeros(2, 3, 8, 8), given, torch.tensor([0.7, 0.2]))
    mean = (OF_CLASSES + BEST * OF_SIDES) / BEST
    assert loss.item() == pytest.approx(0.5 * (0.7 + 0.2) * mean * 2, rel=1e-5)
    loss.backward()
    # d KL / d logit is q - p = 0.5 - 0.8, over the sum of best scores of both images, times 2 images.
    gradient: Any = given["one2one"]["scores"].grad
    assert gradient[0, 0, 0].item() == pytest.approx(0.5 * 0.2 * (0.5 - 0.8) / (2 * BEST) * 2, rel=1e-5)


class OfTwo:
    """One of two ranks: what the other has to add is known."""

    def __init__(self, other_best: float) -> None:
        self.other = torch.tensor([other_best, 1.0])

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        return sums + self.other


def test_the_losses_of_two_ranks_add_up_to_that_of_the_whole_batch() -> None:
    """The second image has the student's and the teacher's places changed: its best scores are 0.5 + 0.5."""
    weights, image = torch.tensor([0.7, 0.2]), torch.zeros(1, 3, 8, 8)
    first, second = (dict.fromkeys(HEADS, outputs) for outputs in (STUDENT, TEACHER))
    parts = []
    for given, wanted, other_best in ((first, TEACHER, 1.0), (second, STUDENT, BEST)):
        ranks: Any = OfTwo(other_best)
        parts.append(Teacher(Fixed(wanted), 1.0, ranks).loss(image, given, weights))
    sums = [divergences(TEACHER, STUDENT)[0], divergences(STUDENT, TEACHER)[0]]
    assert sum(parts).item() == pytest.approx(0.9 * 2 * sum(sums).item() / (BEST + 1.0), rel=1e-5)


class InVain:
    """Ranks of which the others do not answer."""

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the other ranks do not take part")


def test_a_fault_is_explained_without_the_other_ranks() -> None:
    others: Any = InVain()
    given: Any = dict.fromkeys(HEADS, STUDENT)
    criterion: Any = SimpleNamespace(o2m=0.7, o2o=0.2)
    teacher = Teacher(Fixed(TEACHER), 0.5, others).alone()
    loss = teacher.beside(torch.zeros(1, 3, 8, 8), given, criterion)
    assert loss.item() == pytest.approx(0.5 * 0.9 * (OF_CLASSES + BEST * OF_SIDES) / BEST, rel=1e-5)


# --- a training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(fp16: RunRoot, runs_dir: Path) -> RunRoot:
    config, run = beside(fp16, runs_dir, "whole")
    train(config, run, force=False)
    return run


def test_a_resumed_training_is_bit_equal_and_has_no_teacher_in_its_checkpoint(
    fp16: RunRoot, trained: RunRoot, runs_dir: Path
) -> None:
    config, run = beside(fp16, runs_dir, "resumed", {**WITH, **AT_EVERY_STEP})
    train_recorded(config, run, Recorder(crash_before=(2, 4)))
    states = [load_checkpoint(it.variant_dir(LABEL) / "weights" / "last.pt") for it in (trained, run)]
    for state in states:
        state.pop("config")
        state["rows"] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in state["rows"]]
    assert differences(*states) == []
    assert states[0]["model"].keys() == load_scored(trained.best(LABEL))[0].state_dict().keys()


def test_the_teacher_changes_what_is_learned_and_the_terms_stay_those_of_the_detection(
    fp16: RunRoot, trained: RunRoot, runs_dir: Path
) -> None:
    config, run = beside(fp16, runs_dir, "plain", SETTINGS)
    train(config, run, force=False)
    plain, distilled = (load_checkpoint(path) for path in (run.best("qat-w4a16"), trained.best(LABEL)))
    assert any(not torch.equal(distilled["scored"][key], value) for key, value in plain["scored"].items())
    heads = [(it.variant_dir(label) / "results.csv").read_text().splitlines()[0] for it, label in (
        (run, "qat-w4a16"), (trained, LABEL)
    )]  # fmt: skip
    assert heads[0] == heads[1]


def test_the_teacher_is_scored_fp16_in_eval_mode_without_gradient(fp16: RunRoot, trained: RunRoot) -> None:
    config, _ = settle(trained.runs_dir, trained.name, "qat", WITH)
    teacher = read_teacher(config, trained.root, torch.device("cpu"), ALONE)
    assert teacher is not None
    wanted, _, _ = load_scored(fp16.best("fp16"))
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in before.items())
    assert not any(layer.training for layer in teacher.model.modules() if not list(layer.children()))
    images = torch.rand(2, 3, 64, 64)
    student = {head: {n: p.clone().requires_grad_() for n, p in out.items() if n != "feats"}
               for head, out in teacher.model(images).items()}  # fmt: skip
    assert teacher.loss(images, student, torch.tensor([0.8, 0.2])).item() == 0.0
    outputs = wanted(images)[1]
    assert all(torch.equal(student[head]["scores"], outputs[head]["scores"]) for head in HEADS)
    assert not any(weight.requires_grad or weight.grad is not None for weight in teacher.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())


def test_its_hash_is_in_the_run_and_the_row_has_a_name_of_its_own(fp16: RunRoot, trained: RunRoot) -> None:
    digest = sha256(fp16.best("fp16"))
    said = f"from best.pt, sha256 {digest[:12]}"
    folder = trained.variant_dir(LABEL)
    assert read_json(folder / "teacher.json", "train") == {"file": "best.pt", "sha256": digest}
    done = read_json(folder / "done.json", "train")
    assert done["distilled"] == said
    stages = json.loads((trained.root / "run.json").read_text())["stages"]
    assert said in json.dumps(stages)
    training = Training(LABEL, {}, [], {"code_version": "1"}, done)
    assert doubts_of_trainings([training]) == [
        f"{LABEL} was distilled {said}: another recipe than that of the other trainings."
    ]


def test_another_teacher_than_at_the_start_is_refused(fp16: RunRoot, trained: RunRoot, runs_dir: Path) -> None:
    other = RunRoot(runs_dir, "other-teacher")
    shutil.copytree(trained.root, other.root)
    config, _ = settle(runs_dir, other.name, "qat", WITH)
    assert is_finished(config, other)
    with open(other.best("fp16"), "ab") as file:
        file.write(b"0")
    with pytest.raises(
        UserError, match=r"distilled was distilled from another checkpoint than .*fp16/weights/best\.pt"
    ):
        is_finished(config, other)


def test_a_teacher_that_is_missing_unfinished_or_of_another_recipe_is_refused(fp16: RunRoot, runs_dir: Path) -> None:
    config, run = settle(runs_dir, "none", "qat", WITH)
    with pytest.raises(
        UserError, match=r"best\.pt is not there, or its training has not finished: run 'make train-fp16'"
    ):
        make_ready(config, run, force=False)
    config, run = beside(fp16, runs_dir, "unfinished")
    run.done("fp16").unlink()
    with pytest.raises(UserError, match="its training has not finished"):
        make_ready(config, run, force=False)
    seeded, _ = settle(runs_dir, "seeded", "qat", {**WITH, "train.seed": 5})
    with pytest.raises(UserError, match=r"trained with another recipe \(train\.seed: 0 -> 5\)"):
        read_teacher(seeded, fp16.root, torch.device("cpu"), ALONE)
    qat, _ = settle(
        runs_dir, "seeded", "qat", {**WITH, "quant.teacher": runs_dir / "whole" / LABEL / "weights" / "best.pt"}
    )
    with pytest.raises(UserError, match="is of qat-w4a16-distilled, not of an FP16 training"):
        read_teacher(qat, fp16.root, torch.device("cpu"), ALONE)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_teacher_of_other_images_is_refused(fp16: RunRoot, runs_dir: Path, split: str) -> None:
    config, run = beside(fp16, runs_dir, f"images-{split}")
    done = read_json(run.done("fp16"), "train")
    done["images"][split]["images_sha256"] = "0" * 64
    write_json(run.done("fp16"), done)
    with pytest.raises(UserError, match=rf"quant\.distill: .*best\.pt was trained with other {split} images or annot"):
        train(config, run, force=False)


@pytest.mark.parametrize(
    ("names", "fault"), [(NAMES[::-1], "class 0 is person, not toothbrush"), (NAMES[:3], "80 classes, not 3")]
)
def test_a_teacher_of_other_classes_is_refused(
    fp16: RunRoot, runs_dir: Path, names: tuple[str, ...], fault: str
) -> None:
    """Of a version that did not record of which images."""
    config, run = beside(fp16, runs_dir, f"classes-{len(names)}")
    done = read_json(run.done("fp16"), "train")
    del done["images"]
    write_json(run.done("fp16"), done)
    write_json(run.provenance, read_json(run.provenance, "data") | {"names": list(names)})
    with pytest.raises(UserError, match=rf"the teacher .*best\.pt has other classes than this run \({fault}\)"):
        read_teacher(config, run.root, torch.device("cpu"), ALONE)


# --- configuration, graph and bench ----------------------------------------------------------------------------------


def test_off_has_the_hash_from_before_and_on_is_hashed() -> None:
    """The hash of the default configuration in the last commit without this key."""
    assert config_hash(load("qat")) == "a5e57e108b15bb20"
    hashes = {config_hash(load("qat", sets=[f"quant.distill={weight}"])) for weight in (0, 0.5, 1)}
    assert len(hashes) == 3
    assert load("fp16", sets=["quant.distill=1"]) == load("fp16")
    with pytest.raises(UserError, match="teacher takes a distill above 0"):
        load("qat", sets=["quant.teacher=best.pt"])
    quant = load("qat", sets=["quant.distill=1"]).quant
    assert quant is not None
    assert quant.without_options() == load("qat", sets=["quant.fast_path=false"]).quant


def test_what_the_graph_captures_adds_the_same_loss() -> None:
    """Passes.run is what a CUDA graph holds; here its parts are told from each other."""
    seen: list[Any] = []

    class Spy:
        def loss(self, images: torch.Tensor, preds: Any, head_weights: torch.Tensor) -> torch.Tensor:
            seen.append((images, sorted(preds), head_weights))
            return sum(part["scores"].square().sum() for part in preds.values()) * 0.5

    net = torch.nn.Conv2d(3, 4, 1, bias=False)
    passes: Any = object.__new__(Passes)
    passes.net = lambda images: {head: {"scores": net(images)} for head in HEADS}
    passes.amp, passes.half, passes.others, passes.teacher = False, {}, [net.weight], Spy()
    passes.images, passes.inputs = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.empty(1, 3, 2, 2)
    passes.rows, passes.head_weights, passes.scale = None, torch.tensor([0.8, 0.2]), torch.tensor([3.0])
    passes.loss = lambda preds, rows, weights: (preds["one2one"]["scores"].sum(), torch.zeros(3))
    _, [gradient] = passes.run()
    outputs = net.weight.detach().sum(1)  # of each of the four pixels, all ones
    expected = 3 * (4 * torch.ones(4) + 2 * 4 * outputs.flatten())
    torch.testing.assert_close(gradient, expected.view(4, 1, 1, 1).expand(4, 3, 1, 1), rtol=1e-5, atol=1e-5)
    assert [(images.max().item(), names, weights.tolist()) for images, names, weights in seen] == [
        (1.0, ["one2many", "one2one"], pytest.approx([0.8, 0.2]))
    ]


def test_the_arm_learns_from_fp16_of_its_own_seed(tmp_path: Path) -> None:
    arm = "w4a16, distilled"
    training = training_of(RunRoot(tmp_path, "stability"), arm, 3, [], [])
    teacher = tmp_path / "stability-fp16-3" / "fp16" / "weights" / "best.pt"
    quant = training.config.quant
    assert quant is not None
    assert (quant.distill, quant.teacher) == (1.0, str(teacher))
    assert training.root.name == "stability-w4a16_distilled-3"
    assert not training.can_start
    teacher.parents[1].mkdir(parents=True)
    (teacher.parents[1] / "done.json").write_text("{}")
    assert training.can_start
    assert "w4a16-full" in ARMS
    with pytest.raises(UserError, match="it is distilled from the weights of fp16, name that arm too"):
        check_arms([arm])
