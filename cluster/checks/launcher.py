"""Files of Ray's cluster launcher: Ray's own checks, and what they leave open: the provider, the nodes, the commands."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match

from checks import commands, pods

_TEXT, _FLAG = {"type": "string", "minLength": 1}, {"type": "boolean"}
_RULE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["IpProtocol", "FromPort", "ToPort", "IpRanges"],
    "properties": {
        "IpProtocol": {"enum": ["tcp"]},
        "FromPort": {"const": 22},  # everything else goes through a tunnel of SSH
        "ToPort": {"const": 22},
        "IpRanges": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["CidrIp"],
                "properties": {"CidrIp": {"type": "string", "pattern": r"^(?!0\.0\.0\.0)\d+(\.\d+){3}/\d+$"}},
            },
        },
    },
}
_GROUP = {
    "type": "object",
    "additionalProperties": False,
    "required": ["GroupName", "IpPermissions"],
    "properties": {
        "GroupName": {"type": "string", "pattern": r"^[\w.-]+$"},
        "IpPermissions": {"type": "array", "minItems": 1, "items": _RULE},
    },
}
_ZONES = {"type": "string", "pattern": r"^[a-z]+-[a-z]+\d?-?\d?[a-z]?(-[a-z])?(,[a-z]+-[a-z]+-\d[a-z])*$"}
_SHARED = {"availability_zone": _ZONES, "cache_stopped_nodes": {"const": False}, "use_internal_ips": _FLAG}
# Ray passes by what it does not know here, so a misspelt field would be as good as left out.
PROVIDERS = {
    "aws": {
        "required": ["type", "region", "availability_zone", "cache_stopped_nodes", "security_group"],
        "properties": {
            "type": {"const": "aws"},
            "region": {"type": "string", "pattern": r"^[a-z]{2}-[a-z]+-\d$"},
            **_SHARED,
            "security_group": _GROUP,
        },
    },
    "gcp": {
        "required": ["type", "region", "availability_zone", "project_id", "cache_stopped_nodes"],
        "properties": {
            "type": {"const": "gcp"},
            "region": {"type": "string", "pattern": r"^[a-z]+-[a-z]+\d$"},
            "project_id": {"type": "string", "pattern": "^[a-z][-a-z0-9]{4,28}[a-z0-9]$"},
            **_SHARED,
        },
    },
}


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _list(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


# What the file uses of the instances of Compute Engine (v1); Amazon's are checked by the service model of botocore.
_MACHINE = _closed(
    ["machineType", "disks", "serviceAccounts"],
    machineType={"type": "string", "pattern": r"^[a-z]\d[a-z]?-[a-z]+-\d+(g)?$"},
    disks=_list(
        _closed(
            ["boot", "autoDelete", "type", "initializeParams"],
            boot={"const": True},
            autoDelete={"const": True},
            type={"enum": ["PERSISTENT", "SCRATCH"]},
            initializeParams=_closed(
                ["diskSizeGb", "sourceImage"],
                diskSizeGb={"type": "integer", "minimum": 10},
                diskType=_TEXT,
                sourceImage={"type": "string", "pattern": r"^projects/[\w-]+/global/images/[\w/-]+$"},
            ),
        )
    ),
    guestAccelerators=_list(
        _closed(
            ["acceleratorType", "acceleratorCount"],
            acceleratorType={"type": "string", "pattern": r"^nvidia-[\w-]+$"},
            acceleratorCount={"type": "integer", "minimum": 1},
        )
    ),
    metadata=_closed(
        ["items"],
        items=_list(_closed(["key", "value"], key={"enum": ["install-nvidia-driver"]}, value={"enum": ["True"]})),
    ),
    scheduling=_list(_closed([], preemptible=_FLAG, onHostMaintenance={"enum": ["TERMINATE", "MIGRATE"]})),
    serviceAccounts=_list(
        _closed(
            ["email", "scopes"],
            email={"type": "string", "pattern": r"^[\w-]+@[\w-]+\.iam\.gserviceaccount\.com$"},
            scopes=_list({"type": "string", "pattern": r"^https://www\.googleapis\.com/auth/[\w.-]+$"}),
        )
    ),
)


# What has to be there on EC2; which fields there are, and their types, its service model knows.
_INSTANCE = {
    "type": "object",
    "required": ["InstanceType", "IamInstanceProfile", "MetadataOptions", "BlockDeviceMappings"],
    "properties": {
        "IamInstanceProfile": {"required": ["Name"]},
        "InstanceMarketOptions": {"required": ["MarketType"]},
        "MetadataOptions": {
            "required": ["HttpTokens", "HttpPutResponseHopLimit"],
            "properties": {"HttpTokens": {"const": "required"}, "HttpPutResponseHopLimit": {"minimum": 2}},
        },
        "BlockDeviceMappings": {
            "minItems": 1,
            "items": {
                "required": ["DeviceName", "Ebs"],
                "properties": {"Ebs": {"required": ["VolumeSize", "VolumeType"]}},
            },
        },
    },
}


def check(config: Any) -> Iterator[str]:
    """Yield what is wrong with a file of the cluster launcher."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    kind = config["provider"].get("type") if isinstance(config.get("provider"), dict) else None
    if not isinstance(kind, str) or kind not in PROVIDERS:
        yield f"provider.type: got {kind!r}; expected one of {sorted(PROVIDERS)}"
        return
    schema = {"type": "object", "additionalProperties": False, **PROVIDERS[kind]}
    if error := best_match(Draft202012Validator(schema).iter_errors(config["provider"])):
        yield f"provider.{'.'.join(map(str, error.absolute_path))}: {error.message}"
    elif not all(
        zone.startswith(config["provider"]["region"]) for zone in config["provider"]["availability_zone"].split(",")
    ):
        yield "provider.availability_zone: lies in another region"
    logger = logging.getLogger("ray.autoscaler._private.util")
    before = logger.level
    logger.setLevel(logging.WARNING)  # a line for every file that is right
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except ValidationError as error:
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    except Exception as error:  # noqa: BLE001  Ray trips over values of another type in many ways
        yield f"Ray refuses the file: {error!r}"
    else:
        yield from _check_values(config)
        types, head = config["available_node_types"], config["head_node_type"]
        if len(types) < 2:
            yield "available_node_types: expected a type of workers besides the head"
        for name, node in types.items():
            yield from (f"available_node_types.{name}: {text}" for text in _check_node(kind, node, name == head))
    finally:
        logger.setLevel(before)


def _check_values(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what Ray's schema lets pass: what has to be there, and values."""
    for name in (
        "cluster_name",
        "max_workers",
        "auth",
        "docker",
        "head_node_type",
        "file_mounts",
        "idle_timeout_minutes",
    ):
        if name not in config:
            yield f"{name}: is missing"
    for name in ("cluster_name", "docker.container_name", "auth.ssh_user"):
        group, _, last = name.rpartition(".")
        value = (config.get(group) or {} if group else config).get(last)
        if not re.fullmatch(r"[a-z][-a-z0-9]*", str(value)):
            yield f"{name}: got {value!r}; expected lower-case letters, digits and '-'"
    if unknown := (config.get("auth") or {}).keys() - {"ssh_user", "ssh_private_key"}:
        yield f"auth: {sorted(unknown)} are not known"
    docker = config.get("docker") or {}
    if not pods.IMAGE.fullmatch(docker.get("image", "")):
        yield f"docker.image: got {docker.get('image')!r}; expected registry/name:tag, with a tag that stays, or a digest"
    if docker.get("pull_before_run") is not True:
        yield "docker.pull_before_run: expected true"
    options = docker.get("run_options") or []
    if "--env=RAY_AUTH_MODE=token" not in options:
        yield "docker.run_options: --env=RAY_AUTH_MODE=token is missing; who reaches the head could run code"
    for option in options:
        if not re.fullmatch(r"--env=RAY_AUTH_MODE=token|--ulimit=nofile=\d+:\d+|--shm-size=\d+[gm]", str(option)):
            yield f"docker.run_options: {option!r} is not known here"
    if "~/.ray/auth_token" not in (config.get("file_mounts") or {}).values():
        yield "file_mounts: the token is missing: /opt/laplace/.ray/auth_token: ~/.ray/auth_token"
    for remote, local in (config.get("file_mounts") or {}).items():
        if local == "~/.ray/auth_token" and remote != "/opt/laplace/.ray/auth_token":
            yield f"file_mounts: Ray looks for the token in /opt/laplace/.ray/auth_token, not {remote}"
    for name in ("max_workers", "upscaling_speed", "idle_timeout_minutes"):
        if config.get(name, 0) < 0:
            yield f"{name}: expected at least 0"
    starts = {"head": "--head", "worker": "--address=$RAY_HEAD_IP:6379"}
    for role, flag in starts.items():
        lines = config.get(f"{role}_start_ray_commands") or []
        if not any("ray start" in line and flag in line for line in lines) or "ray stop" not in lines:
            yield f"{role}_start_ray_commands: expected ray stop, then ray start … {flag}"
        for line in lines:
            yield from (f"{role}_start_ray_commands: {text}" for text in commands.check_ray(line, {}))
        if role == "head" and not any("--num-cpus=0" in line and "--autoscaling-config=" in line for line in lines):
            yield "head_start_ray_commands: expected --num-cpus=0 and --autoscaling-config"


def _check_node(kind: str, node: Mapping[str, Any], head: bool) -> Iterator[str]:
    """Yield what is wrong with one type of node."""
    if not head and not 0 <= node.get("min_workers", -1) <= node.get("max_workers", -1):
        yield "expected 0 ≤ min_workers ≤ max_workers"
    if head and node["resources"] != {"CPU": 0}:
        yield f"resources: got {node['resources']}; expected CPU: 0 for the head, so that no worker runs beside the driver"
    if kind == "gcp" and not head and not node["resources"].get("CPU"):
        yield "resources.CPU: is missing; on Compute Engine Ray does not look it up"
    for name in node["resources"].keys() - {"CPU", "GPU", "memory"}:
        yield f"resources.{name}: expected CPU, GPU or memory"
    machine = node["node_config"]
    if kind == "gcp":
        error = best_match(Draft202012Validator(_MACHINE).iter_errors(machine))
        if error:
            yield f"node_config.{'.'.join(map(str, error.absolute_path))}: {error.message}"
        elif node["resources"].get("GPU", 0) != sum(
            a["acceleratorCount"] for a in machine.get("guestAccelerators", [])
        ):
            yield "resources.GPU: is another number than that of guestAccelerators"
        elif "guestAccelerators" in machine:
            if {"onHostMaintenance": "TERMINATE"} not in machine.get("scheduling", []):
                yield "node_config.scheduling: a machine with GPUs cannot be moved: onHostMaintenance: TERMINATE is missing"
            if "metadata" not in machine:
                yield "node_config.metadata: install-nvidia-driver is missing"
        return
    validator, shape = _instances()
    report = validator.validate({"MinCount": 1, "MaxCount": 1, **machine}, shape)
    if report.has_errors():
        yield f"node_config: {report.generate_report()}"
        return
    yield from _check_words(machine, shape, "node_config")
    if error := best_match(Draft202012Validator(_INSTANCE).iter_errors(machine)):
        yield f"node_config.{'.'.join(map(str, error.absolute_path))}: {error.message}"


def _check_words(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Yield the words that the service model of EC2 does not list where it lists some; botocore leaves that to the service."""
    if shape.type_name == "structure":
        for name, inner in value.items():
            yield from _check_words(inner, shape.members[name], f"{where}.{name}")
    elif shape.type_name == "list":
        for inner in value:
            yield from _check_words(inner, shape.member, f"{where}[]")
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{where}: {value!r} is none of the {len(shape.enum)} words of EC2"
    elif shape.type_name == "integer" and value < 1:
        yield f"{where}: expected at least 1"
    elif shape.type_name == "string" and not re.fullmatch(r"[\w./:-]+", value):
        yield f"{where}: {value!r} has a character that no name of EC2 has"


@cache
def _instances() -> tuple[Any, Any]:
    """Return botocore's validator, and the shape of what EC2 takes for making instances."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.Session().get_service_model("ec2")
    return ParamValidator(), model.operation_model("RunInstances").input_shape
