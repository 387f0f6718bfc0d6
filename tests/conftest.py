"""Shared set-up: Ultralytics must find its settings folder before its first import."""

from __future__ import annotations

import tempfile
from pathlib import Path

from app.run import isolate_libraries

isolate_libraries(Path(tempfile.mkdtemp(prefix="w4a16-tests-")))
