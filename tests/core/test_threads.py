"""Several threads, as of a server, at one model: each gets its own prediction, and nothing of the process stays changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Event

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture.evaluation import eval_mode

from .models import loader


class Meeting(nn.Module):
    """Passes on what it gets, and notes whether two threads were in here at once."""

    def __init__(self):
        super().__init__()
        self.barrier, self.met = None, False

    def forward(self, x):
        if self.barrier is not None:
            try:
                self.barrier.wait(timeout=0.2)
                self.met = True
            except BrokenBarrierError:
                pass
        return x


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_threads_take_turns_at_a_model(subset, pred_type):
    torch.manual_seed(0)
    meeting = Meeting()
    model = nn.Sequential(nn.Linear(3, 4), meeting, nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    la = Laplace(model, "classification", subset, "kron")
    la.fit(loader(x, y))

    def predict(part):
        link = {"link_approx": "mc", "n_samples": 3} if pred_type == "nn" else {}
        return la(part, pred_type=pred_type, generator=torch.Generator().manual_seed(0), **link)

    parts = x.split(6)
    alone = [predict(part) for part in parts]
    meeting.barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(predict, parts))
    assert not meeting.met
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one, two)
    assert model.training


def test_wrappers_of_one_model_take_turns_too():
    meeting = Meeting()
    model = nn.Sequential(nn.Linear(3, 4), meeting, nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    posteriors = [Laplace(model, "classification", subset, "diag") for subset in ("all", "last_layer")]
    for la in posteriors:
        la.fit(loader(x, y))
    meeting.barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda la: la(x), posteriors))
    assert not meeting.met


def test_a_setting_of_the_process_lasts_as_long_as_any_thread_needs_it_and_no_longer():
    first, second = nn.LSTM(2, 2), nn.LSTM(2, 2)
    inside, go = Event(), Event()
    before = torch.backends.mkldnn.enabled

    def other():
        with eval_mode(second):
            inside.set()
            go.wait()
            return torch.backends.mkldnn.enabled

    with ThreadPoolExecutor(1) as pool:
        with eval_mode(first):
            later = pool.submit(other)
            inside.wait()
        go.set()
        assert later.result() is False
    assert torch.backends.mkldnn.enabled == before
