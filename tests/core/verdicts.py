"""Whether the library is right about a random model: fitted, compared with the reference, and its refusals judged."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laplace import Laplace
from laplace.backends import backend_class
from laplace.curvature import NativeGGN

from . import naive
from .dense_reference import NOISE, PRIOR, Reference, cloned, flattened, is_factored, make_exact, outputs
from .random_features import REFUSE, RIGHT
from .random_laws import LAWS
from .random_models import CONTEXTS, TOLERANCES, Case, Plan, part

# How the messages of torch and of Python begin; an error of the library's own says what it means in its own words.
RAW = (
    "vmap: ", "Only Tensors created explicitly", "element 0 of tensors", "mat1 and mat2", "expected scalar type",
    "Expected ", "The size of tensor", "shape '", "one of the variables needed", "not implemented for", "Cannot access",
    "Sizes of tensors", "index out of", "object has no attribute", "must be Tensor, not", "unsupported operand",
    "not subscriptable", "unexpected keyword", "missing 1 required", "a view of a leaf", "a leaf Variable", "Trying to ",
    "You are trying", "You're trying", "not iterable", "inplace operation", "in-place operation", "batching rule",
    "Inplace ", "Inference tensors", "derivative ", "grad can be", "requires grad", "too many values", "split_with_sizes",
    "unflatten: ", "not broadcastable", "Dimension out of range", "list index", "linear(): ", "grad_outputs", "In order to",
    "can't be cast", "isDifferentiableType", "INTERNAL ASSERT", "einsum(): ", "stack expects", "each element in list",
    "invalid index", "tuple indices", "NoneType", "expand(", "Index tensor", "index_select", "scatter",
)  # fmt: skip
ARGUMENTS = (
    "likelihood", "hessian_structure", "subset_of_weights", "last_layer_name", "subnetwork_indices", "feature_reduction",
    "backend", "prior_precision", "sigma_noise", "dict_key_x", "dict_key_y", "train_loader", "requires_grad", "batch",
    "targets", "Targets", "labels", "Labels", "outputs", "output", "inputs",
)  # fmt: skip


@dataclass
class Verdict:
    """What came of one model.

    Attributes:
        kind: ``right``, ``refused``, ``wrong``, ``not refused``, ``needlessly refused``, ``raw error`` or ``silent``.
        what: The quantity or message.
        error: Relative error of the worst quantity.
    """

    kind: str
    what: str = ""
    error: float = 0.0

    @property
    def good(self) -> bool:
        return self.kind in ("right", "refused")

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}" + (f" (relative error {self.error:.2g})" if self.error else "")


def examine(plan: Plan, device: str = "cpu") -> Verdict:
    """Fit one model with the library, on a device, and compare; the reference is computed on the CPU.

    A model that holds tensors of its own does not run on another device: of it there is nothing to judge.
    """
    case = plan.build()
    if device != "cpu":
        case = case.to(device)
        if not _runs(case):
            return Verdict("left out", f"does not run on {device}")
    before = _state(case.model)
    torch.manual_seed(plan.seed)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            la, prediction = _fit(plan, case, device)
    except Exception as error:  # noqa: BLE001
        if "no positive eigenvalue" in str(error) and not Reference(plan, plan.build()).ggn.any():
            return Verdict("refused", str(error)[:160])  # there is no curvature at all
        return judge(plan, case, error)
    if plan.outcome == REFUSE:
        return Verdict("not refused", "numbers that no definition gives")
    if "embedding_max_norm" not in plan.names and (changed := _changed(before, _state(case.model))):
        return Verdict("wrong", f"the model is left with {changed} changed")
    reference = Reference(plan, plan.build())
    tolerance = max(plan.tolerance, 10 * _rounding(plan, reference, device))
    return _compare(plan, la, prediction, reference, [str(w.message) for w in warned], tolerance)


def _rounding(plan: Plan, reference: Reference, device: str) -> float:
    """Relative error that the precision alone leaves in outputs and Jacobians: more where a norm divides by little."""
    case = plan.build().to(device)
    make_exact(case.model.eval())
    with torch.backends.cudnn.flags(enabled=False):  # whose recurrent layers have no gradient in evaluation mode
        return _rounding_of(plan, case, reference, device)


def _rounding_of(plan: Plan, case: Case, reference: Reference, device: str) -> float:
    parameters = dict(case.model.named_parameters())
    low = plan.tolerance >= TOLERANCES["bfloat16"]
    found, rows = [], []
    for i in range(len(case.y)):
        with torch.set_grad_enabled(low), _precision(plan, device):
            found.append(outputs(case.model, part(case.x, slice(i, i + 1)))[0])
        for value in found[-1].flatten() if low else ():
            chosen = [parameters[name] for name in reference.names]
            grads = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([flattened(g, p).cpu() for g, p in zip(grads, chosen, strict=True)]))
    error = _relative(torch.stack(found), reference.f)
    return max(error, _relative(torch.stack(rows), reference.js.flatten(0, 1))) if low else error


def _runs(case: Case) -> bool:
    try:
        with torch.no_grad():
            outputs(case.model, part(case.x, slice(None)))
    except RuntimeError as error:
        return "on the same device" not in str(error) and "different from other tensors" not in str(error)
    return True


def _precision(plan: Plan, device: str = "cpu") -> Any:
    return torch.autocast(device, torch.bfloat16) if plan.precision == "bfloat16" else nullcontext()


def _fit(plan: Plan, case: Case, device: str) -> tuple[Any, torch.Tensor | tuple]:
    options = {"prior_precision": PRIOR}
    if plan.likelihood == "regression":
        options["sigma_noise"] = NOISE
    if plan.subset == "subnetwork":
        options["subnetwork_indices"] = chosen_indices(plan, sum(_sizes(case.model)))
    around = {CONTEXTS[0]: torch.no_grad, CONTEXTS[1]: torch.inference_mode}.get(plan.context, nullcontext)
    with _precision(plan, device):
        if plan.structure == "lowrank":
            options |= {"backend": NativeGGN, "backend_kwargs": {"low_rank": 12 * len(case.y)}}
        if plan.backend:
            options["backend"] = backend_class(plan.backend)[0]
        law = LAWS[plan.likelihood].ours if plan.likelihood in LAWS else plan.likelihood
        la = Laplace(case.model, law, plan.subset, plan.structure, **options)
        la.fit(case.batches(plan.batch_size))
        x = cloned(case.x)
        with around():
            return la, la._glm_predictive_distribution(x) if plan.likelihood in LAWS else la(x)


def chosen_indices(plan: Plan, size: int) -> torch.Tensor:
    """About a third of the parameters, in order."""
    generator = torch.Generator().manual_seed(plan.seed)
    return torch.randperm(size, generator=generator)[: 1 + size // 3].sort().values


def _sizes(model: nn.Module) -> list[int]:
    return [p.numel() for p in model.parameters() if p.requires_grad]


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a fit has to leave as it is."""
    found: dict[str, Any] = {f"{n} in state_dict": v.clone() for n, v in model.state_dict().items()}
    for name, m in model.named_modules():
        hooks = len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)
        found[f"module {name!r}"] = (m.training, hooks, type(m), frozenset(m.__dict__) - {"seen"})
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [n for n in before.keys() | after.keys() if n not in before or n not in after]
    for name in before.keys() & after.keys():
        one, two = before[name], after[name]
        if not (torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two):
            names.append(name)
    return ", ".join(sorted(names))


def judge(plan: Plan, case: Case, error: Exception) -> Verdict:
    """Whether an error is a refusal in the library's own words that names something."""
    text = f"{type(error).__name__}: {error}"
    names = {n for n, _ in case.model.named_parameters()} | {n for n, _ in case.model.named_modules()} - {""}
    names |= {type(m).__name__ for m in case.model.modules()} | set(ARGUMENTS)
    named = any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", str(error)) for name in names)
    raw = any(phrase in str(error)[:80] for phrase in RAW)
    known = isinstance(error, (ValueError, TypeError, RuntimeError)) and "laplace" in _raised_in(error)
    if raw or not named or not known:
        return Verdict("raw error", text[:160].replace("\n", " "))
    return Verdict("needlessly refused" if plan.outcome == RIGHT else "refused", text[:160].replace("\n", " "))


def _raised_in(error: Exception) -> str:
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals.get("__name__", "")


def _dense(la: Any) -> torch.Tensor:
    return _dense_there(la).cpu()


def _dense_there(la: Any) -> torch.Tensor:
    if la.structure == "blockdiag":
        return torch.block_diag(*[block.double() for block in la.H])
    if la.structure == "ekfac":
        return la.H.to_matrix().double()
    if la.structure == "kron":
        return la.H_facs.to_matrix().double()
    if la.structure == "lowrank":
        vectors, values = (part.double() for part in la.H)
        return (vectors * values) @ vectors.T
    return torch.diag(la.H.double()) if la.structure == "diag" else la.H.double()


def _compare(plan: Plan, la: Any, prediction: Any, ref: Reference, warned: list[str], tolerance: float) -> Verdict:
    size = len(ref.theta)
    ours = ref.ggn if plan.structure == "gp" else _dense(la)  # a process has none of its own
    tolerance = max(tolerance, 1e-6) if plan.structure == "lowrank" else tolerance  # of a search
    chosen = chosen_indices(plan, size) if plan.subset == "subnetwork" else torch.arange(size)
    if len(ours) != len(chosen):
        return Verdict("wrong", f"H is over {len(ours)} parameters, not {len(chosen)}", float("inf"))
    truth = ref.ggn[chosen][:, chosen]
    if plan.structure == "diag":
        truth = torch.diag(truth.diagonal())
    if plan.structure == "ekfac":
        truth = _corrected(la, ref)
    if plan.structure == "blockdiag":
        truth = _by_layer(ref)
    silent = ""
    if plan.outer == "classes_first" and not any("class" in text for text in warned):
        silent = "as many positions as classes, no warning"
    if plan.structure == "kron":
        truth, foreign, unsaid = _kron_truth(la, ours, ref, warned)
        silent = silent or unsaid
        if foreign:
            return Verdict("wrong", foreign, 1.0)
    errors = {"H": _relative(ours, truth), "loss": _relative(torch.as_tensor(la.loss), _scalar(ref.loss))}
    temper = 1 / NOISE**2 if ref.likelihood == "regression" else 1.0
    evidence = ref.log_evidence(truth, chosen, temper)
    errors["evidence"] = _relative(la.log_marginal_likelihood(), _scalar(evidence))
    precision = temper * truth + PRIOR * torch.eye(len(truth), dtype=torch.float64)
    covariance = naive.glm_covariance(ref.js[..., chosen], precision)
    errors |= _prediction_errors(plan, prediction, ref, covariance)
    js = ref.js[..., chosen].to(la.params[0])
    errors["functional variance"] = _relative(la.functional_variance(js), covariance)
    what = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if not errors[what] <= tolerance:
        return Verdict("wrong", what, errors[what])
    return Verdict("silent", silent) if silent else Verdict("right", what, errors[what])


def _kron_truth(la: Any, ours: torch.Tensor, ref: Reference, warned: list[str]) -> tuple[torch.Tensor, str, str]:
    """Blocks by definition, diagonal ones where the library says so; what has factors it should not, and what no warning."""
    blocks, start, foreign, silent = [], 0, "", ""
    for parameter, p, (_, kind, reason) in zip(ref.names, ref.params, la.coverage, strict=True):
        rows = slice(start, start + p.numel())
        start += p.numel()
        factors = ref.factors(parameter)
        if kind == "diag":
            blocks.append(torch.diag(ref.ggn[rows, rows].diagonal()))
            if factors is not None and not any(parameter in text for text in warned):
                silent = f"diagonal block for {parameter}, no warning ({reason})"
        elif factors is not None:
            blocks.append(torch.kron(*factors) if len(factors) == 2 else factors[0])
        else:  # of a kind whose factors the reference does not know
            blocks.append(ours[rows, rows])
            if (
                parameter not in ref.unseen
                and is_factored(ref.model.get_submodule(parameter.rpartition(".")[0]))
                and "out_proj" not in parameter
            ):
                foreign = f"{parameter} has Kronecker factors that are not its own"
    return torch.block_diag(*blocks), foreign, silent


def _corrected(la: Any, ref: Reference) -> torch.Tensor:
    """Of every block of the dense curvature, what is on the diagonal in the library's basis, which has to be orthonormal."""
    blocks, start = [], 0
    for p, vectors in zip(ref.params, la.H.eigenvectors, strict=True):
        sizes = (p.numel(),) if len(vectors) == 1 else (p.shape[0], p.numel() // p.shape[0])
        dense = [torch.eye(n) if q is None else q.cpu() for q, n in zip(vectors, sizes, strict=True)]
        q = dense[0].double() if len(dense) == 1 else torch.kron(*(d.double().contiguous() for d in dense))
        rows = slice(start, start + p.numel())
        start += p.numel()
        blocks.append((q * (q.T @ ref.ggn[rows, rows] @ q).diagonal()) @ torch.linalg.inv(q))
    return torch.block_diag(*blocks)


def _by_layer(ref: Reference) -> torch.Tensor:
    """The dense curvature without what couples parameters of different modules."""
    owners = [name.rpartition(".")[0] or name for name in ref.names]
    where = torch.cat([torch.full((p.numel(),), owners.index(o)) for p, o in zip(ref.params, owners, strict=True)])
    return torch.where(where[:, None] == where, ref.ggn, 0.0)


def _prediction_errors(plan: Plan, prediction: Any, ref: Reference, covariance: torch.Tensor) -> dict[str, float]:
    f = ref.f if ref.f.ndim > 1 else ref.f[:, None]
    if plan.likelihood != "classification":
        mean, variance = (part.cpu() for part in prediction)
        return {
            "mean": _relative(mean.flatten(), f.flatten()),
            "variance": _relative(variance.flatten(), covariance.flatten()),
        }
    spread = covariance.diagonal(dim1=1, dim2=2).reshape(f.shape)
    moved = (f / (1 + math.pi / 8 * spread).sqrt()).softmax(-1)
    if prediction.shape != moved.shape:
        return {"probabilities": float("inf")}
    effect = (moved - f.softmax(-1)).norm().clamp(min=0.05)  # what the variance makes of them
    return {"probabilities": float((prediction.cpu().double() - moved).norm() / effect)}


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    if value.shape != truth.shape:
        return float("inf")
    value, truth = value.detach().cpu().double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-3))
