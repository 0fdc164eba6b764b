"""Every way to break one field of a manifest, as data: what is changed, and which changes are no mistake."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "cluster"
sys.path.insert(0, str(FOLDER))

BROKEN = "~ broken ~"
OF_ANY_FILE = ("empty", "twice", "with white space")  # which no field may be, whatever it says
KINDS = ("misspelt", "of another type", "of another value", "deleted", *OF_ANY_FILE)
# What may be left out, or be another one: (kind of change, pattern of the path, why).
ALLOWED = [
    ("deleted", r"metadata\.labels(\..*)?", "labels are for people"),
    ("deleted", r".*ttlSecondsAfterFinished", "then the cluster goes at once"),
    ("deleted", r".*idleTimeoutSeconds", "KubeRay has a default"),
    ("deleted", r".*(successful|failed)JobsHistoryLimit", "Kubernetes has defaults"),
    ("deleted", r".*envFrom(\.0)?", "where the service account has a role no keys are needed"),
    ("deleted|of another value", r".*secretRef\.optional", "then the Secret has to exist"),
    ("deleted", r".*limits\.cpu", "Ray takes the request"),
    ("deleted", r".*nodeSelector", "any node"),
    (".*", r".*nodeSelector\.cloud.google.com/gke-spot", "other clouds have other labels"),
    ("deleted|of another value", r".*tolerations", "nodes without taints"),
    ("deleted", r".*tolerations\.\d", "nodes without taints"),
    ("deleted", r"upscaling_speed", "Ray has a default"),
    ("deleted", r"docker\.run_options\.1", "Docker has a limit of its own"),
    ("deleted|misspelt", r"available_node_types\.gpu-spot", "a name of our own; two types need not be there"),
    ("deleted", r".*InstanceMarketOptions", "on demand"),
    ("deleted", r".*scheduling\.0", "on demand"),
    ("deleted|of another value", r".*preemptible", "on demand"),
]


FIT, CRON, RAY_CRON = (
    f"kuberay/{name}.yaml" for name in ("fit-rayjob", "recalibrate-cronjob", "recalibrate-raycronjob")
)
# What is wrong though every field is one that KubeRay has, and of its type: (file, path, value, what is said).
HEAD, WORKER = "0.spec.rayClusterSpec.headGroupSpec", "0.spec.rayClusterSpec.workerGroupSpecs.0"
RULES = [
    (FIT, "0.metadata.name", "a" * 48, "metadata.name"),
    (FIT, "0.spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished: needs"),
    (FIT, "0.spec.suspend", True, None),
    (FIT, "0.spec.backoffLimit", 0, None),
    (FIT, "0.spec.submissionMode", "HTTPMode", "submitterPodTemplate: there is no pod"),
    (FIT, "0.spec.submissionMode", "InteractiveMode", "backoffLimit: not in InteractiveMode"),
    (FIT, "0.spec.clusterSelector", {"ray.io/cluster": "laplace"}, "either a cluster or a clusterSelector"),
    (FIT, "0.spec.rayClusterSpec.authOptions.mode", "disabled", "authOptions"),
    (FIT, "0.spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "authOptions"),
    (FIT, "0.spec.rayClusterSpec.rayVersion", "2.51.0", "rayVersion"),
    (FIT, "0.spec.rayClusterSpec.enableInTreeAutoscaling", False, "autoscalerOptions"),
    (FIT, f"{HEAD}.rayStartParams.num-cpus", "4", "num-cpus"),
    (FIT, f"{HEAD}.serviceType", "LoadBalancer", "LoadBalancer"),
    (FIT, f"{HEAD}.template.spec.restartPolicy", "Always", "restartPolicy"),
    (FIT, f"{HEAD}.template.spec.securityContext.runAsUser", 0, "the user of the image is 1000"),
    (FIT, f"{HEAD}.template.spec.containers.0.image", "registry.example.com/laplace-dist:latest", "image"),
    (FIT, f"{HEAD}.template.spec.containers.0.image", "registry.example.com/other:1", "run the same one"),
    (FIT, f"{HEAD}.template.spec.containers.0.env.0.name", "RAY_health_check_initial_dealy_ms", "is not known"),
    (FIT, f"{HEAD}.template.spec.containers.0.env.0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "is a secret"),
    (FIT, f"{HEAD}.template.spec.volumes.0.configMap.name", "other", "no ConfigMap 'other'"),
    (FIT, f"{HEAD}.template.spec.containers.0.env.1.value", "0", "health_check_period_ms"),
    (FIT, f"{HEAD}.template.spec.containers.0.resources.requests.memory", "16Gi", "more than its limit"),
    (FIT, f"{HEAD}.template.spec.containers.0.resources.requests.memory", "8Mi", "too little"),
    (FIT, f"{WORKER}.template.spec.containers.0.resources.requests.cpu", "32", "more than its limit"),
    (FIT, f"{WORKER}.template.spec.containers.0.resources.requests.cpu", 8, None),
    (FIT, "0.spec.submitterPodTemplate.spec.containers.0.image", "registry.example.com/laplace-dist:0.2", "the same one"),
    (FIT, f"{WORKER}.template.spec.volumes", [{"name": "settings", "emptyDir": {"medium": m}} for m in ("Memory", "")],
        "the name settings is there twice"),
    (CRON, "0.spec.startingDeadlineSeconds", 5, "at least 10"),
    (CRON, "0.spec.jobTemplate.spec.activeDeadlineSeconds", 0, "at least 1"),
    (CRON, "0.spec.jobTemplate.spec.template.spec.containers.0.image", "registry.example.com/laplace-dist:0.2", "runs"),
    (FIT, f"{WORKER}.minReplicas", 17, "minReplicas"),
    (FIT, f"{WORKER}.suspend", True, "suspend"),
    (FIT, f"{WORKER}.template.spec.terminationGracePeriodSeconds", 5, "terminationGracePeriodSeconds"),
    (FIT, f"{WORKER}.template.spec.containers.0.resources.requests.nvidia\\.com/gpu", "2", "has to be the same"),
    (FIT, f"{WORKER}.template.spec.containers.0.securityContext.privileged", True, "not expected"),
    (RAY_CRON, "0.metadata.name", "a" * 37, "metadata.name"),
    (RAY_CRON, "0.spec.schedule", "CRON_TZ=UTC 0 3 * * *", "schedule"),
    (RAY_CRON, "0.spec.schedule", "0 25 * * *", "schedule"),
    (RAY_CRON, "0.spec.timeZone", "Mars/Olympus", "timeZone"),
    (RAY_CRON, "0.spec.jobTemplate.entrypoint", "true; rm -r /", "more than one command"),
    (CRON, "0.spec.concurrencyPolicy", "Allow", "expected Forbid"),
    (CRON, "0.spec.concurrencyPolicy", "Replace", "expected Forbid"),
    (CRON, "0.spec.schedule", "0 3 * *", "five fields"),
    (CRON, "0.spec.jobTemplate.spec.template.spec.containers.0.command", ["/bin/bash", "-c"], "command"),
    ("launcher/aws.yaml", "0.provider.cache_stoped_nodes", False, "cache_stoped_nodes"),
    ("launcher/aws.yaml", "0.provider.availability_zone", "us-east-1a", "another region"),
    ("launcher/aws.yaml", "0.provider.security_group.IpPermissions.0.IpRanges.0.CidrIp", "0.0.0.0/0", "0.0.0.0"),
    ("launcher/aws.yaml", "0.provider.security_group.IpPermissions.0.IpRanges.0.CidrIp", "203.0.113.0/2", "host bits"),
    ("launcher/aws.yaml", "0.provider.security_group.IpPermissions.0.IpRanges.0.CidrIp", "192.0.0.0/2", "half the world"),
    ("launcher/aws.yaml", "0.docker.run_options.1", "--ulimit=nofile=65536:4096", "soft limit"),
    ("launcher/aws.yaml", "0.idle_timeout_minutes", 0, "idle_timeout_minutes"),
    ("launcher/gcp.yaml", "0.provider.availability_zone", "us-central1-", "no zone"),
    ("launcher/gcp.yaml", "0.worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379", "ray stop"], "ray stop, then"),
    ("launcher/aws.yaml", "0.available_node_types.gpu-spot.node_config.InstanceType", "g5.3xlarge", "none of the"),
    ("launcher/aws.yaml", "0.available_node_types.head.resources.CPU", 4, "CPU: 0"),
    ("launcher/gcp.yaml", "0.available_node_types.gpu-spot.resources.GPU", 2, "guestAccelerators"),
    ("launcher/gcp.yaml", "0.max_workers", 0, None),
]  # fmt: skip


# How a job's cluster is deleted, and what is said.
DELETE = [
    ({"onSuccess": {"policy": "DeleteCluster"}}, "both of onSuccess and onFailure"),
    ({"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}}, None),
    ({"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteSelf"}}, "autoscaling"),
    ({"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 9}}]}, None),
    ({"deletionRules": [{"policy": "DeleteCluster", "condition": {"ttlSeconds": 9}}]}, "one of jobStatus"),
    ({"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}] * 2}, "twice"),
    (
        {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 9}},
                {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 8}},
            ]
        },
        "workers ≤ cluster",
    ),
]


def allowed(kind: str, path: tuple) -> list[str]:
    """Return why a change is one that somebody may well make; nothing if it is a mistake."""
    text = ".".join(map(str, path))
    return [why for kinds, pattern, why in ALLOWED if re.fullmatch(kinds, kind) and re.fullmatch(pattern, text)]


def plain(value: Any) -> Any:
    """Return a copy in which nothing is shared, as anchors of YAML are."""
    return json.loads(json.dumps(value))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every field and every item of a list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(document: Any, path: tuple, kind: str) -> Any:
    """Return a document with one field broken, or None where this kind of change does not exist there."""
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    if kind == "deleted":
        del parent[key]
    elif kind == "misspelt":
        if not isinstance(parent, dict):
            return None
        items = [(f"{name}x" if name == key else name, inner) for name, inner in parent.items()]
        parent.clear()
        parent.update(items)
    elif kind == "empty":
        parent[key] = None
    elif kind == "twice":
        if not isinstance(value, list):
            return None
        parent[key] = [*value, value[-1]]
    elif kind == "with white space":
        if not isinstance(value, str) or "\n" in value or re.search(r"[ $]", value):  # what a shell reads
            return None
        parent[key] = f"{value}\n"
    elif kind == "of another type":
        parent[key] = BROKEN if isinstance(value, dict | list) else [[]]
    elif isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int | float):
        parent[key] = -7
    elif isinstance(value, str):
        parent[key] = BROKEN
    elif len(value) < 2:
        return None
    else:
        parent[key] = type(value)()
    return document


def set_at(document: Any, path: str, value: Any) -> Any:
    """Return a document with a value at a dotted path, in which numbers are places in lists; None takes it away."""
    document = plain(document)
    keys = [key.replace("\0", ".") for key in path.replace("\\.", "\0").split(".")]
    *parents, last = [int(key) if key.isdigit() else key for key in keys]
    parent = document
    for key in parents:
        parent = parent[key]
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    return document
