"""The shared conformance suite on a local directory, in memory and on a real S3 server; and what only S3 can do."""

from __future__ import annotations

import traceback
import uuid

import pytest

from laplace_dist.errors import SettingsError
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.testing.store_conformance import StoreConformance


class TestLocal(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path):
        return Checkpoint(str(tmp_path / "run"))


class TestMemory(StoreConformance):
    @pytest.fixture
    def store(self):
        return Checkpoint(f"memory://{uuid.uuid4().hex}/run")

    # In memory, creating is a look followed by a write: nothing is atomic between threads.
    test_exactly_one_of_several_creators_wins = None
    test_exactly_one_of_two_attempts_at_a_segment_wins = None


class TestS3(StoreConformance):
    @pytest.fixture
    def store(self, s3):
        return Checkpoint(s3.url(), s3.options)


# ------------------------------------------------------------------ only on S3


def calls(store):
    """Return every operation that reaches the server, by name."""
    return {
        "check_writable": store.check_writable,
        "create": lambda: store.create("plan.json", b"x"),
        "replace": lambda: store.replace("CURRENT.json", b"x"),
        "read": lambda: store.read("plan.json"),
        "read_many": lambda: list(store.read_many(["a", "b"])),
        "exists": lambda: store.exists("plan.json"),
        "list": store.list,
        "delete_tree": lambda: store.delete_tree("partials"),
    }


def refused(url, options, names, secrets):
    """Assert that every operation raises a SettingsError without secrets, and return the messages by operation."""
    messages = {}
    for name in names:
        store = Checkpoint(url, options)
        with pytest.raises(SettingsError) as caught:
            calls(store)[name]()
        messages[name] = str(caught.value)
        text = "".join(traceback.format_exception(caught.value))
        assert not [secret for secret in secrets if secret in text], name
    return messages


ALL = ("check_writable", "create", "replace", "read", "read_many", "exists", "list", "delete_tree")


@pytest.mark.parametrize(
    "change",
    [{"secret": "a-wrong-secret-0123"}, {"key": "an-unknown-key-0123"}, {"anon": True, "key": None, "secret": None}],
    ids=["secret", "key", "anonymous"],
)
def test_wrong_credentials_are_refused_at_the_first_request(s3, change):
    options = {**s3.options, **change}
    secrets = [s3.key, s3.secret, "a-wrong-secret-0123", "an-unknown-key-0123"]
    for name, message in refused(s3.url(), options, ALL, secrets).items():
        assert "--checkpoint 's3://" in message, name
        assert "storage-options" in message, name


def test_no_credentials_at_all_are_refused(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    options = {"client_kwargs": s3.options["client_kwargs"], "skip_instance_cache": True}
    for message in refused(s3.url(), options, ["check_writable", "read", "list"], []).values():
        assert "NoCredentialsError" in message


def test_a_missing_bucket_is_refused(s3):
    for message in refused("s3://no-such-bucket/run", s3.options, ALL, [s3.key, s3.secret]).values():
        assert "bucket" in message


@pytest.mark.parametrize(
    "change", [{"nosuch": "option-0123"}, {"client_kwargs": {"endpoint_url": "not-a-url-0123"}}], ids=["option", "URL"]
)
def test_options_that_mean_nothing_are_refused(s3, change):
    for message in refused(s3.url(), {**s3.options, **change}, ["read"], [s3.secret, "0123"]).values():
        assert "cannot be opened" in message


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(SettingsError, match="credentials in a URL") as caught:
        Checkpoint("s3://name:sekrit@bucket/run")
    assert "sekrit" not in str(caught.value)


def test_a_retry_that_meets_its_own_write_has_created_it(s3, monkeypatch):
    """The request arrives, its answer is lost, and the client sends it again."""
    store = Checkpoint(s3.url(), s3.options)
    fs = store._fs.fs
    pipe_file, sent = fs.pipe_file, []

    def answer_lost(path, data, **kwargs):
        pipe_file(path, data, **kwargs)
        sent.append(path)
        raise TimeoutError("the answer was lost")

    monkeypatch.setattr(fs, "pipe_file", answer_lost)
    assert store.create("m.json", b"attempt 1")
    assert not Checkpoint(store.url, s3.options).create("m.json", b"attempt 2")
    assert len(sent) == 1


def test_what_another_process_writes_is_listed(s3):
    """A client of its own, as in another process, that has listed before."""
    store = Checkpoint(s3.url(), s3.options)
    other = Checkpoint(store.url, {**s3.options, "skip_instance_cache": True})
    for number in range(3):
        assert other.list("p", recursive=False) == other.list("p") == [f"p/{i}.json" for i in range(number)]
        store.create(f"p/{number}.json", b"x")


def test_the_server_is_asked_for_each_object_once(s3, monkeypatch):
    """A read is one GET: asking for the size first would double the time that 10,000 manifests take."""
    store = Checkpoint(s3.url(), s3.options)
    store.create("m.json", b"x")
    asked, call = [], type(store._fs.fs)._call_s3

    async def counting(self, method, *args, **kwargs):
        asked.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(type(store._fs.fs), "_call_s3", counting)
    assert store.read("m.json") == b"x"
    assert asked == ["get_object"]
