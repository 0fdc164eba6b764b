"""What a command was given and lies in the run that it would delete first."""

from __future__ import annotations

import os

import dist_cases
import pytest
from test_partials import PLAN

from laplace_dist import cli, cli_training
from laplace_dist.errors import SettingsError
from laplace_dist.run.layout import PLAN as PLAN_KEY
from laplace_dist.run.place import refuse_needed
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

LOST = ["weights.safetensors", "weights.safetensors.index.json", "config.yaml", "posteriors/0123456789abcdef", ""]
KEPT = ["mine.safetensors", "posteriors/mine", "../run-2/weights.safetensors", "../weights.safetensors"]


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "run"))
    store.create(PLAN_KEY, seal_json(PLAN.to_values()))
    for key in (*LOST[:3], f"{LOST[3]}/x", *KEPT[:2]):
        store.create(key, b"content")
    return store


def local(store, name):
    return os.path.join(store.url, name)


def link(store, name):
    os.symlink(store.url, f"{store.url}-link")
    return f"{store.url}-link/{name}"


WAYS = {"a path": local, "a URL": lambda store, name: f"file://{local(store, name)}", "through a link": link}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_the_run_s_is_refused_by_the_name_of_its_flag(store, way, name):
    with pytest.raises(SettingsError, match=r"--weights: got .* would be deleted .*Copy it to another place"):
        refuse_needed(store, {"--data": None, "--weights": way(store, name)})


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_stays_is_not(store, way, name):
    refuse_needed(store, {"--weights": way(store, name)})


def test_a_url_is_compared_by_its_parts(monkeypatch):
    store = Store("memory://needed/run/")
    store.create("weights.safetensors", b"content")
    refuse_needed(store, {"--weights": "memory://needed/runner/weights.safetensors"})
    with pytest.raises(SettingsError, match="--weights"):
        refuse_needed(store, {"--weights": "memory://needed/run/weights.safetensors"})
    store.delete_tree("weights.safetensors")


def test_a_run_is_as_it_was_after_a_job_that_was_to_delete_what_it_needs(tmp_path, capsys):
    run, flags = tmp_path / "run", ["--fresh", "--ray-address=inline", "--gpus-per-worker=0"]
    dist_cases.run_inline(dist_cases.config(run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    own = ["--model=dist_cases:convnet", "--data=dist_cases:blobs", f"--checkpoint={run}", *flags]
    jobs = {"fit": lambda argv: cli.main("fit", argv), "train": cli_training.marglik_main}
    for job in jobs.values():
        for given in (
            ["--config", str(run / "config.yaml"), *flags],
            [*own, f"--weights={run / 'weights.safetensors'}"],
        ):
            assert job(given) == 2
            flag = given[0] if given[0] == "--config" else "--weights"
            assert f"{flag}: got {str(run)!r}"[:-1] in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
