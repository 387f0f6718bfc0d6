"""What a container sees of the user's folders, and their names outside: the names that messages use."""

from __future__ import annotations

import functools
import os
import re

MOUNTS = "APP_MOUNTS"  # set by docker-compose.yml and scripts/job: a line 'path in the container=path outside' each
HERE = "."  # path outside of the checkout: the user stands in it, so a path below it is shown without it
SEEN = (
    "runs/, data/, COCO_DIR, and what make is given as A, B, ONNX, WEIGHTS, CONF, quant.scheme, sensitivity.against or "
    "train.weights"
)


def in_container() -> bool:
    return bool(_mounts())


def as_known(text: str) -> str:
    """The text with every path of the container as the user knows it; without a container the text itself."""
    mounts = _mounts()
    if not mounts:
        return text
    return _pattern(tuple(mounts)).sub(lambda match: _outside(mounts[match[1]], match[2]), text)


def only_seen() -> str:
    """What a container sees, for the end of a message about a path that is missing; nothing without a container."""
    return f" (the container sees only {SEEN})" if in_container() else ""


def _mounts() -> dict[str, str]:
    """Path in the container -> path outside; empty without a container."""
    lines = os.environ.get(MOUNTS, "").splitlines()
    pairs = [line.partition("=") for line in lines]
    return {inside: outside for inside, _, outside in pairs if inside and outside}


@functools.cache
def _pattern(places: tuple[str, ...]) -> re.Pattern[str]:
    """One of the places as a whole path or the begin of one, and the slash behind it; the longest place first."""
    longest_first = sorted(places, key=len, reverse=True)
    either = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<![\w.~/-])({either})(/|(?!\.?[\w-]))")


def _outside(place: str, slash: str) -> str:
    if place == HERE and slash:
        return ""
    return place.rstrip("/") + slash or "/"
