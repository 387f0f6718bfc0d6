"""The files of a page: a run's own, or one of the run merged with others, which stands beside the own one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from app.core.run import RunRoot, runs_of
from app.report.evidence import gather

MAX_ENDING = 48  # characters: two other seeds of a run whose name has 15
HASH_DIGITS = 6


@dataclass(frozen=True)
class PageFiles:
    """Names of the files in the root of the run; `ending` is empty for the page of the run alone."""

    run: RunRoot
    ending: str = ""

    @property
    def numbers(self) -> Path:
        return self.run.root / f"report{self.ending}.json"

    @property
    def markdown(self) -> Path:
        return self.run.root / f"summary{self.ending}.md"

    @property
    def html(self) -> Path:
        return self.markdown.with_suffix(".html")

    @property
    def published_dir(self) -> Path:
        return self.run.runs_dir / "reports" / f"{self.run.name}{self.ending}"


def scored_runs(names: Sequence[str], runs_dir: Path) -> tuple[list[RunRoot], list[str]]:
    """The runs that a page is made of, as `runs_of` gives them, and a line for every run that is left out.

    Left out are the runs of a sweep that nothing was scored of: their trainings have failed or have not begun.
    """
    all_runs = runs_of(names, runs_dir)
    found = [run for run in all_runs if run.name in names or has_scores(run)] or all_runs[:1]
    lines = []
    for run in all_runs:
        if run not in found:
            lines.append(f"{run.name}: nothing was scored, the run is left out: the command of its sweep goes on")
    return found, lines


def has_scores(run: RunRoot) -> bool:
    return run.root.is_dir() and bool(gather(run).scored)


def page_of(run: RunRoot, others: Sequence[RunRoot] = ()) -> PageFiles:
    """-with-b-c for the page merged with b and c; of many or long names the first one, their number and a hash."""
    return PageFiles(run, ending([other.name for other in others]))


def ending(names: Sequence[str]) -> str:
    """At most MAX_ENDING characters, other ones for other names."""
    if not names:
        return ""
    text = "-".join(["-with", *names])
    if len(text) <= MAX_ENDING:
        return text
    cut = f"-and-{len(names) - 1}-more-{sha256('/'.join(names).encode()).hexdigest()[:HASH_DIGITS]}"
    return f"-with-{names[0]}"[: MAX_ENDING - len(cut)] + cut
