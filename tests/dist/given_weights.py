"""Weights of a run that are any bytes, for tests in which nobody reads them."""

from __future__ import annotations

from torch import nn

from laplace_dist.run.run_weights import RunWeights


class Given(RunWeights):
    """The bytes that a run has as its weights."""

    def __init__(self, content: bytes) -> None:
        super().__init__(nn.Linear(1, 1))
        self._bytes = content

    def _content(self) -> bytes:
        return self._bytes
