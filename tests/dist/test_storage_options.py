"""Whose options are whose: each of checkpoint, data and weights gets its own, and nobody else's."""

from __future__ import annotations

import dist_cases
import fsspec
import numpy as np
import pytest
import torch
import zarr
from fsspec.implementations.memory import MemoryFileSystem

from laplace_dist import cli, cli_readers, cli_training
from laplace_dist.config.settings import Config
from laplace_dist.data.loader import batches
from laplace_dist.data.sources import hint, load_split, weights_options
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.run.weights import load_model
from laplace_dist.storage.store import Store

PASSWORDS = {"checkpoint": "planted-checkpoint", "data": "planted-data", "weights": "planted-weights"}
TAKEN = {
    "checkpoint": "auto_mkdir",
    "data": "password",
    "weights": "password",
}  # what a local file system takes: no password
FLAGS = {"checkpoint": "storage_options", "data": "data_storage_options", "weights": "weights_storage_options"}


class _Guarded(MemoryFileSystem):
    """Files in memory that ask for a password, and note every one that they were offered."""

    cachable, broken = False, False
    offered: set
    owner: str

    def __init__(self, password: str = "", **others):
        super().__init__()
        type(self).offered |= {password, others.get("auto_mkdir", password)}
        self.right = password == PASSWORDS[self.owner]

    def check(self, path):
        if path is not None and not self.right:
            raise PermissionError(f"{path}: no or another password")
        if path is not None and self.broken:
            raise PermissionError(f"{path}: {PASSWORDS[self.owner]} is not accepted any more")

    def _open(self, path, mode="rb", **options):
        self.check(path if mode == "rb" else None)
        return super()._open(path, mode, **options)

    def cat_file(self, path, *args, **options):
        self.check(path)
        return super().cat_file(path, *args, **options)


@pytest.fixture
def hosts(tmp_path):
    """Make a file system each for data and weights, with what a run needs on them."""
    found = {}
    for name in ("data", "weights"):
        own = {"protocol": f"{name}host", "owner": name, "offered": set(), "store": {}, "pseudo_dirs": [""]}
        found[name] = type(name, (_Guarded,), own)
        fsspec.register_implementation(f"{name}host", found[name], clobber=True)
    x, y = dist_cases.tensors("train")
    group = zarr.create_group("datahost://set", storage_options={"password": PASSWORDS["data"]})
    group.create_array("train/x", data=x.numpy(), chunks=(8, 1, 6, 6))
    group.create_array("train/y", data=y.numpy().astype(np.int64), chunks=(8,))
    with fsspec.open("weightshost://w.pt", "wb", password=PASSWORDS["weights"]) as file:
        torch.save(dist_cases.convnet().state_dict(), file)
    for kind in found.values():
        kind.offered.clear()
    return found


def config(tmp_path, *given: str) -> Config:
    options = {FLAGS[name]: {TAKEN[name]: PASSWORDS[name]} for name in given}
    return dist_cases.config(tmp_path / "run", data="datahost://set", weights="weightshost://w.pt", **options)


def test_each_host_is_offered_its_own_password_alone(tmp_path, hosts):
    dist_cases.run_inline(config(tmp_path, "checkpoint", "data", "weights"))
    assert {name: kind.offered for name, kind in hosts.items()} == {
        name: {PASSWORDS[name]} for name in ("data", "weights")
    }
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not any(password.encode() in content for password in PASSWORDS.values() for content in files)


@pytest.mark.parametrize("name", ["data", "weights"])
def test_a_host_that_was_given_no_options_of_its_own_is_offered_none_and_the_way_out_is_said(tmp_path, hosts, name):
    others = [other for other in PASSWORDS if other != name]
    with pytest.raises((SettingsError, ExampleError)) as caught:
        dist_cases.run_inline(config(tmp_path, *others))
    assert hosts[name].offered == {""}
    said = str(caught.value)
    assert f"--{name}" in said and f"--storage-options go to --checkpoint alone: give --{name}-storage-options" in said
    assert "planted" not in said and "\n" not in said


def test_the_hint_is_given_only_where_it_helps(tmp_path, hosts):
    assert hint(config(tmp_path, "data"), "weights") == "", "no options were given at all"
    assert hint(config(tmp_path, "checkpoint", "data"), "data") == ""
    local = dist_cases.config(tmp_path, storage_options={"key": "abcd"})
    assert hint(local, "data") == hint(local, "weights") == ""


UNDER = [
    ("s3://bucket/run", "s3://bucket/run/weights.safetensors", "checkpoint"),
    ("s3://bucket/run/", "s3://bucket/run/weights.safetensors", "checkpoint"),
    ("s3://bucket/run", "s3://bucket/runner/weights.safetensors", None),
    ("s3://bucket/run", "s3://other/run/weights.safetensors", None),
    ("s3://bucket/run", "gs://bucket/run/weights.safetensors", None),
    ("s3://bucket/run", "s3://bucket/run/../secret/w", None),
    ("s3://bucket/run", "s3://bucket/run/%2e%2e/secret/w", None),
    ("s3://bucket/run", "s3://bucket/run/w::http://other/w", None),
    ("/run", "s3://bucket/run/w", None),
]


@pytest.mark.parametrize(("checkpoint", "weights", "whose"), UNDER, ids=[f"{w} of {c}" for c, w, _ in UNDER])
def test_the_checkpoints_options_open_weights_only_under_the_checkpoint(checkpoint, weights, whose):
    """A run's own settings name its own copy of the weights."""
    given = {"storage_options": {"password": PASSWORDS["checkpoint"]}}
    chosen = dist_cases.config(checkpoint, weights=weights, **given)
    assert weights_options(chosen) == (given["storage_options"] if whose else {})
    own = {"password": PASSWORDS["weights"]}
    assert weights_options(chosen.model_copy(update={"weights_storage_options": own})) == own


@pytest.mark.parametrize("name", ["data", "weights"])
def test_options_for_what_is_no_url_are_refused_and_not_repeated(tmp_path, capsys, name):
    secret = PASSWORDS[name]
    torch.save(dist_cases.convnet().state_dict(), tmp_path / "w.pt")
    argv = ["--model=dist_cases:convnet", "--data=dist_cases:blobs", f"--weights={tmp_path / 'w.pt'}", "--skip-tune"]
    argv += [
        f"--checkpoint={tmp_path / 'run'}",
        f'--{name}-storage-options={{"password": "{secret}"}}',
        "--skip-evaluate",
    ]
    assert cli.main("fit", argv) == 2
    said = capsys.readouterr().err
    assert f"--{name}-storage-options: given, but --{name} is " in said and "is no URL" in said
    assert secret not in said and not (tmp_path / "run").exists()


JOBS = {
    "fit": lambda argv: cli.main("fit", [*argv, "--model=dist_cases:convnet", "--data=dist_cases:blobs"]),
    "tune": lambda argv: cli.main("tune", argv),
    "train": lambda argv: cli_training.marglik_main([*argv, "--model=dist_cases:convnet", "--data=dist_cases:blobs"]),
    "verify": cli.verify_main,
    "status": cli_readers.status_main,
}


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_options_for_a_local_checkpoint_are_refused_by_every_job_and_not_repeated(tmp_path, capsys, job, scheme):
    url, secret = f"{scheme}{tmp_path / 'run'}", PASSWORDS["checkpoint"]
    assert job([f"--checkpoint={url}", f'--storage-options={{"password": "{secret}"}}']) == 2
    said = capsys.readouterr().err
    assert f"--storage-options: given (password), but --checkpoint is '{url}', a local place" in said
    assert secret not in said and not (tmp_path / "run").exists()


def test_options_that_a_local_file_system_takes_stay(tmp_path):
    store = Store(str(tmp_path / "run"), {"auto_mkdir": True})
    assert store.create("one", b"1") and store.read("one") == b"1"


def test_errors_of_a_host_do_not_repeat_its_options(tmp_path, hosts, monkeypatch):
    chosen = config(tmp_path, "data", "weights")
    dataset = load_split(chosen, "train")

    monkeypatch.setattr(_Guarded, "broken", True)
    calls = lambda: load_split(chosen, "train"), lambda: load_model(chosen), lambda: next(batches(dataset, 0, 4, 4))
    for call in calls:
        with pytest.raises((SettingsError, ExampleError)) as caught:
            call()
        assert "planted" not in str(caught.value) and "PermissionError" in str(caught.value)
        assert caught.value.__cause__ is None or "planted" not in str(caught.value.__cause__)
    assert "planted" not in repr(chosen)
