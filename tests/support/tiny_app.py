"""`python -m tests.support.tiny_app STAGE ...` is `python -m app STAGE ...` with the tiny network for YOLOv10."""

from __future__ import annotations

import sys

from app.__main__ import main
from app.core import child
from tests.support.tiny import tiny_network

if __name__ == "__main__":
    child.PROGRAM = ["-m", "tests.support.tiny_app"]  # of stages that this one starts
    with tiny_network():
        sys.exit(main())
