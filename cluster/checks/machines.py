"""Nodes of a launcher file: the machines of Compute Engine and EC2, and what Ray is told of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

_TEXT, _FLAG = {"type": "string", "minLength": 1}, {"type": "boolean"}


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _list(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


_ACCELERATORS = (
    *("tesla-t4", "tesla-p4", "tesla-p100", "tesla-v100", "l4", "tesla-a100", "a100-80gb", "h100-80gb"),
    *("h100-mega-80gb", "h200-141gb", "b200"),
)
_SCOPES = ("cloud-platform", "devstorage.read_write", "compute")
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
                diskSizeGb={"type": "integer", "minimum": 10, "maximum": 65536},
                diskType=_TEXT,
                sourceImage={"type": "string", "pattern": r"^projects/[\w-]+/global/images/[\w/-]+$"},
            ),
        )
    ),
    guestAccelerators=_list(
        _closed(
            ["acceleratorType", "acceleratorCount"],
            acceleratorType={"enum": [f"nvidia-{name}" for name in _ACCELERATORS]},
            acceleratorCount={"type": "integer", "minimum": 1},
        )
    ),
    metadata=_closed(
        ["items"],
        items=_list(_closed(["key", "value"], key={"enum": ["install-nvidia-driver"]}, value={"enum": ["True"]})),
    ),
    scheduling=_list(_closed([], preemptible=_FLAG, onHostMaintenance={"enum": ["TERMINATE", "MIGRATE"]})),
    serviceAccounts={
        "maxItems": 1,  # of a machine
        **_list(
            _closed(
                ["email", "scopes"],
                email={"type": "string", "pattern": r"^[\w-]+@[\w-]+\.iam\.gserviceaccount\.com$"},
                scopes=_list({"enum": [f"https://www.googleapis.com/auth/{name}" for name in _SCOPES]}),
            )
        ),
    },
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
            "properties": {
                "HttpTokens": {"const": "required"},
                "HttpPutResponseHopLimit": {"minimum": 2, "maximum": 64},
            },
        },
        "BlockDeviceMappings": {
            "minItems": 1,
            "items": {
                "required": ["DeviceName", "Ebs"],
                "properties": {
                    "DeviceName": {"pattern": r"^/dev/(sd[a-z]\d?|xvd[a-z])$"},
                    "Ebs": {
                        "required": ["VolumeSize", "VolumeType"],
                        "properties": {"VolumeSize": {"maximum": 65536}},
                    },
                },
            },
        },
    },
}


def check(kind: str, node: Mapping[str, Any], *, head: bool) -> Iterator[str]:
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
