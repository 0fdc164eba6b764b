"""Check everything in this folder offline: manifests, launcher files, command lines, the image.

    python cluster/validate.py [--crd FILE…] [FOLDER]

Nothing is started and nothing is fetched; it needs the extra `test`. Objects of Kubernetes are checked by
`kubernetes-validate`; those of KubeRay by a schema of our own, the rules of its controller and, with `--crd`, the CRDs
themselves; launcher files by Ray, botocore and schemas of our own; every command line by the parser that would get it; the
image by hadolint. Ends with status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from checks import commands, image, kuberay, launcher, plain, pods  # noqa: E402

Documents = Mapping[str, Any]


def load(folder: Path) -> dict[str, Any]:
    """Return what is to be checked by path below the folder: the documents of YAML files, and the text of others."""
    found: dict[str, Any] = {}
    for path in sorted([*folder.glob("kuberay/*.yaml"), *folder.glob("launcher/*.yaml")]):
        found[str(path.relative_to(folder))] = plain.load(path.read_text())
    for name in ("local.sh", "Dockerfile"):
        if (folder / name).exists():
            found[name] = (folder / name).read_text()
    return found


def check(everything: Documents, crds: Mapping[str, Any], only: str | None = None) -> list[str]:
    """Return the problems, each with the path of its file.

    Args:
        everything: What `load` returns.
        crds: What `kuberay.load_crds` returns; empty for the project's own schema alone.
        only: Look at this file, with the others around it.
    """
    around, problems = around_of(everything), []
    for name, content in everything.items():
        if only is None or name == only:
            problems += [f"{name}: {text}" for text in _check_file(name, content, around, crds)]
    return problems


def around_of(everything: Documents) -> pods.Around:
    """Return what pods may refer to: what the other manifests hold."""
    maps, accounts, clusters = {}, set(), {}
    for name, content in everything.items():
        for document in content if name.startswith("kuberay/") else ():
            try:
                own = document["metadata"]["name"]
                if document["kind"] == "ConfigMap":
                    maps[own] = {key: text for key, text in document["data"].items() if isinstance(text, str)}
                elif document["kind"] == "ServiceAccount":
                    accounts.add(own)
                elif document["kind"] == "RayCluster":
                    clusters[own] = document["spec"]["headGroupSpec"]["template"]
            except (KeyError, TypeError, AttributeError):
                continue  # said where the document itself is checked
    return pods.Around(maps, frozenset(accounts), clusters)


def _check_file(name: str, content: Any, around: pods.Around, crds: Mapping[str, Any]) -> Iterator[str]:
    if name == "Dockerfile":
        yield from image.check(content)
    elif name == "local.sh":
        yield from commands.check_script(content, {}, address="http://127.0.0.1:8265")
    elif problems := [text for document in content for text in plain.check(document)]:
        yield from problems
    elif name.startswith("launcher/"):
        for config in content:
            yield from launcher.check(config) if isinstance(config, dict) else ["expected a mapping"]
    else:
        for document in content:
            yield from check_document(document, around, crds)


def check_document(document: Any, around: pods.Around, crds: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with one object of a manifest."""
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        yield "expected an object with a kind"
        return
    if not isinstance(document.get("metadata"), dict):
        yield "metadata: is missing"
        return
    if problems := list(pods.check_schema({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})):
        yield from problems
        return
    for label, value in (document["metadata"].get("labels") or {}).items():
        if label != "app.kubernetes.io/name" or value != "laplace-dist":
            yield f"metadata.labels: expected app.kubernetes.io/name: laplace-dist, not {label}: {value}"
    for field in document["metadata"].keys() - {"name", "namespace", "labels", "annotations"}:
        yield f"metadata.{field}: not expected here"
    kind = document["kind"]
    if kind in kuberay.KINDS:
        yield from kuberay.check(document, around, crds)
    elif kind not in ("CronJob", "ConfigMap", "ServiceAccount"):
        yield f"kind: {kind} is not expected here; secrets least of all"
    elif problems := list(pods.check_schema(document)):
        yield from problems
    elif not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"].get("name", "")):
        yield "metadata.name: expected lower-case letters, digits and '-'"
    elif kind == "CronJob" and "spec" not in document:
        yield "spec: is missing"
    elif kind == "CronJob":
        yield from _check_cron_job(document, around)
    elif kind == "ConfigMap":
        yield from _check_settings(document)


def _check_cron_job(document: Mapping[str, Any], around: pods.Around) -> Iterator[str]:
    """Yield what the schema of a CronJob lets pass."""
    spec = document["spec"]
    if spec.get("concurrencyPolicy") != "Forbid":
        yield f"spec.concurrencyPolicy: got {spec.get('concurrencyPolicy')!r}; expected Forbid"
    yield from kuberay.check_schedule(spec["schedule"], spec.get("timeZone", ""))
    job = spec["jobTemplate"].get("spec") or {}
    numbers = {
        "startingDeadlineSeconds": (spec.get("startingDeadlineSeconds", -1), 10),  # the controller looks every 10 s
        "successfulJobsHistoryLimit": (spec.get("successfulJobsHistoryLimit", 3), 0),
        "failedJobsHistoryLimit": (spec.get("failedJobsHistoryLimit", 1), 0),
        "backoffLimit": (job.get("backoffLimit", -1), 0),
        "activeDeadlineSeconds": (job.get("activeDeadlineSeconds", -1), 1),
    }
    for name, (number, least) in numbers.items():
        if number < least:
            yield f"{name}: expected a number, at least {least}"
    template = job.get("template") or {}
    if "spec" not in template:
        yield "spec.jobTemplate: holds no pod"
        return
    if problems := [f"spec.jobTemplate: {text}" for text in pods.check_pod(template, around)]:
        yield from problems
        return
    [container] = template["spec"]["containers"]
    if container.get("command") != ["/bin/sh", "-euc"] or len(container.get("args") or []) != 1:
        yield "command: expected [/bin/sh, -euc], and the script as the only one of args"
        return
    if template["spec"].get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken: expected false; the pod talks to Ray alone"
    variables = {variable["name"]: variable for variable in container.get("env") or []}
    token = commands.at(variables, "RAY_AUTH_TOKEN", "valueFrom", "secretKeyRef") or {}
    cluster = token.get("name")
    if "RAY_AUTH_MODE" not in variables or token.get("key") != "auth_token" or cluster not in around.clusters:
        yield f"env: expected RAY_AUTH_MODE, and RAY_AUTH_TOKEN: auth_token of the Secret of one of {sorted(around.clusters)}"
        return
    if container["image"] != (theirs := commands.at(around.clusters[cluster], "spec", "containers", 0, "image")):
        yield f"image: got {container['image']!r}; the cluster {cluster} runs {theirs!r}"
    files, address = pods.files_of(around.clusters[cluster], around), f"http://{cluster}-head-svc:8265"
    yield from (f"args: {text}" for text in commands.check_script(container["args"][0], files, address=address))


def _check_settings(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the jobs say of settings in a ConfigMap."""
    for name, text in (document.get("data") or {}).items():
        words = ["python", f"{commands.WORKDIR}/jobs/fit_kron.py", "--config", f"/{name}"]
        yield from commands.check_job(words, {f"/{name}": text}, in_image=True)
    if not document.get("data"):
        yield "data: holds no settings"


def main(argv: Sequence[str] | None = None) -> int:
    """Check a folder from the command line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default=HERE, type=Path, help="a folder laid out like this one (this one)")
    parser.add_argument("--crd", nargs="+", default=[], metavar="FILE", help=f"CRDs of KubeRay {kuberay.VERSION}")
    given = parser.parse_args(argv)
    crds = kuberay.load_crds(given.crd)
    everything = load(given.folder)
    problems = check(everything, crds)
    for kind, schema in crds.items():
        if kind in kuberay.KINDS:
            own, theirs = kuberay.schema()[kind], schema["properties"]["spec"]
            problems += [
                f"checks/kuberay-{kuberay.VERSION}.yaml: {kind}.{text}" for text in kuberay.not_in_crd(own, theirs)
            ]
    print("\n".join([*problems, f"{given.folder}: {len(everything)} files, {len(problems)} problem(s)"]))
    return 1 if problems or not everything else 0


if __name__ == "__main__":
    sys.exit(main())
