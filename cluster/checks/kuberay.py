"""KubeRay's kinds: a schema, the rules of its controller, and the command line that a job runs."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from checks import commands, pods

VERSION = "1.7.0"
KINDS = ("RayCluster", "RayJob", "RayCronJob")
_LONGEST_NAME = {"RayCluster": 50, "RayJob": 47, "RayCronJob": 36}  # names of pods and jobs are made from it
_OF_HEAD = {name for name in pods.VARIABLES if "health_check" in name or "STOP_WAIT" in name}
_CRON = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


@cache
def schema() -> dict[str, Any]:
    """Return the project's own schema, one entry per kind besides its definitions."""
    return yaml.safe_load((Path(__file__).parent / f"kuberay-{VERSION}.yaml").read_text())


@cache
def _validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator({"$defs": schema()["$defs"], **schema()[kind]})


def load_crds(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the schema of version v1 from files of CRDs, by kind, made to refuse fields that it does not list."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for path in paths:
        for document in yaml.load_all(Path(path).read_text(), Loader=loader):
            if document and document.get("kind") == "CustomResourceDefinition":
                versions = {version["name"]: version for version in document["spec"]["versions"]}
                found[document["spec"]["names"]["kind"]] = _closed(versions["v1"]["schema"]["openAPIV3Schema"])
    return found


def _closed(node: Any) -> Any:
    """Return a schema of OpenAPI as JSON Schema that refuses unknown fields."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _closed(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        node.pop("type", None)
        node.pop("anyOf", None)
        if isinstance(pattern := node.pop("pattern", None), str):
            node["anyOf"] = [{"type": "integer"}, {"type": "string", "pattern": pattern}]
        else:
            node["type"] = ["integer", "string"]
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        node.setdefault("additionalProperties", node.get("x-kubernetes-preserve-unknown-fields", False))
    return node


def check(document: Mapping[str, Any], around: pods.Around, crds: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with one object of KubeRay."""
    kind = document["kind"]
    for name in document.keys() - {"apiVersion", "kind", "metadata", "spec"}:
        yield f"{name}: not expected here"
    if document.get("apiVersion") != "ray.io/v1":
        yield f"apiVersion: got {document.get('apiVersion')!r}; expected ray.io/v1"
    errors = list(_validator(kind).iter_errors(document.get("spec")))
    if kind in crds:
        errors += Draft202012Validator(crds[kind]).iter_errors(document)
    if errors:
        error = best_match(errors)
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        return
    name, spec = str(document["metadata"].get("name")), document["spec"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _LONGEST_NAME[kind]:
        yield f"metadata.name: {name!r} is no lower-case label of at most {_LONGEST_NAME[kind]} characters"
    if kind == "RayCluster":
        yield from _check_cluster(spec, around)
    elif kind == "RayJob":
        yield from _check_job(spec, around)
    else:
        yield from check_schedule(spec["schedule"], spec["timeZone"])
        yield from _check_job(spec["jobTemplate"], around)


def check_schedule(schedule: str, zone: str) -> Iterator[str]:
    """Yield what is wrong with a schedule of five fields and its time zone."""
    fields = schedule.split()
    item = re.compile(r"(\*|(\d+)(-(\d+))?)(/([1-9]\d*))?")
    if len(fields) != len(_CRON):
        yield f"schedule: got {schedule!r}; expected five fields"
    for text, (low, high) in zip(fields, _CRON, strict=False):
        for part in text.split(","):
            found = item.fullmatch(part)
            numbers = [int(n) for n in (found[2], found[4]) if n] if found else [-1]
            if not all(low <= number <= high for number in numbers) or numbers != sorted(numbers):
                yield f"schedule: {part!r} in {schedule!r}: expected numbers from {low} to {high}, *, a-b, */n"
    if zone not in available_timezones():
        yield f"timeZone: there is no {zone!r}"


def _check_job(spec: Mapping[str, Any], around: pods.Around) -> Iterator[str]:
    yield from _check_deletion(spec)
    mode, cluster = spec["submissionMode"], spec.get("rayClusterSpec")
    selector = spec.get("clusterSelector") or {}
    if bool(cluster) == bool(selector):
        yield "rayClusterSpec: expected either a cluster or a clusterSelector"
    unfit = mode == "SidecarMode" or spec["backoffLimit"] or spec.get("suspend")
    if selector and (set(selector) != {"ray.io/cluster"} or unfit):
        yield "clusterSelector: expected ray.io/cluster alone, without SidecarMode, backoffLimit and suspend"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend: needs shutdownAfterJobFinishes"
    if mode == "InteractiveMode" and spec["backoffLimit"]:
        yield "backoffLimit: not in InteractiveMode"
    for name in ("submitterPodTemplate", "submitterConfig"):
        if name in spec and mode != "K8sJobMode":
            yield f"{name}: there is no pod that submits in {mode}"
    if mode == "K8sJobMode" and not {"submitterPodTemplate", "submitterConfig"} <= spec.keys():
        yield "expected a submitterPodTemplate and submitterConfig; the operator's own pod would run with other rights"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if name not in spec:
            yield f"{name}: is missing; nothing else ends a job that hangs"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML") or "{}"), dict):
        yield "runtimeEnvYAML: expected a mapping"
    if cluster:
        yield from _check_cluster(cluster, around)
    head = cluster["headGroupSpec"]["template"] if cluster else around.clusters.get(selector.get("ray.io/cluster"))
    if "submitterPodTemplate" in spec:
        found = _check_submitter(spec["submitterPodTemplate"], head or {}, around)
        yield from (f"submitterPodTemplate: {text}" for text in found)
    if head is None:
        yield "clusterSelector: no such RayCluster is among the manifests"
    elif not list(pods.check_schema({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **head})):
        shells = 2 if mode in ("K8sJobMode", "SidecarMode") else 1
        found = commands.check_entrypoint(spec["entrypoint"], pods.files_of(head, around), through_shells=shells)
        yield from (f"entrypoint: {text}" for text in found)


def _check_deletion(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the controller refuses of how and when a job's cluster is deleted."""
    ends, strategy = spec.get("shutdownAfterJobFinishes", False), spec.get("deletionStrategy")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if strategy is None:
        if not ends and spec.get("rayClusterSpec"):
            yield "shutdownAfterJobFinishes: expected true, or a deletionStrategy; else the cluster stays and costs"
        return
    rules, ways = (
        strategy.get("deletionRules") or [],
        [strategy[n] for n in ("onSuccess", "onFailure") if n in strategy],
    )
    policies = [item["policy"] for item in (*rules, *ways)]
    scaled = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    if rules and ends:
        yield "deletionStrategy.deletionRules: not together with shutdownAfterJobFinishes"
    if bool(rules) == bool(ways) or (ways and len(ways) < 2):
        yield "deletionStrategy: expected either both of onSuccess and onFailure, or deletionRules"
    if "DeleteWorkers" in policies and scaled:
        yield "deletionStrategy: DeleteWorkers does not go with autoscaling"
    if spec.get("clusterSelector") and {"DeleteWorkers", "DeleteCluster"} & set(policies):
        yield "deletionStrategy: a cluster that was selected is not the job's to delete"
    if ways and ends and "DeleteNone" in policies:
        yield "deletionStrategy: DeleteNone does not go with shutdownAfterJobFinishes"
    seen: dict[Any, dict[str, int]] = {}
    for rule in rules:
        when = rule["condition"]
        if ("jobStatus" in when) == ("jobDeploymentStatus" in when):
            yield "deletionStrategy.deletionRules: expected one of jobStatus and jobDeploymentStatus"
        group = seen.setdefault((when.get("jobStatus"), when.get("jobDeploymentStatus")), {})
        if rule["policy"] in group:
            yield f"deletionStrategy.deletionRules: {rule['policy']} twice for one state"
        group[rule["policy"]] = when.get("ttlSeconds", 0)
    for group in seen.values():
        order = [group[name] for name in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if name in group]
        if order != sorted(order):
            yield "deletionStrategy.deletionRules: expected ttlSeconds of workers ≤ cluster ≤ the job itself"


def _check_cluster(spec: Mapping[str, Any], around: pods.Around) -> Iterator[str]:
    """Yield what is wrong with a cluster: the controller's rules, and ours."""
    version, auth, head = spec["rayVersion"], spec["authOptions"], spec["headGroupSpec"]
    scaler, scaled = spec.get("autoscalerOptions") or {}, spec.get("enableInTreeAutoscaling", False)
    if version != _pinned("ray"):
        yield f"rayVersion: got {version}; cluster/constraints.txt pins {_pinned('ray')}"
    if auth["mode"] != "token" or auth.get("enableK8sTokenAuth"):
        yield "authOptions: expected mode: token alone; who reaches the head can run code"
    if bool(scaler) != scaled:
        yield "autoscalerOptions: expected together with enableInTreeAutoscaling: true"
    if scaler:
        yield from (f"autoscalerOptions: {text}" for text in _check_scaler(scaler))
    if head["rayStartParams"] != {"num-cpus": "0"}:
        yield 'headGroupSpec.rayStartParams: expected num-cpus: "0" alone, so that no worker runs beside the driver'
    yield from (f"headGroupSpec: {text}" for text in pods.check_pod(head["template"], around))
    given = commands.at(head, "template", "spec", "containers", 0, "env")
    names = {str(commands.at(variable, "name")) for variable in given} if isinstance(given, list) else set()
    if missing := _OF_HEAD - names:
        yield f"headGroupSpec: env: {sorted(missing)} are missing: how soon a lost node is noticed, how long a stop may take"
    images = {str(commands.at(head, "template", "spec", "containers", 0, "image"))}
    for group in spec["workerGroupSpecs"]:
        where, low, high = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None or low > high:
            yield f"{where}: expected minReplicas ≤ maxReplicas"
        if "idleTimeoutSeconds" in group and scaler.get("version") != "v2":
            yield f"{where}: idleTimeoutSeconds needs autoscalerOptions.version: v2"
        grace = commands.at(group, "template", "spec", "terminationGracePeriodSeconds")
        if not isinstance(grace, int) or grace < 30:
            yield f"{where}: terminationGracePeriodSeconds: expected at least 30, for what a worker is committing"
        if group.get("suspend"):
            yield f"{where}: suspend does not go with autoscaling, nor without its feature gate"
        for name in group["rayStartParams"].keys() - {"num-cpus", "num-gpus", "object-store-memory"}:
            yield f"{where}: rayStartParams.{name}: expected num-cpus, num-gpus or object-store-memory"
        if group.get("resources") and group["rayStartParams"].keys() & {"num-cpus", "num-gpus"}:
            yield f"{where}: resources are given twice"
        yield from (f"{where}: {text}" for text in pods.check_pod(group["template"], around))
        images.add(str(commands.at(group, "template", "spec", "containers", 0, "image")))
    if len(images) > 1:
        yield f"images: head and workers have to run the same one, not {sorted(images)}"


def _check_submitter(template: Mapping[str, Any], head: Mapping[str, Any], around: pods.Around) -> Iterator[str]:
    """Yield what is wrong with the pod that submits a job."""
    if problems := list(pods.check_pod(template, around)):
        yield from problems
        return
    own, theirs = (commands.at(pod, "spec", "containers", 0, "image") for pod in (template, head))
    if own != theirs:
        yield f"image: it and the head have to run the same one, not {own!r} and {theirs!r}"


def _check_scaler(scaler: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the container of the autoscaler."""
    container = {name: scaler[name] for name in ("resources", "securityContext", "env") if name in scaler}
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "autoscaler", **container}]}}
    if problems := list(pods.check_schema(pod)):
        yield from problems
        return
    yield from pods.check_rights(scaler)
    yield from pods.check_resources(scaler["resources"])


@cache
def _pinned(package: str) -> str:
    text = (Path(__file__).parents[1] / "constraints.txt").read_text()
    return re.search(rf"^{package}==(\S+)$", text, re.MULTILINE)[1]


def not_in_crd(own: Mapping[str, Any], theirs: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the fields of the project's own schema that a CRD does not have."""
    if "$ref" in own:
        own = copy.copy(schema()["$defs"][own["$ref"].rpartition("/")[2]])
    for name, field in (own.get("properties") or {}).items():
        if name not in (theirs.get("properties") or {}):
            yield f"{where}{name}: not a field of KubeRay's"
        else:
            yield from not_in_crd(field, theirs["properties"][name], f"{where}{name}.")
    if "items" in own and own["items"].get("properties"):
        yield from not_in_crd(own["items"], theirs.get("items") or {}, f"{where}[].")
