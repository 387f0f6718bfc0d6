"""The bits of every layer that cost least within a budget: a multiple-choice knapsack, solved exactly.

    minimise sum_l cost[l, b_l]   subject to   sum_l price[l, b_l] <= budget

Layers are added one after the other to a list of partial choices, of which only those stay that no other undercuts in
both price and cost (Nemhauser & Ullmann, Management Science 15(9), 1969; ZeroQ builds its Pareto frontier of bits in
this way, Cai et al., CVPR 2020). A choice is dropped too if even the linear relaxation of the layers to come, which
costs no more than any completion, does not bring it below a choice that is known (Pisinger, EJOR 83(2), 1995).
No solver is in the package list; this takes milliseconds and gives the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SLACK = 1e-9  # relative, of sums in floating point


@dataclass(frozen=True)
class Option:
    """A number of bits for a layer, what it takes of the budget, and what it costs."""

    bits: int
    price: float
    cost: float


class OverBudget(Exception):
    """Even the cheapest choice is over the budget."""


def cheapest(layers: list[list[Option]], budget: float) -> list[Option]:
    """The option of each layer whose costs have the smallest sum within the budget.

    Raises:
        OverBudget: no choice is within the budget.
    """
    limit = budget * (1 + SLACK)
    frontiers = [frontier(options) for options in layers]
    relaxed = relaxations(frontiers)
    price, cost = np.zeros(1), np.zeros(1)
    if relaxed[0].price[0] > limit:
        raise OverBudget
    known = rounded_down(frontiers, limit)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of every layer: the choice before, the option
    for options, rest in zip(frontiers, relaxed[1:], strict=True):
        price = (price[:, None] + [option.price for option in options]).ravel()
        cost = (cost[:, None] + [option.cost for option in options]).ravel()
        at_best = cost + np.interp(limit - price, rest.price, rest.cost)
        can = (price + rest.price[0] <= limit) & (at_best <= known + SLACK * abs(known))
        kept = undominated(price, cost, np.flatnonzero(can))
        steps.append((kept // len(options), kept % len(options)))
        price, cost = price[kept], cost[kept]
    return followed(frontiers, steps, int(cost.argmin()))


def undominated(price: np.ndarray, cost: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Those of `places` that no other undercuts, by rising price and falling cost."""
    ordered = places[np.lexsort((cost[places], price[places]))]
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], cost[ordered]]))[:-1]
    return ordered[cost[ordered] < least_before]


def followed(layers: list[list[Option]], steps: list[tuple[np.ndarray, np.ndarray]], last: int) -> list[Option]:
    """The options that led to the last choice."""
    chosen = []
    for options, (before, option) in zip(reversed(layers), reversed(steps), strict=True):
        chosen.append(options[option[last]])
        last = int(before[last])
    return chosen[::-1]


def frontier(options: list[Option]) -> list[Option]:
    """Options by rising price and falling cost, without those that another undercuts.

    Of options with one price the one with most bits stays: that it costs more can only be an error of measurement.
    """
    by_price: dict[float, Option] = {}
    for option in sorted(options, key=lambda option: option.bits):
        by_price[option.price] = option
    kept: list[Option] = []
    for _, option in sorted(by_price.items()):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


@dataclass(frozen=True)
class Relaxation:
    """The least cost of layers over their budget, if options could be mixed: a falling, convex polyline."""

    price: np.ndarray
    cost: np.ndarray


def relaxations(layers: list[list[Option]]) -> list[Relaxation]:
    """For every number of layers that are chosen already: the relaxation of those to come, the last one of none."""
    relaxed = [Relaxation(np.zeros(1), np.zeros(1))]
    slopes: list[tuple[float, float, float]] = []
    start_price = start_cost = 0.0
    for options in reversed(layers):
        edges = hull(options)
        start_price, start_cost = start_price + edges[0].price, start_cost + edges[0].cost
        for before, after in pairwise(edges):
            width, fall = after.price - before.price, after.cost - before.cost
            slopes.append((fall / width, width, fall))
        slopes.sort()
        prices = np.cumsum([start_price, *(width for _, width, _ in slopes)])
        costs = np.cumsum([start_cost, *(fall for _, _, fall in slopes)])
        relaxed.append(Relaxation(prices, costs))
    return relaxed[::-1]


def hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of a frontier."""
    kept: list[Option] = []
    for option in options:
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(left: Option, right: Option) -> float:
    return (right.cost - left.cost) / (right.price - left.price)


def rounded_down(layers: list[list[Option]], limit: float) -> float:
    """Cost of a choice within the limit: steps along the hulls, the best value first, as long as they fit."""
    hulls = [hull(options) for options in layers]
    price = sum(edges[0].price for edges in hulls)
    cost = sum(edges[0].cost for edges in hulls)
    steps = []
    for edges in hulls:
        for before, after in pairwise(edges):
            steps.append((_slope(before, after), after.price - before.price, after.cost - before.cost))
    for _, width, fall in sorted(steps):
        if price + width > limit:
            break
        price, cost = price + width, cost + fall
    return cost
