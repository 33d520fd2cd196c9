"""The PyTorchJob: its fields are those of kubeflow.org/v1, and what it runs is understood."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from celltron.train.loop_config import LoopConfig

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "scripts" / "kubernetes" / "pytorchjob.yaml"

# Fields of pkg/apis/kubeflow.org/v1 of the training operator, and of Kubernetes' core/v1, as far as they are used.
FIELDS = {
    "job": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "elasticPolicy": {
        "maxReplicas", "maxRestarts", "metrics", "minReplicas", "nProcPerNode", "rdzvBackend", "rdzvConf", "rdzvHost",
        "rdzvId", "rdzvPort", "standalone",
    },
    "runPolicy": {
        "activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "schedulingPolicy", "suspend",
        "ttlSecondsAfterFinished",
    },
    "replica": {"replicas", "restartPolicy", "template"},
    "pod": {"containers", "securityContext", "terminationGracePeriodSeconds", "volumes"},
    "container": {"args", "command", "env", "image", "name", "resources", "volumeMounts"},
}  # fmt: skip
QUANTITY = re.compile(r"\d+(Gi|Ti|m)?")


@pytest.fixture(scope="module")
def claim() -> Any:
    return list(yaml.safe_load_all(MANIFEST.read_text()))[0]


@pytest.fixture(scope="module")
def job() -> Any:
    _, job = yaml.safe_load_all(MANIFEST.read_text())
    return job


@pytest.fixture(scope="module")
def worker(job: Any) -> Any:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


@pytest.fixture(scope="module")
def pod(worker: Any) -> Any:
    return worker["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    (container,) = pod["containers"]
    return container


def test_fields_are_those_of_the_operator(job: Any, worker: Any, pod: Any, container: Any) -> None:
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    for name, found in {
        "job": job, "spec": spec, "elasticPolicy": spec["elasticPolicy"], "runPolicy": spec["runPolicy"],
        "replica": worker, "pod": pod, "container": container,
    }.items():  # fmt: skip
        assert set(found) <= FIELDS[name], name
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}, "elastic jobs have no Master"
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert container["name"] == "pytorch", "the operator looks for this name"


def test_it_is_elastic_and_goes_on_by_itself(job: Any, worker: Any) -> None:
    policy = job["spec"]["elasticPolicy"]
    assert policy["rdzvBackend"] in ("c10d", "etcd", "etcd-v2")
    assert 1 <= policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert policy["maxRestarts"] > 0 and worker["restartPolicy"] == "OnFailure"


def test_it_runs_a_command_that_celltron_understands(container: Any, check_command: Callable[[list[str]], Any]) -> None:
    config = check_command(container["command"] + container["args"])
    assert config.resume == "auto"
    shared = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["shared"]
    assert config.out.startswith(f"{shared}/")
    assert all(source.startswith(f"{shared}/") for source in config.data.sources)


def test_a_process_has_a_gpu(container: Any) -> None:
    (processes,) = (word for word in container["command"] if word.startswith("--nproc-per-node="))
    assert int(processes.partition("=")[2]) == container["resources"]["limits"]["nvidia.com/gpu"]
    quantities = [value for part in container["resources"].values() for value in part.values()]
    assert all(QUANTITY.fullmatch(str(value)) for value in quantities)


def test_a_pod_has_time_to_save(pod: Any, container: Any) -> None:
    (timeout,) = (word for word in container["command"] if word.startswith("--shutdown-timeout="))
    assert LoopConfig().stop_seconds < int(timeout.partition("=")[2]) < pod["terminationGracePeriodSeconds"]


def test_volumes_are_there(claim: Any, pod: Any, container: Any) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert QUANTITY.fullmatch(claim["spec"]["resources"]["requests"]["storage"])
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["shared-memory"] == "/dev/shm"


def test_user_and_image_are_those_of_the_dockerfile(pod: Any, container: Any) -> None:
    found = re.search(r"useradd .*--uid (\d+) celltron", (ROOT / "Dockerfile").read_text())
    assert found and pod["securityContext"]["runAsUser"] == int(found[1]) and pod["securityContext"]["runAsNonRoot"]
    assert re.fullmatch(r"\S+/celltron:\d\S*", container["image"]), "a fixed tag"
