"""A scheme within a budget, and whether it is better than the built-in ones at their own size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from app.core.config import UserError
from app.core.files import write_json, write_text
from app.core.scheme import Scheme, keep_scheme
from app.quant.sizes import layers_of
from app.sensitivity import page
from app.sensitivity.budget import (
    BITS,
    BYTES,
    Budget,
    amount_of,
    budget_of,
    propose,
    read_budget,
    scheme_named,
    scheme_of,
)
from app.sensitivity.changes import MAIN_BITS, MEASURED_BITS, SCHEME, Change, scheme_change, single
from app.sensitivity.held_out import HeldOut, duel, score_held_out
from app.sensitivity.measure import summary
from app.sensitivity.subject import Subject

FLOAT = "fp32"  # the network before any layer is quantized
OTHER_BITS = next(bits for bits in MEASURED_BITS if bits != MAIN_BITS)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The user's budget, and by name the schemes of sensitivity.against with what each takes."""

    budget: Budget
    given: dict[str, Scheme]
    sizes: dict[str, Budget]


@dataclass(frozen=True)
class Search:
    """Schemes by name: those that were found, the user's first, and those given.

    `same_size` names for each given one that which was found for what it takes; itself, where the search finds it too.
    """

    found: dict[str, Scheme]
    given: dict[str, Scheme]
    same_size: dict[str, str]


def read_wanted(subject: Subject, option: tuple[str, str]) -> Wanted:
    """What a proposal takes beside the measurement, which lasts minutes to hours: so this is read first.

    Raises:
        UserError: the budget cannot be read, is too small, or names no scheme; or a scheme of sensitivity.against is
            none, cannot be measured, or has the name of another.
    """
    kind, text = option
    budget = read_budget(kind, text, subject.model)
    schemes = [scheme_named(value) for value in dict.fromkeys(subject.config.sensitivity.against)]
    for scheme in schemes:
        scheme_change(subject.model, scheme)
    sizes = {scheme.name: budget_of(kind, scheme, subject.model) for scheme in schemes}
    names = [FLOAT, *(scheme.name for scheme in schemes), budget.scheme, *(size.scheme for size in sizes.values())]
    for scheme in schemes:
        if names.count(scheme.name) > 1:
            raise UserError(f"sensitivity.against: another row of the proposal is named {scheme} too: rename the file")
    return Wanted(budget, {scheme.name: scheme for scheme in schemes}, sizes)


def propose_scheme(subject: Subject, result: dict[str, Any], wanted: Wanted) -> None:
    """Writes sensitivity/scheme/fit-<budget>.yaml, and fit-<budget>.json and .md, which score it on images that the
    search has not seen."""
    budget = wanted.budget
    searched = search(subject, result, wanted)
    folder = subject.run.root / "sensitivity"
    for scheme in searched.found.values():
        keep_scheme(scheme, folder)
    name = next(iter(searched.found))
    file = folder / "scheme" / f"{name}.yaml"
    log.info("sensitivity: %s for %s", file, budget)
    schemes = {**searched.found, **searched.given}
    changes = [Change(SCHEME, FLOAT, {}), *(scheme_change(subject.model, scheme) for scheme in schemes.values())]
    places = subject.chosen.held_out
    scored = score_held_out(subject.probe(changes), changes, subject.images, places, subject.config)
    facts = facts_of(subject, searched, scored)
    facts |= {
        "budget": asdict(budget),
        "scheme": name,
        "file": str(file),
        "measure": subject.config.sensitivity.measure,
    }
    write_json(folder / f"{name}.json", facts)
    text = page.proposal(facts)
    write_text(folder / f"{name}.md", text)
    for line in text.splitlines():
        log.info("%s", line)


def search(subject: Subject, result: dict[str, Any], wanted: Wanted) -> Search:
    """The scheme within the budget, and for each scheme of sensitivity.against the one within what that takes."""
    cost = cost_of(result, subject.config.sensitivity.measure)
    given, budgets = wanted.given, {None: wanted.budget, **wanted.sizes}
    measure = subject.config.sensitivity.measure

    def why(layer: str) -> str:
        return f"{measure} {cost(layer, MAIN_BITS):.2g} at {MAIN_BITS} bits alone"

    names: dict[str, str] = {}  # of the schemes, by their bits
    found, same_size = {}, {}
    for reference, own in budgets.items():
        bits = propose(subject.model, own, cost)
        if reference and bits == scheme_change(subject.model, given[reference]).bits:
            same_size[reference] = reference
            continue
        name = names.setdefault(str(bits), own.scheme)
        if name not in found:
            found[name] = scheme_of(name, bits, why)
        if reference:
            same_size[reference] = name
    return Search(found, given, same_size)


def cost_of(result: dict[str, Any], measure: str) -> Callable[[str, int], float]:
    """What a layer costs at a number of bits, in the measure that a search adds up.

    Fewer images have measured other bits than 4. Their shifts are scaled by what all images say of 4 bits over what
    those few say; losses, which may be negative, are taken as they are.
    """
    layers = {layer["name"]: layer["bits"] for layer in result["layers"]}
    scales = {}
    for name, by_bits in layers.items():
        same = [batch for batch in result["batches"] if single(name, OTHER_BITS) in batch["changes"]]
        few, every = summary(same, single(name, MAIN_BITS)).shift, by_bits[str(MAIN_BITS)]["shift"]
        scales[name] = every / few if few > 0 else 1.0

    def cost(layer: str, bits: int) -> float:
        number = layers[layer][str(bits)][measure]
        return number * scales[layer] if measure == "shift" and bits != MAIN_BITS else number

    return cost


def facts_of(subject: Subject, searched: Search, scored: HeldOut) -> dict[str, Any]:
    """Rows of the schemes, and how the found ones did against the given ones of the same size."""
    schemes = {**searched.found, **searched.given}
    rows: list[dict[str, Any]] = [{"name": FLOAT, "ap": scored.ap[FLOAT]}]
    for name, scheme in schemes.items():
        layers = layers_of(subject.model, scheme)
        sizes = {"bytes": amount_of(BYTES, layers), "bits": amount_of(BITS, layers)}
        rows.append({"name": name, **sizes, **asdict(summary(scored.batches, name)), "ap": scored.ap[name]})
    duels = []
    for given, found in searched.same_size.items():
        fought = duel(scored.batches, found, given)
        verdict = "the same bits" if found == given else fought.verdict
        duels.append({"found": found, "against": given, **asdict(fought), "verdict": verdict})
    return {"rows": rows, "duels": duels, "n_images": scored.n_images, "n_batches": len(scored.batches)}
