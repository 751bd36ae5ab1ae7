"""The shipped manifests against the schemas of Kubernetes and KubeRay, and what they name against the checkout."""

import copy
import functools
import json
import os
import re
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.cli import load
from tests.test_architecture import JOBS

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared/kuberay"))  # <plural>.json: schema by version
KUBERAY = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
DOCUMENTS = {
    f"{path.relative_to(INFRA)}:{document['kind']}/{document['metadata']['name']}": document
    for path in sorted((INFRA / "kubernetes").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
}
CORE = [name for name, document in DOCUMENTS.items() if document["kind"] not in KUBERAY]
RAY = [name for name, document in DOCUMENTS.items() if document["kind"] in KUBERAY]


def validate(document):
    if document["kind"] not in KUBERAY:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        return
    validator = kuberay_validator(document["kind"], document["apiVersion"].partition("/")[2])
    if validator is None:
        pytest.skip(f"no schemas of KubeRay's kinds in {SCHEMAS}; KUBERAY_SCHEMAS names their folder")
    validator.validate(document)


@functools.cache  # the schemas are large, and reading one takes longer than using it
def kuberay_validator(kind, version):
    path = SCHEMAS / f"{KUBERAY[kind]}.json"
    if not path.exists():
        return None
    return jsonschema.Draft202012Validator(closed(json.loads(path.read_text())[version]))


def closed(schema):
    """The schema with unknown fields refused, as the API server warns of them, and int-or-string as it means it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    fields = schema.get("properties")
    if isinstance(fields, dict) and schema.get("type") == "object" and "additionalProperties" not in schema:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return result


@pytest.mark.parametrize("name", CORE)
def test_a_manifest_is_what_kubernetes_expects(name):
    validate(DOCUMENTS[name])


@pytest.mark.parametrize("name", RAY)
def test_a_manifest_is_what_kuberay_expects(name):
    validate(DOCUMENTS[name])


@pytest.mark.parametrize("name", [*CORE, *RAY])
def test_a_mistyped_field_is_refused(name):
    document = copy.deepcopy(DOCUMENTS[name])
    part = document.get("spec", document["metadata"])
    part["concurencyPolicy"] = "Forbid"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(document)


def commands():
    """(where, words) of every command that starts a job."""
    for name, document in DOCUMENTS.items():
        for entry in re.findall(r'"entrypoint": "([^"]*)"', json.dumps(document)):
            yield name, shlex.split(entry)
        if document["kind"] == "CronJob":
            for container in document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]:
                command = container["command"]
                yield name, command[command.index("--") + 1 :]


@pytest.mark.parametrize(("name", "words"), list(commands()))
def test_a_job_that_a_manifest_starts_exists_and_its_settings_load(name, words):
    python, option, module, config, *overrides = words
    job = module.removeprefix("jobs.")
    assert (python, option) == ("python", "-m")
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    assert config.startswith("/app/")  # where the image has the checkout's jobs/
    load(JOBS[job], str(ROOT / config.removeprefix("/app/")), overrides)


def test_every_job_has_its_manifest():
    started = {words[2].removeprefix("jobs.") for name, words in commands() if "RayJob/" in name}
    assert started == {"preprocess", "train_vae", "train_base", "train_refiner", "generate"}


def test_what_the_image_copies_exists():
    copied = [words.split() for words in re.findall(r"^COPY (?!--from)(.*)$", (INFRA / "Dockerfile").read_text(), re.M)]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    assert sources
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().split()
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in allowed


def test_ray_starts_with_token_authentication_in_every_file():
    cluster = next(document for document in DOCUMENTS.values() if document["kind"] == "RayCluster")
    assert cluster["spec"]["authOptions"]["mode"] == "token"
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    rays = [service for service in compose["services"].values() if str(service.get("command")).startswith("ray start")]
    assert len(rays) == 2
    assert all(service["environment"]["RAY_AUTH_MODE"] == "token" for service in rays)
    launcher = yaml.safe_load((INFRA / "aws.yaml").read_text())
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]


def test_secrets_are_named_and_never_written():
    def values(node):
        for item in node.values() if isinstance(node, dict) else node:
            if isinstance(item, dict | list):
                yield from values(item)
        if isinstance(node, dict) and "value" in node and "name" in node:
            yield node["name"], node["value"]

    for document in DOCUMENTS.values():
        assert document["kind"] != "Secret"
        assert [name for name, _ in values(document) if re.search("TOKEN|SECRET|PASSWORD|_URI", name)] == []
    example = (INFRA / "compose.env.example").read_text()
    assert all(line.startswith("#") or line.endswith("=") for line in example.splitlines())


def test_the_containers_of_pods_are_not_root():
    def pods(node):
        if isinstance(node, dict):
            if "containers" in node:
                yield node
            for item in node.values():
                yield from pods(item)
        elif isinstance(node, list):
            for item in node:
                yield from pods(item)

    found = [pod for document in DOCUMENTS.values() for pod in pods(document)]
    assert len(found) >= 10
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]
