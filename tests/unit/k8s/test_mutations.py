"""Every check catches something: one edit each of a manifest that passes, and the check that must say so."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest

from tests.unit.k8s import manifests, schemas
from tests.unit.k8s.test_overlays import CHECKS, failures

REMOVE = object()
GPU, CPU, KUEUE, CLUSTER = "two-pool-gpu", "dev-cpu", "kueue", "raycluster"

SPEC = "RayJob/distill/spec"
RAY = f"{SPEC}/rayClusterSpec"
HEAD = f"{RAY}/headGroupSpec"
TEACHER = f"{RAY}/workerGroupSpecs/0"
STUDENT = f"{RAY}/workerGroupSpecs/1"
POD = "template/spec"
FIRST = f"{POD}/containers/0"
RULES = "PrometheusRule/ray-kd/spec/groups/0/rules"


@dataclass(frozen=True)
class Mutation:
    """An edit of an overlay, or of one with more components.

    check: what catches it; alone unless others are named in also.
    """

    check: str
    edits: dict[str, Any]
    overlay: str = GPU
    also: tuple[str, ...] = ()
    components: tuple[str, ...] = ()


def edited(objects, edits):
    """A copy with the value at each path KIND/NAME/key/... replaced, computed, appended (`-`) or removed."""
    objects = copy.deepcopy(objects)
    for path, value in edits.items():
        kind, name, *keys = [part.replace("~", "/") for part in path.split("/")]
        (place,) = (item for item in objects if item["kind"] == kind and item["metadata"]["name"].startswith(name))
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if keys[-1] == "-":
            place.append(value)
            continue
        last = int(keys[-1]) if isinstance(place, list) else keys[-1]
        if value is REMOVE:
            del place[last]
        else:
            place[last] = value(place[last]) if callable(value) else value
    return objects


def run_with(old, new):
    """An edit of the run's config: the text in the ConfigMap."""
    return {"ConfigMap/ray-kd-run/data/run.yaml": lambda text: text.replace(old, new)}


def rule(policy, ttl=0, **condition):
    return {"policy": policy, "condition": {**condition, "ttlSeconds": ttl}}


OPERATOR = [
    Mutation("name_is_short_enough", {"RayJob/distill/metadata/name": "d" * 48}),
    Mutation("name_is_short_enough", {"RayJob/distill/metadata/name": "2-distill"}),
    Mutation("groups_have_containers", {f"{STUDENT}/{POD}/containers": []}, also=(
        "memory_is_sized", "run_fits_the_cluster")),
    Mutation("resources_are_said_once", {f"{HEAD}/resources": {"CPU": "4"}}),
    Mutation("labels_are_top_level", {f"{TEACHER}/rayStartParams/labels": "a=b"}),
    Mutation("labels_are_well_formed", {f"{TEACHER}/labels/zone": "eu west"}),
    Mutation("replicas_are_bounded", {f"{STUDENT}/minReplicas": 3}, also=(
        "disruption_budgets_hold", "groups_scale_as_meant")),
    Mutation("group_options_need_autoscaler_v2", {f"{TEACHER}/idleTimeoutSeconds": 60}, KUEUE),
    Mutation("group_options_need_autoscaler_v2", {f"{STUDENT}/priority": 1}, KUEUE),
    Mutation("autoscaler_is_said_once",
             {f"{HEAD}/{FIRST}/env/-": {"name": "RAY_enable_autoscaler_v2", "value": "1"}}),
    Mutation("autoscaler_is_said_once",
             {f"{HEAD}/{FIRST}/env/-": {"name": "RAY_enable_autoscaler_v2", "value": "true"}}, KUEUE),
    Mutation("pods_do_not_restart", {f"{HEAD}/{POD}/restartPolicy": "Always"}, CPU),
    Mutation("pods_do_not_restart", {f"{TEACHER}/{POD}/restartPolicy": "OnFailure"}),
    Mutation("workers_are_not_suspended", {f"{TEACHER}/suspend": True}),
    Mutation("redis_is_not_used", {f"{RAY}/gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}),
    Mutation("redis_is_not_used", {f"{HEAD}/{FIRST}/env/-": {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}}),
    Mutation("token_auth_knows_its_ray", {f"{RAY}/rayVersion": "2.51.0"}, also=("ray_is_the_projects",)),
    Mutation("token_auth_knows_its_ray", {f"{RAY}/authOptions/enableK8sTokenAuth": True}),
    Mutation("alpha_features_are_not_used", {f"{RAY}/tlsOptions": {"enabled": True}}),
    Mutation("upgrade_strategy_is_for_clusters", {f"{RAY}/upgradeStrategy": {"type": "Recreate"}}),
    Mutation("suspended_job_shuts_down", {f"{SPEC}/suspend": True}),
    Mutation("deadlines_are_positive", {f"{SPEC}/activeDeadlineSeconds": 0}),
    Mutation("time_to_live_needs_shutdown", {f"{SPEC}/ttlSecondsAfterFinished": 60}),
    Mutation("cluster_is_said_once", {f"{SPEC}/clusterSelector": {"ray.io/cluster": "ray-kd"}},
             also=("deletion_rules_agree",)),
    Mutation("submission_mode_is_consistent", {f"{SPEC}/submitterConfig": {"backoffLimit": 3}}),
    Mutation("runtime_env_is_yaml", {f"{SPEC}/runtimeEnvYAML": "env_vars: {A: 1"}),
    Mutation("runtime_env_is_yaml", {f"{SPEC}/runtimeEnvYAML": "- pip"}),
    Mutation("deletion_is_said_once", {f"{SPEC}/shutdownAfterJobFinishes": True}),
    Mutation("deletion_rules_agree",
             {f"{SPEC}/deletionStrategy/deletionRules/-": rule("DeleteWorkers", jobStatus="SUCCEEDED")}),
    Mutation("deletion_rules_agree",
             {f"{SPEC}/deletionStrategy/deletionRules/-": rule("DeleteSelf", jobStatus="FAILED")}),
    Mutation("deletion_rules_agree",
             {f"{SPEC}/deletionStrategy/deletionRules/-": rule("DeleteCluster", 60, jobStatus="FAILED")}),
    Mutation("kueue_admits", {f"{SPEC}/shutdownAfterJobFinishes": False}, KUEUE,
             also=("retries_resume", "time_to_live_needs_shutdown")),
    Mutation("kueue_admits", {f"{RAY}/enableInTreeAutoscaling": True}, KUEUE, also=(
        "groups_scale_as_meant", "only_the_autoscaler_has_a_token", "pods_are_confined")),
]  # fmt: skip

SECURITY = [
    Mutation("images_are_pinned", {f"{HEAD}/{FIRST}/image": "ray-kd:latest"}),
    Mutation("images_are_pinned", {f"{TEACHER}/{FIRST}/image": "ray-kd"}),
    Mutation("ray_is_the_projects", {f"{RAY}/rayVersion": "2.59.0"}),
    Mutation("pods_are_confined", {f"{STUDENT}/{POD}/securityContext/runAsNonRoot": False}),
    Mutation("pods_are_confined", {f"{STUDENT}/{FIRST}/securityContext/privileged": True}),
    Mutation("pods_are_confined", {f"{STUDENT}/{FIRST}/securityContext/capabilities/add": ["SYS_PTRACE"]}),
    Mutation("pods_are_confined", {f"{RAY}/autoscalerOptions/securityContext": REMOVE}),
    Mutation("pods_are_confined", {f"{TEACHER}/{POD}/hostNetwork": True}),
    Mutation("pods_are_confined",
             {f"{TEACHER}/{POD}/volumes/-": {"name": "host", "hostPath": {"path": "/var/run"}}}),
    Mutation("only_the_autoscaler_has_a_token", {f"{TEACHER}/{POD}/automountServiceAccountToken": True}),
    Mutation("only_the_autoscaler_has_a_token", {"ServiceAccount/ray-kd/automountServiceAccountToken": REMOVE}),
    Mutation("token_authentication_is_on", {f"{RAY}/authOptions/mode": "disabled"}),
    Mutation("token_authentication_is_on", {"RayCluster/ray-kd/spec/authOptions": REMOVE}, CLUSTER),
    Mutation("secrets_are_not_written_down",
             {f"{TEACHER}/{FIRST}/env/-": {"name": "HF_TOKEN", "value": "not-a-secret"}}),
    Mutation("secrets_are_not_written_down", run_with("models/student", "https://me:word@host/student"), also=(
        "run_fits_the_cluster",)),  # such a config is not read at all
    Mutation("network_is_closed", {f"{TEACHER}/template/metadata/labels/app.kubernetes.io~part-of": REMOVE}),
    Mutation("network_is_closed", {"NetworkPolicy/ray-kd-default-deny/spec/egress": [{}]}),
    Mutation("network_is_closed", {"NetworkPolicy/ray-kd-operator/spec/ingress/0/from": REMOVE}),
    Mutation("network_is_closed", {"NetworkPolicy/ray-kd-dns/spec/egress/0/ports/0/port": 54,
                                   "NetworkPolicy/ray-kd-dns/spec/egress/0/ports/1/port": 54}),
    Mutation("namespace_is_guarded",
             {"Namespace/ray-kd/metadata/labels/pod-security.kubernetes.io~enforce": "privileged"}),
]  # fmt: skip

CLUSTERS = [
    Mutation("objects_are_unique", {"PodDisruptionBudget/ray-kd-head/metadata/name": "ray-kd-students"}),
    Mutation("objects_are_unique", {"ServiceAccount/ray-kd/metadata/namespace": "default"}),
    Mutation("references_are_met", {f"{HEAD}/{POD}/volumes/0/persistentVolumeClaim/claimName": "other"}),
    Mutation("references_are_met", {f"{TEACHER}/{FIRST}/envFrom": [{"secretRef": {"name": "mine"}}]}),
    Mutation("pools_are_labelled", {f"{STUDENT}/labels/ray-subcluster": "student"}),
    Mutation("pools_are_labelled", {f"{TEACHER}/labels/ray-kd.io~pool": REMOVE}, also=(
        "disruption_budgets_hold", "groups_scale_as_meant", "run_fits_the_cluster")),
    Mutation("pools_are_labelled", {f"{STUDENT}/template/metadata/labels/ray-kd.io~pool": "teacher"}),
    Mutation("groups_scale_as_meant", {f"{STUDENT}/maxReplicas": 4}),
    Mutation("groups_scale_as_meant", {f"{TEACHER}/idleTimeoutSeconds": REMOVE}),
    Mutation("groups_scale_as_meant", {f"{RAY}/autoscalerOptions/version": "v1"}, also=(
        "group_options_need_autoscaler_v2",)),
    Mutation("head_does_no_work", {f"{HEAD}/rayStartParams/num-cpus": REMOVE}),
    Mutation("head_does_no_work", {f"{HEAD}/{FIRST}/resources/limits/cpu": "2"}),
    Mutation("resources_are_said", {f"{TEACHER}/{FIRST}/resources/requests/cpu": "4"}),
    Mutation("resources_are_said", {f"{STUDENT}/{FIRST}/resources/limits/memory": REMOVE}, CPU,
             also=("memory_is_sized",)),
    Mutation("resources_are_said", {f"{TEACHER}/{POD}/tolerations": []}),
    Mutation("memory_is_sized", {f"{TEACHER}/{POD}/volumes/1/emptyDir/sizeLimit": "4Gi"}),
    Mutation("memory_is_sized", {f"{TEACHER}/{POD}/volumes/1/emptyDir/medium": REMOVE}),
    Mutation("memory_is_sized", {f"{TEACHER}/{POD}/volumes/2/emptyDir/sizeLimit": "40Gi"}),
    Mutation("memory_is_sized", {f"{HEAD}/{POD}/volumes/1/name": "shm", f"{HEAD}/{FIRST}/volumeMounts/1/name": "shm"}),
    Mutation("probes_are_kuberays", {f"{HEAD}/{FIRST}/livenessProbe": {"tcpSocket": {"port": 6379}}}),
    Mutation("retries_resume", {f"{SPEC}/submissionMode": "K8sJobMode"}),
    Mutation("retries_resume", {f"{SPEC}/backoffLimit": 0}),
    Mutation("retries_resume", {f"{SPEC}/entrypointNumCpus": 1}),
    Mutation("retries_resume", {f"{SPEC}/entrypoint": "python -m ray_kd distill /etc/ray-kd/run.yaml && true"},
             also=("run_fits_the_cluster",)),
    Mutation("retries_resume", {f"{SPEC}/deletionStrategy/deletionRules/2": REMOVE}),
    Mutation("run_fits_the_cluster", run_with("/mnt/ray-kd/runs", "/tmp/runs")),
    Mutation("run_fits_the_cluster", run_with("address: auto", "address: null")),
    Mutation("run_fits_the_cluster", run_with("micro_batch_size", "mirco_batch_size")),
    Mutation("run_fits_the_cluster", run_with("num_workers: 2", "num_workers: 4")),
    Mutation("run_fits_the_cluster", run_with("num_cpus: 1", "num_cpus: 8")),
    Mutation("run_fits_the_cluster", run_with("ray-kd.io/pool: student", "ray-kd.io/pool: pupil")),
    Mutation("run_fits_the_cluster", {f"{SPEC}/entrypoint": "python -m ray_kd distill /etc/ray-kd/run.yaml x=1"}),
    Mutation("disruption_budgets_hold", {"PodDisruptionBudget/ray-kd-students/spec/minAvailable": 1}),
    Mutation("disruption_budgets_hold", {"PodDisruptionBudget/ray-kd-head/spec/minAvailable": "100%"}),
    Mutation("monitors_find_the_pods", {"PodMonitor/ray-kd/spec/podMetricsEndpoints/0/port": "prometheus"},
             components=("monitoring",)),
    Mutation("monitors_find_the_pods", {"NetworkPolicy/ray-kd-metrics/spec/ingress/0/ports/0/port": 9090},
             components=("monitoring",)),
    Mutation("alerts_are_whole", {f"{RULES}/0/labels/severity": "page"}, components=("monitoring",)),
    Mutation("alerts_are_whole", {f"{RULES}/1/annotations/description": REMOVE}, components=("monitoring",)),
    Mutation("alerts_are_whole", {f"{RULES}/2/alert": "RayKDStarved"}, components=("monitoring",)),
    Mutation("alerts_are_whole", {f"{RULES}/3/expr": REMOVE}, components=("monitoring",)),
    Mutation("alerts_are_whole", {f"{RULES}/0/expr": lambda text: text.replace("last_step", "newest_step")},
             components=("monitoring",)),
    Mutation("alerts_are_whole", {f"{RULES}/3/expr": lambda text: text.replace("object_store", "objects")},
             components=("monitoring",)),
    Mutation("alerts_are_whole", {"PrometheusRule/ray-kd/spec/rules": []}, components=("monitoring",)),
]  # fmt: skip

SCHEMAS = [
    Mutation("fits_core_schema", {"PodDisruptionBudget/ray-kd-head/spec/minAvailble": 1}),
    Mutation("fits_core_schema", {"NetworkPolicy/ray-kd-dns/spec/policyTypes": "Egress"}),
    Mutation("fits_core_schema", {f"{TEACHER}/{FIRST}/volumeMounts/0/mountpath": "/mnt"}),
]

DEFINITIONS = [
    Mutation("fits_definition", {f"{RAY}/headGroupSpecs": {}}),
    Mutation("fits_definition", {f"{SPEC}/backoffLimit": "2"}),
    Mutation("fits_definition", {f"{TEACHER}/rayStartParams/num-cpus": 8}),
    Mutation("fits_definition", {f"{TEACHER}/groupName": REMOVE}),
    Mutation("fits_definition", {f"{RAY}/autoscalerOptions/version": "v3"}),
    Mutation("fits_definition", {f"{STUDENT}/{FIRST}/resources/limits/nvidia.com~gpu": "one"}),
    Mutation("fits_definition", {"RayCluster/ray-kd/spec/entrypoint": "python"}, CLUSTER),
    Mutation("keeps_cel_rules", {f"{SPEC}/deletionStrategy/onSuccess": {"policy": "DeleteCluster"}}),
    Mutation("keeps_cel_rules", {f"{SPEC}/deletionStrategy/deletionRules": REMOVE}),
    Mutation("keeps_cel_rules", {f"{SPEC}/deletionStrategy/deletionRules/0/condition/jobStatus": REMOVE}),
    Mutation("keeps_cel_rules", {f"{SPEC}/deletionStrategy/deletionRules/0/condition/jobDeploymentStatus": "Failed"}),
    Mutation("keeps_cel_rules", {f"{SPEC}/managedBy": "somebody"}),
]


def described(mutation):
    return f"{mutation.check}:{next(iter(mutation.edits)).rsplit('spec/', 1)[-1]}"


@pytest.fixture
def broken(mutation, tmp_path):
    folder = manifests.compose(tmp_path, f"overlays/{mutation.overlay}", *mutation.components)
    objects = manifests.build(folder if mutation.components else manifests.K8S / "overlays" / mutation.overlay)
    changed = edited(objects, mutation.edits)
    assert changed != objects
    return changed


@pytest.mark.parametrize("mutation", OPERATOR + SECURITY + CLUSTERS, ids=described)
def test_a_broken_manifest_is_caught_by_its_check_and_no_other(mutation, broken):
    checks = [check for check in CHECKS if check not in schemas.CHECKS]
    assert set(failures(broken, checks)) == {mutation.check, *mutation.also}


@pytest.mark.parametrize("mutation", SCHEMAS, ids=described)
def test_what_kubernetes_schemas_refuse(mutation, broken):
    assert set(failures(broken, schemas.CHECKS)) == {mutation.check}


@pytest.mark.parametrize("mutation", DEFINITIONS, ids=described)
def test_what_kuberays_definitions_refuse(mutation, broken):
    schemas.needs_definitions()
    assert set(failures(broken, schemas.CUSTOM_CHECKS)) == {mutation.check}


def test_every_check_has_a_mutation():
    every = {check.__name__ for check in (*CHECKS, *schemas.CUSTOM_CHECKS)}
    assert every == {mutation.check for mutation in OPERATOR + SECURITY + CLUSTERS + SCHEMAS + DEFINITIONS}
