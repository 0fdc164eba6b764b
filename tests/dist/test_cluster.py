"""Which cluster a job joins, and what it does to Ray's authentication."""

from __future__ import annotations

import os
import socket

import dist_cases
import pytest
import ray  # here, since it reads the environment when it is imported, which a fixture takes away

from laplace_dist import fit
from laplace_dist.errors import SettingsError
from laplace_dist.execution import ray_access, ray_cluster
from laplace_dist.execution.ray_access import find_address
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.run.checkpoint import Checkpoint


@pytest.fixture
def listening():
    """Return the address of something that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """A process of a user without tokens or clusters, whose Ray is not touched."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_access, "_process_token", None)
    monkeypatch.setattr(ray_access, "_reread_authentication", lambda: None)
    return tmp_path


def note(folder, address):
    """Leave behind what `ray start` leaves."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)


def test_an_address_in_the_settings_wins(clean, monkeypatch, listening):
    note(clean, listening)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert find_address("10.0.0.1:6379") == ("10.0.0.1:6379", "as asked")
    assert find_address("local") == (None, "as asked")


def test_auto_is_ray_address_then_a_running_cluster_then_a_private_one(clean, monkeypatch, listening):
    assert find_address("auto")[0] is None
    note(clean, listening)
    assert find_address("auto") == (listening, "already running on this machine")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert find_address("auto") == ("10.0.0.9:6379", "from RAY_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_address("auto") == (None, "from RAY_ADDRESS")


def test_a_note_of_a_cluster_that_is_gone_is_ignored(clean):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    note(clean, f"127.0.0.1:{port}")
    assert find_address("auto")[0] is None


@pytest.mark.parametrize("address", ["ray://10.0.0.9:10001", "http://10.0.0.9:8265", "https://ray.example"])
def test_the_address_of_another_service_is_refused_with_the_way_to_submit(clean, monkeypatch, address):
    with pytest.raises(SettingsError, match=f"--ray-address: got '{address}' .as asked.; .*ray job submit"):
        find_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SettingsError, match="from RAY_ADDRESS"):
        find_address("auto")
    assert find_address("local") == (None, "as asked")


def test_a_process_connected_through_rays_client_is_refused(clean, monkeypatch):
    monkeypatch.setattr(ray_cluster, "is_connected", lambda: True)
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(SettingsError, match="through Ray's client; .*ray job submit"):
        Cluster(dist_cases.config(clean), say=lambda text: None).connect()


def inside(local):
    with ray_access.authentication(local):
        return {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}


def test_a_private_cluster_gets_a_token_of_the_process_and_nothing_is_left(clean):
    before = dict(os.environ)
    first = inside(local=True)
    assert first["RAY_AUTH_MODE"] == "token" and len(first["RAY_AUTH_TOKEN"]) == 64
    assert dict(os.environ) == before
    assert inside(local=True) == first, "Ray reads it once per process"
    assert list(clean.iterdir()) == [], "a token in the home directory would change the user's later clusters"


def test_a_users_own_token_is_used(clean):
    (clean / ".ray").mkdir()
    (clean / ".ray" / "auth_token").write_text("0" * 64)
    assert inside(local=True) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None}
    assert inside(local=False) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None}


def test_without_a_token_a_running_cluster_is_joined_without(clean):
    assert inside(local=False) == {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None}


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_mode_that_the_user_has_chosen_is_left_alone(clean, monkeypatch, mode):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert inside(local=True) == {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": None}


@pytest.mark.parametrize("error", [RuntimeError("Version mismatch: Ray 1.0"), ConnectionError("refused")])
def test_a_cluster_that_cannot_be_joined_is_refused_as_a_setting(clean, monkeypatch, listening, error):
    """Ray raises a RuntimeError where the cluster has other versions of Ray or Python."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray_cluster, "is_connected", lambda: False)
    with pytest.raises(SettingsError, match=f"--ray-address: cannot connect to '{listening}'.*{error}"):
        Cluster(dist_cases.config(clean, ray_address=listening), say=lambda text: None).connect()


HERE = {"gpus": 0, "cpus": 2}
TOO_LARGE = [
    ({"cpus_per_worker": 3}, "cpu", "--cpus-per-worker: got 3; no worker fits .* 2 CPUs and 0 GPUs"),
    ({"gpus_per_worker": 2.0}, "cuda", "--gpus-per-worker: got 2; no worker fits"),
    ({"gpus_per_worker": None, "device": "cuda"}, "cuda", "--device: got 'cuda'; no worker fits"),
]


@pytest.mark.parametrize(("changes", "device", "words"), TOO_LARGE)
def test_a_worker_larger_than_this_machine_is_refused_before_a_private_cluster_or_a_run_is_begun(
    clean, monkeypatch, changes, device, words
):
    monkeypatch.setattr(os, "cpu_count", lambda: HERE["cpus"])
    monkeypatch.setattr(ray_cluster.torch.cuda, "device_count", lambda: HERE["gpus"])
    monkeypatch.setattr(ray_cluster, "is_connected", lambda: False)  # by an earlier test
    config = dist_cases.config(clean / "run", ray_address="local", **changes)
    monkeypatch.setattr(Cluster, "connect", lambda self: pytest.fail("a cluster was started"))
    with pytest.raises(SettingsError, match=words):
        Cluster(config).admit(device)
    with pytest.raises(SettingsError, match=words):
        fit(config)
    assert Checkpoint(str(clean / "run")).list() == []
    wanted = config.model_copy(update={"num_workers": 1, "gpus_per_worker": 0.0})
    Cluster(wanted).admit("cpu")  # who asks for a worker of many threads on this machine gets it
