"""Settings: precedence, what they refuse and in which words, what changes bits, and that secrets stay out of sight."""

from __future__ import annotations

import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from laplace_dist.config.command_line import load_config
from laplace_dist.config.plain_yaml import dump_yaml, parse_yaml
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError

DEFAULTS = {"model": "demo:model", "data": "demo:data", "checkpoint": "./runs/test"}
SECRET = "hunter2hunter2"


def load(*argv):
    return load_config(argv, defaults=DEFAULTS)


def test_flags_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batch-size: 32\nseed: 7\nmodel_args: {width: 8}\nskip-tune: true\n")
    config = load("--config", str(path), "--seed", "9", "--no-skip-tune", "--ood", "far", "near")
    assert (config.model, config.batch_size, config.seed) == ("demo:model", 32, 9)
    assert config.model_args == {"width": 8}
    assert config.skip_tune is False
    assert config.ood == ["far", "near"]


def test_flags_become_the_fields_types():
    argv = ["--data-args", '{"n": 3, "on": true}', "--gpus-per-worker", "0.5", "--segment-size", "64", "--fresh"]
    config = load(*argv, "--segment-timeout", "90")
    assert (config.data_args, config.gpus_per_worker, config.segment_size) == ({"n": 3, "on": True}, 0.5, 64)
    assert (config.segment_timeout, config.fresh) == (90, True)


REFUSED = [
    (["--segment-size", "0"], ["--segment-size", "got 0", "at least 1"]),
    (["--batch-size", "many"], ["--batch-size", "'many'", "whole number"]),
    (["--batch-size", "2.5"], ["--batch-size", "'2.5'", "whole number"]),
    (["--num-workers", "-1"], ["--num-workers", "-1", "at least 1"]),
    (["--gpus-per-worker", "inf"], ["--gpus-per-worker", "inf", "finite"]),
    (["--segment-timeout", "nan"], ["--segment-timeout", "nan"]),
    (["--loader-workers", "-1"], ["--loader-workers", "-1", "at least 0"]),
    (["--loader-workers", "some"], ["--loader-workers", "'some'", "whole number"]),
    (["--loader-workers", "1000"], ["--loader-workers", "1000", "at most 128"]),
    (["--cpus-per-worker", "100000"], ["--cpus-per-worker", "100000", "at most 1024"]),
    (["--batch-size", str(10**20)], ["--batch-size", str(10**20), "less than"]),
    (["--outputs", str(10**20)], ["--outputs", "less than"]),
    (["--mc-samples", "100000"], ["--mc-samples", "100000", "at most 10000"]),
    (["--grid-size", "100000"], ["--grid-size", "100000", "at most 10000"]),
    (["--draws", str(10**9)], ["--draws", "at most 1000000"]),
    (["--dict-key-x", ""], ["--dict-key-x", "''", "at least 1"]),
    (["--dict-key-y", ""], ["--dict-key-y", "''", "at least 1"]),
    (["--data-storage-options", "x"], ["--data-storage-options", "mapping", "JSON or YAML"]),
    (["--likelihood", "poisson"], ["--likelihood", "'poisson'", "classification, regression"]),
    (
        ["--hessian-structure", "krn"],
        ["--hessian-structure", "'krn'", "kron, ekfac, diag, blockdiag, full", "Did you mean kron"],
    ),
    (["--backend", "asdll"], ["--backend", "'asdll'", "native, curvlinops"]),
    (["--estimator", "fisher"], ["--estimator", "'fisher'", "ggn, mc, ef"]),
    (["--subset-of-weights", "some"], ["--subset-of-weights", "'some'", "all, last_layer"]),
    (["--hessian-structure", "gp"], ["'gp'", "not a sum", "kron, diag, full or lowrank"]),
    (["--hessian-structure", "functional"], ["'functional'", "not a sum", "kron, diag, full or lowrank"]),
    (["--ood", "train"], ["--ood", "'train'", "other than train, val and test"]),
    (["--ood", "x" * 129], ["--ood", "at most 128 bytes"]),
    (["--unlabelled", "ü" * 65], ["--unlabelled", "at most 128 bytes"]),
    (["--window", "x" * 129], ["--window", "at most 128 bytes"]),
    (["--model-args", "width"], ["--model-args", "got 'width'", "mapping", "JSON or YAML"]),
    (["--bach-size", "3"], ["--bach-size", "Did you mean --batch-size"]),
    (["--seed"], ["--seed", "expected one argument"]),
    (["--data-args", "{day: !!timestamp 2020-01-01}"], ["--data-args", "JSON can hold"]),
    (["--config", "nowhere.yaml"], ["--config nowhere.yaml", "cannot be read"]),
]


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_a_refusal_names_field_value_and_what_is_accepted(argv, words):
    with pytest.raises(SettingsError) as caught:
        load(*argv)
    for word in words:
        assert word in str(caught.value)


def test_dates_are_text_with_quotes_or_without(tmp_path):
    (tmp_path / "run.yaml").write_text("window: 2026-03-01\ndata_args: {day: 2026-03-01, at: 2026-03-01 10:00:00}\n")
    found = load("--config", str(tmp_path / "run.yaml"))
    assert found.window == "2026-03-01"
    assert found.data_args == {"day": "2026-03-01", "at": "2026-03-01 10:00:00"}
    assert load("--data-args", "{day: 2026-03-01}").data_args == {"day": "2026-03-01"}


def test_numbers_are_numbers_as_in_json(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "prior_range: [1e-4, 1e4]\ndecay: 5e-1\nmodel_args: {a: 1e-3, b: 1, c: .5, d: -2E+3, e: '1e3'}\n"
    )
    found = load("--config", str(tmp_path / "run.yaml"))
    assert (found.prior_range, found.decay) == ([1e-4, 1e4], 0.5)
    assert found.model_args == {"a": 1e-3, "b": 1, "c": 0.5, "d": -2000.0, "e": "1e3"}
    assert isinstance(found.model_args["b"], int)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(["1e3", "1e-3", ".5", "2026-03-01", "1_0", "0x1", "no", "~", "1:20", "+.5E1", "<<", "="]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8,
))  # fmt: skip
def test_what_is_stored_is_what_is_read(value):
    assert parse_yaml(dump_yaml({"value": value})) == {"value": value}


FILES = [
    ("seeed: 3", ["seeed", "run.yaml", "Did you mean seed"]),
    ("batch_size: true", ["batch_size (in", "got True", "whole number"]),
    ("batch-size: 8\nbatch_size: 9", ["batch_size", "given twice"]),
    ("seed: 1\nbatch_size: 8\nbatch_size: 9", ["run.yaml", "batch_size is given twice, again at line 3; keep one"]),
    ("model_args: {width: 1, width: 2}", ["run.yaml", "width is given twice"]),
    ("- 1", ["run.yaml", "holds a list", "name: value"]),
    ("a: [1", ["run.yaml", "is not YAML", "line"]),
    ("ood: far", ["ood (in", "got 'far'", "list"]),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=[text for text, _ in FILES])
def test_a_refusal_in_the_file_names_the_key_as_it_is_written_there(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load("--config", str(path))
    for word in words:
        assert word in str(caught.value)


def test_all_refused_fields_are_named_at_once():
    with pytest.raises(SettingsError) as caught:
        load("--batch-size", "0", "--backend", "none")
    assert "--batch-size" in str(caught.value)
    assert "--backend" in str(caught.value)


def test_required_and_unknown_fields_in_python():
    with pytest.raises(SettingsError, match="--checkpoint: is required") as caught:
        Config(model="a:b", data="c:d", segmentsize=3)
    assert "Did you mean segment_size" in str(caught.value)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3


OPTIONS = ["--storage-options", "--data-storage-options", "--weights-storage-options"]


@pytest.mark.parametrize("flag", OPTIONS)
def test_storage_options_work_but_never_show(flag):
    name = flag[2:].replace("-", "_")
    config = load(flag, f'{{"key": "me", "secret": "{SECRET}", "client_kwargs": {{"x": "{SECRET}"}}}}')
    assert getattr(config, name)["secret"] == SECRET
    shown = [repr(config), str(config), config.to_yaml(), str(config.bits()), str(config.model_dump())]
    assert not any(SECRET in text for text in shown)
    assert getattr(pickle.loads(pickle.dumps(config)), name)["secret"] == SECRET


@pytest.mark.parametrize(
    "argv",
    [
        *([flag, SECRET] for flag in OPTIONS),
        ["--storage-options", f"{{secret: {SECRET}"],
        ["--storage-options", f"[{SECRET}]"],
        ["--storage-options", "{a: b}", SECRET],
        ["--checkpoint", f"s3://me:{SECRET}@bucket/run"],
        ["--weights", f"s3://{SECRET}@bucket/w"],
        ["--config", "FILE"],
    ],
)
def test_errors_do_not_repeat_secrets(tmp_path, argv):
    path = tmp_path / "run.yaml"
    path.write_text(f"storage-options: {SECRET}\ndata-storage-options: [{SECRET}]\nweights-storage-options: {SECRET}\n")
    with pytest.raises(SettingsError) as caught:
        load(*[str(path) if arg == "FILE" else arg for arg in argv])
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_snapshot_can_be_loaded_again_and_deletes_nothing(tmp_path):
    config = load("--batch-size", "8", "--model-args", "{a: 1}", "--fresh", "--storage-options", "{key: abcd}")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(["--config", str(path)])
    assert again.fresh is False
    assert again.storage_options == {}
    assert again.model_dump(exclude={"fresh"}) == config.model_dump(exclude={"fresh"})
    assert "batch-size" in yaml.safe_load(config.to_yaml())


CHANGES_BITS = [
    ("batch_size", 8), ("segment_size", 8), ("cpus_per_worker", 2), ("backend", "curvlinops"), ("estimator", "mc"),
    ("likelihood", "regression"), ("hessian_structure", "diag"), ("subset_of_weights", "last_layer"), ("seed", 1),
    ("mc_samples", 1), ("outputs", [0]), ("collate", "m:f"), ("dict_key_x", "pixel_values"), ("dict_key_y", "target"),
]  # fmt: skip
KEEPS_BITS = [
    ("num_workers", 3), ("gpus_per_worker", 1.0), ("ray_address", "local"), ("segment_timeout", 5.0), ("fresh", True),
    ("skip_tune", True), ("skip_evaluate", True), ("storage_options", {"key": "x"}), ("checkpoint", "elsewhere"),
    ("tune_method", "gridsearch"), ("prior_structure", "diag"), ("grid_size", 5), ("ood", ["far"]),
    ("loader_workers", 3), ("data_storage_options", {"key": "x"}), ("weights_storage_options", {"key": "x"}),
]  # fmt: skip


def test_exactly_the_settings_that_change_bits_are_among_the_bits():
    base = Config(**DEFAULTS)
    for name, value in CHANGES_BITS:
        assert Config(**{**DEFAULTS, name: value}).bits() != base.bits(), name
    for name, value in KEEPS_BITS:
        assert Config(**{**DEFAULTS, name: value}).bits() == base.bits(), name
    assert base.bits(device_type="cuda") != base.bits()


def test_a_run_of_before_these_settings_has_the_digest_of_their_defaults():
    assert not {"collate", "dict_key_x", "dict_key_y", "loader_workers"} & Config(**DEFAULTS).bits().keys()


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for name in Config.model_fields:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "gridsearch"),
        ({"likelihood": "regression"}, "marglik"),
        ({"prior_structure": "layerwise"}, "marglik"),
        ({"tune_method": "marglik"}, "marglik"),
        ({"likelihood": "regression", "tune_method": "gridsearch"}, "gridsearch"),
    ],
)
def test_the_way_of_tuning_follows_the_likelihood_and_the_prior(changes, expected):
    config = Config(model="m:f", data="d:f", checkpoint="run", **changes)
    assert config.tuning == expected


def test_a_wrong_word_for_an_optional_setting_lists_the_valid_ones():
    with pytest.raises(SettingsError, match="expected one of marglik, gridsearch"):
        load_config(["--model", "m:f", "--data", "d:f", "--checkpoint", "run", "--tune-method", "guess"])
