"""Shared set-up: Ultralytics must find its settings folder before its first import."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from app.core.environment import isolate_libraries

# Several tests share the cores: OpenMP threads do not spin (app/core/environment.py lets them spin a little).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
isolate_libraries(Path(tempfile.mkdtemp(prefix="w4a16-tests-")))
