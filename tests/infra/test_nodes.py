"""Sizes of nodes and pods, and which of them Ray's own code starts for which work."""

import copy
import re
import tomllib
from collections import Counter
from unittest.mock import Mock

import pytest
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION, REQUIRE_SHM_SIZE_THRESHOLD
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.scheduler import NodeTypeConfig, ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import SUBCLUSTER_LABEL_KEY

from tests.infra.shipped import COMPOSE, INFRA, LAUNCHER, SETTINGS, cluster, commands, groups, size


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
