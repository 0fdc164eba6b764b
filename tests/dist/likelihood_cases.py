"""Likelihoods by import path, and data for them; workers import this module."""

from __future__ import annotations

import dist_cases
import torch
from torch.utils.data import TensorDataset

from laplace.likelihoods import BaseLikelihood, WeightedCategorical


class Exponential(BaseLikelihood):
    """Waiting times whose log rate is the output."""

    def check_shapes(self, f, y, offset=0):
        super().check_shapes(f, y, offset)
        if y.shape != f.shape or bool((y < 0).any()):
            raise ValueError("Waiting times are not negative, and there is one per output.")

    def nll(self, f, y):
        return (y * f.exp() - f).sum(-1)

    def mean(self, f):
        return (-f).exp()

    def draw(self, f, u):
        return -torch.log1p(-u) * (-f).exp()


def ignoring():
    return WeightedCategorical(ignore_index=-100)


def with_argument(index):
    return WeightedCategorical(ignore_index=index)


def no_likelihood():
    return "classification"


def waiting_times(split):
    x, _ = dist_cases.tensors(split, "float64")
    return TensorDataset(x, x.flatten(1)[:, :3].abs())


def counts(split):
    x, _ = dist_cases.tensors(split, "float64")
    return TensorDataset(x, (2 * x.flatten(1)[:, :3].abs()).round())


def binary(split):
    x, _ = dist_cases.tensors(split, "float64")
    return TensorDataset(x, (x.flatten(1)[:, :3] > 0).long())


def partly_labelled(split):
    """Labels of the first batches are all left out."""
    x, y = dist_cases.tensors(split, "float64")
    y[:9] = -100
    return TensorDataset(x, y)
