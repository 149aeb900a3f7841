"""The image, and what hadolint and checkov say of it and of the pods: nothing, or something with a reason."""

import json
import re
import subprocess

import pytest
import yaml

from tests.unit.k8s import manifests, security_policy

DOCKERFILE = manifests.K8S / "Dockerfile"
CHECKOV = manifests.ROOT / ".venv-checkov" / "bin" / "checkov"

POD_EXCEPTIONS = {
    "CKV_K8S_8": "probes are KubeRay's",
    "CKV_K8S_9": "probes are KubeRay's",
    "CKV_K8S_15": "a tag names one version, and an image that was loaded into a node (kind) is in no registry",
    "CKV_K8S_22": "Ray, Triton and DeepSpeed write under the home directory",
    "CKV_K8S_38": "the autoscaler, in the head pod, asks the API server for pods",
    "CKV_K8S_40": "1000 is the user of Ray's images",
    "CKV_K8S_43": "users build the image; kustomize's `images` takes their digest",
}
DOCKERFILE_EXCEPTIONS = {
    "CKV_DOCKER_2": "probes are KubeRay's",
    "CKV_DOCKER_7": "the tag is in an argument, and held by a test here",
}


def test_hadolint_finds_nothing():
    result = subprocess.run(
        [manifests.tool("hadolint"), "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_the_base_image_has_the_projects_ray_and_no_other():
    versions = set(re.findall(r"rayproject/ray:(\d+\.\d+\.\d+)-py311", DOCKERFILE.read_text()))
    base = manifests.build(manifests.K8S / "base")
    assert versions == {manifests.cluster_spec(base)["rayVersion"]}
    assert all(security_policy.is_projects_ray(version) for version in versions)


@pytest.mark.parametrize("version", ["2.59.0", "2.61.0", "2.60", "latest"])
def test_another_ray_is_not_the_projects(version):
    assert not security_policy.is_projects_ray(version)


def test_the_image_ends_as_the_user_that_pods_run_as():
    users = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    contexts = [group.pod["securityContext"] for group in manifests.groups(manifests.build(manifests.K8S / "base"))]
    assert {f"{context['runAsUser']}:{context['runAsGroup']}" for context in contexts} == {users[-1]}


def test_the_image_is_made_of_named_folders_and_extras():
    ignored = (manifests.K8S / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    copied = set(re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE))
    assert {name for line in copied for name in line.split()} == {line[1:] for line in ignored if line[:1] == "!"}
    extras = set(security_policy.PROJECT["optional-dependencies"])
    named = re.findall(r"EXTRAS=(\S+)", DOCKERFILE.read_text()) + re.findall(r"\"\.\[(\w+)\]\"", DOCKERFILE.read_text())
    assert {extra for names in named for extra in names.split(",")} <= extras


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
def test_checkov_finds_what_is_known(overlay, tmp_path):
    objects = manifests.build(manifests.K8S / "overlays" / overlay)
    plain = [item for item in objects if item["kind"] not in ("RayJob", "RayCluster")]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all([*plain, *manifests.pods(objects)]))
    found = failed_checks("kubernetes", tmp_path / "all.yaml")
    is_elastic = manifests.cluster_spec(objects).get("enableInTreeAutoscaling")
    assert found == set(POD_EXCEPTIONS) - (set() if is_elastic else {"CKV_K8S_38"})


def test_checkov_finds_what_is_known_of_the_dockerfile():
    assert failed_checks("dockerfile", DOCKERFILE) == set(DOCKERFILE_EXCEPTIONS)


def failed_checks(framework, path):
    if not CHECKOV.exists():
        pytest.skip("checkov is not in .venv-checkov: make test-k8s")
    result = subprocess.run(
        [str(CHECKOV), "--file", str(path), "--framework", framework, "--output", "json", "--skip-download"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = json.loads(result.stdout)
    assert report["summary"]["passed"] > 0
    assert report["summary"]["parsing_errors"] == 0
    return {item["check_id"] for item in report["results"]["failed_checks"]}
