"""What the commands and the image install is pinned, and the image copies what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {name_of(r) for group in [project["dependencies"], *extras.values()] for r in group} - {project["name"]}
    lines = (ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    pinned = {name_of(line) for line in lines if "==" in line and not line.startswith("#")}
    assert len(wanted) > 20 and wanted - {"ruff", "pre-commit"} <= pinned, wanted - pinned


def test_the_image_copies_what_there_is_and_installs_what_is_pinned():
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "cluster/constraints.txt", "laplace", "laplace_dist", "jobs"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("--constraint cluster/constraints.txt" in line for line in installs)
