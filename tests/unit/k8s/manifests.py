"""The manifests of k8s/ as users get them: built by kustomize, read into dictionaries, and taken apart."""

import copy
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())

Object = dict[str, Any]

_UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def tool(name: str) -> str:
    """A program of the test extra, which pip puts beside python; without it the test is skipped."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install '.[test]'")
    return found


def build(folder: Path) -> list[Object]:
    """What `kubectl apply -k` would send, as fresh dictionaries. Skips the test without kubectl."""
    return [document for document in yaml.safe_load_all(_kustomize(tool("kubectl"), folder)) if document]


@functools.cache
def _kustomize(kubectl: str, folder: Path) -> str:
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compose(folder: Path, base: str, *components: str) -> Path:
    """Write, in folder, an overlay of one's own: `base` or an overlay of k8s/, with more components."""

    def relative(path: Path) -> str:
        return os.path.relpath(path, folder.resolve())

    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [relative(K8S / base)],
                "components": [relative(K8S / "components" / name) for name in components],
            }
        )
    )
    return folder


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def name_of(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def ray_object(objects: list[Object]) -> Object:
    """The RayJob or the RayCluster; there is one."""
    (found,) = (item for item in objects if item["kind"] in ("RayJob", "RayCluster"))
    return found


def cluster_spec(objects: list[Object]) -> Object:
    """The RayClusterSpec of a RayJob or of a RayCluster."""
    found = ray_object(objects)
    return found["spec"].get("rayClusterSpec", {}) if found["kind"] == "RayJob" else found["spec"]


@dataclass(frozen=True)
class Group:
    """The head, or a group of workers."""

    name: str
    spec: Object

    @property
    def is_head(self) -> bool:
        return self.name == "head"

    @property
    def params(self) -> dict[str, str]:
        return self.spec.get("rayStartParams") or {}

    @property
    def labels(self) -> dict[str, str]:
        """Of the Ray node."""
        return self.spec.get("labels") or {}

    @property
    def pod_labels(self) -> dict[str, str]:
        return self.spec["template"].get("metadata", {}).get("labels") or {}

    @property
    def pod(self) -> Object:
        return self.spec["template"]["spec"]

    @property
    def containers(self) -> list[Object]:
        """All of the pod, the Ray container first where there is one."""
        return [*(self.pod.get("containers") or []), *self.pod.get("initContainers", [])]

    @property
    def ray(self) -> Object:
        return (self.pod.get("containers") or [{}])[0]

    @property
    def volumes(self) -> dict[str, Object]:
        return {volume["name"]: volume for volume in self.pod.get("volumes", [])}

    def limit(self, resource: str) -> Decimal:
        return quantity(self.ray.get("resources", {}).get("limits", {}).get(resource, "0"))

    @property
    def num_gpus(self) -> int:
        return int(self.limit("nvidia.com/gpu"))

    @property
    def num_cpus(self) -> int:
        """Ray's logical CPUs: as it is told, or the limit rounded up, as KubeRay does."""
        told = self.params.get("num-cpus")
        return int(told) if told is not None else int(-(-self.limit("cpu") // 1))

    def replicas(self, key: str = "replicas") -> int:
        return 1 if self.is_head else int(self.spec[key])


def groups(objects: list[Object]) -> list[Group]:
    """The head, then the workers."""
    spec = cluster_spec(objects)
    if not spec:
        return []
    return [Group("head", spec["headGroupSpec"])] + [
        Group(item["groupName"], item) for item in spec["workerGroupSpecs"]
    ]


def quantity(text: str | int) -> Decimal:
    """A Kubernetes quantity as a number."""
    digits = str(text).rstrip("kKMGim")
    return Decimal(digits) * _UNITS[str(text)[len(digits) :]]


def env_of(container: Object) -> dict[str, Object]:
    return {item["name"]: item for item in container.get("env", [])}


def pods(objects: list[Object]) -> list[Object]:
    """The pod templates as Pod objects, which tools that know no custom resources can read."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": group.name, "namespace": "ray-kd", "labels": dict(group.pod_labels)},
            "spec": copy.deepcopy(group.pod),
        }
        for group in groups(objects)
    ]


def references(group: Group) -> Iterator[tuple[str, str]]:
    """(kind, name) of the objects of its namespace that a pod needs before it starts."""
    yield "ServiceAccount", group.pod["serviceAccountName"]
    for volume in group.volumes.values():
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in group.containers:
        for source in container.get("envFrom", []):
            yield ("Secret", source["secretRef"]["name"]) if "secretRef" in source else (
                "ConfigMap", source["configMapRef"]["name"]
            )  # fmt: skip
        for item in container.get("env", []):
            for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if key in item.get("valueFrom", {}):
                    yield kind, item["valueFrom"][key]["name"]
