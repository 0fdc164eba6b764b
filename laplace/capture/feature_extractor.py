"""Split a model into features and a linear last layer."""

from __future__ import annotations

from collections.abc import MutableMapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.calls import input_of, is_batched
from laplace.capture.forward import run, tensor_output
from laplace.enums import parse
from laplace.linalg.precision import coarsest


class FeatureReduction(StrEnum):
    """How features ``(batch, positions, in)`` become ``(batch, in)``; it has to repeat what the model does.

    Models that pick the last position that is not padding pick another one for every example: the position whose logits are
    the model's output is then taken instead.
    """

    PICK_FIRST = "pick_first"
    PICK_LAST = "pick_last"
    AVERAGE = "average"


class FeatureExtractor(nn.Module):
    """A model together with its last layer and the inputs of that layer.

    Args:
        model: The network.
        last_layer_name: Name of the last layer as in ``model.named_modules()``; found from a forward pass if None.
        enable_backprop: Keep the graph of the features.
        feature_reduction: How features with a position dimension are reduced.

    Everywhere ``x`` are inputs ``(batch, …)`` or a dict-like batch.

    Raises:
        ValueError: If there is no such layer or reduction.

    Example:
        >>> import torch
        >>> from laplace.utils import FeatureExtractor
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> outputs, features = FeatureExtractor(model).forward_with_features(torch.randn(8, 2))
        >>> features.shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str | None = None,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
    ):
        """See the class."""
        super().__init__()
        self.model = model
        self.enable_backprop = enable_backprop
        self.feature_reduction = feature_reduction
        self.last_layer_name: str | None = None
        if last_layer_name is not None:
            self.set_last_layer(last_layer_name)

    @property
    def feature_reduction(self) -> FeatureReduction | None:
        """How features with a position dimension are reduced; set by name or member."""
        return self._feature_reduction

    @feature_reduction.setter
    def feature_reduction(self, value: FeatureReduction | str | None) -> None:
        self._feature_reduction = None if value is None else parse(FeatureReduction, value, "feature_reduction")

    @property
    def last_layer(self) -> nn.Linear:
        """The linear last layer.

        Raises:
            RuntimeError: If it is not known yet.
        """
        if self.last_layer_name is None:
            raise RuntimeError("The last layer is not known yet: call find_last_layer(x) or fit() first.")
        return self.model.get_submodule(self.last_layer_name)

    def set_last_layer(self, last_layer_name: str) -> None:
        """Choose the last layer by name.

        Args:
            last_layer_name: As in ``model.named_modules()``.

        Raises:
            ValueError: If there is no such module or it is not :class:`torch.nn.Linear`.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if last_layer_name not in modules:
            linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
            raise ValueError(f"last_layer_name={last_layer_name!r} is not a module; linear modules are {linear}.")
        if not isinstance(modules[last_layer_name], nn.Linear):
            kind = type(modules[last_layer_name]).__name__
            raise ValueError(f"The last layer must be nn.Linear, but {last_layer_name!r} is {kind}.")
        self.last_layer_name = last_layer_name

    def forward(self, x: Tensor | MutableMapping[str, Any]) -> Tensor:
        """The model's outputs; the first call finds the last layer."""
        if self.last_layer_name is None:
            return self.find_last_layer(x)
        return self.model(x)

    def forward_with_features(self, x: Tensor | MutableMapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Outputs and (reduced) inputs of the last layer, as they are before the layer's own hooks."""
        if self.last_layer_name is None:
            self.find_last_layer(x)
        out, kept = self._run(x)
        features = self._reduce(*kept[-1], out)
        return out, features if self.enable_backprop else features.detach()

    def forward_with_call(
        self, x: Tensor | MutableMapping[str, Any]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """As :meth:`forward_with_features`, and the last call of the last layer where the model's output is what it gave.

        Returns:
            Outputs, features, and copies of what the layer's weight was multiplied by and of what the layer gave; None for the
            two where the output differs from that in shape or in any number, or where features are reduced.
        """
        last: list[tuple[Tensor, Tensor]] = []

        def copy(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            value, last[:] = input_of(args, kwargs), []
            if value is not None and isinstance(output, Tensor) and not is_batched(output):
                last.append((value.clone(), output.clone()))  # either may be changed in place later

        handle = self.last_layer.register_forward_hook(copy, with_kwargs=True)
        try:
            out, features = self.forward_with_features(x)
        finally:
            handle.remove()
        value, given = last[0] if last else (None, None)
        same = value is not None and value.shape == features.shape and out.dtype == given.dtype
        return out, features, (value, given) if same and torch.equal(out, given) else None

    def _run(self, x: Tensor | MutableMapping[str, Any]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Outputs, and input and output of every call of the last layer."""
        given: list[Tensor | None] = []
        logits: list[Any] = []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given.append(input_of(args, kwargs) if len(args) + len(kwargs) == 1 else None)

        handles = (
            self.last_layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            self.last_layer.register_forward_hook(lambda module, args, output: logits.append(output)),
        )
        try:
            out = tensor_output(run(self.model, x))
        finally:
            for handle in handles:
                handle.remove()
        if any(value is None for value in given) or not all(isinstance(value, Tensor) for value in logits):
            raise ValueError(
                f"The last layer {self.last_layer_name!r} ({type(self.last_layer).__name__}) is called with something else "
                "than one tensor, or gives something else. Let its forward take the features and return the outputs, or use "
                "subset_of_weights='all'."
            )
        if any(map(is_batched, logits)):
            raise ValueError(
                f"The last layer {self.last_layer_name!r} runs inside of torch.func.vmap or another transform in the model's "
                "forward, where its inputs cannot be seen. Call it on the whole batch, or use subset_of_weights='all'."
            )
        return out, list(zip(given, logits, strict=True))

    def find_last_layer(self, x: Tensor | MutableMapping[str, Any]) -> Tensor:
        """Take the layer that ran last, and check that the model's output is its output.

        Raises:
            ValueError: If that layer is not linear, or if something follows it that changes the output.
        """
        ran: list[tuple[str, nn.Module, Tensor]] = []  # the latest alone
        handles = [
            module.register_forward_hook(lambda m, args, out, name=name: ran.__setitem__(slice(None), [(name, m, out)]))
            for name, module in self.model.named_modules()
            if _is_layer(name, module)
        ]
        try:
            out = tensor_output(run(self.model, x))
        finally:
            for handle in handles:
                handle.remove()
        name, layer, logits = ran[0] if ran else ("", None, None)
        if not isinstance(layer, nn.Linear):
            last = f"{name!r} ({type(layer).__name__})" if ran else "unknown"
            raise ValueError(
                f"The layer that ran last is {last}, not nn.Linear. Models for last-layer Laplace end in a linear layer "
                "and return logits; if the last layer is elsewhere, pass last_layer_name."
            )
        self.set_last_layer(name)
        unreduced = self.feature_reduction is not None and out.shape == logits.shape and torch.equal(out, logits)
        try:
            if not unreduced:  # where the model does not reduce, only the features will be
                self.check_last_layer(x)
        except ValueError:
            self.last_layer_name = None
            raise
        return out

    def check_last_layer(self, x: Tensor | MutableMapping[str, Any]) -> None:
        """Check that the model's output is the output of the layer that was named.

        Raises:
            ValueError: If that layer does not run, or if something follows it that changes the output.
        """
        out, kept = self._run(x)
        if not kept:
            raise ValueError(
                f"The layer last_layer_name={self.last_layer_name!r} does not run in the model's forward pass."
            )
        with torch.no_grad():
            rebuilt = self.last_layer(self._reduce(*kept[-1], out))
        self.check_output(rebuilt, out)

    def check_output(self, rebuilt: Tensor, out: Tensor) -> None:
        """Check that the model's output is what the last layer makes of the features.

        Args:
            rebuilt: The last layer's output of the (reduced) features.
            out: The model's output.

        Raises:
            ValueError: If these differ by more than rounding.
        """
        if rebuilt.shape != out.shape or not _same(rebuilt.detach(), out.detach()):
            raise ValueError(
                f"The model's output {tuple(out.shape)} is not the output of its last layer {self.last_layer_name!r} "
                f"{tuple(rebuilt.shape)}. Return raw logits, or state the model's own reduction with feature_reduction "
                f"({', '.join(repr(r.value) for r in FeatureReduction)}). Of a model that goes on otherwise, "
                "as one of pairs does, take subset_of_weights='all'."
            )

    def _reduce(self, features: Tensor, logits: Tensor, out: Tensor) -> Tensor:
        if self.feature_reduction is None or features.ndim == 2:
            return features
        features, logits = features.flatten(1, -2), logits.flatten(1, -2)
        if self.feature_reduction is FeatureReduction.AVERAGE:
            return features.mean(1)
        last = self.feature_reduction is FeatureReduction.PICK_LAST
        if out.shape != logits[:, 0].shape:
            return features[:, -1 if last else 0]
        same = (logits == out[:, None]).all(-1)  # the position that the model picked
        order = torch.arange(1, same.shape[1] + 1, device=same.device)
        picked = (same * (order if last else order.flip(0))).argmax(1)
        nominal = torch.full_like(picked, same.shape[1] - 1 if last else 0)
        picked = torch.where(same.any(1), picked, nominal)
        return features[torch.arange(len(features), device=features.device), picked]


def _is_layer(name: str, module: nn.Module) -> bool:
    """Whether a module can be a last layer: a linear one, though it has parametrisations inside, or one without children."""
    inside = ".parametrizations." in f".{name}."
    return not inside and (isinstance(module, nn.Linear) or not list(module.children()))


def _same(rebuilt: Tensor, out: Tensor) -> bool:
    """Whether two outputs are equal but for rounding, which is small next to the largest values of either."""
    scale = torch.maximum(rebuilt.abs().amax(), out.abs().amax()).double()
    difference = (rebuilt.double() - out.double()).abs().amax()
    finite = bool(torch.isfinite(scale))  # what is not finite is refused elsewhere, with the examples' numbers
    return not finite or bool(difference <= min(max(1e-6, 1e3 * coarsest(rebuilt, out)), 0.05) * scale)
