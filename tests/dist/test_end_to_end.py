"""Whole runs on Ray: any number of workers, workers and drivers killed, poisoned data, jobs as processes."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import dist_cases
import fault_cases
import pytest
from forked import Forked

from laplace_dist import fit, status
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.execution.scaling import FIRST_WORKERS
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.partial_manifests import read_manifest
from laplace_dist.run.versions import read_version

ROOT = Path(__file__).resolve().parents[2]
SEGMENTS = [f"{i:06d}" for i in range(6)]  # of the 44 examples in segments of 8


def factor_bytes(url):
    """Return the decoded bytes of every factor of the current posterior."""
    store = Checkpoint(str(url))
    plan = read_plan(store)
    version = json.loads(store.read("CURRENT.json"))["version"]
    factors = read_version(store, plan, version)["factors"]
    return {n: store.read_array(place["prefix"], n, place["entry"]).tobytes() for n, place in factors.items()}


def attempts(url):
    """Return the committed attempt of every segment, with the identity and the time of its manifest's file."""
    store = Checkpoint(str(url))
    plan = read_plan(store)
    found = {}
    for segment in plan.segments:
        path = Path(url) / "partials" / f"{segment.id}.json"
        if path.exists():
            info = path.stat()
            found[segment.id] = (read_manifest(store, plan, segment)["attempt"], info.st_ino, info.st_mtime_ns)
    return found


def examples_read(folder):
    """Return the set of training examples that each worker read, by process id."""
    files = folder.glob("reads-*")
    return {int(f.name.removeprefix("reads-")): {int(line) for line in f.read_text().split()} for f in files}


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """Return the bytes of the factors of a run with one worker to which nothing happened."""
    url = tmp_path_factory.mktemp("undisturbed")
    fit(dist_cases.config(url, num_workers=1))
    return factor_bytes(url)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(cluster, undisturbed, tmp_path, workers, capsys):
    result = fit(dist_cases.config(tmp_path, num_workers=workers))
    assert factor_bytes(tmp_path) == undisturbed
    assert result.checkpoint == str(tmp_path)
    found = status(str(tmp_path))
    assert (found["segments_committed"], found["examples_committed"], found["complete"]) == (6, 44, True)
    assert "map: 6/6 segments" in capsys.readouterr().out


def test_another_data_set_gives_other_bytes(undisturbed, tmp_path):
    """The comparison of bytes can fail."""
    dist_cases.run_inline(dist_cases.config(tmp_path, data_args={"dtype": "float64"}, model_args={"dtype": "float64"}))
    assert factor_bytes(tmp_path) != undisturbed


def test_a_worker_killed_in_the_middle_of_a_segment_changes_no_byte(cluster, undisturbed, tmp_path):
    folder, url = tmp_path / "signals", tmp_path / "run"
    folder.mkdir()
    killed = []

    def kill():
        waiting = dist_cases.wait_for(folder, "waiting-*")
        pid = int(waiting.name.removeprefix("waiting-"))
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        (folder / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    data_args = {"folder": str(folder), "trap": 21}
    fit(dist_cases.config(url, num_workers=2, data="dist_cases:Blocking", data_args=data_args))
    killer.join()
    readers = examples_read(folder)
    others = [pid for pid, examples in readers.items() if 23 in examples]
    assert len(killed) == 1
    assert 21 in readers[killed[0]] and 23 not in readers[killed[0]], "it died inside segment 000002"
    assert others and killed[0] not in others, "another process redid the segment"
    assert factor_bytes(url) == undisturbed


def job(script, *arguments, environment):
    """Start a job as a process of its own, in the repository's root."""
    return subprocess.Popen(
        [sys.executable, f"jobs/{script}.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def forked(script, *arguments, environment):
    return Forked(ROOT / "jobs" / f"{script}.py", list(arguments), environment)


def toy_flags(url, address, folder=None, **changes):
    chosen = dist_cases.config(url, ray_address=address, num_workers=1, **changes)
    names = ("model", "data", "checkpoint", "batch_size", "segment_size", "num_workers", "ray_address")
    flags = [f"--{name.replace('_', '-')}={getattr(chosen, name)}" for name in names]
    flags += [f"--data-args={json.dumps(chosen.data_args)}", "--gpus-per-worker=0", "--skip-tune", "--skip-evaluate"]
    return flags


def test_a_killed_driver_is_continued_by_the_same_command(cluster, undisturbed, tmp_path, environment):
    folder, url = tmp_path / "signals", tmp_path / "run"
    folder.mkdir()
    data_args = {"folder": str(folder), "trap": 29}  # in segment 000003
    flags = toy_flags(url, cluster, data="dist_cases:Blocking", data_args=data_args)
    first = forked("fit_kron", *flags, environment=environment)
    waiting = dist_cases.wait_for(folder, "waiting-*")
    before, readers = attempts(url), examples_read(folder)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert sorted(before) == SEGMENTS[:3]
    assert status(str(url))["complete"] is False
    fault_cases.wait_until_gone(int(waiting.name.removeprefix("waiting-")))  # else it would go on, and commit

    (folder / "go").touch()
    second = forked("fit_kron", *flags, environment=environment)
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert "continuing the run" in out and "3 of 6 segments were committed before" in out
    after = attempts(url)
    assert sorted(after) == SEGMENTS
    assert {name: after[name] for name in before} == before
    news = [examples for pid, examples in examples_read(folder).items() if pid not in readers]
    assert set.union(*news) - {0} == set(range(24, 44)), "finished segments were read again (0 shows the shapes)"
    assert factor_bytes(url) == undisturbed


def test_a_segment_that_kills_every_worker_is_named(cluster, tmp_path):
    folder = tmp_path / "signals"
    folder.mkdir()
    chosen = dist_cases.config(
        tmp_path / "run", num_workers=2, data="dist_cases:Deadly", data_args={"folder": str(folder), "trap": 12}
    )
    with pytest.raises(RunFailed, match=r"segment 000001 \(examples 8 to 15\) failed 3 times.*process died"):
        fit(chosen)
    assert sum(12 in examples for examples in examples_read(folder).values()) == 3
    assert sorted(attempts(tmp_path / "run")) == [name for name in SEGMENTS if name != "000001"], "the others are done"


def test_nan_in_a_worker_names_the_example_at_once(cluster, tmp_path):
    chosen = dist_cases.config(tmp_path, num_workers=1, data="dist_cases:with_nan", data_args={"at": 41})
    with pytest.raises(RunFailed, match=r"segment 000005 \(examples 40 to 43\): .*NaN or Inf.*indices 41"):
        fit(chosen)
    assert sorted(attempts(tmp_path)) == SEGMENTS[:5]


def test_a_segment_that_takes_too_long_is_redone_by_another_worker(cluster, undisturbed, tmp_path):
    folder = tmp_path / "signals"
    folder.mkdir()
    chosen = dist_cases.config(
        tmp_path / "run",
        num_workers=1,
        data="dist_cases:BlockingOnce",
        data_args={"folder": str(folder), "trap": 4},
        segment_timeout=20.0,
    )
    fit(chosen)
    readers = examples_read(folder)
    assert sum(4 in examples for examples in readers.values()) == 2
    assert sum(7 in examples for examples in readers.values()) == 1
    assert factor_bytes(tmp_path / "run") == undisturbed


def test_a_worker_that_no_node_can_hold_is_refused(cluster, tmp_path):
    with pytest.raises(SettingsError, match=r"--cpus-per-worker: got 99; .*has 4 CPUs and 0 GPUs"):
        fit(dist_cases.config(tmp_path, cpus_per_worker=99))


def test_a_worker_that_a_node_may_hold_which_is_still_to_join_is_waited_for(cluster, tmp_path):
    """On a cluster of four CPUs and no GPU, which nodes may join."""
    for waits in ({"cpus_per_worker": 99, "num_workers": 3}, {"gpus_per_worker": 1.0}):
        said = []
        with Cluster(dist_cases.config(tmp_path, **waits), say=said.append) as joined:
            assert joined.pool("cuda" if joined.config.gpus_per_worker else "cpu").size == waits.get(
                "num_workers", FIRST_WORKERS
            )
        assert said[-1].startswith("Ray: waiting for nodes to join (a worker needs")


def test_a_private_cluster_gets_no_nodes_so_nothing_is_waited_for(tmp_path, cluster):
    joined = Cluster(dist_cases.config(tmp_path, gpus_per_worker=1.0, num_workers=2), say=lambda text: None)
    joined.connect()
    joined._private = True
    with pytest.raises(SettingsError, match="no worker fits on any node of the cluster, which has 4 CPUs and 0 GPUs"):
        joined.pool("cuda" if joined.config.gpus_per_worker else "cpu")


# ------------------------------------------------------------------ jobs as a person starts them


def test_the_demo_on_a_private_cluster_then_tune_and_evaluate_alone(tmp_path, environment):
    """No Ray setting in the environment: the job starts its own cluster and leaves nothing in the home directory."""
    home = tmp_path / "home"
    home.mkdir()
    plain = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
    plain |= {"HOME": str(home)}
    url = str(tmp_path / "run")
    fitted = job("fit_kron", "--ray-address=local", f"--checkpoint={url}", "--num-workers=2", environment=plain)
    out, err = fitted.communicate()
    assert fitted.returncode == 0, err
    assert "starting a private cluster" in out
    assert not (home / ".ray").exists()

    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert out.splitlines()[-1] == f"report: {url}/report.html" and (tmp_path / "run" / "report.html").is_file()
    table = {line.split()[0]: line.split() for line in out.splitlines()[-8:-2]}
    for name, key in (("accuracy", "accuracy"), ("NLL", "nll"), ("Brier", "brier"), ("ECE", "ece")):
        shown = [word for word in table[name] if word.replace(".", "").isdigit()]
        assert shown == [f"{metrics[method][key]:.4f}" for method in ("map", "laplace")]
    assert metrics["laplace"]["nll"] < metrics["map"]["nll"]

    start = out.splitlines().index("In Python:")
    code = "\n".join(line.strip() for line in out.splitlines()[start + 1 :] if line.startswith("    "))
    names: dict = {}
    exec(code, names)  # noqa: S102 - what the job tells its user to type
    assert type(names["la"]).__name__ == "KronLaplace"
    assert names["la"].prior_precision.item() != 1.0


def test_follow_on_jobs_alone(cluster, tmp_path, environment):
    url = tmp_path / "run"
    demo = {"model": "laplace_dist.demo:network", "data": "laplace_dist.demo:digits", "batch_size": 256}
    dist_cases.run_inline(dist_cases.config(url, **demo))
    common = [f"--checkpoint={url}", f"--ray-address={cluster}", "--num-workers=2"]
    tuned = forked("tune", *common, "--tune-method=gridsearch", "--grid-size=9", environment=environment)
    out, err = tuned.communicate()
    assert tuned.returncode == 0, err
    assert "(gridsearch)" in out
    evaluated = forked("evaluate", *common, "--ood", "inverted", environment=environment)
    out, err = evaluated.communicate()
    assert evaluated.returncode == 0, err
    metrics = json.loads((url / "evaluation" / "metrics.json").read_text())
    assert metrics["tuning"] in [f"tuning/{path.name}" for path in (url / "tuning").glob("*.json")]
    assert set(metrics["map"]) == {"accuracy", "nll", "brier", "ece", "ood_auroc/inverted"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("fit_kron", ["--batch-size=0"], "--batch-size: got 0"),
        ("fit_full", ["--estimator=exact"], "--estimator: got 'exact'; expected one of ggn, mc, ef"),
        ("fit_diag", ["--model=nowhere:net", "--data=dist_cases:blobs"], "there is no module 'nowhere'"),
        ("tune", [], "where there is no run"),
        ("evaluate", [], "where there is no run"),
    ],
)
def test_refusals_leave_with_status_2_and_one_message(tmp_path, monkeypatch, capfd, script, arguments, message):
    """The script itself, in this process, which is what costs nothing."""
    path = str(ROOT / "jobs" / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments, f"--checkpoint={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_process_leaves_with_status_2_and_one_message(tmp_path, environment):
    given = ["--model=dist_cases:convnet", "--data=dist_cases:blobs", "--ray-address=127.0.0.1:1"]
    process = job("fit_kron", *given, f"--checkpoint={tmp_path / 'run'}", environment=environment)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "cannot connect to '127.0.0.1:1'" in err and "Traceback" not in err


def test_a_failed_run_leaves_with_status_1(cluster, tmp_path, environment):
    flags = toy_flags(tmp_path / "run", cluster, data="dist_cases:with_nan", data_args={"at": 3})
    process = forked("fit_kron", *flags, environment=environment)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "segment 000000 (examples 0 to 7)" in err and "indices 3" in err
    assert "Traceback" not in err
