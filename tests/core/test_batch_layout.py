"""Layers that do not see the batch in their first dimension, or see it folded together with positions."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace
from laplace.predictive import glm_distribution


class PositionsFirst(nn.Module):
    """The first layer sees ``(positions, batch, in)``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x.transpose(0, 1)).tanh().mean(0))


class Folded(PositionsFirst):
    """The first layer sees ``(batch · positions, in)``, example by example."""

    def forward(self, x):
        return self.b(self.a(x.flatten(0, 1)).tanh().reshape(*x.shape[:2], 5).mean(1))


class FoldedPositionsFirst(PositionsFirst):
    """The first layer sees ``(positions · batch, in)``, position by position."""

    def forward(self, x):
        n, positions = x.shape[:2]
        return self.b(self.a(x.transpose(0, 1).reshape(-1, 3)).tanh().reshape(positions, n, 5).mean(0))


@pytest.mark.parametrize("positions", [1, 2, 4, 6, 12])
@pytest.mark.parametrize(
    ("kind", "covered"), [(PositionsFirst, False), (Folded, True), (FoldedPositionsFirst, False)], ids=lambda k: str(k)
)
def test_rows_belong_to_examples_whatever_the_layout(kind, covered, positions):
    torch.manual_seed(0)
    model = kind().double()
    x, y = torch.randn(12, positions, 3, dtype=torch.float64), torch.randint(0, 3, (12,))
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    full = Laplace(model, "classification", "all", "full")
    full.fit(loader)
    js, f = full.backend.functorch_jacobians(x)
    p = f.softmax(-1)
    h = torch.einsum("ncp,ncd,ndq->pq", js, torch.diag_embed(p) - p[:, :, None] * p[:, None], js)
    torch.testing.assert_close(full.H, h, rtol=1e-10, atol=1e-12)
    diag = Laplace(model, "classification", "all", "diag")
    diag.fit(loader)
    torch.testing.assert_close(diag.H, h.diagonal(), rtol=1e-10, atol=1e-12)
    kron = Laplace(model, "classification", "all", "kron")
    kron.fit(loader)
    torch.testing.assert_close(glm_distribution(kron, x)[1], kron.functional_variance(js), rtol=1e-10, atol=1e-12)
    if positions > 1:
        structures = {name: structure for name, structure, _ in kron.coverage}
        assert (structures["a.weight"] == "kron") is covered


def test_one_example_is_enough_to_tell_the_batch_from_positions():
    torch.manual_seed(0)
    model = PositionsFirst().double()
    x, y = torch.randn(4, 4, 3, dtype=torch.float64), torch.randint(0, 3, (4,))
    la = Laplace(model, "classification", "all", "full")
    la.initialize(x[:1])
    sums = la.zero_sums()
    la.accumulate(sums, x, y)
    whole = Laplace(model, "classification", "all", "full")
    whole.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    torch.testing.assert_close(sums.tensors["full"], whole.H)
    assert dict((n, r) for n, _, r in la.coverage)["a.weight"].endswith("batch not in the first dimension")
