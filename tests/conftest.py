"""Shared set-up: Ultralytics must find its settings folder before its first import."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from app.run import isolate_libraries

# Several tests run at a time, beside each other on the same cores: no OpenMP thread spins (app/run.py sets a little).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
isolate_libraries(Path(tempfile.mkdtemp(prefix="w4a16-tests-")))
