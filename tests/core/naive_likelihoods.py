"""Likelihoods written down from their definitions for one example in float64: loss, and Hessian or Fisher information."""

from __future__ import annotations

import math

import torch


class Bernoulli:
    def loss(self, f, y):
        p = 1 / (1 + torch.exp(-f))
        return -sum(
            torch.log(p[c]) if bool(y.reshape(f.shape)[c] > 0.5) else torch.log(1 - p[c]) for c in range(len(f))
        )

    def hessian(self, f, y):
        p = 1 / (1 + torch.exp(-f))
        return torch.diag(p * (1 - p))


class Poisson:
    def loss(self, f, y):
        return sum(torch.exp(f[c]) - y[c] * f[c] + math.log(math.factorial(int(y[c]))) for c in range(len(f)))

    def hessian(self, f, y):
        return torch.diag(torch.exp(f))


class Heteroscedastic:
    def loss(self, f, y):
        half = len(f) // 2
        total = 0.0
        for c in range(half):
            variance = torch.exp(f[half + c])
            total = total + (y[c] - f[c]) ** 2 / (2 * variance) + torch.log(2 * math.pi * variance) / 2
        return total

    def hessian(self, f, y):
        """Fisher information: 1/σ² of the mean, ½ of the log variance."""
        half = len(f) // 2
        return torch.diag(torch.cat([torch.exp(-f[half:]), torch.full((half,), 0.5, dtype=f.dtype)]))


class Weighted:
    """The cross entropy of a list of weights ``t`` that the settings and the target make."""

    def __init__(self, class_weights=None, label_smoothing=0.0, ignore_index=None, soft_targets=False):
        self.weights, self.smoothing, self.ignored, self.soft = (
            class_weights,
            label_smoothing,
            ignore_index,
            soft_targets,
        )

    def targets(self, f, y):
        classes = len(f)
        if not self.soft and self.ignored is not None and int(y) == self.ignored:
            return [0.0] * classes
        hard = [float(y[c]) if self.soft else float(c == int(y)) for c in range(classes)]
        weights = self.weights or [1.0] * classes
        return [w * ((1 - self.smoothing) * h + self.smoothing / classes) for w, h in zip(weights, hard, strict=True)]

    def loss(self, f, y):
        p = torch.exp(f) / torch.exp(f).sum()
        return -sum(t * torch.log(p[c]) for c, t in enumerate(self.targets(f, y)))

    def hessian(self, f, y):
        p = torch.exp(f) / torch.exp(f).sum()
        return sum(self.targets(f, y)) * (torch.diag(p) - torch.outer(p, p))
