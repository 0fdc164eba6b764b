"""Where tests write, and in which order their files are begun."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Whatever the library commits is flushed, and a disk takes its time for that, so that tests write to memory if there is room.
MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30  # what they leave until they end is a tenth of this

# Files that take longest, those that mostly wait for processes and those that compute by turns: begun last, one of them would keep
# all but one core idle, and beside each other those that wait would.
LONGEST = (
    "test_process_faults",
    "test_full_disk",
    "test_end_to_end",
    "test_integrity",
    "test_s3_faults",
    "test_windows",
    "test_window_refusals",
    "test_window_jobs",
    "test_job_submission",
    "test_retention",
    "test_soak",
    "test_tuning",
    "test_tuned_temperature",
    "test_tuning_jobs",
    "test_evidence_or_map",
    "test_node_loss",
    "test_security",
    "test_signals",
    "test_report_page",
    "test_s3_runs",
    "test_manifests",
    "test_out_of_memory",
    "test_drift_watch",
    "test_read_ahead",
    "test_examples",
    "test_autoscaler",
    "test_random_models",
    "test_second_pass",
    "test_model_examples",
    "test_status",
    "test_recalibration",
)


def pytest_configure(config):
    """Keep temporary directories in memory, unless somebody has said where they are to be."""
    if config.option.basetemp is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(items):
    """Put the longest files first, then the jobs' other tests, and those of the library, which are short, last."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path.stem, len(rank)), item.path.parent.name == "core"))
