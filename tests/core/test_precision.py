"""Products of float32 that torch rounds by its own switches: read and set in every way that there is, and told to checks."""

from __future__ import annotations

import subprocess
import sys
from threading import Event, Thread

import pytest
import torch

from laplace.linalg.precision import (
    KINDS,
    coarsest,
    float32_products,
    in_full_precision,
    matmul_precision,
    products_in,
    spacing_of_products,
)

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
