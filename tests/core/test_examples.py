"""The examples run, and say what they are there to show."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Examples import each other as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_regression_finds_the_noise_and_the_documented_prior(tmp_path):
    out = tmp_path / "regression.png"
    fitted = load("regression").main(epochs=400, out=str(out))  # of its 1000, by which both have settled
    after = fitted["evidence after training"]
    # The documentation of the walk-through gives σ ≈ 0.28 and δ ≈ 0.10 for data of the same kind with σ = 0.3; 150 points
    # leave a standard error of 0.3 / sqrt(2 · 150) = 0.017 in σ, and a factor of two either way is usual for δ.
    assert after.sigma_noise.item() == pytest.approx(0.28, abs=0.035)
    assert 0.05 <= after.prior_precision.item() <= 0.2
    assert fitted["evidence during training"].sigma_noise.item() == pytest.approx(0.28, abs=0.035)
    assert out.stat().st_size > 10_000


def test_calibration_is_better_than_the_map(tmp_path):
    out = tmp_path / "calibration.png"
    table = load("calibration").main(out=str(out))
    for name in set(table) - {"MAP"}:
        assert table[name]["nll"] < table["MAP"]["nll"]
        assert table[name]["ece"] < table["MAP"]["ece"]
        assert abs(table[name]["accuracy"] - table["MAP"]["accuracy"]) < 0.02
    assert out.stat().st_size > 10_000


def test_a_hugging_face_classifier_gains_by_every_posterior():
    table = load("huggingface").main()
    assert set(table) == {"MAP", "last_layer × full", "all × kron", "mlp × diag"}
    assert table["MAP"]["accuracy"] > 0.75  # it has learned; a coin has 0.5, and labels are wrong one time in ten
    for name in set(table) - {"MAP"}:
        assert table[name]["nll"] < table["MAP"]["nll"] - 0.05
        assert abs(table[name]["accuracy"] - table["MAP"]["accuracy"]) < 0.02


def test_lora_weights_alone_have_a_distribution(capsys):
    table = load("lora").main()
    assert "256 of 4080 weights have a distribution" in capsys.readouterr().out
    assert table["MAP"]["accuracy"] > 0.7
    for name in ("LoRA × kron", "LoRA × diag"):
        assert table[name]["nll"] < table["MAP"]["nll"] - 0.005
        assert abs(table[name]["accuracy"] - table["MAP"]["accuracy"]) < 0.02


@pytest.mark.parametrize(
    "name, package",
    [("huggingface", "transformers"), ("lora", "peft"), ("regression", "matplotlib"), ("calibration", "matplotlib")],
)
def test_a_missing_package_is_named_with_what_to_install(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f'needs {package}: pip install -e "'):
        module = load(name)
        module.pyplot()


def test_rewards_follow_the_preference_and_are_less_certain_far_away():
    mean, variance = load("reward_model").main()
    assert mean.shape == (4, 1)
    assert variance.shape == (4, 1, 1)
    assert (mean.flatten().diff() > 0).all()
    assert variance[3] > variance[0]
