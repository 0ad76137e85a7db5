"""The files of deploy/cluster: each is valid for the tool that reads it, and they fit each other and the config."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray._private.ray_constants import RAY_RUNTIME_ENV_CREATE_WORKING_DIR_ENV_VAR
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from deploy import placement
from deploy.placement import Node
from system import config_file
from system.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy/cluster"

KUBERAY = {
    "": "entrypoint entrypointNumCpus entrypointNumGpus entrypointResources metadata runtimeEnvYAML jobId submissionMode "
    "submitterPodTemplate submitterConfig rayClusterSpec clusterSelector shutdownAfterJobFinishes ttlSecondsAfterFinished "
    "activeDeadlineSeconds backoffLimit suspend managedBy deletionStrategy",
    "rayClusterSpec": "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions gcsFaultToleranceOptions "
    "headServiceAnnotations headGroupSpec workerGroupSpecs suspend managedBy",
    "rayClusterSpec.authOptions": "mode",
    "rayClusterSpec.autoscalerOptions": "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
    "upscalingMode version volumeMounts",
    "rayClusterSpec.headGroupSpec": "enableIngress headService labels rayStartParams resources serviceType template",
    "rayClusterSpec.workerGroupSpecs": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams "
    "replicas resources scaleStrategy suspend template",
}
"""Path in a RayJob's spec -> the keys that KubeRay's schema (ray.io_rayjobs.yaml of 1.5) has there. No package carries that
schema; the pods inside are Kubernetes' own and checked with the rest."""
FREE = {"template", "submitterPodTemplate", "rayStartParams", "labels", "metadata", "resources"}
"""Sections of other keys."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def misspelt(name: str, key: str) -> list[dict[str, Any]]:
    """The documents of a file with the key short of its last letter."""
    text = (FOLDER / name).read_text()
    assert f"{key}:" in text
    return list(yaml.safe_load_all(text.replace(f"{key}:", f"{key[:-1]}:")))


def one(name: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template in a manifest."""
    if not isinstance(document, dict):
        return [pod for item in document for pod in pods(item)] if isinstance(document, list) else []
    own = [document["template"]] if "containers" in document.get("template", {}).get("spec", {}) else []
    return own + [pod for value in document.values() for pod in pods(value)]


def every_pod() -> list[dict[str, Any]]:
    """Of all manifests."""
    return [pod for name in ("rayjob.yaml", "mlflow.yaml") for pod in pods({"all": documents(name)})]


def check_what_kubernetes_defines(manifest: list[dict[str, Any]]) -> None:
    """Every object but the RayJob, and its pods. Strict: the API server refuses a key that its schema lacks."""
    jobs = [document for document in manifest if document["kind"] == "RayJob"]
    inside = [{"apiVersion": "v1", "kind": "Pod"} | pod for pod in pods({"all": jobs})]
    for document in [*(document for document in manifest if document not in jobs), *inside]:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def autoscaling(cluster: dict[str, Any]) -> dict[str, Any]:
    """What the autoscaler beside a head reads of the Ray cluster that KubeRay was given."""
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "name", "namespace": "default"}, "spec": cluster})


def test_the_cluster_launcher_takes_its_file() -> None:
    config = prepare_config(yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text()))
    validate_config(config)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"worker_nodes": 3}, schema)


def test_what_the_launcher_copies_is_in_the_repository() -> None:
    mounts = yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text())["file_mounts"]
    assert all((ROOT / source).exists() for source in mounts.values() if not source.startswith("~"))


@pytest.mark.parametrize("name", ["rayjob.yaml", "mlflow.yaml"])
def test_kubernetes_takes_every_object_and_every_pod(name: str) -> None:
    check_what_kubernetes_defines(documents(name))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rayjob.yaml", "volumeMounts"),
        ("rayjob.yaml", "securityContext"),
        ("rayjob.yaml", "accessModes"),
        ("mlflow.yaml", "clusterIP"),
        ("mlflow.yaml", "volumeClaimTemplates"),
        ("mlflow.yaml", "strategy"),
        ("mlflow.yaml", "readinessProbe"),
    ],
)
def test_kubernetes_refuses_a_misspelt_key_in_an_object_or_a_pod(name: str, key: str) -> None:
    with pytest.raises(kubernetes_validate.ValidationError, match=f"'{key[:-1]}' was unexpected"):
        check_what_kubernetes_defines(misspelt(name, key))


@pytest.mark.parametrize("key", ["headGroupSpec", "workerGroupSpecs", "groupName", "minReplicas", "maxReplicas"])
def test_the_autoscaler_refuses_a_ray_job_with_a_misspelt_key_that_it_must_have(key: str) -> None:
    (job,) = [document for document in misspelt("rayjob.yaml", key) if document["kind"] == "RayJob"]
    with pytest.raises(KeyError, match=key):
        autoscaling(job["spec"]["rayClusterSpec"])


@pytest.mark.parametrize(
    "key",
    [
        "shutdownAfterJobFinishes", "runtimeEnvYAML", "authOptions", "enableInTreeAutoscaling", "mode", "idleTimeoutSeconds",
        "rayStartParams", "groupName",
    ],
)  # fmt: skip
def test_kuberay_knows_every_key_of_the_ray_job_outside_its_pods(key: str) -> None:
    def unknown(manifest: list[dict[str, Any]]) -> set[str]:
        (spec,) = [document["spec"] for document in manifest if document["kind"] == "RayJob"]
        found, left = set(), [("", spec)]
        while left:
            path, section = left.pop()
            for name, value in section.items():
                if name not in KUBERAY[path].split():
                    found.add(name)
                elif name not in FREE:
                    inner = f"{path}.{name}".lstrip(".")
                    left += [(inner, one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]
        return found

    assert unknown(documents("rayjob.yaml")) == set()
    assert unknown(misspelt("rayjob.yaml", key)) == {key[:-1]}


def test_the_autoscaler_reads_how_long_a_pod_may_be_idle() -> None:
    cluster = one("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]
    assert autoscaling(cluster)["idle_timeout_minutes"] * 60 == cluster["autoscalerOptions"]["idleTimeoutSeconds"]


def test_the_entrypoint_of_the_ray_job_is_a_config_that_fits_its_pods() -> None:
    spec = one("rayjob.yaml", "RayJob")["spec"]
    python, script, config, *overrides = shlex.split(spec["entrypoint"])
    assert (python, script) == ("python", "deploy/job.py")
    loaded = config_file.load(ROOT / config, overrides)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    read = autoscaling(cluster)
    groups = read["available_node_types"]
    head = Node.of(groups.pop(read["head_node_type"])["resources"]["CPU"], 0)
    workers = [(Node.of(group["resources"]["CPU"], 0), group) for group in groups.values()]
    fewest = [head, *(node for node, group in workers for _ in range(group["min_workers"]))]
    most = [head, *(node for node, group in workers for _ in range(group["max_workers"]))]
    placement.check(loaded, fewest)
    homes = placement.learner_homes(loaded, most)
    assert len(homes) == loaded.learner.ranks
    assert placement.samplers_beside(loaded, most, homes) == loaded.actors.most
    with pytest.raises(ConfigError):
        placement.check(loaded, fewest[:1])


def test_the_runs_of_a_ray_job_outlive_its_cluster() -> None:
    spec = one("rayjob.yaml", "RayJob")["spec"]
    (output,) = re.findall(r"output_dir=(\S+)", spec["entrypoint"])
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if output.startswith(mount["mountPath"])]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert volume["persistentVolumeClaim"]["claimName"] == one("rayjob.yaml", "PersistentVolumeClaim")["metadata"]["name"]


def test_a_ray_job_logs_to_the_mlflow_service() -> None:
    entrypoint = one("rayjob.yaml", "RayJob")["spec"]["entrypoint"]
    (host, port) = re.findall(r"tracking.uri=http://([\w-]+):(\d+)", entrypoint)[0]
    services = {
        document["metadata"]["name"]: document for document in documents("mlflow.yaml") if document["kind"] == "Service"
    }
    assert services[host]["spec"]["ports"][0]["port"] == int(port)


@pytest.mark.parametrize("name", ["rayjob.yaml", "mlflow.yaml"])
def test_what_pods_refer_to_is_there(name: str) -> None:
    claims = {document["metadata"]["name"] for document in documents(name) if document["kind"] == "PersistentVolumeClaim"}
    templates = [document for document in documents(name) if document["kind"] in ("Deployment", "StatefulSet")]
    assert pods({"all": documents(name)})
    for pod in pods({"all": documents(name)}):
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"].get("volumes", [])}
        assert set(volumes.values()) <= claims
        own = [
            claim["metadata"]["name"]
            for document in templates
            if document["spec"]["template"] is pod or document["spec"]["template"] == pod
            for claim in document["spec"].get("volumeClaimTemplates", [])
        ]
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= {*volumes, *own}
    for document in templates:
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert document["spec"]["selector"]["matchLabels"] == labels
        matching = [s for s in documents(name) if s["kind"] == "Service" and s["spec"]["selector"] == labels]
        (port,) = matching[0]["spec"]["ports"]
        assert [each["containerPort"] for each in document["spec"]["template"]["spec"]["containers"][0]["ports"]] == [
            port["port"]
        ]


def test_the_password_of_the_database_is_in_no_file() -> None:
    text = (FOLDER / "mlflow.yaml").read_text()
    references = re.findall(r"secretKeyRef: \{name: ([\w-]+), key: ([\w-]+)\}", text)
    assert references == [("mlflow-database", "password")] * 2
    assert "create secret generic mlflow-database --from-literal=password=" in text


def test_every_image_is_the_one_that_is_built_or_has_a_version() -> None:
    built = re.findall(r"-t (\S+) \.", (FOLDER / "Dockerfile").read_text())
    images = [container["image"] for pod in every_pod() for container in pod["spec"]["containers"]]
    assert {image for image in images if image.startswith("REGISTRY/")} == set(built)
    assert all(re.search(r":\w*\d", image) for image in images)


@pytest.mark.parametrize(
    ("line", "spoilt", "complaint"),
    [
        ("", "", ""),
        ("WORKDIR /headwater", "WORKDIR headwater", "DL3000"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("COPY . .", "COPIED . .", "unexpected 'C'"),
        ("requirements/cpu.txt requirements/cpu.txt", "requirements/cpu.txt pyproject.toml requirements", "DL3021"),
    ],
)
def test_hadolint_takes_the_dockerfile_as_it_is_alone(line: str, spoilt: str, complaint: str) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert line in text
    hadolint = Path(sys.executable).with_name("hadolint")
    read = subprocess.run([hadolint, "--no-color", "-"], input=text.replace(line, spoilt), capture_output=True, text=True)
    assert (read.returncode == 0) == (not complaint)
    assert complaint in read.stdout + read.stderr


def test_the_user_of_the_image_may_write_to_the_volumes() -> None:
    (group,) = re.findall(r"^USER \d+:(\d+)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    groups = {
        pod["spec"]["securityContext"]["fsGroup"]
        for pod in every_pod()
        if any("REGISTRY/" in container["image"] for container in pod["spec"]["containers"]) and pod["spec"].get("volumes")
    }
    assert groups == {int(group)}


def test_the_image_gets_no_history_and_nothing_that_git_ignores() -> None:
    """Docker's patterns begin at the root, git's anywhere."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    assert set((ROOT / ".dockerignore").read_text().split()) == {".git", *(f"**/{name}" for name in ignored)}


def test_ray_takes_every_runtime_environment_of_the_page_together_with_the_working_directory() -> None:
    page = (FOLDER / "README.md").read_text()
    environments = [json.loads(text) for text in re.findall(r"--runtime-env-json '(.+?)'", page, re.DOTALL)]
    assert {name for environment in environments for name in environment} == {"env_vars", "pip"}
    for environment in environments:
        RuntimeEnv(working_dir=str(ROOT), **environment)
        for package in environment.get("pip", {}).get("packages", []):
            # Where the agent runs there is no file of ours, except in the working directory that it has unpacked.
            file = package.removeprefix(f"-r ${{{RAY_RUNTIME_ENV_CREATE_WORKING_DIR_ENV_VAR}}}/")
            assert (ROOT / file).is_file(), package
