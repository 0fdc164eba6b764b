"""Where tests write: in memory if there is room, since whatever the library commits is flushed, and a disk takes its time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30  # what tests leave until they end is a tenth of this


def pytest_configure(config):
    """Keep temporary directories in memory, unless somebody has said where they are to be."""
    if config.option.basetemp is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
