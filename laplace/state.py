"""The state of a posterior as tensors and plain values: written without pickle, checked when read."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from laplace.fitted import Fitted
from laplace.linalg.dense import parameter_vector
from laplace.renaming import renamed
from laplace.structures.specification import SumsSpec

SCHEMA_VERSION = 3
_READABLE = (1, 2, 3)  # 1 lacks the estimator and settings of structure and subset, 2 the temperature of the logits


def state_dict(la: Fitted) -> dict[str, Any]:
    """The structure's own part, prior, noise and mean; with the model's own state dict this is the whole posterior."""
    la._check_fitted()
    return {
        "schema_version": SCHEMA_VERSION,
        "cls_name": type(la).__name__,
        "likelihood": la.likelihood_object.identity,
        "temperature": float(la.temperature),
        "logit_temperature": float(la.logit_temperature),
        "mean": la.mean,
        "prior_mean": la.prior_mean,
        "prior_precision": la.prior_precision.detach(),
        "sigma_noise": la.sigma_noise.detach(),
        "n_data": la.n_data,
        "n_outputs": la.n_outputs,
        "input_ndim": la.input_ndim,
        **{name: _plain(getattr(la, name)) for name in la._settings()},
        **la._state(),
    }


def load_state_dict(la: Fitted, state: dict[str, Any]) -> None:
    """Take over a state; nothing changes if it does not fit.

    Raises:
        ValueError: If it is of a newer schema, of another class or likelihood, or of parameters of other values or names.
    """
    if not isinstance(state, Mapping) or "schema_version" not in state:
        what = "a state dict of something else, such as a model" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"This is {what}, not the state of a posterior; give what la.state_dict() returned. A whole posterior or model "
            "that torch.save wrote is used as it is."
        )
    version = state["schema_version"]
    if version not in _READABLE:
        raise ValueError(f"The state has schema version {version!r}; this version of laplace reads {SCHEMA_VERSION}.")
    for key, ours in (("cls_name", type(la).__name__), ("likelihood", la.likelihood_object.identity)):
        if state[key] != ours:
            raise ValueError(f"The state's {key} is {state[key]!r}, but this is {ours!r}.")
    state = renamed(state, la.model)
    spec = SumsSpec.from_json(state["spec"])
    settings = [name for name in la._settings() if name in state]
    names = (*settings, "temperature", "logit_temperature", "sigma_noise", "prior_mean", "prior_precision")
    before = {name: getattr(la, name) for name in names}
    forget = la._adopt_parameters(spec)
    try:
        mean = state["mean"].to(la._device)
        now = parameter_vector(la.params).detach()
        if mean.shape != now.shape or not torch.equal(mean, now.to(mean.dtype)):
            raise ValueError(
                "The state was fitted at other parameters than the model has now. Load the model's own state dict first"
                + (f", into a model of {mean.dtype}: this one is of {now.dtype}." if mean.dtype != now.dtype else ".")
            )
        content = la._read_state({**state, "spec": _in_type(state["spec"], la._dtype)})
        for name in names:
            setattr(la, name, state.get(name, 1.0) if name == "logit_temperature" else state[name])
        la._take_state(content)
        la.input_ndim = state.get("input_ndim")  # a state of an earlier version does not say
    except ValueError:
        forget()
        for name, value in before.items():
            setattr(la, name, value)
        raise


def _in_type(spec: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The specification for a model that is of another precision than the one fitted; the sums are float64 in any case."""
    return {**spec, "dtype": str(torch.promote_types(dtype, torch.float32)).removeprefix("torch.")}


def _plain(value: Any) -> Any:
    """What ``torch.load(weights_only=True)`` reads: the value of an enumeration's member."""
    return value.value if isinstance(value, Enum) else value
