"""No code from a file that is read, no path out of the checkpoint, no credential anywhere."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import dist_cases
import psutil
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from storage_cases import SMALL, recorded_run

import laplace_dist
from laplace_dist import cli, cli_settings, load_posterior
from laplace_dist.config.command_line import load_config
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.job import fit
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.settings_file import seal_yaml
from laplace_dist.storage import object_store
from laplace_dist.storage.sealed_json import seal_json

OWN = (CheckpointError, SettingsError, RunFailed)
SECRETS = {"key": "PLANTEDKEY0123", "secret": "planted/secret+0123", "token": "planted-token-0123"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a finished run; not to be changed."""
    url = tmp_path_factory.mktemp("finished") / "run"
    recorded_run(dist_cases.config(url, **SMALL))
    return url


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Evil:
    """Creates a marker when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def evil_bytes(marker):
    """Return the forms in which a pickle could hide: plain, as torch's archive, as torch's old format, as NumPy's."""
    folder = marker.parent / "evil"
    folder.mkdir(exist_ok=True)
    plain = pickle.dumps(Evil(marker), protocol=2)
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3")
    torch.save({"x": Evil(marker)}, folder / "new")
    torch.save({"x": Evil(marker)}, folder / "old", _use_new_zipfile_serialization=False)
    return [plain, *((folder / name).read_bytes() for name in ("zip", "new", "old"))]


def uses(url):
    """Yield every way to read a run, each of which returns what it says of bad objects or raises an error."""

    def problems():
        return [text for _, text in laplace_dist.verify(str(url)).problems]

    def silently(call, *args, **options):
        return lambda: call(*args, **options) and None

    yield silently(recorded_run, dist_cases.config(url, **SMALL))
    yield silently(load_posterior, str(url), dist_cases.convnet(), load_weights=True)
    yield problems
    yield silently(laplace_dist.status, str(url))
    yield silently(cli_settings.settings_of_run, dist_cases.config(url))


def test_a_pickle_in_any_file_of_a_run_is_never_loaded(finished, tmp_path):
    """In the place of every object in turn; where the object is read, the error names it."""
    marker = tmp_path / "marker"
    pickle.loads(evil_bytes(marker)[0])
    assert marker.exists(), "the pickle would do its work"
    marker.rmdir()
    evil, silent, groups = evil_bytes(marker), [], {}
    for key in Checkpoint(str(finished)).list():
        part = re.search(r"zarr.json$|/c(/|$)", key)
        groups.setdefault((key.split("/")[0], part[0]) if part else key, []).append(key)
    assert len(groups) > 15
    for number, keys in enumerate(
        groups.values()
    ):  # objects one by one; the chunks of a folder, and their metadata, at once
        url = Path(shutil.copytree(finished, tmp_path / "run"))
        said = []
        for use in uses(url):
            for key in keys:
                (url / key).write_bytes(evil[number % len(evil)])
            try:
                said += use() or []
            except OWN as error:
                said.append(str(error))
        assert not marker.exists(), keys
        if not any(key in text for text in said for key in keys):
            silent.append(keys)
        shutil.rmtree(url)
    assert silent == []


@pytest.mark.parametrize("form", range(4), ids=["plain", "archive", "torch", "old torch"])
def test_a_pickle_as_weights_is_refused(tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    path.write_bytes(evil_bytes(marker)[form])
    with pytest.raises(SettingsError, match=r"--weights .*weights.pt: is not a state dict"):
        recorded_run(dist_cases.config(tmp_path / "run", weights=str(path)))
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


YAML = [
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/new:os.mkdir [{marker}]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
]


@pytest.mark.parametrize("text", YAML, ids=[text.split(":")[0] for text in YAML])
def test_yaml_runs_nothing(run, tmp_path, text):
    """In a settings file, in flags, and in the snapshot that a run keeps, with a true digest."""
    marker = tmp_path / "marker"
    text = text.format(marker=marker)
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: {text}\n")
    with pytest.raises(SettingsError, match=r"run.yaml: is not YAML"):
        load_config(["--config", str(path)])
    for flag in ("--model-args", "--data-args", "--storage-options"):
        with pytest.raises(SettingsError, match=flag):
            load_config([flag, f"{{a: {text}}}", "--model=m:f", "--data=d:f", "--checkpoint=c"])
    Checkpoint(str(run)).replace("config.yaml", seal_yaml(f"seed: {text}\n"))
    with pytest.raises(CheckpointError, match="config.yaml was altered"):
        cli_settings.settings_of_run(dist_cases.config(run))
    assert "config.yaml" in dict(laplace_dist.verify(str(run)).problems)
    assert not marker.exists()


# ------------------------------------------------------------------ paths

OUTSIDE = [
    "../../outside",
    "/etc",
    "s3://bucket/x",
    "file:///etc",
    "a/../../..",
    "..\\..",
    "partials/000000/../../../x",
    "",
]


def forge(store, key, change):
    """Change a sealed object and seal it again."""
    values = open_json(store.read(key), key)
    change(values)
    store.replace(key, seal_json(values))


def set_prefix(prefix):
    def change(values):
        for place in values["factors"].values() if "factors" in values else [values]:
            place["prefix"] = prefix

    return change


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_in_a_manifest_leaves_the_checkpoint(run, monkeypatch, path):
    """Prefixes, attempt, version and tuning, each sealed with a true digest; only files of the checkpoint are opened."""
    store = Checkpoint(str(run))
    version = open_json(store.read("CURRENT.json"), "CURRENT.json")["version"]
    keys = [
        k
        for k in store.list()
        if k.endswith(".json") and "arrays" in store.read(k).decode() and "prefix" in k + store.read(k).decode()
    ]
    changes = [
        (key, set_prefix(path)) for key in (*keys, f"posteriors/{version}.json") if not key.endswith("zarr.json")
    ]
    changes += [
        ("CURRENT.json", lambda values, name=name: values.update({name: path})) for name in ("version", "tuning")
    ]
    changes += [("partials/000000.json", lambda v: v.update(attempt=path, prefix=f"partials/000000/{path}"))]
    assert len(changes) >= 8
    opened, cat = [], LocalFileSystem.cat_file
    monkeypatch.setattr(LocalFileSystem, "cat_file", lambda fs, name, **o: opened.append(name) or cat(fs, name, **o))
    # One function judges the paths of all places, so that each place has half of them: one that climbs, and one from elsewhere.
    for key, change in changes[OUTSIDE.index(path) // 2 % 2 :: 2]:
        good = store.read(key)
        forge(store, key, change)
        said = []
        for use in uses(run):
            try:
                said += use() or []
            except OWN as error:
                said.append(str(error))
        assert any(key in text for text in said), (key, said)
        store.replace(key, good)
        assert laplace_dist.verify(str(run), collect_orphans_older_than=1000).ok
    assert opened
    assert all(os.path.realpath(name).startswith(f"{os.path.realpath(run)}/") for name in opened)


def test_collecting_orphans_deletes_nothing_that_a_forged_manifest_points_at(run, tmp_path):
    """A path in a manifest is only ever compared with what is there."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    forge(Checkpoint(str(run)), "partials/000000.json", set_prefix("../outside"))
    report = laplace_dist.verify(str(run), collect_orphans_older_than=0)
    assert report.collected == [] and not report.ok
    assert (tmp_path / "outside" / "precious").exists()


@pytest.mark.parametrize("what", ["codec", "dtype"])
def test_an_array_with_other_codecs_or_types_is_refused(run, what):
    """Even if its manifest says so: an object array or a codec of someone else's could run code."""
    import hashlib
    import json

    store = Checkpoint(str(run))
    manifest = open_json(store.read("partials/000000.json"), "partials/000000.json")
    key = f"{manifest['prefix']}/00000/zarr.json"
    metadata = json.loads(store.read(key))
    if what == "codec":
        metadata["codecs"] = [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}]
    else:
        metadata["data_type"] = "object"
    content = json.dumps(metadata).encode()
    store.replace(key, content)
    manifest["arrays"]["00000"]["metadata_sha256"] = hashlib.sha256(content).hexdigest()
    store.replace("partials/000000.json", seal_json(manifest))
    problems = dict(laplace_dist.verify(str(run)).problems)
    assert any(key in text for text in problems.values()), problems


# ------------------------------------------------------------------ secrets


def assert_clean(texts):
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        assert not [planted for planted in SECRETS.values() if planted.encode() in content], name


def test_no_planted_secret_is_written_or_shown(cluster, tmp_path, monkeypatch, capfd):
    """Of the options and of the environment: not in the run, on the terminal, in a report or in Ray's logs."""
    import ray

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["secret"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRETS["token"])
    url = tmp_path / "run"
    options = {"auto_mkdir": SECRETS}  # which a local file system takes, for true
    config = dist_cases.config(url, storage_options=options, num_workers=1, **SMALL)
    fit(config)
    report = laplace_dist.verify(str(url), options)
    assert report.ok
    state = laplace_dist.status(str(url), options)
    with pytest.raises(SettingsError) as caught:
        fit(config.model_copy(update={"estimator": "ef"}))
    store = Checkpoint(str(url), options)
    (url / "partials" / "000000.json").write_bytes(b"{")
    with pytest.raises(CheckpointError) as broken:
        fit(config)
    printed = capfd.readouterr()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = {str(path): path.read_bytes() for path in (session / "logs").rglob("*") if path.is_file()}
    assert logs
    assert_clean({key: store.read(key) for key in store.list()})
    assert_clean({"out": printed.out, "err": printed.err, "report": repr(report), "status": repr(state), **logs})
    assert_clean(
        {"refusal": f"{caught.value!r}", "error": f"{broken.value!r}", "config": repr(config), "store": repr(store)}
    )


@pytest.mark.parametrize("flag", ["--checkpoint", "--weights", "--data"])
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path, flag, capsys):
    given = {
        "--model": "m:f",
        "--data": "d:f",
        "--checkpoint": str(tmp_path),
        flag: f"s3://me:{SECRETS['secret']}@bucket/x",
    }
    given[flag] = given[flag].replace("/secret", "-secret")
    argv = [f"{name}={value}" for name, value in given.items()]
    assert cli.main("fit", argv) == 2
    printed = capsys.readouterr()
    assert flag in printed.err
    assert "planted" not in printed.out + printed.err


@pytest.mark.parametrize("call", ["verify", "status", "load"])
def test_credentials_in_a_url_are_refused_in_python_too(call):
    url = "s3://me:planted-password@bucket/run"
    calls = {"verify": laplace_dist.verify, "status": laplace_dist.status}
    with pytest.raises(SettingsError, match="credentials in a URL") as caught:
        calls.get(call, lambda u: load_posterior(u, dist_cases.convnet()))(url)
    assert "planted" not in str(caught.value)


def test_messages_are_scrubbed_of_every_form_of_an_option():
    """Also of a password inside an endpoint's URL, and of values in nested options."""
    options = {"client_kwargs": {"endpoint_url": "http://me:planted-pw@host:9000"}, "list": [{"x": "planted-x"}]}
    text = object_store.scrub(
        "could not reach http://me:planted-pw@host:9000/bucket via planted-pw or planted-x", options
    )
    assert "planted" not in text


# ------------------------------------------------------------------ what listens


def listening(process):
    """Return the addresses at which a process and its descendants accept connections."""
    connections = [c for one in (process, *process.children(recursive=True)) for c in one.net_connections("inet")]
    return {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}


def test_the_s3_server_of_the_tests_listens_on_loopback_only(s3):
    assert listening(psutil.Process(s3.process.pid)) == {"127.0.0.1"}


PRIVATE = """
import sys
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.config.settings import Config
demo = {"model": "laplace_dist.demo:network", "data": "laplace_dist.demo:digits"}
config = Config(**demo, ray_address="local", num_workers=1, gpus_per_worker=0, checkpoint=sys.argv[1])
cluster = Cluster(config, say=lambda _: None)
pool = cluster.pool("cpu")
pool.top_up(1)
while not pool.idle:
    pool.wait(1.0, None)
print("ready", flush=True)
sys.stdin.read()
cluster.close()
"""


def test_a_private_cluster_listens_on_loopback_only(tmp_path, environment):
    """Head, node, agents, driver and a worker."""
    plain = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", PRIVATE, str(tmp_path)]
    with subprocess.Popen(command, env=plain, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while (line := process.stdout.readline()) and line != "ready\n":
            pass
        found = listening(psutil.Process(process.pid))
        process.stdin.close()
    assert process.returncode == 0
    assert found == {"127.0.0.1"}
