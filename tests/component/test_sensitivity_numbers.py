"""What the sensitivity stage computes: kept activations against the whole network, statistics, sums; by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from brevitas.nn import QuantConv2d
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules.conv import Conv

from app.coco.images import place
from app.core.config import UserError, load
from app.core.scheme import BITS
from app.quant.batchnorm import batchnorm_layers, reestimate_batchnorm
from app.quant.model import float_network
from app.quant.schemes import QUANTIZERS, quantize
from app.quant.sizes import layers_of
from app.report.spread import chance_of, telling_t
from app.sensitivity.additive import correlations, rank_correlation, sums_of
from app.sensitivity.batchnorm import corrections
from app.sensitivity.budget import BITS as MEAN_BITS
from app.sensitivity.budget import BYTES, amount_of, propose, read_budget, scheme_of, shortened
from app.sensitivity.changes import LAYER, RANDOM, SCHEME, Change, groups_of, learned_layers, scheme_change, uniform
from app.sensitivity.folded import Folded, fold
from app.sensitivity.held_out import duel
from app.sensitivity.images import Batch, choose, class_numbers, label_rows
from app.sensitivity.measure import Probe, summary
from app.sensitivity.network import Graph, Statistics, fake_quantized
from app.sensitivity.outputs import Reference, loss_of
from app.train.processes import ALONE
from app.train.step import criterion_of_part
from tests.support.export_run import EVERY_BLOCK, IMGSZ, SETS, enliven, network
from tests.support.scheme_files import scheme_of as rules_of

N_IMAGES = 2
ROUNDING = 1e-3  # logits of up to 20 of a network that magnifies rounding a hundredfold


@pytest.fixture(scope="module", autouse=True)
def every_block() -> Iterator[None]:
    with network(EVERY_BLOCK):
        yield


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(N_IMAGES, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(images: torch.Tensor) -> Any:
    """One of every block of YOLOv10, in float, with statistics of its images."""
    config = load("fp16", [], SETS)
    model = float_network(config)
    enliven(model, images)
    model.args = get_cfg(overrides=config.hyp.model_dump())
    return model.eval()


@pytest.fixture(scope="module")
def labels() -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])
    return {"batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.tensor([[3.0], [7.0]]), "bboxes": boxes}


def quantized(model: Any, bits: dict[str, int]) -> Any:
    """A copy with plain Brevitas layers at these bits, the others in float."""
    copy = deepcopy(model)
    quant = load("qat").quant
    assert quant is not None
    is_whole = len(bits) == len(learned_layers(model))
    scheme = rules_of(("*", next(iter(bits.values())))) if is_whole else rules_of(*bits.items(), ("*", "float"))
    quantize(copy, quant.without_options().model_copy(update={"scheme": scheme}))
    return copy.eval()


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_what_brevitas_makes_of_it(bits: int) -> None:
    conv = torch.nn.Conv2d(5, 7, 3)
    layer = QuantConv2d(5, 7, 3, weight_quant=QUANTIZERS[bits])
    layer.weight.data.copy_(conv.weight.data)
    assert torch.equal(fake_quantized(conv, bits), layer.quant_weight().value)  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def test_kept_activations_give_what_the_whole_network_gives(
    model: Any, images: torch.Tensor, labels: dict[str, torch.Tensor]
) -> None:
    """Bit for bit, outputs and loss, for every layer; afterwards the network is as before."""
    graph = Graph(model)
    criterion: Any = criterion_of_part(model, ALONE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = graph.run(images)
    layers = learned_layers(model)
    assert graph.blocks.keys() == layers.keys()
    for layer in layers:
        with graph.changed({layer: 4}):
            heads = graph.rerun(kept, graph.behind([layer]))
        whole = quantized(model, {layer: 4})(images)[1]["one2one"]
        assert torch.equal(heads["boxes"], whole["boxes"]) and torch.equal(heads["scores"], whole["scores"]), layer
        assert loss_of(criterion, heads, labels) == float(sum(criterion.one2one.loss(whole, labels)[1].values()))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(graph.heads(graph.run(images))["scores"], graph.heads(kept)["scores"])


@torch.no_grad()
def test_folded_batchnorm_gives_what_the_whole_network_gives(
    model: Any, images: torch.Tensor, labels: dict[str, torch.Tensor]
) -> None:
    """But for rounding, for every layer and a whole scheme, with other statistics of the norms too."""
    graph, generator = Graph(model), torch.Generator().manual_seed(1)
    folded, criterion = Folded(graph), criterion_of_part(model, ALONE)
    moved = {}
    for name, norm in graph.norms_in(graph.nodes).items():
        factor = 0.8 + 0.4 * torch.rand(len(norm.running_mean), generator=generator)  # pyright: ignore
        moved[name] = Statistics(norm.running_mean + 0.1 * factor, norm.running_var * factor)  # pyright: ignore
    layers = learned_layers(model)
    kept = folded.run(images)
    some = [({layer: 3}, {f"{layer.rpartition('.')[0]}.bn"} & moved.keys()) for layer in layers]
    for bits, norms in (({}, set()), *some, (dict.fromkeys(layers, 3), moved.keys())):
        corrected = {name: moved[name] for name in norms}
        heads = folded.changed(kept, bits, corrected)
        whole = with_statistics(quantized(model, bits) if bits else deepcopy(model), corrected)(images)[1]["one2one"]
        torch.testing.assert_close(heads["boxes"], whole["boxes"], rtol=1e-4, atol=ROUNDING)
        torch.testing.assert_close(heads["scores"], whole["scores"], rtol=1e-4, atol=ROUNDING)
        expected = float(sum(criterion.one2one.loss(whole, labels)[1].values()))
        assert loss_of(criterion, heads, labels) == pytest.approx(expected, rel=1e-4)


def with_statistics(model: Any, corrected: dict[str, Statistics]) -> Any:
    norms = batchnorm_layers(model)
    for name, statistics in corrected.items():
        norms[name].running_mean, norms[name].running_var = statistics.copies()
    return model


def test_a_block_with_another_activation_is_refused() -> None:
    relu: Any = torch.nn.ReLU()
    block = Conv(3, 4, act=relu).eval()
    with pytest.raises(KeyError, match="ReLU"):
        fold(block, block.conv.weight, None)


@torch.no_grad()
def test_only_what_reads_a_changed_layer_runs_again(model: Any, images: torch.Tensor) -> None:
    graph = Graph(model)

    def behind(layer: str) -> set[str]:
        """Blocks and other modules that run again."""
        return {str(node.target) for node in graph.behind([layer]) if node.op == "call_module"}

    branch = "model.11.one2one_cv3.1"
    assert behind(f"{branch}.0.1.conv") == {f"{branch}.0.1", f"{branch}.1.0", f"{branch}.1.1", f"{branch}.2"}
    # Of model.3 the second convolution of its bottleneck and the last one, not what they read.
    inside = {name for name in behind("model.3.m.0.cv2.conv") if name.startswith("model.3.")}
    assert inside == {"model.3.m.0.cv2", "model.3.cv2"}
    # model.5 and what follows it, without the branches of model.3, the head's first level
    again = {".".join(name.split(".")[: 4 if "one2one" in name else 2]) for name in behind("model.5.conv")}
    assert again == {*(f"model.{n}" for n in (5, 6, 7, 8, 10)), *(
        f"model.11.one2one_cv{branch}.{level}" for branch in (2, 3) for level in (1, 2)
    )}  # fmt: skip
    decoded = graph.decoded(graph.heads(graph.run(images)))
    boxes, probabilities = decoded[:, :4], decoded[:, 4:]
    assert boxes.shape == (N_IMAGES, 4, 12**2 + 6**2 + 3**2)
    assert probabilities.min() > 0 and probabilities.max() < 1


@torch.no_grad()
def test_statistics_of_a_scheme_move_as_re_estimation_moves_them(model: Any, images: torch.Tensor) -> None:
    """Two batches; the product's own re-estimation of both networks is the oracle."""
    batches = [images, images.flip(3) * 0.7]
    graph = Graph(model)
    everything = scheme_change(model, uniform(3))
    found = corrections(graph, [everything], batches)["all"]
    copies = deepcopy(model), quantized(model, everything.bits)
    for copy in copies:
        reestimate_batchnorm(copy, batches)
    plain, changed = map(batchnorm_layers, copies)
    old = batchnorm_layers(model)
    assert found.keys() == {name for name in old if not name.startswith(("model.11.cv2", "model.11.cv3"))}
    for name, statistics in found.items():
        mean = old[name].running_mean + (changed[name].running_mean - plain[name].running_mean)  # pyright: ignore
        var = old[name].running_var * changed[name].running_var / plain[name].running_var  # pyright: ignore
        torch.testing.assert_close(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.var, var, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_of_a_single_layer_its_own_statistics_move(model: Any, images: torch.Tensor) -> None:
    graph, layer = Graph(model), "model.0.conv"
    last = "model.11.one2one_cv2.0.2"
    changes = [Change(LAYER, "first", {layer: 2}), Change(LAYER, "last", {last: 2})]
    found = corrections(graph, changes, [images])
    assert found.keys() == {"first"} and found["first"].keys() == {"model.0.bn"}  # no norm reads the head's last one
    conv, norm = graph.convs[layer], batchnorm_layers(model)["model.0.bn"]
    maps, changed = conv(images), quantized(model, {layer: 2}).model[0].conv(images)
    statistics = found["first"]["model.0.bn"]
    shift = changed.mean((0, 2, 3)) - maps.mean((0, 2, 3))
    torch.testing.assert_close(statistics.mean, norm.running_mean + shift)
    torch.testing.assert_close(statistics.var, norm.running_var * changed.var((0, 2, 3)) / maps.var((0, 2, 3)))
    assert not model.training and not norm.training and norm.momentum != 1.0


def test_the_shift_is_the_divergence_of_the_outputs() -> None:
    """One image, one anchor, two classes, two bins: p = 1/2 and 1/4 against 1/2 and 1/2; one side 3/4, 1/4 against
    halves. The best p is 1/2."""

    def heads(second_class: float, side: tuple[float, float]) -> dict[str, torch.Tensor]:
        scores = torch.tensor([0.0, second_class]).view(1, 2, 1)
        return {"scores": scores, "boxes": torch.tensor([*side, *[0.0] * 6]).view(1, 8, 1)}

    plain = heads(math.log(1 / 3), (math.log(3), 0.0))
    classes = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    side = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert Reference(plain).shift(heads(0.0, (0.0, 0.0))) == pytest.approx(classes + 0.5 * side, rel=1e-6)
    assert Reference(plain).shift(plain) == 0.0


def batch(n: int, loss: float, **changes: list[float]) -> dict[str, Any]:
    return {"n": n, "loss": loss, "changes": changes}


def test_a_summary_weighs_batches_by_their_images() -> None:
    batches = [batch(3, 1.0, a=[1.5, 0.2]), batch(1, 2.0, a=[2.1, 0.6]), batch(4, 9.0, b=[9.0, 0.0])]
    found = summary(batches, "a")
    assert found.loss == pytest.approx((3 * 0.5 + 0.1) / 4) and found.shift == pytest.approx((3 * 0.2 + 0.6) / 4)
    assert found.loss_se == pytest.approx(math.sqrt(0.75 * 0.1**2 + 0.25 * 0.3**2)) and found.n_images == 4
    equal = summary([batch(2, 1.0, a=[1.5, 0.2]), batch(2, 2.0, a=[2.1, 0.6])], "a")
    assert equal.loss_se == pytest.approx(0.2)  # 0.5 and 0.1: deviation 0.4 / sqrt 2, over sqrt 2
    assert summary(batches[:1], "a").loss_se is None


def test_rank_correlations_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 2, 3], [9, 8, 7]) == pytest.approx(-1)
    # ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_sums_of_single_layers_beside_whole_schemes() -> None:
    """Alone a costs 0.1 at 4 and 0.4 at 2 bits, b 0.2 and 0.3; the schemes cost another order in loss."""
    singles = {"a@4": [1.1, 1.0], "a@2": [1.4, 2.0], "b@4": [1.2, 3.0], "b@2": [1.3, 5.0]}
    schemes = [
        Change(SCHEME, "44", {"a": 4, "b": 4}), Change(RANDOM, "24", {"a": 2, "b": 4}),
        Change(RANDOM, "42", {"a": 4, "b": 2}), Change(RANDOM, "22", {"a": 2, "b": 2}),
    ]  # fmt: skip
    whole = {"44": [1.05, 4.0], "24": [1.5, 5.5], "42": [1.6, 6.5], "22": [1.7, 9.0], "77": [1.0, 0.0]}
    batches = [{"n": 1, "loss": 1.0, "changes": {**singles, **whole}}]
    sums = sums_of(batches, [*schemes, Change(SCHEME, "77", {"a": 7, "b": 7})])
    assert [scheme.name for scheme in sums] == ["44", "24", "42", "22"]  # 7 bits were not measured alone
    assert [scheme.loss_sum for scheme in sums] == pytest.approx([0.3, 0.6, 0.4, 0.7])
    assert [scheme.shift_sum for scheme in sums] == [4, 5, 6, 7]
    found = correlations(sums)
    assert found["loss"] == pytest.approx(0.8) and found["shift"] == found["shift to loss"] == pytest.approx(1)
    assert found["loss, random"] == pytest.approx(0.5)  # ranks 1, 0, 2 against 0, 1, 2


def test_a_duel_is_decided_by_students_t() -> None:
    """Of 4.3 errors with three batches."""
    batches = [
        batch(1, 0.0, a=[1.0, 0], b=[1.5, 0], c=[1.2, 0]), batch(1, 0.0, a=[2.0, 0], b=[2.3, 0], c=[2.0, 0]),
        batch(1, 0.0, a=[3.0, 0], b=[3.4, 0], c=[3.1, 0]),
    ]  # fmt: skip
    won = duel(batches, "a", "b")
    assert won.loss == pytest.approx(-0.4) and won.error == pytest.approx(0.1 / math.sqrt(3)) and won.verdict == "wins"
    assert duel(batches, "b", "a").verdict == "loses"
    assert duel(batches, "a", "c").verdict == "not told apart"  # 0.1 and an error of 0.058
    assert duel(batches, "a", "a").verdict == "not told apart"
    assert duel(batches[:2], "a", "b").verdict == duel(batches[:1], "a", "b").verdict == "not told apart"


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.303), (3, 3.182), (15, 2.131), (120, 1.980)])
def test_the_chance_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert chance_of(-quantile, 1.0, freedom) == pytest.approx(0.05, abs=1e-4)
    assert telling_t(freedom) == pytest.approx(quantile, abs=1e-3)
    assert chance_of(0.0, 0.0, freedom) == pytest.approx(1.0) and chance_of(0.1, 0.0, freedom) == 0.0


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8), (8, 8, 8, 8), (8, 8, 8, 1), (8,) * 16])
def test_equal_schemes_are_seldom_told_apart(sizes: tuple[int, ...]) -> None:
    rng, n = np.random.default_rng(0), 1000
    decided = 0
    for _ in range(n):
        batches = [batch(size, 0.0, a=[rng.normal() / math.sqrt(size), 0], b=[0.0, 0]) for size in sizes]
        decided += duel(batches, "a", "b").verdict != "not told apart"
    assert decided <= 0.07 * n  # 5 % and three standard errors of that share


def test_the_search_sees_other_images_than_the_score() -> None:
    chosen = choose(100, 30, seed=1)
    assert len(chosen.search) == len(chosen.held_out) == 30 and not {*chosen.search} & {*chosen.held_out}
    assert choose(100, 30, seed=1) == chosen != choose(100, 30, seed=2)
    few = choose(9, 30, seed=1)
    assert len(few.search) == len(few.held_out) == 4
    with pytest.raises(UserError, match="3 val image"):
        choose(3, 30, seed=1)


def test_labels_follow_the_letterbox() -> None:
    """A 200 x 100 image in 64 px: 64 x 32 in the middle, so y starts at 16."""
    labels = np.array([[5, 0.25, 0.5, 0.5, 1.0]], np.float32)
    rows = label_rows(3, labels, place(200, 100, 64), 64)
    assert rows.tolist() == [[3, 5, 0.25, 0.5, 0.5, 0.5]]


def test_labels_take_the_numbers_of_the_network() -> None:
    """Imported weights may list the classes in another order, and others beside them."""
    assert class_numbers(["nut", "bolt"], ["bolt", "screw", "nut"]).tolist() == [2, 0]
    with pytest.raises(UserError, match="know no class 'washer'"):
        class_numbers(["nut", "washer"], ["nut"])


def test_groups_are_the_parts_of_the_detector(model: Any) -> None:
    layers = learned_layers(model)
    assert not [name for name in layers if "dfl" in name or name.startswith(("model.11.cv2", "model.11.cv3"))]
    groups = groups_of(model, layers)
    assert groups["first"] == ["model.0.conv"]
    assert set(groups["attention (PSA)"]) == {name for name in layers if name.startswith("model.7.")}
    assert "model.2.cv2.conv" in groups["depthwise"] and "model.11.one2one_cv3.0.0.0.conv" in groups["depthwise"]
    assert len(groups["last of the head"]) == 6
    assert len(groups["box branch P3"]) == 3 and len(groups["class branch P4"]) == 5


def test_a_proposal_named_after_a_long_scheme_has_a_label() -> None:
    names = [f"{'a' * 38}{end}" for end in "xy"]
    labels = [f"fit-as-{shortened(name)}-bits" for name in names]
    assert len(set(labels)) == 2 and shortened("w4a16-mixed-dw") == "w4a16-mixed-dw"
    for label in labels:
        assert scheme_of(label, {"model.0.conv": 4}, lambda layer: "test").name == label


def test_budgets_are_read_and_kept(model: Any) -> None:
    layers = learned_layers(model)
    w4, w8 = (layers_of(model, uniform(bits)) for bits in (4, 8))
    least, most = amount_of(BYTES, w4), amount_of(BYTES, w8)
    n_weights = sum(conv.weight.numel() for conv in layers.values())
    n_odd = sum(conv.weight.numel() % 2 for conv in layers.values())
    assert most - least == (n_weights - n_odd) // 2  # half a byte a weight
    assert amount_of(MEAN_BITS, w4) == 4 and read_budget(MEAN_BITS, "same-as:w8a16", model).amount == 8
    assert read_budget(BYTES, "3.0MB", model).amount == 3e6 and read_budget(BYTES, "2000KiB", model).amount == 2048000
    for kind, text in ((BYTES, "much"), (MEAN_BITS, "3MB"), (BYTES, "-3"), (BYTES, "same-as:nothing")):
        with pytest.raises(UserError):
            read_budget(kind, text, model)
    for kind, text in ((BYTES, f"{(least + most) / 2:.0f}"), (MEAN_BITS, "4.3"), (MEAN_BITS, "2.5")):
        budget = read_budget(kind, text, model)
        bits = propose(model, budget, lambda layer, bits: len(layer) * 4.0**-bits)
        scheme = scheme_of("fit", bits, lambda layer: "test")
        assert scheme_change(model, scheme).bits == bits
        assert 0.9 * budget.amount < amount_of(kind, layers_of(model, scheme)) <= budget.amount
        rules = {layer.name: layer.rule.bits for layer in layers_of(model, scheme)}
        assert all(rules[name.replace("one2one_", "")] == bits[name] for name in bits if "one2one_" in name)
    with pytest.raises(UserError, match="schemes of this network take"):
        read_budget(BYTES, "100B", model)


def test_a_probe_measures_changes(model: Any, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
    graph, criterion = Graph(model), criterion_of_part(model, ALONE)
    change = Change(LAYER, "x", {"model.5.conv": 2})
    seen: list[str] = []
    probe = Probe(graph, criterion, {})
    changes = [change, Change(SCHEME, "none", {})]
    found = probe.measure(Batch(images, labels, []), changes, lambda change, heads: seen.append(change.name))
    assert seen == ["x", "none"] and found["n"] == N_IMAGES
    assert found["changes"]["none"] == [found["loss"], 0.0]
    assert found["changes"]["x"][1] > 0


def test_threads_measure_the_same_and_leave_when_one_fails(
    model: Any, images: torch.Tensor, labels: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, batch = Probe(Graph(model), criterion_of_part(model, ALONE), {}), Batch(images, labels, [])
    changes = [Change(LAYER, f"{layer}@2", {layer: 2}) for layer in learned_layers(model)]
    n_threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            seen: list[str] = []
            found.append(probe.measure(batch, changes, lambda change, heads: seen.append(change.name)))  # noqa: B023
            assert seen == list(found[-1]["changes"]) == [change.name for change in changes]
            assert torch.get_num_threads() == n
        begun, run = [], Folded.changed

        def noted(self: Folded, *args: Any) -> Any:
            begun.append(1)
            return run(self, *args)

        def fail(change: Change, heads: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Folded, "changed", noted)
        with pytest.raises(KeyboardInterrupt):
            probe.measure(batch, changes * 20, fail)
        assert len(begun) < len(changes) * 10
    finally:
        torch.set_num_threads(n_threads)
    alone, together = (np.array(list(each["changes"].values())) for each in found)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
