"""Every overlay, and every component on an overlay, is built by real kustomize and passes every check."""

import os
import re

import pytest
import yaml

from tests.unit.k8s import cluster_policy, manifests, operator_rules, schemas, security_policy

CHECKS = (*schemas.CHECKS, *operator_rules.CHECKS, *security_policy.CHECKS, *cluster_policy.CHECKS)

TOGETHER = ("monitoring", "volcano", "spot-teachers", "object-store", "hf-token", "vllm-image")


def failures(objects, checks=CHECKS):
    """{name of a check: what it found}."""
    found = {check.__name__: list(check(objects)) for check in checks}
    return {name: lines for name, lines in found.items() if lines}


@pytest.fixture(params=[f"overlays/{name}" for name in manifests.OVERLAYS] + ["base"])
def shipped(request):
    return manifests.build(manifests.K8S / request.param)


def test_an_overlay_passes_every_check(shipped):
    assert failures(shipped) == {}


def test_an_overlay_fits_kuberays_definitions(shipped):
    schemas.needs_definitions()
    assert failures(shipped, schemas.CUSTOM_CHECKS) == {}


@pytest.mark.parametrize("name", [name for name in manifests.COMPONENTS if name != "raycluster"])
def test_a_component_changes_the_base_and_passes_every_check(name, tmp_path):
    objects = manifests.build(manifests.compose(tmp_path, "base", name))
    assert objects != manifests.build(manifests.K8S / "base")
    assert failures(objects) == {}


def test_components_that_go_together_fit_kuberays_definitions(tmp_path):
    objects = manifests.build(manifests.compose(tmp_path, "overlays/two-pool-gpu", *TOGETHER))
    assert failures(objects) == {}
    schemas.needs_definitions()
    assert failures(objects, schemas.CUSTOM_CHECKS) == {}


def test_the_interactive_cluster_is_that_of_the_job():
    job = manifests.build(manifests.K8S / "overlays" / "two-pool-gpu")
    cluster = manifests.build(manifests.K8S / "overlays" / "raycluster")
    assert manifests.of_kind(cluster, "RayJob") == []
    assert manifests.cluster_spec(cluster) == manifests.cluster_spec(job)


def test_a_changed_run_has_a_config_map_of_another_name():
    names = {
        item["metadata"]["name"]
        for overlay in ("dev-cpu", "two-pool-gpu")
        for item in manifests.of_kind(manifests.build(manifests.K8S / "overlays" / overlay), "ConfigMap")
    }
    assert len(names) == 2


def test_every_component_is_shown_or_tried():
    assert set(manifests.COMPONENTS) == {"gpu", "autoscaling", "kueue", "raycluster", *TOGETHER}


def test_the_readmes_overlay_of_ones_own_is_one(tmp_path):
    text = (manifests.K8S / "README.md").read_text()
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    overlays = (manifests.K8S / "overlays").resolve()
    for key in ("resources", "components"):
        example[key] = [os.path.relpath(overlays / "mine" / path, tmp_path.resolve()) for path in example[key]]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(example))
    run = (manifests.K8S / "components" / "gpu" / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(run + "eval: {max_rows: 8}\n")
    objects = manifests.build(tmp_path)
    assert failures(objects) == {}
    (config_map,) = (item for item in manifests.of_kind(objects, "ConfigMap") if "run.yaml" in item["data"])
    assert config_map["data"]["run.yaml"].endswith("eval: {max_rows: 8}\n")


def test_the_readme_names_every_overlay_component_and_secret():
    text = (manifests.K8S / "README.md").read_text()
    for name in [*manifests.COMPONENTS, *security_policy.SECRETS]:
        assert f"`{name}`" in text or f"generic {name} " in text
    for name in manifests.OVERLAYS:
        assert f"      {name} " in text
    assert f"{len(operator_rules.CHECKS)} rules of KubeRay's and Kueue's" in text
    assert f"{len(security_policy.CHECKS) + len(cluster_policy.CHECKS)} of ours" in text
