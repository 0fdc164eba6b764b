"""Whatever the readers are given: what was written, or an error of this project that names the object; never another."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import dist_cases
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_cases import SMALL, recorded_run

import laplace_dist
from laplace_dist import load_posterior
from laplace_dist.config.command_line import load_config, parse_yaml
from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import (
    evaluations,
    layout,
    lifecycle,
    partial_manifests,
    partials,
    pointer,
    settings_file,
    tunings,
    versions,
)
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.storage.sealed_json import seal_json

OWN = (CheckpointError, SettingsError, RunFailed)
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["..", "/x", "", "a/b", 2**80]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run; what a test changes it puts back."""
    url = tmp_path_factory.mktemp("fuzz") / "run"
    recorded_run(dist_cases.config(url, **SMALL))
    return Checkpoint(str(url))


def places(value, path=()):
    """Yield the path of everything inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def mutations(draw, original):
    """Draw a JSON object that differs from the original in one or two places: replaced, deleted or added."""
    mutant = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([path for path in places(mutant) if path] or [("x",)]))
        parent = mutant
        for step in path:
            parent = parent[step]
        what = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if what == "delete":
            del parent[last]
        elif what == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = draw(values)
        else:
            parent[last] = draw(values)
    return mutant


def seal(mutant):
    """Return a sealed object, with a true digest: as someone would who can write to the checkpoint."""
    try:
        return seal_json(mutant)
    except ValueError:  # NaN and infinity, which the sealed form does not have
        return json.dumps({**mutant, "sha256": "0" * 64}).encode()


def manifest(run, folder, depth):
    keys = [
        k for k in run.list(folder) if k.count("/") == depth and k.endswith(".json") and not k.endswith("zarr.json")
    ]
    return next(key for key in keys if key != layout.METRICS)


def the_plan(run):
    return lifecycle.read_plan(run)


def tuned(run, key):
    value = tunings.read_tuning(run, key)
    return value[0], value[1].tolist()


def shard_of_tuning(run, key):
    totals, of_map, n, fixed = tunings.read_shard(run, key)
    return totals.tolist(), of_map.tolist(), n, fixed


def joined(run, key):
    main, _, shard = key.removesuffix(".json").rpartition("/")
    split, _, id_ = shard.rpartition("-")
    return {
        name: value.tolist()
        for name, value in evaluations.joined_scores(run, f"{main}.json", split, [id_], "map").items()
    }


def version(run, key):
    plan = the_plan(run)
    found = versions.read_version(run, plan, Path(key).stem)
    return {n: run.read_array(p["prefix"], n, p["entry"]).tolist() for n, p in found["factors"].items()}


def partial(run, key):
    plan = the_plan(run)
    found = partial_manifests.read_manifest(run, plan, plan.segments[0])
    return {name: value.tolist() for name, value in partials.read_factors(run, plan, found).items()}


# What each reader makes of its object: a result that can be compared.
READERS = {
    "plan": (lambda run: "plan.json", lambda run, key: Plan.from_values(open_json(run.read(key), key))),
    "CURRENT": (lambda run: "CURRENT.json", lambda run, key: pointer.read_current(run)),
    "partial": (lambda run: "partials/000000.json", partial),
    "posterior version": (lambda run: manifest(run, "posteriors", 1), version),
    "tuning": (lambda run: manifest(run, "tuning", 1), tuned),
    "tuning shard": (lambda run: manifest(run, "tuning", 2), shard_of_tuning),
    "evaluation": (
        lambda run: manifest(run, "evaluation", 1),
        lambda run, key: open_json(run.read(key), key)["metrics"],
    ),
    "evaluation shard": (lambda run: manifest(run, "evaluation", 2), joined),
}


def outcome(run, key, read, content):
    """Return what a reader makes of other content, or the error's text; any error but the project's own gets through."""
    good = run.read(key)
    run.replace(key, content)
    try:
        return read(run, key), None
    except OWN as error:
        return None, str(error)
    finally:
        run.replace(key, good)


@pytest.mark.parametrize("kind", READERS)
def test_any_bytes_are_an_error_that_names_the_object(run, kind):
    find, read = READERS[kind]
    key = find(run)
    good = run.read(key)
    nested = b'{"a":' * 100_000
    special = [
        nested,
        b"[" * 100_000,
        b'{"sha256": NaN}',
        b"\xff\xfe",
        b"1" * 5000,
        b'{"sha256":"x","a":1e999}',
        b"null",
    ]

    @FUZZ
    @given(st.binary(max_size=64) | st.sampled_from(special) | st.integers(0, len(good) - 1).map(lambda n: good[:n]))
    def check(content):
        result, error = outcome(run, key, read, content)
        assert error is not None and key in error, (result, error)

    check()


@pytest.mark.parametrize("kind", READERS)
def test_any_sealed_mutation_gives_the_same_result_or_an_error_that_names_an_object(run, kind):
    """Sealed, so that the fields themselves have to be checked; the object that is named may be one it leads to."""
    find, read = READERS[kind]
    key = find(run)
    original, expected = open_json(run.read(key), key), read(run, key)
    refused = []

    @FUZZ
    @given(mutations(original))
    def check(mutant):
        result, error = outcome(run, key, read, seal(mutant))
        refused.append(error is not None)
        if error is None:
            # Numbers that no digest covers may differ, such as an evidence; those of the factors may not.
            assert result == expected if kind in ("partial", "posterior version") else type(result) is type(expected)
        else:
            assert any(name in error for name in (key, key.removesuffix(".json"), "not a key inside"))

    check()
    assert sum(refused) > 20


@pytest.mark.parametrize("new", ["missing", None, [], {}], ids=repr)
def test_a_plan_without_one_of_its_values_is_no_plan_of_a_posterior(run, new):
    """Each value of the plan, its settings and its first blocks in turn, where the fuzzer takes some by chance."""
    plan, convnet = open_json(run.read("plan.json"), "plan.json"), dist_cases.convnet()
    places = [(key,) for key in plan] + [("settings", key) for key in plan["settings"]]
    places += [("spec", key) for key in plan["spec"]] + [
        ("spec", "blocks", 0, key) for key in plan["spec"]["blocks"][0]
    ]
    for *path, last in places:
        mutant = copy.deepcopy(plan)
        inside = functools.reduce(lambda value, key: value[key], path, mutant)
        if new == "missing":
            del inside[last]
        else:
            inside[last] = new
        outcome(run, "plan.json", lambda *_: load_posterior(run.url, convnet), seal(mutant))


def test_whole_readers_of_a_mutated_plan_raise_errors_of_this_project(run):
    """`load_posterior`, `status` and `verify` on a plan that is sealed and means something else."""
    original = open_json(run.read("plan.json"), "plan.json")

    @settings(FUZZ, max_examples=40)
    @given(mutations(original))
    def check(mutant):
        for call in (
            lambda: load_posterior(run.url, dist_cases.convnet()),
            lambda: laplace_dist.status(run.url),
            lambda: laplace_dist.verify(run.url),
        ):
            outcome(run, "plan.json", lambda store, key, call=call: call(), seal(mutant))

    check()


@FUZZ
@given(
    st.text(max_size=60)
    | st.sampled_from(["[" * 3000, "a: &a [*a]", "!!bool x", "!!timestamp x", "!!float ''", "!!int ''"])
)
def test_any_yaml_text_is_a_value_or_a_value_error(text):
    try:
        parse_yaml(text)
    except ValueError as error:
        assert type(error) is ValueError


TAGS = [
    "!!bool x",
    "!!timestamp x",
    "!!float ''",
    "!!int x",
    "!!binary é",
    "? [a]\n: b",
    "!!python/object/apply:os.getcwd []",
]


@FUZZ
@given(
    st.dictionaries(st.sampled_from([*Config.model_fields, "nonsense", 3]), values, max_size=4),
    st.sampled_from(["", *TAGS]),
)
def test_any_settings_file_is_settings_or_a_settings_error(tmp_path_factory, chosen, tail):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    text = yaml.safe_dump(chosen) if chosen else ""
    path.write_text(f"{text}\n{tail}\n", encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(["--config", str(path)], defaults={"model": "m:f", "data": "d:f", "checkpoint": "c"})
    except SettingsError as error:
        assert str(error)
    else:
        assert isinstance(config, Config)
        assert isinstance(parse_yaml(config.to_yaml()), dict)


FLAGS = [f"--{name.replace('_', '-')}" for name in Config.model_fields] + ["--config", "--nonsense", "--", "-x"]


@FUZZ
@given(
    st.lists(
        st.sampled_from(FLAGS) | st.text(max_size=8) | st.sampled_from(["1", "inf", "{a: b}", "\0", "[", "1e999"]),
        max_size=6,
    )
)
def test_any_command_line_is_settings_or_a_settings_error(argv):
    try:
        load_config(argv, defaults={"model": "m:f", "data": "d:f", "checkpoint": "c"})
    except SettingsError as error:
        assert str(error)


@FUZZ
@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_snapshot_of_the_settings_is_refused_unless_it_is_one(tmp_path_factory, content):
    store = Checkpoint(str(tmp_path_factory.getbasetemp() / "snapshot"))
    for written in (content, settings_file.seal_yaml(content.decode(errors="replace"))):
        store.replace("config.yaml", written)
        try:
            assert isinstance(settings_file.read_config(store), dict)
        except CheckpointError as error:
            assert "config.yaml" in str(error)
