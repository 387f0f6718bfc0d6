"""Shared set-up: Ultralytics must find its settings folder before its first import."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from app.run import isolate_libraries

# OpenMP's threads spin while they wait: beside other busy processes that takes a hundred times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
isolate_libraries(Path(tempfile.mkdtemp(prefix="w4a16-tests-")))
