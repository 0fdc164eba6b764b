"""The manifests, launcher files and the image are right, and whatever breaks one of them is noticed."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from functools import cache

import manifest_cases as cases
import pytest
import yaml
from kubernetes_validate import utils as schemas
from ray.autoscaler._private import util as ray_util

import validate  # isort: skip  (the folder is put on the path by manifest_cases)
from checks import commands, kuberay, launcher, pods  # isort: skip

EVERYTHING = {
    name: cases.plain(content) if isinstance(content, list) else content
    for name, content in validate.load(cases.FOLDER).items()
}
FILES = [name for name, content in EVERYTHING.items() if isinstance(content, list)]
FIT, CRON, RAY_CRON, DEVELOPMENT = cases.FIT, cases.CRON, cases.RAY_CRON, "kuberay/development-raycluster.yaml"
AROUND = validate.around_of(EVERYTHING)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Read once what other packages read for every check, of which there are thousands: defaults, names of schemas."""
    read, known = ray_util._get_default_config, {}

    def defaults(provider):
        name = provider["type"]
        known[name] = known.get(name) or read(provider)
        return copy.deepcopy(known[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_util, "_get_default_config", defaults)
        patch.setattr(schemas, "all_versions", cache(schemas.all_versions))
        yield


def test_there_is_a_manifest_of_every_kind():
    kinds = {document["kind"] for name in FILES if name.startswith("kuberay") for document in EVERYTHING[name]}
    assert kinds == {"RayJob", "RayCronJob", "RayCluster", "CronJob", "ConfigMap", "ServiceAccount"}
    providers = {EVERYTHING[name][0]["provider"]["type"] for name in FILES if name.startswith("launcher")}
    assert providers == set(launcher.PROVIDERS) == {"aws", "gcp"}
    assert {"Dockerfile", "local.sh"} <= EVERYTHING.keys()


def test_everything_is_right_and_the_command_says_so():
    command = [sys.executable, "cluster/validate.py"]
    done = subprocess.run(command, cwd=cases.FOLDER.parent, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(EVERYTHING)} files, 0 problem(s)" in done.stdout


def test_an_empty_folder_and_a_broken_one_end_with_status_1(tmp_path, capsys):
    assert validate.main([str(tmp_path)]) == 1
    (tmp_path / "kuberay").mkdir()
    (tmp_path / "kuberay" / "x.yaml").write_text("kind: Secret\nmetadata: {name: x}\napiVersion: v1\n")
    assert validate.main([str(tmp_path)]) == 1
    assert "kuberay/x.yaml: kind: Secret is not expected here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"), [("kind: [", "while parsing"), ("kind: CronJob\nkind: Job\n", "kind: is given twice in")]
)
def test_a_file_that_is_no_yaml_or_gives_a_field_twice_is_named(tmp_path, capsys, text, said):
    (tmp_path / "kuberay").mkdir()
    (tmp_path / "kuberay" / "x.yaml").write_text(text)
    assert validate.main([str(tmp_path)]) == 1
    assert f"kuberay/x.yaml: {said}" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_any_field_that_is_broken_is_noticed(name, kind):
    """Every field of every document, one after the other; what is no mistake is listed with its reason."""
    passed, count, documents = [], 0, EVERYTHING[name]
    alone = name != "kuberay/common.yaml" or kind in cases.OF_ANY_FILE
    only = name if alone else None  # what is in that one, the others refer to
    for number, document in enumerate(documents):
        for path in cases.places(document):
            broken = cases.changed(document, path, kind)
            if broken is None or cases.allowed(kind, path):
                continue
            count += 1
            content = [*documents[:number], broken, *documents[number + 1 :]]
            if not validate.check({**EVERYTHING, name: content}, {}, only):
                passed.append(".".join(map(str, path)))
    assert passed == []
    assert count >= {"twice": 0, "with white space": 3}.get(kind, 5)  # common.yaml has no lists


def test_what_is_allowed_is_allowed_for_something():
    used = set()
    for name in FILES:
        for number, document in enumerate(EVERYTHING[name]):
            for path in cases.places(document):
                for kind in cases.KINDS:
                    reasons = cases.allowed(kind, path)
                    broken = cases.changed(document, path, kind) if set(reasons) - used else None
                    content = [*EVERYTHING[name][:number], broken, *EVERYTHING[name][number + 1 :]]
                    if broken is not None and not validate.check({**EVERYTHING, name: content}, {}, name):
                        used.update(reasons)
    assert used == {reason for _, _, reason in cases.ALLOWED}


@pytest.mark.parametrize(("name", "path", "value", "said"), cases.RULES, ids=lambda value: str(value)[:40])
def test_the_rules_of_controller_and_house(name, path, value, said):
    problems = validate.check({**EVERYTHING, name: cases.set_at(EVERYTHING[name], path, value)}, {}, name)
    assert (problems == []) if said is None else any(said in text for text in problems), problems


@pytest.mark.parametrize(("strategy", "said"), cases.DELETE)
def test_the_rules_of_deletion(strategy, said):
    """Rules are not for a job that ends its cluster itself; other ways are."""
    [job] = cases.set_at(EVERYTHING[FIT], "0.spec.ttlSecondsAfterFinished", None)
    job["spec"].update(shutdownAfterJobFinishes=False, deletionStrategy=strategy)
    problems = list(kuberay.check(job, AROUND, {}))
    assert (problems == []) if said is None else any(said in text for text in problems), problems
    job["spec"]["shutdownAfterJobFinishes"] = True
    if "deletionRules" in strategy:
        assert any("not together with shutdownAfterJobFinishes" in text for text in kuberay.check(job, AROUND, {}))


# ------------------------------------------------------------------ command lines

SETTINGS = {"/etc/laplace/run.yaml": AROUND.maps["laplace-settings"]["run.yaml"]}
JOB = "python /opt/laplace-dist/jobs/"
COMMANDS = [
    (f"{JOB}fit_kron.py --config /etc/laplace/run.yaml", None),
    (f"{JOB}recalibrate.py --config /etc/laplace/run.yaml --window 2026-01-31 --windows last:7 --decay 0.9", None),
    (f"{JOB}recalibrate.py --config /etc/laplace/run.yaml --drop-window 2026-01-31 --dry-run", None),
    (f"{JOB}verify.py --config /etc/laplace/run.yaml --collect-orphans-older-than 24", None),
    (f"{JOB}fit_kron.py", "without --config"),
    (f"{JOB}fit_krom.py --config /etc/laplace/run.yaml", "there is no such job"),
    ("python jobs/fit_kron.py --config /etc/laplace/run.yaml", "expected python /opt/laplace-dist/jobs/"),
    (f"{JOB}fit_kron.py --config /etc/laplace/other.yaml", "no manifest puts a file there"),
    (f"{JOB}fit_kron.py --config /etc/laplace/run.yaml --batchsize 3", "--batch-size"),
    (f"{JOB}fit_kron.py --config /etc/laplace/run.yaml --batch-size three", "--batch-size"),
    (f"{JOB}fit_kron.py --config /etc/laplace/run.yaml --checkpoint runs/x", "every node reaches"),
    (f"{JOB}recalibrate.py --config /etc/laplace/run.yaml --windows", "--windows"),
    (f"{JOB}recalibrate.py --config /etc/laplace/run.yaml --decay 2", "--decay"),
    (f"{JOB}recalibrate.py --config /etc/laplace/run.yaml --data-args {{day:", "--data-args"),
    (f"{JOB}recalibrate.py --config /etc/laplace/run.yaml --help", "only asks for help"),
]


@pytest.mark.parametrize(("line", "said"), COMMANDS)
def test_a_command_line_is_read_by_the_jobs_own_parser(line, said):
    problems = list(commands.check_job(line.split(), SETTINGS, in_image=True))
    assert (problems == []) if said is None else any(said in text for text in problems), problems


def test_settings_that_a_job_refuses_are_refused_where_they_are_written():
    for old, new in [
        ("batch-size: 256", "batch-size: 0"),
        ("likelihood:", "likelyhood:"),
        ("s3://bucket/run", "runs/x"),
    ]:
        [account, settings] = cases.plain(EVERYTHING["kuberay/common.yaml"])
        settings["data"]["run.yaml"] = settings["data"]["run.yaml"].replace(old, new)
        for only in ("kuberay/common.yaml", FIT, CRON, RAY_CRON):
            assert validate.check({**EVERYTHING, "kuberay/common.yaml": [account, settings]}, {}, only), (new, only)


def test_two_shells_read_plain_words_only_and_one_reads_a_day():
    line = "python /opt/laplace-dist/jobs/recalibrate.py --config /etc/laplace/run.yaml --window $(date -u +%F)"
    assert not list(commands.check_entrypoint(line, SETTINGS, through_shells=1))
    assert any("two shells" in text for text in commands.check_entrypoint(line, SETTINGS, through_shells=2))


def words_of(name):
    """Return the text of a script, and where its words are: of lines that are no comments."""
    text = EVERYTHING[name] if name == "local.sh" else None
    text = text or EVERYTHING[name][0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    lines = [(m.start(), m[0]) for m in re.finditer(r"(?m)^(?!#).+$", text)]
    return text, [(start + m.start(), m[0]) for start, line in lines for m in re.finditer(r"[\w./:-]{4,}", line)]


@pytest.mark.parametrize("name", [CRON, "local.sh"])
def test_any_word_of_a_script_that_is_misspelt_is_noticed(name):
    text, words = words_of(name)
    passed = []
    for start, word in words:
        broken = f"{text[:start]}{word[:2]}~{text[start + 2 :]}"
        if name == "local.sh":
            content = broken
        else:
            path = "0.spec.jobTemplate.spec.template.spec.containers.0.args"
            content = cases.set_at(EVERYTHING[name], path, [broken])
        if not validate.check({**EVERYTHING, name: content}, {}, name):
            passed.append(word)
    assert len(words) > 12
    # What the data callable takes is its own affair.
    assert [word for word in passed if word not in ("/dev/null", "day:")] == []


# ------------------------------------------------------------------ the image


def test_any_line_of_the_image_that_is_broken_is_noticed():
    """Left out, its instruction misspelt, or its last word another one."""
    lines, passed = EVERYTHING["Dockerfile"].splitlines(), []
    for number, line in enumerate(lines):
        if not line.strip() or (line.startswith("#") and "hadolint" not in line):
            continue
        ways = [[], [f"X{line}"], [re.sub(r"\w+(\W*)$", r"broken\1", line)]]
        for way in ways if not line.startswith("#") else ways[:2]:
            text = "\n".join([*lines[:number], *way, *lines[number + 1 :], ""])
            if not validate.check({"Dockerfile": text}, {}):
                passed.append((line, way))
    assert passed == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 1000:1000\n", "USER root\n"),
        ("python:3.11.14-slim-bookworm", "python:latest"),
        ("python:3.11.14-slim-bookworm", "python:3.11"),
        ("--constraint cluster/constraints.txt --no-deps", "--no-deps"),
        ("COPY jobs jobs", "COPY jobs jobs\nADD https://example.com/x /x"),
        ("COPY jobs jobs", "COPY jobs jobs\nRUN sudo true"),
    ],
)
def test_an_image_that_is_not_pinned_or_runs_as_root_is_noticed(old, new):
    assert old in EVERYTHING["Dockerfile"]
    assert validate.check({"Dockerfile": EVERYTHING["Dockerfile"].replace(old, new)}, {})


# ------------------------------------------------------------------ the CRDs themselves

CRD = """
kind: CustomResourceDefinition
spec:
  names: {kind: RayCluster}
  versions:
    - name: v1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              required: [headGroupSpec]
              properties:
                rayVersion: {type: string}
                size: {anyOf: [{type: integer}, {type: string}], x-kubernetes-int-or-string: true, pattern: '^[0-9]+(Gi)?$'}
                free: {type: object, additionalProperties: {type: string}}
                open: {type: object, properties: {a: {type: string}}, x-kubernetes-preserve-unknown-fields: true}
                headGroupSpec: {type: object}
"""


def test_a_crd_refuses_fields_that_it_does_not_list(tmp_path):
    (tmp_path / "crd.yaml").write_text(CRD)
    schema = kuberay.load_crds([str(tmp_path / "crd.yaml")])["RayCluster"]
    validator = kuberay.Draft202012Validator(schema)
    right = {"headGroupSpec": {}, "size": "4Gi", "free": {"x": "y"}, "open": {"b": 1}}
    assert validator.is_valid({"kind": "RayCluster", "metadata": {"name": "x"}, "spec": right})
    assert validator.is_valid({"spec": {**right, "size": 4}})
    for wrong in ({"sizes": 4}, {"size": 0.5}, {"size": "4Mi"}, {"free": {"x": 1}}, {"rayVersion": 2}):
        assert not validator.is_valid({"spec": {**right, **wrong}}), wrong
    own = {"properties": {"rayVersion": {}, "rayVersions": {}}}
    assert list(kuberay.not_in_crd(own, schema["properties"]["spec"])) == ["rayVersions: not a field of KubeRay's"]
    assert any("authOptions" in text for text in validate.check(EVERYTHING, {"RayCluster": schema}, DEVELOPMENT))


def test_the_crds_of_kuberay_where_they_are_given(capsys):
    """Set `KUBERAY_CRDS` to their paths, with colons between them; they are not part of the project."""
    paths = os.environ.get("KUBERAY_CRDS", "").split(":")
    if paths == [""]:
        pytest.skip("KUBERAY_CRDS is not set")
    assert validate.main(["--crd", *paths]) == 0, capsys.readouterr().out


def test_the_schema_says_of_which_version_it_is():
    assert kuberay.VERSION in (cases.FOLDER / "checks" / f"kuberay-{kuberay.VERSION}.yaml").read_text().splitlines()[0]
    assert set(kuberay.KINDS) == kuberay.schema().keys() - {"$defs"}


def test_no_manifest_holds_a_secret():
    for name in FILES:
        for path in cases.places(EVERYTHING[name]):
            assert not re.search(r"secret_?key$|password", str(path[-1]), re.IGNORECASE), (name, path)
    assert list(pods.check_variable("AWS_SECRET_ACCESS_KEY", "x"))
    assert list(pods.check_variable("RAY_AUTH_TOKEN", "x"))


def test_every_file_of_the_folder_is_looked_at():
    files = {str(path.relative_to(cases.FOLDER)) for path in cases.FOLDER.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("checks/") and "__pycache__" not in name}
    assert files - EVERYTHING.keys() == {"README.md", "constraints.txt", "validate.py"}
    for name in FILES:
        assert list(yaml.safe_load_all((cases.FOLDER / name).read_text())), name
