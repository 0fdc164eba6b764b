"""Products of float32 that torch rounds by its own switches: read and set in every way that there is, and told to checks."""

from __future__ import annotations

import subprocess
import sys
from threading import Event, Thread

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, marglik_training
from laplace.linalg.precision import (
    KINDS,
    coarsest,
    float32_products,
    in_full_precision,
    matmul_precision,
    products_in,
    spacing_of_products,
)
from laplace.utils import fit_diagonal_swag_var

WAYS = {
    "nothing": "pass",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "all": "torch.backends.fp32_precision = 'tf32'",
    "one kind of many": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
}
AROUND = """
import torch
{way}
from laplace.linalg import precision
before = precision.float32_products()
with precision.in_full_precision():
    assert not set(precision.float32_products(["cuda.matmul", "mkldnn.matmul"]).values()) & {{"bf16"}}
assert precision.float32_products() == before
with precision.products_in("ieee"):
    assert set(precision.float32_products().values()) == {{"ieee"}}, precision.float32_products()
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
with precision.products_in("tf32"):
    assert set(precision.float32_products().values()) == {{"tf32"}}
after = precision.float32_products()
assert {{k: v.replace("none", "ieee") for k, v in after.items()}} == {{k: v.replace("none", "ieee") for k, v in before.items()}}
"""


@pytest.mark.parametrize("way", WAYS)
def test_switches_are_read_set_and_left_as_they_were(way):
    """Each in a process of its own: torch refuses to read its older switches once the newer ones were used."""
    done = subprocess.run([sys.executable, "-c", AROUND.format(way=WAYS[way])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.fixture
def medium():
    """Products on CPUs may round to bfloat16."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_checks_know_how_coarse_products_are(medium):
    cpu = torch.device("cpu")
    assert spacing_of_products(cpu) == coarsest(torch.ones(1)) == 2.0**-7
    assert coarsest(torch.ones(1, dtype=torch.float16)) == 2.0**-7
    with in_full_precision():
        assert coarsest(torch.ones(1)) == torch.finfo(torch.float32).eps
    assert spacing_of_products(torch.device("meta")) == 0.0


def test_a_decorated_function_that_calls_itself_and_fails_leaves_all_as_it_was(medium):
    """Each call has a block of its own, and every one of them ends."""
    seen = []

    @in_full_precision()
    def count(n):
        seen.append((float32_products()["mkldnn.matmul"], torch.is_autocast_enabled("cpu")))
        return count(n - 1) if n else 1 / n

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            count(2)
        assert torch.is_autocast_enabled("cpu")
        assert float32_products()["mkldnn.matmul"] == "bf16"
    assert seen == [("ieee", False)] * 3


def test_the_word_for_what_was_found(medium):
    assert matmul_precision(float32_products()) == "medium" == torch.get_float32_matmul_precision()
    with products_in("tf32"):
        assert matmul_precision(float32_products()) == "high"
    assert matmul_precision(dict.fromkeys(KINDS, "none")) == "highest"


def test_a_thread_stays_in_full_precision_where_another_leaves_it(medium):
    entered, left = Event(), Event()

    def other():
        with in_full_precision():
            entered.set()
            left.wait(60)

    thread = Thread(target=other)
    thread.start()
    assert entered.wait(60)
    with in_full_precision():
        left.set()
        thread.join()
        assert float32_products(["mkldnn.matmul"]) == {"mkldnn.matmul": "ieee"}
    assert float32_products(["mkldnn.matmul"]) == {"mkldnn.matmul": "bf16"}


# --- what autocast keeps between passes ----------------------------------------------------------------------------------


def with_and_without_autocast(function, make):
    """What a function makes of a network in a block of autocast, and of one in single precision."""
    found = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(float(function(make())))
    return found


def test_a_first_pass_without_gradients_takes_none_from_the_next():
    """As of torch's fast path of an encoder, which autocast would go on with."""
    x, y = torch.randn(6, 4, 8), torch.arange(6) % 3
    make = lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(32, 3))  # noqa: E731

    def fit(model):
        la = Laplace(model.eval(), "classification", "all", "kron")
        la.fit([(x, y)])
        assert [name for name, kind, _ in la.coverage if kind == "diag"] == [
            name for name, _ in model.named_parameters() if "norm" in name
        ]
        return la.log_marginal_likelihood()

    half, single = with_and_without_autocast(fit, make)
    assert half == pytest.approx(single, rel=1e-2)


@pytest.mark.parametrize("how", ["marglik_training", "swag"])
def test_training_sees_the_weights_of_the_last_step(how):
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)

    def trained(model):
        if how == "swag":
            return fit_diagonal_swag_var(model, data, nn.MSELoss(), n_snapshots_total=3, lr=0.05).norm()
        return marglik_training(
            model, data, "regression", "diag", n_epochs=4, n_hypersteps=1, optimizer_kwargs={"lr": 0.05}
        )[3][-1]

    make = lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    half, single = with_and_without_autocast(trained, make)
    assert half == pytest.approx(single, rel=0.1)
