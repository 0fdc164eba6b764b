"""Files of Ray's cluster launcher: Ray's own checks, and what they leave open: the provider, the nodes, the commands."""

from __future__ import annotations

import copy
import ipaddress
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match

from checks import commands, machines, pods

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
                "properties": {"CidrIp": _TEXT},
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
_SHARED = {"availability_zone": _TEXT, "cache_stopped_nodes": {"const": False}, "use_internal_ips": _FLAG}
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
    else:
        yield from _check_provider(config["provider"])
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
            yield from (
                f"available_node_types.{name}: {text}" for text in machines.check(kind, node, head=name == head)
            )
    finally:
        logger.setLevel(before)


def _check_provider(provider: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the schema of a provider lets pass: where its zones lie, and who reaches its machines."""
    zone = re.escape(provider["region"]) + ("-[a-z]" if provider["type"] == "gcp" else "[a-z]")
    for name in provider["availability_zone"].split(","):
        if not re.fullmatch(zone, name):
            yield f"provider.availability_zone: {name!r} lies in another region than {provider['region']}, or is no zone"
    for rule in (provider.get("security_group") or {}).get("IpPermissions", []):
        for addresses in rule["IpRanges"]:
            try:
                open_to = ipaddress.ip_network(addresses["CidrIp"])
            except ValueError as error:
                yield f"provider.security_group: CidrIp: {error}"
            else:
                if open_to.prefixlen < 16:
                    yield f"provider.security_group: CidrIp: {open_to} is half the world; expected /16 or fewer addresses"


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
        soft, _, hard = str(option).partition("nofile=")[2].partition(":")
        if soft.isdigit() and hard.isdigit() and int(soft) > int(hard):
            yield f"docker.run_options: {option!r}: the first number is the soft limit, which is no higher than the second"
        if not re.fullmatch(r"--env=RAY_AUTH_MODE=token|--ulimit=nofile=\d+:\d+|--shm-size=\d+[gm]", str(option)):
            yield f"docker.run_options: {option!r} is not known here"
    if "~/.ray/auth_token" not in (config.get("file_mounts") or {}).values():
        yield "file_mounts: the token is missing: /opt/laplace/.ray/auth_token: ~/.ray/auth_token"
    for remote, local in (config.get("file_mounts") or {}).items():
        if local == "~/.ray/auth_token" and remote != "/opt/laplace/.ray/auth_token":
            yield f"file_mounts: Ray looks for the token in /opt/laplace/.ray/auth_token, not {remote}"
    if config.get("max_workers", 0) < 0:
        yield "max_workers: expected at least 0"
    for name in ("upscaling_speed", "idle_timeout_minutes"):
        if config.get(name, 1) <= 0:
            yield f"{name}: expected more than 0"
    starts = {"head": "--head", "worker": "--address=$RAY_HEAD_IP:6379"}
    for role, flag in starts.items():
        lines = config.get(f"{role}_start_ray_commands") or []
        first, start = lines if len(lines) == 2 else ("", "")
        if first != "ray stop" or "ray start" not in start or flag not in start:
            yield f"{role}_start_ray_commands: expected ray stop, then ray start … {flag}"
        for line in lines:
            yield from (f"{role}_start_ray_commands: {text}" for text in commands.check_ray(line, {}))
        if role == "head" and not any("--num-cpus=0" in line and "--autoscaling-config=" in line for line in lines):
            yield "head_start_ray_commands: expected --num-cpus=0 and --autoscaling-config"
