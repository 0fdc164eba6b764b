"""Agreement with laplace-torch 0.3, run as a black box on the same weights and data.

    python benchmarks/parity.py --peer-python PATH/TO/PEER/ENV/bin/python

Prints one row per likelihood × structure × subset × peer backend: the largest relative difference (Frobenius norm) over
networks of the posterior precision, the evidence and its gradient in prior precision and noise, the predictive, and the other
links of a classifier or the joint predictive of a regression; in float64 and float32. Of ``marglik_training``, precision means
the trained prior precision and noise, and evidence its values at all steps. Rows above 1e-9 (float64) or 1e-5 (float32)
say why, and how far either side is from a naive reference: dense matrices from one call of autograd per output and example.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from parity_side import HESSIAN_PRIOR, NETWORKS, NOISE, PRIOR, data, network, subnetwork

_HERE = Path(__file__).resolve().parent
_WHAT = ("precision", "evidence", "gradient", "predictive", "links, joint")
_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}

_EMPIRICAL = (
    "ours is the sum of gradient outer products of ½‖f - y‖², gradient f - y; the peer's is twice that: it halves the product "
    "of two gradients 2 (f - y) of ‖f - y‖² once"
)
_BACKPACK = (
    "convolutions only, the MLP agrees to 1e-14: ours is KFAC-expand, as are the peer's curvlinops and asdl rows; BackPACK "
    "combines the positions of a convolution in another way"
)
_NOISE = (
    "ours: the peer's evidence is the same number, but its derivative in σ is not that of the number (for the CNN 182.5, where "
    "central differences of its own evidence give 294.2, as ours do), so that training goes another way"
)

_ROUNDING = (
    "ours, and in float32 alone: of the MLP's small gradient, 5e-6 (ours) and 2.4e-5 (the peer) from its value in float64 at "
    "the same weights"
)


def explanation(likelihood: str, structure: str, subset: str, backend: str) -> str:
    """Why the two libraries differ in a row, where they do."""
    if structure.startswith("gp"):
        independent = "; the predictives of independent outputs agree" if "independent" in structure else ""
        return f"ours: conditioned on all of the data, a Gaussian process is the dense posterior{independent}"
    if (structure, subset, backend) == ("diag", "last_layer", "curvlinops EF"):
        return "ours: it is the diagonal of the full last-layer EF; so are the peer's own asdl and backpack rows"
    if likelihood == "regression" and backend.endswith("EF"):
        return _EMPIRICAL
    if (structure, backend) == ("kron", "backpack GGN"):
        return _BACKPACK if likelihood == "classification" else f"{_BACKPACK}; and for the gradient in σ, {_NOISE}"
    if (structure, likelihood) == ("kron", "regression"):
        return _NOISE
    if structure == "kron":
        return _ROUNDING
    return "UNEXPLAINED"


def reference(kind: str, likelihood: str, structure: str, subset: str, estimator: str) -> dict[str, torch.Tensor]:
    """Precision, evidence and predictive in float64 from dense matrices; nothing for trained ones and for low rank."""
    from tests.core import naive

    if subset == "marglik_training" or structure == "lowrank":
        return {}
    model, (loader, test) = network(kind, 3, torch.float64), data(likelihood, torch.float64)
    xs, ys = loader.dataset.tensors
    loss = naive.loss(model, xs, ys, likelihood)
    if subset == "last_layer":
        for parameter in model[:-1].parameters():
            parameter.requires_grad_(False)
    h, js = curvature(naive, model, xs, ys, likelihood, structure, estimator), naive.jacobians(model, test)
    theta = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    if subset == "subnetwork":
        kept = subnetwork(model)
        h, js, theta = h[kept][:, kept], js[..., kept], theta[kept]
    noise = NOISE**2 if likelihood == "regression" else 1.0
    prior = HESSIAN_PRIOR if estimator == "Hessian" else PRIOR
    identity = torch.eye(h.shape[-1])
    precision = h / noise + prior * identity  # of independent outputs, one per output
    constant = ys.numel() * 0.5 * math.log(2 * math.pi * noise) if likelihood == "regression" else 0.0
    evidence = -loss / noise - constant - 0.5 * (torch.logdet(precision / prior).sum() + prior * theta @ theta)
    f = model(test).detach()
    if "independent" in structure:
        variances = torch.einsum("ncp,cpq,ncq->nc", js, torch.linalg.inv(precision), js)
        covariance = torch.diag_embed(variances)
    else:
        covariance = naive.glm_covariance(js, precision)
    variance = covariance.diagonal(dim1=1, dim2=2)
    probit = torch.softmax(f / torch.sqrt(1 + math.pi / 8 * variance), -1)
    predictive = probit if likelihood == "classification" else torch.cat([f.flatten(), covariance.flatten()])
    found = {"precision": precision, "evidence": evidence, "predictive": predictive}
    if structure == "diag":
        found["precision"] = precision.diagonal()
    if structure.startswith("gp"):
        del found["precision"]
    return {name: value.detach() for name, value in found.items()}


def curvature(naive, model, xs, ys, likelihood: str, structure: str, estimator: str) -> torch.Tensor:
    """The dense curvature that a structure stands for."""
    if estimator == "Hessian":
        params = {name: p.detach() for name, p in model.named_parameters()}
        sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

        def total(theta):
            parts = dict(zip(params, [t.view(s) for t, s in zip(theta.split(sizes), shapes, strict=True)], strict=True))
            return sum(
                naive.example_loss(torch.func.functional_call(model, parts, (x[None],))[0], y, likelihood)
                for x, y in zip(xs, ys, strict=True)
            )

        return torch.autograd.functional.hessian(total, torch.cat([p.flatten() for p in params.values()]))
    if structure == "kron":
        return naive.kron_matrix(naive.kron(model, xs, ys, likelihood, estimator.lower()))
    if "independent" in structure:
        js = naive.jacobians(model, xs)
        diagonals = [naive.output_hessian(f.detach(), likelihood).diagonal() for f in model(xs)]
        return torch.einsum("ncp,nc,ncq->cpq", js, torch.stack(diagonals), js)
    h = naive.full(model, xs, ys, likelihood, estimator.lower())
    return torch.diag(h.diagonal()) if structure == "diag" else h


def distances(key: tuple[str, ...], ours: dict, theirs: dict) -> str:
    """How far either side is from the naive reference, over networks and quantities."""
    likelihood, structure, subset, backend = key
    worst = {"ours": 0.0, "theirs": 0.0}
    for kind in NETWORKS:
        truth = reference(kind, likelihood, structure, subset, backend.split()[1])
        if not truth:
            return ""
        names = {"ours": "native " + backend.split()[1], "theirs": backend}
        for who, results in (("ours", ours), ("theirs", theirs)):
            found = results["|".join(["float64", kind, likelihood, structure, subset, names[who]])]
            worst[who] = max([worst[who], *(difference(found[w], truth[w].double()) for w in truth if w in found)])
    return f"from the naive reference: ours {worst['ours']:.0e}, the peer {worst['theirs']:.0e}"


def side(python: str, which: str, folder: Path) -> dict:
    """All numbers of one library."""
    out = folder / f"{which}.pt"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if which == "ours":
        environment["PYTHONPATH"] = str(_HERE.parent)
    command = [python, "-W", "ignore", str(_HERE / "parity_side.py"), "--which", which, "--out", str(out)]
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    return torch.load(out, weights_only=True)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300))


def compare(ours: dict, theirs: dict) -> dict[tuple[str, ...], dict[str, str | float]]:
    """Largest differences by (likelihood, structure, subset, backend)."""
    rows: dict[tuple[str, ...], dict[str, str | float]] = {}
    for key, peer in theirs.items():
        dtype, kind, likelihood, structure, subset, backend = key.split("|")
        mine = ours["|".join([dtype, kind, likelihood, structure, subset, "native " + backend.split()[1]])]
        row = rows.setdefault((likelihood, structure, subset, backend), {})
        if "error" in mine:
            row["ours"] = mine["error"]
        if "error" in peer:
            row[f"the peer refuses ({kind})"] = peer["error"]
            continue
        for what in _WHAT:
            if what in mine and what in peer:
                name = f"{what} {dtype}"
                row[name] = max(row.get(name, 0.0), difference(mine[what], peer[what]))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(_HERE.parent))  # the naive reference is part of the tests
    torch.set_default_dtype(torch.float64)  # as in the float64 rows, so that random weights are the same numbers
    with tempfile.TemporaryDirectory() as folder:
        ours = side(sys.executable, "ours", Path(folder))
        theirs = side(arguments.peer_python, "theirs", Path(folder))
    columns = [f"{what} {dtype}" for dtype in ("float64", "float32") for what in _WHAT]
    print("| likelihood | structure | subset | peer backend | " + " | ".join(columns) + " | notes |")
    print("|" + " --- |" * (len(columns) + 5))
    for key, row in compare(ours, theirs).items():
        cells = [f"{row[c]:.0e}" if c in row else "–" for c in columns]
        notes = "; ".join(f"{name}: {value}" for name, value in row.items() if isinstance(value, str))
        if any(row.get(c, 0.0) > _TOLERANCE[c.split()[-1]] for c in columns):
            notes = "; ".join(filter(None, [explanation(*key), distances(key, ours, theirs), notes]))
        print("| " + " | ".join([*key, *cells, notes]) + " |")


if __name__ == "__main__":
    main()
