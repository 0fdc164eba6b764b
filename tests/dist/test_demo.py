"""The bundled demo without the packages that take a second to import: its numbers are theirs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from laplace_dist import demo


def test_the_digits_are_those_of_scikit_learn():
    table, bunch = demo._table(), load_digits()
    assert (table[:, :-1] == bunch.data).all() and (table[:, -1] == bunch.target).all()


def test_the_network_is_trained_as_by_torchs_adam(monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 3)
    x, y = demo.digits("train").tensors
    torch.manual_seed(demo.SEED)
    expected = demo.network()
    optimizer = torch.optim.Adam(expected.parameters(), lr=demo.RATE)
    for _ in range(demo.EPOCHS):
        for index in torch.randperm(len(x)).split(demo.BATCH):
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in expected.parameters())
            (nn.functional.cross_entropy(expected(x[index]), y[index]) + demo.DECAY / 2 * penalty).backward()
            optimizer.step()
    found = demo.trained_network()
    for name, weight in found.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_nothing_is_imported_for_it_that_takes_long(environment):
    code = "import sys; from laplace_dist import demo; demo.EPOCHS = 1; demo.trained_network(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "torch._dynamo"} & set(done.stdout.split())


def test_without_scikit_learn_it_says_where_the_digits_are(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        demo.digits("train")
