"""docs/bad-input.md from the table of cases; `PYTHONPATH=. python tests/support/bad_input_doc.py` writes it."""

from __future__ import annotations

from collections.abc import Sequence

from app.core.environment import REPO_DIR
from app.core.files import write_text
from tests.support.bad_annotation_cases import CATEGORIES, IDS, JSON, Case
from tests.support.bad_input_cases import ARGUMENTS, BOXES, CORNERS, DOUBTS, FILES, FOLDER, SETTINGS, Argument

DOC = REPO_DIR / "docs" / "bad-input.md"
HEAD = """# What a bad input says

Each is found before the GPU is taken, ends the command with exit code 2 and this one line, and leaves nothing behind.
`COCO` stands for the dataset folder, 40 x 30 and 24 x 32 px are the images of the tests. This page is made from the
cases that `tests/unit/test_bad_input.py` runs: `PYTHONPATH=. python tests/support/bad_input_doc.py`.
"""
PARTS = {
    "The folder": FOLDER, "The annotation file": JSON, "Categories": CATEGORIES, "Ids and entries": IDS,
    "All boxes": CORNERS,
    "Image files (`data.skip_broken=true` goes on without them)": FILES,
    "Boxes (`data.skip_broken=true` goes on without their images)": BOXES,
    "Doubtful annotations (a warning; an error with `data.strict=true`)": DOUBTS,
    "Settings": SETTINGS,
    "Arguments (in make's ARGS)": ARGUMENTS,
}  # fmt: skip


def document() -> str:
    """The whole page."""
    parts = [f"\n## {title}\n\n| what is wrong | what it says |\n|---|---|\n{rows(of)}" for title, of in PARTS.items()]
    return HEAD + "".join(parts)


def rows(cases: Sequence[Case | Argument]) -> str:
    return "".join(f"| {case.name} | `{case.line.replace('|', chr(92) + '|')}` |\n" for case in cases)


if __name__ == "__main__":
    write_text(DOC, document())
