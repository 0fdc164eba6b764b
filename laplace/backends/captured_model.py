r"""A model and its likelihood as a backend sees them: which parameters, from which layers, and one batch captured.

What is then made of a captured batch is the backend's business; see :mod:`laplace.backends.interface`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.admission import check_model
from laplace.capture.blocks import row_key
from laplace.capture.capture import Capture
from laplace.capture.contractions import require_jacobians
from laplace.capture.evaluation import eval_mode
from laplace.capture.feature_extractor import FeatureExtractor
from laplace.capture.forward import failures_named, run
from laplace.capture.last_layer import LastLayerCapture, capture_last_layer, last_layer_sources
from laplace.capture.liveness import live_rows
from laplace.capture.soundness import check_function, check_inputs
from laplace.capture.unproven import Unproven
from laplace.capture.uses import Proven
from laplace.capture.verify import find_layers
from laplace.data.batches import few, is_divisible, length_of, part_of, tensors_of, which_have_rows
from laplace.data.mistakes import check_outputs
from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.named import NamedLikelihood
from laplace.linalg.memory import at_once, ranges
from laplace.noise import fixed_directions
from laplace.structures.registry import sums_spec, warn_of_diagonal_blocks
from laplace.structures.specification import SumsSpec
from laplace.structures.subnetwork import check_subnetwork_indices, split_indices

_HELD = 1 << 27  # elements of rows and gradients that are held at once, beyond those of one backward pass


class CapturedModel:
    """What every backend knows of its model; the arguments are those of :class:`CurvatureInterface`."""

    likelihood = NamedLikelihood()

    def __init__(
        self,
        model: nn.Module,
        likelihood: BaseLikelihood | Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ):
        """See the class."""
        self.likelihood = likelihood
        self.model = model
        self.last_layer = last_layer
        self.subnetwork_indices = subnetwork_indices
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self._spec: SumsSpec | None = None
        self._known: list[tuple[str, str | None]] | None = None  # sources of which the two below are
        self._unproven = Unproven()
        self._with_rows: dict[tuple, bool] = {}  # what in dict-like batches has a row for each example
        self._is_asked = False  # whether the batch that is being added has been asked what is open
        self._proven: Proven = {}
        self._sizes: tuple[SumsSpec | None, dict[Any, tuple[int, int]]] = (None, {})

    @property
    def spec(self) -> SumsSpec | None:
        """Names and shapes of the sums, and where every parameter's curvature comes from; None before :meth:`initialize`.

        Of another one than :meth:`initialize` found here, as a stored posterior has it, no batch has shown anything yet.
        """
        return self._spec

    @spec.setter
    def spec(self, value: SumsSpec | None) -> None:
        self._spec = value
        if value is None or _sources(value) == self._known:
            return
        modules = [name for name, _ in self._whole_model.named_modules()]
        layers = [] if self.last_layer else [layer or row_key(name) for name, layer in _sources(value)]
        self._learn(value, Unproven(modules, layers, None if self._leaves_parameters_out else ()))

    def _learn(self, spec: SumsSpec, unproven: Unproven) -> None:
        self._spec, self._known, self._unproven, self._proven = spec, _sources(spec), unproven, {}

    @property
    def likelihood_object(self) -> BaseLikelihood:
        """The likelihood of the training data; loss and factor follow it."""
        return self._likelihood_object

    @likelihood_object.setter
    def likelihood_object(self, value: BaseLikelihood) -> None:
        self._likelihood_object = value.fitted
        loss, self.factor = self._likelihood_object.torch_loss()
        self.lossfunc = self._likelihood_object.loss if loss is None else loss

    @property
    def named_params(self) -> dict[str, nn.Parameter]:
        """The parameters under consideration by name, in the order of the parameter vector."""
        if self.last_layer:
            assert isinstance(self.model, FeatureExtractor)
            prefix = self.model.last_layer_name
            return {f"{prefix}.{n}": p for n, p in self.model.last_layer.named_parameters() if p.requires_grad}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def kept_entries(self) -> dict[str, tuple[int, ...] | None]:
        """Parameters that have to be differentiated, and which of their entries are kept (None for all).

        Without a subnetwork these are all of :attr:`named_params`. With one, tensors that hold none of it are missing:
        curvature is then computed for the others alone, and reduced to the chosen entries.
        """
        sizes = {name: p.numel() for name, p in self.named_params.items()}
        if self.subnetwork_indices is None:
            return dict.fromkeys(sizes)
        return split_indices(check_subnetwork_indices(self.subnetwork_indices, sum(sizes.values())), sizes)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters under consideration."""
        return list(self.named_params.values())

    @property
    def sums_dtype(self) -> torch.dtype:
        """Precision of the sums: that of the parameters, but float32 at least."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    def initialize(self, x: Tensor | MutableMapping[str, Any], structure: str) -> SumsSpec:
        """Decide from one batch which parameter's curvature comes from where.

        Raises:
            ValueError: If a subnetwork is to be Kronecker-factored or taken by layers.
        """
        if structure in ("kron", "ekfac", "blockdiag") and self.subnetwork_indices is not None:
            raise ValueError(
                "Single entries of a weight have neither a block of a layer nor Kronecker factors; subnetworks take 'full' or "
                "'diag'."
            )
        named, kept = self.named_params, self.kept_entries()
        shapes = {name: tuple(named[name].shape) for name in kept}
        check_inputs(x)
        self._with_rows = which_have_rows(x)
        x = few(x)
        with eval_mode(self.model):
            check_model(self.model)
            modules = check_function(self._whole_model, x)
            before, dead = self._dead_before(x), set[str]()
            if self.last_layer:
                with torch.no_grad():  # a last layer ends the model, so its graph shows nothing
                    f, features = self.model.forward_with_features(x)
                found = last_layer_sources(self.model.last_layer, self.model.last_layer_name, shapes, features.detach())
            else:
                found = find_layers(self.model, list(shapes), x)
                keys = [(source.layer or row_key(name), source.alive) for name, source in found.items()]
                dead = {key for key, _ in keys} - {key for key, alive in keys if alive}
                with torch.enable_grad():
                    f = self.model(x)
        check_outputs(x, f)
        self.likelihood_object.warn_of_outputs(f)
        n_outputs = self.likelihood_object.count_outputs(f)
        bare = next(self._whole_model.children(), None) is None
        spec = sums_spec(structure, shapes, found, self.sums_dtype, n_outputs, kept, bare)
        self._learn(spec, Unproven(modules, dead, before))
        warn_of_diagonal_blocks(self.spec, self._whole_model)
        return self.spec

    @property
    def _leaves_parameters_out(self) -> bool:
        """Whether the model has parameters that a fit does not differentiate."""
        return self.last_layer or not all(p.requires_grad for p in self.model.parameters())

    def _dead_before(self, x: Any) -> set[str]:
        """What has no gradient in this batch of that which a fit does not differentiate."""
        if not self._leaves_parameters_out or not is_divisible(x):
            return set()
        return {name for name, row in live_rows(self._whole_model, x).items() if row is None}

    @property
    def _whole_model(self) -> nn.Module:
        return self.model.model if self.last_layer else self.model

    def capture(self, x: Tensor | MutableMapping[str, Any]) -> Capture | LastLayerCapture:
        """One forward pass that remembers what every contraction needs.

        Raises:
            ValueError: If the batch uses parameters otherwise than the first one, or is the first to show that examples depend
                on one another, which gradients along a direction may do too.
        """
        self._check_rows(x)
        with eval_mode(self.model), self._unproven.watched(self._whole_model, x):
            self._unproven.look_before(self._whole_model, x)
            capture = self._unchecked_capture(x)
        if isinstance(capture, Capture):
            if self._unproven.layers:
                capture.watch = partial(self._unproven.look_at_gradients, self.model, x)
            capture.check_uses(
                name for block in self.spec.blocks for name in (block.parameter, block.layer) if block.layer
            )
            capture.check_attribution()
        return capture

    def _check_rows(self, x: Any) -> None:
        """Refuse a batch where something would be taken for rows of examples that was for all of them before, or the other way.

        Raises:
            ValueError: If there is such a thing; names it.
        """
        now = which_have_rows(x)
        self._with_rows = {**now, **self._with_rows}
        for path in now:
            if now[path] != self._with_rows[path]:
                raise ValueError(
                    f"In a batch of {length_of(x)} examples, {'.'.join(map(str, path))!r} "
                    f"{'looks as if it had' if now[path] else 'has not'} a row for each of them, other than before. Keep what "
                    "belongs to all examples together in the model, or give batches of another size."
                )

    def check_batch(self, x: Any, y: Tensor | None = None, offset: int = 0) -> None:
        """Ask a batch of which others than :meth:`capture` make the passes, if something is still open that it may show.

        Args:
            x: Inputs.
            y: Targets that are to be checked beside the outputs; of the same pass, so that there is one more at most.
            offset: Index in the data set of the batch's first example.

        Raises:
            NonFiniteError: If an output or target is NaN or Inf; names the examples.
            ValueError: If it is the first to show that examples depend on one another; names the module. If targets do not fit.
        """
        self._check_rows(x)
        if self._is_asked:
            return
        open_ = self._unproven
        with eval_mode(self.model):
            open_.look_before(self._whole_model, x)
        if y is None and not open_.modules and not open_.layers:
            return
        with eval_mode(self.model), torch.no_grad(), open_.watched(self._whole_model, x):
            capture = self._unchecked_capture(x) if open_.layers else None
            f = run(self.model, x, "this batch") if capture is None else capture.f
        if y is not None:
            self.likelihood_object.check(f, y, offset)
        if open_.layers and isinstance(capture, Capture):
            open_.look_at_gradients(self.model, x, capture.gradients(fixed_directions(capture.f)))

    def _unchecked_capture(self, x: Tensor | MutableMapping[str, Any]) -> Capture | LastLayerCapture:
        assert self.spec is not None, "initialize() comes first"
        self._check_gradients()
        with eval_mode(self.model), failures_named(self._whole_model, x, "this batch"):
            others = [block.parameter for block in self.spec.blocks if block.layer is None]
            if self.last_layer:
                capture = capture_last_layer(self.model, x, self.spec.torch_dtype, others)
            else:
                layers = dict.fromkeys(block.layer for block in self.spec.blocks if block.layer is not None)
                capture = Capture(self.model, x, layers, others, self.spec.torch_dtype, self._proven)
        if len(capture.f):
            self._known_sizes[_shapes(x)] = capture.f[0].numel(), capture.width
        return capture

    def parts(
        self, x: Tensor | MutableMapping[str, Any], every_output: bool = False, outputs: int | None = None
    ) -> list[tuple[slice, Any]]:
        """Parts of a batch that are captured one after the other, each with its range of examples.

        There is one, the whole batch, unless what is held of it at once is more than about ``_HELD`` elements: the rows of
        parameters without a layer along one direction, or where ``every_output`` is needed at once, as for variances, these and
        the layers' output gradients along as many directions as there are outputs, or as ``outputs`` says.

        Raises:
            NotEnoughMemoryError: If the rows of one example are larger than the free memory.
        """
        assert self.spec is not None, "initialize() comes first"
        others = [block for block in self.spec.blocks if block.layer is None]
        several = every_output or outputs is not None
        if not is_divisible(x) or not (others or several):
            return [(slice(0, None), x)]
        n, size = length_of(x), sum(torch.Size(block.shape).numel() for block in others)
        count, inner = self._size_of_example(x) if several else (1, 0)
        outputs = count if outputs is None else outputs
        if others:
            names = ", ".join(block.parameter for block in others)
            require_jacobians(1, outputs, size, self.spec.torch_dtype, self.params[0].device, f" ({names})")
        found = [
            slice(start, stop)
            for start, stop in ranges(n, outputs * (size + inner), at_once(_HELD, self.params[0].device))
        ]
        return [(part, part_of(x, part)) for part in found] if len(found) > 1 else [(slice(0, n), x)]

    def _size_of_example(self, x: Any) -> tuple[int, int]:
        """Number of outputs of an example over all its positions, and elements of what comes out of its layers."""
        if not (shapes := _shapes(x)) or shapes not in self._known_sizes:
            self._unchecked_capture(part_of(x, slice(0, 2)))
        return self._known_sizes[shapes]

    @property
    def _known_sizes(self) -> dict[Any, tuple[int, int]]:
        """Sizes of examples by the shapes of their inputs, of the model as it is initialised."""
        if self._sizes[0] is not self.spec:
            self._sizes = (self.spec, {})
        return self._sizes[1]

    def _check_gradients(self) -> None:
        """Refuse a model whose ``requires_grad`` flags are not those that it was initialised with."""
        now, then = self.named_params, {block.parameter for block in self.spec.blocks}
        changed = [name for name in then if name not in now]
        if self.subnetwork_indices is None:
            changed += [name for name in now if name not in then]
        if changed:
            raise ValueError(
                f"requires_grad of {sorted(changed)} has changed since the fit: the posterior is over {len(then)} parameter "
                f"tensors, the model now has {len(now)} with gradients. Set it back, or fit a copy of the model for each."
            )

    def _outputs_per_example(self, x: Any) -> int:
        """Number of outputs of an example, over all its positions."""
        with eval_mode(self.model), torch.no_grad():
            return run(self.model, part_of(x, slice(0, 2)), "this batch")[0].numel()


def _shapes(x: Any) -> tuple[torch.Size, ...]:
    """Shapes of the inputs of one example."""
    return tuple(value.shape[1:] for value in tensors_of(x))


def _sources(spec: SumsSpec) -> list[tuple[str, str | None]]:
    """Parameters, and the layers that their curvature comes from."""
    return [(block.parameter, block.layer) for block in spec.blocks]
