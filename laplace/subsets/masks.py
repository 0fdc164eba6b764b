"""Which parameters form the subnetwork: a model turned into indices of its parameter vector, here by names.

The parameter vector consists of all parameters with ``requires_grad``, in the order of the model. A strategy of your
own is a subclass of :class:`SubnetMask` with :meth:`~SubnetMask.get_subnet_mask`, or of
:class:`laplace.subsets.scored_masks.ScoreBasedSubnetMask` with ``compute_param_scores``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace.capture.evaluation import eval_mode
from laplace.capture.feature_extractor import FeatureExtractor
from laplace.data.batches import batches
from laplace.data.calling import called_by_batch
from laplace.linalg.dense import parameter_vector


class SubnetMask:
    """A choice of parameters, made once by :meth:`select`.

    Args:
        model: Trained network.

    Attributes:
        parameter_vector: All parameters with ``requires_grad`` as one vector.

    Raises:
        ValueError: If there is nothing to choose from, or no such choice; so for every strategy.
    """

    def __init__(self, model: nn.Module):
        """See the class."""
        self.model = model
        own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        named = model.named_parameters(
            remove_duplicate=False
        )  # of modules that share a parameter, each has a name for it
        self._own_names = {name: own[id(p)] for name, p in named if id(p) in own}
        self._sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        if not self._sizes:
            raise ValueError("The model has no parameter with requires_grad=True, so there is nothing to choose from.")
        self.parameter_vector = parameter_vector(p for p in model.parameters() if p.requires_grad).detach()
        self._n_params = len(self.parameter_vector)
        self._indices: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """Sorted indices of the chosen parameters ``(subnetwork parameters,)``.

        Raises:
            AttributeError: Before :meth:`select`.
        """
        if self._indices is None:
            raise AttributeError("The subnetwork has not been selected yet: call select() first.")
        return self._indices

    @property
    def n_params_subnet(self) -> int:
        """Number of chosen parameters."""
        return len(self.indices)

    def select(self, train_loader: DataLoader | None = None) -> Tensor:
        """Choose the subnetwork.

        Args:
            train_loader: Training data, for strategies that look at it.

        Returns:
            Sorted indices of the parameter vector, for ``subnetwork_indices``.

        Raises:
            ValueError: On a second call, or if the strategy needs data and gets none.
        """
        if self._indices is not None:
            raise ValueError("The subnetwork has been selected already; make a new mask for another choice.")
        self._indices = self.convert_subnet_mask_to_indices(self.get_subnet_mask(train_loader))
        return self._indices

    def get_subnet_mask(self, train_loader: DataLoader | None) -> Tensor:
        """The strategy.

        Args:
            train_loader: What :meth:`select` was given.

        Returns:
            A mask over the parameter vector, ``(parameters,)`` of booleans or of zeros and ones.
        """
        raise NotImplementedError

    def convert_subnet_mask_to_indices(self, subnet_mask: Tensor) -> Tensor:
        """Indices of the ones of a mask.

        Args:
            subnet_mask: What :meth:`get_subnet_mask` gave.

        Raises:
            ValueError: If it is not a mask over the parameter vector, or chooses nothing.
        """
        if not isinstance(subnet_mask, Tensor) or subnet_mask.shape != (self._n_params,):
            shape = tuple(subnet_mask.shape) if isinstance(subnet_mask, Tensor) else type(subnet_mask).__name__
            raise ValueError(f"The mask has shape {shape}, expected ({self._n_params},).")
        if not bool(((subnet_mask == 0) | (subnet_mask == 1)).all()):
            raise ValueError("The mask holds values other than 0 and 1.")
        indices = subnet_mask.nonzero().flatten()
        if len(indices) == 0:
            raise ValueError("The mask is 0 everywhere, so the subnetwork would be empty.")
        return indices

    def _mask_of(self, chosen: Iterable[str]) -> Tensor:
        """Ones on the parameters of these names."""
        chosen = {self._own_names[name] for name in chosen}
        device = self.parameter_vector.device
        return torch.cat([torch.full((n,), name in chosen, device=device) for name, n in self._sizes.items()])


class ParamNameSubnetMask(SubnetMask):
    """Whole parameter tensors, by name.

    Args:
        model: Trained network.
        parameter_names: Names as in ``model.named_parameters()``.

    Example:
        >>> import torch
        >>> from laplace.utils import ParamNameSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> indices = ParamNameSubnetMask(model, parameter_names=["0.bias"]).select()
        >>> len(indices)
        4
    """

    def __init__(self, model: nn.Module, parameter_names: Sequence[str]):
        """See the class."""
        super().__init__(model)
        self._parameter_names = _checked_names("parameter_names", parameter_names, self._own_names)

    def get_subnet_mask(self, train_loader: DataLoader | None) -> Tensor:
        """Ones on these parameters."""
        return self._mask_of(self._parameter_names)


class ModuleNameSubnetMask(SubnetMask):
    """All parameters of some modules, by name.

    Args:
        model: Trained network.
        module_names: Names as in ``model.named_modules()``; a module's children belong to it.

    Example:
        >>> import torch
        >>> from laplace.utils import ModuleNameSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> indices = ModuleNameSubnetMask(model, module_names=["2"]).select()
        >>> len(indices)
        15
    """

    def __init__(self, model: nn.Module, module_names: Sequence[str]):
        """See the class."""
        super().__init__(model)
        self._module_names = _checked_names("module_names", module_names, _modules(model))
        for module in self._module_names:
            if not self._parameters_of(module):
                raise ValueError(f"Module {module!r} has no parameter with requires_grad=True.")

    def _parameters_of(self, module: str) -> list[str]:
        prefix = f"{module}." if module else ""
        return [name for name in self._own_names if name.startswith(prefix)]

    def get_subnet_mask(self, train_loader: DataLoader | None) -> Tensor:
        """Ones on the parameters of these modules."""
        return self._mask_of(name for module in self._module_names for name in self._parameters_of(module))


class LastLayerSubnetMask(ModuleNameSubnetMask):
    """All parameters of the last layer.

    Args:
        model: Trained network.
        last_layer_name: Name of the last layer; found by a forward pass on ``train_loader`` if None.

    Example:
        >>> import torch
        >>> from laplace.utils import LastLayerSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> indices = LastLayerSubnetMask(model).select([(x, y)])
        >>> len(indices)
        15
    """

    def __init__(self, model: nn.Module, last_layer_name: str | None = None):
        """See the class."""
        SubnetMask.__init__(self, model)
        if last_layer_name is not None:
            self._module_names = _checked_names("last_layer_name", [last_layer_name], _modules(model))
            if not self._parameters_of(last_layer_name):
                raise ValueError(f"last_layer_name={last_layer_name!r} has no parameter with requires_grad=True.")
        self._last_layer_name = last_layer_name

    def get_subnet_mask(self, train_loader: DataLoader | None) -> Tensor:
        """Ones on the last layer's parameters."""
        if self._last_layer_name is None:
            self._module_names = [self._find(required(train_loader))]
        return super().get_subnet_mask(train_loader)

    def _find(self, train_loader: DataLoader) -> str:
        extractor = FeatureExtractor(called_by_batch(self.model))
        x, _ = next(batches(train_loader, self.parameter_vector.device))
        with eval_mode(self.model), torch.no_grad():
            extractor.find_last_layer(x)
        return extractor.last_layer_name


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by all of their names."""
    return dict(model.named_modules(remove_duplicate=False))


def required(train_loader: DataLoader | None) -> DataLoader:
    """The data that a strategy looks at.

    Raises:
        ValueError: If there are none.
    """
    if train_loader is None:
        raise ValueError("This strategy looks at the training data: call select(train_loader).")
    return train_loader


def _checked_names(what: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not names:
        raise ValueError(f"{what}={names!r} must be a non-empty list of names.")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what} holds {unknown}; valid names are {[name for name in known if name]}.")
    return list(names)
