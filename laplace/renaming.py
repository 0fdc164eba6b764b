"""A state by the names that its parameters have in the model that it is loaded into.

``torch.compile``, ``nn.DataParallel`` and modules that hold another one put something in front of all names. What was saved
from a model inside of one of them goes on in the model outside, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import nn

from laplace.capture.feature_extractor import FeatureExtractor
from laplace.structures import blockdiag
from laplace.structures.ekfac import Eigenbasis


def renamed(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """The state itself, or one whose names begin as those of the model do.

    Raises:
        ValueError: If its parameters have other names in the model, not only other beginnings.
    """
    model = model.model if isinstance(model, FeatureExtractor) else model
    ours = {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }  # a last layer's may be an embedding's, too
    theirs = [block["parameter"] for block in state["spec"]["blocks"]]
    if ours.issuperset(theirs):
        return state
    change = _change(theirs, ours)
    if change is None:
        missing = [name for name in theirs if name not in ours]
        raise ValueError(
            f"The state is of parameters {missing[:3]}, which the model has not; it has {sorted(ours)[:3]}. Build the model "
            "with the names that it had when the state was saved."
        )
    return _changed(state, change)


def _change(theirs: list[str], ours: Collection[str]) -> Callable[[str], str] | None:
    """What makes each of their names one of ours by another beginning, of which no layer's own name is a part."""
    parts = theirs[0].split(".")
    for cut in range(len(parts)):
        front, tail = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
        for name in ours:
            other = name.removesuffix(tail)
            wraps = name == tail or (name.endswith(f".{tail}") and (front == "" or "." in tail))
            if wraps and all(t.startswith(front) and other + t.removeprefix(front) in ours for t in theirs):
                return partial(_replaced, front, other)
    return None


def _replaced(front: str, other: str, name: str) -> str:
    """The name with its beginning replaced; the empty name, and the beginning's own, are the module that has all of them."""
    rest = f"{name}.".removeprefix(front) if name else ""
    return f"{other}{rest}".removesuffix(".")


def _changed(state: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def of_sum(name: str) -> str:
        owner, slash, kind = name.rpartition("/")
        if not slash and name != blockdiag.MODEL:  # of all parameters together
            return name
        return f"{change(owner)}/{kind}".removeprefix("/")

    def of_block(block: Mapping[str, Any]) -> dict[str, Any]:
        lists = {key: [of_sum(name) for name in block[key]] for key in ("factors", "basis") if key in block}
        layer = block["layer"] if block["layer"] is None else change(block["layer"])
        return {**block, "parameter": change(block["parameter"]), "layer": layer, **lists}

    spec = dict(state["spec"])
    spec["blocks"] = [of_block(block) for block in spec["blocks"]]
    spec["factors"] = {of_sum(name): value for name, value in spec["factors"].items()}
    new = {**state, "spec": spec}
    for part in ("sums", "basis"):
        if part in state:
            new[part] = {of_sum(name): value for name, value in state[part].items()}
    if "basis" in state:
        spec["basis"] = Eigenbasis(new["basis"]).digest
    return new
