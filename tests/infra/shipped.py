"""What is shipped to run the system, as its tests read it: files, and what kustomize makes of some."""

import functools
import re
import shlex
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SETTINGS = ROOT / "jobs/configs/sdxl"
LAUNCHER = yaml.safe_load((INFRA / "aws.yaml").read_text())
STARTED = sorted((INFRA / "kubernetes/jobs").glob("*/kustomization.yaml"))


def kustomized(path):
    """What `kubectl kustomize` makes of one of ours: its resources with values replaced."""
    kustomization = yaml.safe_load(path.read_text())
    for name in kustomization["resources"]:
        found = path.parent / name
        documents = kustomized(found / path.name) if found.is_dir() else yaml.safe_load_all(found.read_text())
        for document in documents:
            for patch in kustomization.get("patches", []):
                for change in yaml.safe_load(patch["patch"]):
                    *parents, last = change["path"].strip("/").split("/")
                    part = functools.reduce(lambda node, key: node[key], parents, document)
                    assert (change["op"], patch["target"]) == ("replace", {"kind": document["kind"]})
                    assert last in part
                    part[last] = change["value"]
            yield document


MADE = [
    *((path, list(yaml.safe_load_all(path.read_text()))) for path in sorted((INFRA / "kubernetes").glob("*.yaml"))),
    *((path, list(kustomized(path))) for path in STARTED if path.parent.name != "common"),
]
DOCUMENTS = {
    f"{path.relative_to(INFRA)}:{document['kind']}/{document['metadata']['name']}": document
    for path, documents in MADE
    for document in documents
}


def nodes(node):
    """Every mapping in a document."""
    if isinstance(node, dict):
        yield node
    for item in node.values() if isinstance(node, dict) else node:
        if isinstance(item, dict | list):
            yield from nodes(item)


def submitted():
    """(where, words) of every `ray job submit`: of a RayJob's entrypoint a shell reads them, of a CronJob's nobody."""
    for name, document in DOCUMENTS.items():
        for node in nodes(document):
            if "entrypoint" in node:
                yield name, shlex.split(node["entrypoint"])
        if document["kind"] == "CronJob":
            for container in document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]:
                command = container["command"]
                yield name, command[command.index("--") + 1 :]


def commands():
    """(where, words) of every command that starts a job, as it gets them through the shell that Ray starts it by."""
    for name, words in submitted():
        yield name, shlex.split(subprocess.list2cmdline(words))  # as `ray job submit` puts them together


def cluster():
    (found,) = (document for document in DOCUMENTS.values() if document["kind"] == "RayCluster")
    return found


def size(text):
    """Bytes of 16Gi, of 4gb."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(text)).groups()
    return int(number) * {"": 1, "Gi": 1 << 30, "gb": 1 << 30}[unit]


def groups():
    """(name, the group, its pod's specification) of the head and of each group of nodes."""
    spec = cluster()["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield group.get("groupName", "head"), group, group["template"]["spec"]
