"""The search of bits against brute force, and the numbers of the sensitivity stage by hand. Without torch."""

from __future__ import annotations

import itertools
import random

import pytest

from app.sensitivity.search import Option, OverBudget, cheapest

BITS = (2, 3, 4, 5, 6, 8)


def total(options: tuple[Option, ...] | list[Option], field: str) -> float:
    return sum(vars(option)[field] for option in options)


def drawn_layers(rng: random.Random, n: int) -> list[list[Option]]:
    """Prices of whole numbers, and costs that fall with the bits, but for noise: then some options undercut others."""
    layers = []
    for _ in range(n):
        n_weights, weight = rng.randint(1, 50), rng.random() ** 4
        layers.append([Option(bits, n_weights * bits, weight * 4.0**-bits * rng.uniform(0.1, 3)) for bits in BITS])
    return layers


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    layers = drawn_layers(rng, rng.randint(1, 5))
    budget = rng.uniform(2, 8) * sum(options[0].price / 2 for options in layers)
    within = [choice for choice in itertools.product(*layers) if total(choice, "price") <= budget]
    found = cheapest(layers, budget)
    assert total(found, "price") <= budget
    assert total(found, "cost") == pytest.approx(min(total(choice, "cost") for choice in within), rel=1e-12)


def test_costs_may_be_negative() -> None:
    layers = [[Option(4, 1, -0.5), Option(8, 2, 0.1)], [Option(4, 1, 0.2), Option(8, 2, -0.3)]]
    assert [option.bits for option in cheapest(layers, 3)] == [4, 8]


def test_of_one_price_the_most_bits_are_taken_whatever_they_measure() -> None:
    """2 and 4 bits take half a byte, 5 and 8 a byte."""
    layer = [Option(2, 0.5, 1.0), Option(4, 0.5, 1.1), Option(5, 1, 0.2), Option(8, 1, 0.3)]
    assert cheapest([layer], 0.9)[0].bits == 4
    assert cheapest([layer], 1)[0].bits == 8


def test_more_bits_that_cost_more_are_not_bought() -> None:
    assert cheapest([[Option(4, 1, 0.1), Option(8, 2, 0.3)]], 5)[0].bits == 4


def test_too_small_a_budget() -> None:
    layers = drawn_layers(random.Random(0), 3)
    least = sum(options[0].price for options in layers)
    assert {option.bits for option in cheapest(layers, least)} == {2}
    with pytest.raises(OverBudget):
        cheapest(layers, least - 1)
