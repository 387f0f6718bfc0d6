"""Budgets, and the scheme that a search finds within one."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.core.config import UserError
from app.core.scheme import FLOAT, MAX_NAME, Rule, Scheme, find_scheme
from app.quant.sizes import Layer, layers_of
from app.sensitivity.changes import BY_CHANNEL, MEASURED_BITS, learned_layers, uniform
from app.sensitivity.search import SLACK, Option, cheapest

SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?(B|kB|MB|KiB|MiB)?")  # it becomes part of a scheme's name
UNITS = {None: 1, "B": 1, "kB": 1e3, "MB": 1e6, "KiB": 2**10, "MiB": 2**20}
SAME_AS = "same-as:"
BYTES, BITS = "--budget", "--budget-bits"  # the option of each kind
LONGEST, HASH_DIGITS = MAX_NAME - len("fit-as--bits"), 6
HEAD_PARTS = ("one2one_cv2", "one2one_cv3")  # the one2many head, which the training alone has, is named without one2one


@dataclass(frozen=True)
class Budget:
    """What the weights may take: `kind` BYTES, of codes and scales in the INT4 file; or BITS, the mean of a weight.

    `label` names it in `scheme`, the name of what is found for it.
    """

    kind: str
    amount: float
    label: str

    @property
    def scheme(self) -> str:
        return f"fit-{self.label}"

    def __str__(self) -> str:
        return f"{self.amount:,.0f} bytes" if self.kind == BYTES else f"{self.amount:.3f} bits a weight"


def read_budget(kind: str, text: str, model: Any) -> Budget:
    """An option's value: a size such as 3.0MB, a number of bits such as 4.3, or same-as:SCHEME.

    Raises:
        UserError: it is none of these, or no scheme of the network takes so little.
    """
    budget = budget_in(kind, text, model)
    least, most = (amount_of(kind, layers_of(model, uniform(bits))) for bits in (MEASURED_BITS[0], MEASURED_BITS[-1]))
    if least > budget.amount * (1 + SLACK):
        unit = "bytes" if kind == BYTES else "bits a weight"
        raise UserError(
            f"{kind}: {budget} is too little, schemes of this network take {least:,.0f} to {most:,.0f} {unit}"
        )
    return budget


def budget_in(kind: str, text: str, model: Any) -> Budget:
    """As `read_budget`, whatever schemes of the network take."""
    if text.startswith(SAME_AS):
        return budget_of(kind, scheme_named(text.removeprefix(SAME_AS)), model)
    match = SIZE.fullmatch(text.strip())
    if match is None or (kind == BITS and match[2]):
        wanted = "a size such as 3.0MB, 3000kB or 2.9MiB" if kind == BYTES else "a mean number of bits such as 4.3"
        raise UserError(f"{kind} {text}: give {wanted}, or {SAME_AS}SCHEME such as {SAME_AS}w4a16-mixed-dw")
    amount = float(match[1]) * UNITS[match[2]]
    label = text.strip().replace(" ", "") if kind == BYTES else f"{match[1]}bits"
    return Budget(kind, amount, label)


def budget_of(kind: str, scheme: Scheme, model: Any) -> Budget:
    """What a scheme takes."""
    label = f"as-{shortened(scheme.name)}" + ("" if kind == BYTES else "-bits")
    return Budget(kind, amount_of(kind, layers_of(model, scheme)), label)


def shortened(name: str) -> str:
    """A scheme's name; of a long one a hash replaces the end, because a proposal's has room for LONGEST letters."""
    if len(name) <= LONGEST:
        return name
    digits = hashlib.sha256(name.encode()).hexdigest()[:HASH_DIGITS]
    return f"{name[: LONGEST - HASH_DIGITS - 1]}-{digits}"


def scheme_named(value: str) -> Scheme:
    """A built-in scheme by its name, or that of a file."""
    try:
        return find_scheme(value)
    except ValueError as error:
        raise UserError(f"scheme {value}: {error}") from error


def amount_of(kind: str, layers: list[Layer]) -> float:
    """What layers take of a budget: bytes in the INT4 file, or bits over the number of quantized weights."""
    if kind == BYTES:
        return float(sum(layer.n_bytes(packs=True) for layer in layers))
    counted = [layer for layer in layers if layer.is_in_file and layer.rule.bits != FLOAT]
    n_weights = sum(layer.n_weights for layer in counted)
    return sum(layer.n_weights * int(layer.rule.bits) for layer in counted) / max(n_weights, 1)


def propose(model: Any, budget: Budget, cost: Callable[[str, int], float]) -> dict[str, int]:
    """The bits of every layer whose costs have the least sum within the budget; `cost` is that of a layer at bits."""
    names = list(learned_layers(model))
    by_bits = {bits: {layer.name: layer for layer in layers_of(model, uniform(bits))} for bits in MEASURED_BITS}
    n_weights = {name: by_bits[2][name].n_weights for name in names}
    limit = budget.amount
    if budget.kind == BYTES:
        limit -= sum(layer.n_bytes(packs=True) for name, layer in by_bits[2].items() if name not in n_weights)
    else:
        limit *= sum(n_weights.values())
    options = []
    for name in names:
        of_layer = []
        for bits in MEASURED_BITS:
            price = by_bits[bits][name].n_bytes(packs=True) if budget.kind == BYTES else n_weights[name] * bits
            of_layer.append(Option(bits, price, cost(name, bits)))
        options.append(of_layer)
    return {name: option.bits for name, option in zip(names, cheapest(options, limit), strict=True)}


def scheme_of(name: str, bits: dict[str, int], why: Callable[[str], str]) -> Scheme:
    """A scheme with a rule for every layer but those of the most frequent bits; `why` gives the reason for a layer.

    The one2many head gets the bits of the one2one head.
    """
    usual, _ = Counter(bits.values()).most_common(1)[0]
    rules = []
    for layer, n_bits in bits.items():
        if n_bits != usual:
            rules.append(Rule(pattern=both_heads(layer), bits=n_bits, granularity=BY_CHANNEL, why=why(layer)))
    rest = Rule(pattern="*", bits=usual, granularity=BY_CHANNEL, why="every other learned convolution")
    return Scheme(name=name, rules=(*rules, rest))


def both_heads(layer: str) -> str:
    """A pattern that matches a layer and, if it is of the one2one head, its counterpart in the one2many head."""
    for part in HEAD_PARTS:
        layer = layer.replace(f".{part}.", f".*{part.removeprefix('one2one_')}.")
    return layer
