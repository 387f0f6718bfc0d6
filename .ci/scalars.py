"""Asks a running TensorBoard for the scalars of a run: exits with 0 when both variants have them within 30 s.

python3 .ci/scalars.py URL RUN
"""

import json
import sys
import time
import urllib.request

WAIT_S = 30


def scalars(url: str, run: str) -> dict[str, list[str]]:
    """Folder of events -> tags of its scalars, for the folders of one run."""
    with urllib.request.urlopen(f"{url}/data/plugin/scalars/tags", timeout=10) as answer:  # noqa: S310 - http only
        return {folder: sorted(tags) for folder, tags in json.load(answer).items() if folder.startswith(f"{run}/")}


def main(url: str, run: str) -> int:
    deadline = time.monotonic() + WAIT_S
    while len(found := scalars(url, run)) < 2 and time.monotonic() < deadline:
        time.sleep(1)
    for folder, tags in sorted(found.items()):
        sys.stdout.write(f"{folder}: {len(tags)} scalars, {', '.join(tags[:3])} ...\n")
    return 0 if len(found) >= 2 and all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
