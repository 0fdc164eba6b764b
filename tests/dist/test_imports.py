"""Importing what a job's processes need runs no garbage collection of everything, and leaves the collector as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WATCHED = (
    "import gc\n"
    "full = []\n"
    "gc.callbacks.append(lambda phase, info: full.append(1) if info['generation'] == 2 else None)\n"
    "{before}\n"
    "import {module}\n"
    "{after}\n"
    "print(len(full), gc.isenabled(), gc.get_freeze_count() > 0)"
)


def after_importing(module, before="", after=""):
    code = WATCHED.format(module=module, before=before, after=after)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()


def test_a_worker_and_what_it_does_first_collect_nothing():
    first = "made = [[] for _ in range(10_000)]"  # collections of what is new, which would be everything
    assert after_importing("laplace_dist.execution.worker", after=first) == ["0", "True", "False"]


def test_a_process_of_a_job_alone_keeps_what_it_has_imported_for_good():
    assert after_importing("laplace_dist.cli") == ["0", "True", "True"]


@pytest.mark.parametrize(
    "before, left", [("gc.disable()", ["0", "False", "False"]), ("gc.freeze()", ["0", "True", "True"])]
)
def test_what_the_process_had_chosen_stays(before, left):
    assert after_importing("laplace_dist.execution.worker", before=before) == left
