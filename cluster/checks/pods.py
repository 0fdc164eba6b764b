"""Pods: the schema of Kubernetes, and what it leaves open: rights, resources, names that refer to something, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import kubernetes_validate

KUBERNETES = "1.34"
# Ray takes no notice of a name that it does not know.
VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": r"[1-9]\d{0,2}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_failure_threshold": r"[1-9]\d?",
    "RAY_health_check_initial_delay_ms": r"[1-9]\d{0,4}",
    "RAY_health_check_period_ms": r"[1-9]\d{0,4}",
    "RAY_health_check_timeout_ms": r"[1-9]\d{0,4}",
}
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)", re.IGNORECASE)
IMAGE = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+(:(?!latest$)[\w][\w.-]*|@sha256:[0-9a-f]{64})")
_contents = cache(kubernetes_validate.utils.schema_contents)  # a megabyte each time
_LABEL = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i)?")
_UNITS = {None: 1.0, "m": 1e-3}
_UNITS |= {unit: 1e3 ** (i + 1) for i, unit in enumerate("kMGTPE")}
_UNITS |= {f"{unit}i": 1024.0 ** (i + 1) for i, unit in enumerate("KMGTPE")}
_RANGE = {"cpu": (0.05, 512), "memory": (2**27, 2**44)}  # what anything of Ray takes, and more than a machine has
_RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu", "amd.com/gpu"}
_WORDS = {"operator": {"Exists", "Equal"}, "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"}}


@dataclass(frozen=True)
class Around:
    """What the other manifests hold that a pod may refer to.

    Attributes:
        maps: Data of the ConfigMaps, by name.
        accounts: Names of the service accounts.
        clusters: The templates of the heads of RayClusters, by the clusters' names.
    """

    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    accounts: frozenset[str] = frozenset()
    clusters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def check_schema(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the schema of Kubernetes says of an object of one of its own kinds; unknown fields are refused."""
    try:
        with mock.patch.object(kubernetes_validate.utils, "schema_contents", _contents):
            kubernetes_validate.validate(dict(document), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    except (
        kubernetes_validate.SchemaNotFoundError,
        kubernetes_validate.utils.VersionNotSupportedError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        yield f"is no object of Kubernetes {KUBERNETES}: {getattr(error, 'message', repr(error))}"


def check_pod(template: Mapping[str, Any], around: Around) -> Iterator[str]:
    """Yield what is wrong with the template of a pod."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    if problems := list(check_schema(pod)):
        yield from problems
        return
    spec = template["spec"]
    if len(spec["containers"]) != 1:
        yield f"containers: got {len(spec['containers'])}; expected one"
        return
    security = spec.get("securityContext") or {}
    if spec.get("restartPolicy") != "Never":
        yield "restartPolicy: expected Never: whoever made the pod makes another one"
    if security.get("runAsNonRoot") is not True or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "securityContext: expected runAsNonRoot: true and seccompProfile: {type: RuntimeDefault}"
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        if security.get(name) != 1000:
            yield f"securityContext.{name}: got {security.get(name)!r}; the user of the image is 1000"
    if spec.get("terminationGracePeriodSeconds", 0) < 0:
        yield "terminationGracePeriodSeconds: expected at least 0"
    if (account := spec.get("serviceAccountName")) not in around.accounts:
        yield f"serviceAccountName: got {account!r}; the manifests have {sorted(around.accounts)}"
    for label in spec.get("nodeSelector") or {}:
        if not _LABEL.fullmatch(label):
            yield f"nodeSelector: {label!r} is no label"
    for toleration in spec.get("tolerations") or []:
        for name, words in _WORDS.items():
            if toleration.get(name) not in words:
                yield f"tolerations: {name} is {toleration.get(name)!r}; expected one of {sorted(words)}"
        if not _LABEL.fullmatch(toleration.get("key", "")):
            yield f"tolerations: {toleration.get('key')!r} is no label"
    for container in spec["containers"]:
        yield from (f"{container['name']}: {text}" for text in _check_container(container, spec, around))


def _check_container(container: Mapping[str, Any], spec: Mapping[str, Any], around: Around) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", container["name"]):
        yield "name: expected lower-case letters, digits and '-'"
    if not IMAGE.fullmatch(container.get("image", "")):
        yield f"image: got {container.get('image')!r}; expected registry/name:tag, with a tag that stays, or a digest"
    yield from check_rights(container)
    yield from check_resources(container.get("resources") or {})
    for variable in container.get("env") or []:
        yield from check_variable(variable["name"], variable.get("value"), variable.get("valueFrom"))
    for source in container.get("envFrom") or []:
        for kind in ("secretRef", "configMapRef"):
            if kind in source and not _is_name(source[kind].get("name", "")):
                yield f"envFrom: {source[kind].get('name')!r} is no name"
        if not source:
            yield "envFrom: refers to nothing"
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts") or []}
    if volumes != set(mounts):
        yield f"volumeMounts: {sorted(mounts)} are mounted, volumes are {sorted(volumes)}"
    for path in mounts.values():
        if not path.startswith("/"):
            yield f"volumeMounts: {path!r} is no absolute path"
    for volume in spec.get("volumes") or []:
        if "configMap" in volume and volume["configMap"].get("name") not in around.maps:
            yield f"volumes: no ConfigMap {volume['configMap'].get('name')!r} is among the manifests"
        if len(volume) < 2:
            yield f"volumes: {volume['name']} says nothing of what it holds"


def check_rights(container: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a container may do and should not."""
    rights = container.get("securityContext") or {}
    if rights.get("allowPrivilegeEscalation") is not False or (rights.get("capabilities") or {}).get("drop") != ["ALL"]:
        yield "securityContext: expected allowPrivilegeEscalation: false and capabilities: {drop: [ALL]}"
    for name in rights.keys() - {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem", "runAsNonRoot"}:
        yield f"securityContext.{name}: not expected here"


def check_resources(resources: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with what a container asks for: it has to say CPU and memory, and a GPU on both sides."""
    for side in resources.keys() - {"requests", "limits"}:
        yield f"resources.{side}: expected requests and limits"
    amounts: dict[str, dict[str, float]] = {"requests": {}, "limits": {}}
    for side, names in (("requests", ("cpu", "memory")), ("limits", ("memory",))):
        for name in names:
            if name not in (resources.get(side) or {}):
                yield f"resources.{side}.{name}: is missing; Ray takes its sizes from it"
        for name, amount in (resources.get(side) or {}).items():
            if name not in _RESOURCES:
                yield f"resources.{side}.{name}: expected one of {sorted(_RESOURCES)}"
            found = None if isinstance(amount, bool) else _QUANTITY.fullmatch(str(amount))
            if found is None:
                yield f"resources.{side}.{name}: {amount!r} is no quantity"
                continue
            amounts[side][name] = float(found[1]) * _UNITS[found[2]]
            low, high = _RANGE.get(name, (0, float("inf")))
            if not low <= amounts[side][name] <= high:
                yield f"resources.{side}.{name}: {amount!r} is too little, or more than a machine has"
    for name in sorted(_RESOURCES):
        request, limit = (amounts[side].get(name) for side in ("requests", "limits"))
        if name.endswith("/gpu") and request != limit:
            yield f"resources: {name} has to be the same in requests and limits"
        if request is not None and limit is not None and request > limit:
            yield f"resources: {name} asks for more than its limit"


def check_variable(name: str, value: Any, source: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield what is wrong with a variable of the environment: secrets by reference alone, and no misspelt name of Ray's."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        yield f"env: {name!r} is no name of a variable"
    if (value is None) == (source is None):
        yield f"env: {name} needs either a value or a reference"
    if value is not None and _SECRET.search(name) and name != "RAY_AUTH_MODE":
        yield f"env: {name} is a secret; refer to one with valueFrom.secretKeyRef"
    if value is not None and name.startswith("RAY_"):
        if name not in VARIABLES:
            yield f"env: {name} is not known; expected one of {sorted(VARIABLES)}"
        elif not re.fullmatch(VARIABLES[name], str(value)):
            yield f"env: {name} is {value!r}; expected {VARIABLES[name]}"
    for kind, reference in (source or {}).items():
        if kind != "secretKeyRef" or not _is_name(reference.get("name", "")) or not reference.get("key"):
            yield f"env: {name} refers to {kind} {reference!r}; expected a secretKeyRef with name and key"


def files_of(template: Mapping[str, Any], around: Around) -> dict[str, str]:
    """Return what the files hold that a pod's first container gets from ConfigMaps, by their path."""
    spec = template["spec"]
    maps = {
        v["name"]: around.maps.get(v["configMap"].get("name"), {})
        for v in spec.get("volumes") or []
        if "configMap" in v
    }
    mounts = spec["containers"][0].get("volumeMounts") or [] if spec["containers"] else []
    return {
        f"{mount['mountPath'].rstrip('/')}/{name}": text
        for mount in mounts
        for name, text in maps.get(mount["name"], {}).items()
    }


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", text))
