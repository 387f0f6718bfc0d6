"""What work costs: seconds by the clock and of the processor, and the line on which they grow with its size."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
STRETCH = 3.0  # times the seconds that were asked for, on the clock of a busy machine
STARVED = 0.8  # cores: a process with less is kept waiting by others


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and of all cores. A Stopwatch sees those of another process only when it has ended."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def __sub__(self, other: Cost) -> Cost:
        """Clamped at 0: noise can make a difference negative."""
        return Cost(max(self.wall_s - other.wall_s, 0.0), max(self.cpu_s - other.cpu_s, 0.0))

    def __mul__(self, times: float) -> Cost:
        return Cost(self.wall_s * times, self.cpu_s * times)

    __rmul__ = __mul__

    def __truediv__(self, by: float) -> Cost:
        return self * (1 / by)


NOTHING = Cost()


def beside(one: Cost, other: Cost) -> Cost:
    """Two costs at the same time, in different processes: the seconds of the slower one, the processor's of both."""
    return Cost(max(one.wall_s, other.wall_s), one.cpu_s + other.cpu_s)


class Stopwatch:
    """Reads both clocks. `wait` is called before each reading: it waits for what a GPU has still to do."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.wait = wait

    def now(self) -> Cost:
        if self.wait:
            self.wait()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return Cost(time.perf_counter(), sum(of.ru_utime + of.ru_stime for of in used))

    def timed(self, work: Callable[[], T]) -> tuple[Cost, T]:
        """What `work` costs, and its result."""
        start = self.now()
        result = work()
        return self.now() - start, result

    def cost(self, work: Callable[[], object]) -> Cost:
        return self.timed(work)[0]


@dataclass(frozen=True)
class Line:
    """fixed + size * each."""

    fixed: Cost
    each: Cost

    def at(self, size: float) -> Cost:
        return self.fixed + size * self.each


def line(small: tuple[float, Cost], large: tuple[float, Cost]) -> Line:
    """The line through two measured (size, cost); through nothing and the larger one where the two make no sense.

    They make none where the sizes are equal, or where the larger one costs less, or more than its share.
    """
    (n_small, of_small), (n_large, of_large) = small, large
    wall = _line(n_small, of_small.wall_s, n_large, of_large.wall_s)
    cpu = _line(n_small, of_small.cpu_s, n_large, of_large.cpu_s)
    return Line(Cost(wall[0], cpu[0]), Cost(wall[1], cpu[1]))


def _line(n_small: float, small_s: float, n_large: float, large_s: float) -> tuple[float, float]:
    """Fixed and each of one clock."""
    if n_large > n_small and large_s > small_s:
        each = (large_s - small_s) / (n_large - n_small)
        fixed = large_s - n_large * each
        if fixed >= 0:
            return fixed, each
    return 0.0, large_s / n_large


def typical(costs: list[Cost]) -> Cost:
    """The median by each clock, without the first one, which also compiles and allocates, where there are others."""
    warm = costs[1:] or costs
    return Cost(float(np.median([cost.wall_s for cost in warm])), float(np.median([cost.cpu_s for cost in warm])))


class Budget:
    """The seconds that the estimate may take, and how many of them are used up.

    On a machine that leaves this process less than one core, seconds of the processor count, so that what is measured
    is no less; until `stretch` times the seconds have passed on the clock.
    """

    def __init__(self, seconds: float, stretch: float = STRETCH) -> None:
        self.seconds, self.stretch = seconds, stretch
        self.start = Cost(time.monotonic(), time.process_time())

    @property
    def waits(self) -> float | None:
        """Seconds on the clock by those of the processor so far, where others keep this process waiting; else None."""
        passed = self.passed
        is_starved = self.stretch > 1 and passed.cpu_s < STARVED * passed.wall_s
        return passed.wall_s / passed.cpu_s if is_starved else None

    @property
    def passed(self) -> Cost:
        return Cost(time.monotonic(), time.process_time()) - self.start

    def counted(self, cost: Cost) -> float:
        """The seconds of the budget that a cost uses up."""
        return max(min(cost.wall_s, cost.cpu_s), cost.wall_s / self.stretch)

    def share(self, fraction: float) -> BudgetShare:
        """A share that begins now and may use this fraction of the whole, or what is left of it."""
        return BudgetShare(self, min(self.counted(self.passed) + fraction * self.seconds, self.seconds))


@dataclass(frozen=True)
class BudgetShare:
    """A share of a budget: it should end when `end_s` seconds of the budget are used up."""

    budget: Budget
    end_s: float

    @property
    def left_s(self) -> float:
        return self.end_s - self.budget.counted(self.budget.passed)

    def has(self, cost: Cost) -> bool:
        """Whether a cost still fits into it."""
        return self.budget.counted(cost) <= self.left_s

    def of_rest(self, fraction: float) -> BudgetShare:
        """The beginning of what is left of it."""
        return BudgetShare(self.budget, self.end_s - (1 - fraction) * max(self.left_s, 0.0))


def repeat(work: Callable[[], Cost], share: BudgetShare, times: range) -> list[Cost]:
    """Costs of `work`, as many times as fit into the share, within the range."""
    costs = [work()]
    while len(costs) < times.start or (len(costs) < times.stop and share.has(costs[-1])):
        costs.append(work())
    return costs
