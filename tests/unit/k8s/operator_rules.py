"""What the operators refuse when they see an object, after the API server has taken it.

KubeRay 1.7.0 says so in the object's events alone, and Kueue in its webhook; neither is in a schema. A function each,
with the feature gates that are on by default.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import yaml
from packaging.version import Version

from tests.unit.k8s import manifests
from tests.unit.k8s.manifests import Object

_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_DNS1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_MAX_NAME = {"RayJob": 47, "RayCluster": 53}
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def _job(objects: list[Object]) -> Object:
    found = manifests.ray_object(objects)
    return found["spec"] if found["kind"] == "RayJob" else {}


def _has_autoscaler(spec: Object) -> bool:
    return bool(spec.get("enableInTreeAutoscaling"))


def _has_autoscaler_v2(spec: Object) -> bool:
    return _has_autoscaler(spec) and spec.get("autoscalerOptions", {}).get("version") == "v2"


def name_is_short_enough(objects: list[Object]) -> Iterator[str]:
    """Names of clusters, services and pods are made of it."""
    found = manifests.ray_object(objects)
    name, most = found["metadata"]["name"], _MAX_NAME[found["kind"]]
    if len(name) > most or not _DNS1035.fullmatch(name):
        yield f"name '{name}': allowed are {most} characters of a-z, 0-9 and -, a letter first"


def groups_have_containers(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects):
        if not group.pod.get("containers"):
            yield f"{group.name} has no container"


def resources_are_said_once(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects):
        if group.spec.get("resources") and any(group.params.get(key) for key in _RESOURCE_PARAMS):
            yield f"{group.name} has resources and rayStartParams for them"


def labels_are_top_level(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects):
        if "labels" in group.params:
            yield f"{group.name} has rayStartParams.labels"


def labels_are_well_formed(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects):
        for key, value in group.labels.items():
            prefix, _, name = key.rpartition("/")
            if (prefix and not _LABEL_PREFIX.fullmatch(prefix)) or not _LABEL_NAME.fullmatch(name):
                yield f"{group.name} has the label key '{key}'"
            if value and not _LABEL_NAME.fullmatch(value):
                yield f"{group.name} has the label value '{value}'"


def replicas_are_bounded(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects)[1:]:
        least, most = group.spec.get("minReplicas"), group.spec.get("maxReplicas")
        if least is None or most is None:
            yield f"{group.name} lacks minReplicas or maxReplicas"
        elif not 0 <= least <= most:
            yield f"{group.name} has {least} to {most} replicas"


def group_options_need_autoscaler_v2(objects: list[Object]) -> Iterator[str]:
    spec = manifests.cluster_spec(objects)
    for group in manifests.groups(objects)[1:]:
        timeout = group.spec.get("idleTimeoutSeconds")
        if timeout is not None and (timeout < 0 or not _has_autoscaler_v2(spec)):
            yield f"{group.name} has idleTimeoutSeconds {timeout}"
        if group.spec.get("priority") and not _has_autoscaler_v2(spec):
            yield f"{group.name} has a priority"


def autoscaler_is_said_once(objects: list[Object]) -> Iterator[str]:
    spec = manifests.cluster_spec(objects)
    options = spec.get("autoscalerOptions", {})
    for group in manifests.groups(objects)[:1]:
        told = manifests.env_of(group.ray).get("RAY_enable_autoscaler_v2")
        if told and not _has_autoscaler(spec) and told.get("value") in ("1", "true"):
            yield "RAY_enable_autoscaler_v2 is set without an autoscaler"
        if told and _has_autoscaler(spec) and "version" in options:
            yield "the autoscaler's version is set twice"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in manifests.env_of(options):
        yield "autoscalerOptions.env has KubeRay's own KUBERAY_GEN_AUTOSCALER_START_CMD"


def pods_do_not_restart(objects: list[Object]) -> Iterator[str]:
    """With autoscaler v2 none may, in SidecarMode the head may not."""
    spec = manifests.cluster_spec(objects)
    for group in manifests.groups(objects):
        is_held = _has_autoscaler_v2(spec) or (
            group.is_head and _job(objects).get("submissionMode") == "SidecarMode"
        )  # fmt: skip
        if is_held and group.pod.get("restartPolicy", "Never") != "Never":
            yield f"{group.name} has restartPolicy {group.pod['restartPolicy']}"


def workers_are_not_suspended(objects: list[Object]) -> Iterator[str]:
    if _has_autoscaler(manifests.cluster_spec(objects)):
        for group in manifests.groups(objects)[1:]:
            if group.spec.get("suspend"):
                yield f"{group.name} is suspended under an autoscaler"


def redis_is_not_used(objects: list[Object]) -> Iterator[str]:
    """A RayJob cannot, and half a configuration is refused."""
    for group in manifests.groups(objects)[:1]:
        for name in ("RAY_REDIS_ADDRESS", "REDIS_USERNAME", "REDIS_PASSWORD"):
            if name in manifests.env_of(group.ray):
                yield f"the head has {name}"
        for name in ("redis-username", "redis-password"):
            if name in group.params:
                yield f"the head has rayStartParams.{name}"
    if "gcsFaultToleranceOptions" in manifests.cluster_spec(objects):
        yield "gcsFaultToleranceOptions is set"
    if "ray.io/ft-enabled" in manifests.ray_object(objects)["metadata"].get("annotations", {}):
        yield "the annotation ray.io/ft-enabled is set"


def token_auth_knows_its_ray(objects: list[Object]) -> Iterator[str]:
    spec = manifests.cluster_spec(objects)
    options = spec.get("authOptions", {})
    version = Version(spec.get("rayVersion") or "0")
    if options.get("mode") == "token" and version < Version("2.52.0"):
        yield f"token authentication with rayVersion {version}"
    if options.get("enableK8sTokenAuth") and (
        options.get("mode") != "token" or version < Version("2.55.0") or options.get("secretName") or _job(objects)
    ):
        yield "enableK8sTokenAuth is for a RayCluster, in mode token, without secretName, from Ray 2.55"


def alpha_features_are_not_used(objects: list[Object]) -> Iterator[str]:
    """Their gates are off by default."""
    for key in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if key in manifests.cluster_spec(objects):
            yield f"{key} is set"


def upgrade_strategy_is_for_clusters(objects: list[Object]) -> Iterator[str]:
    kind = manifests.cluster_spec(objects).get("upgradeStrategy", {}).get("type")
    if kind is not None and (_job(objects) or kind not in ("Recreate", "None")):
        yield f"upgradeStrategy {kind}"


def suspended_job_shuts_down(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    if job.get("suspend") and (not job.get("shutdownAfterJobFinishes") or job.get("clusterSelector")):
        yield "suspend needs shutdownAfterJobFinishes and a cluster of its own"


def deadlines_are_positive(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(key, 1) <= 0:
            yield f"{key} is {job[key]}"
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        if job.get(key, 0) < 0:
            yield f"{key} is {job[key]}"


def time_to_live_needs_shutdown(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"


def cluster_is_said_once(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    selector = job.get("clusterSelector")
    if job and not selector and not job.get("rayClusterSpec"):
        yield "neither rayClusterSpec nor clusterSelector"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector without ray.io/cluster"
    if selector and job.get("submissionMode") == "SidecarMode":
        yield "clusterSelector in SidecarMode"
    if selector and job.get("backoffLimit"):
        yield "clusterSelector with backoffLimit"


def submission_mode_is_consistent(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    mode = job.get("submissionMode")
    if mode == "InteractiveMode" and job.get("backoffLimit"):
        yield "InteractiveMode with backoffLimit"
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if key in job:
                yield f"SidecarMode with {key}"


def runtime_env_is_yaml(objects: list[Object]) -> Iterator[str]:
    try:
        found = yaml.safe_load(_job(objects).get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML: {str(error).splitlines()[0]}"
        return
    if not isinstance(found, dict):
        yield "runtimeEnvYAML is no mapping"


def deletion_is_said_once(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    strategy = job.get("deletionStrategy")
    if strategy is None:
        return
    rules, old = strategy.get("deletionRules"), {"onSuccess", "onFailure"} & set(strategy)
    if rules and job.get("shutdownAfterJobFinishes"):
        yield "deletionRules with shutdownAfterJobFinishes"
    if rules and old:
        yield "deletionRules with onSuccess or onFailure"
    if not rules and len(old) != 2:
        yield "neither deletionRules nor both of onSuccess and onFailure"


def deletion_rules_agree(objects: list[Object]) -> Iterator[str]:
    job = _job(objects)
    seen: dict[Any, dict[str, int]] = defaultdict(dict)
    for place, rule in enumerate(job.get("deletionStrategy", {}).get("deletionRules") or []):
        condition, policy = rule["condition"], rule["policy"]
        ttl = condition.get("ttlSeconds", 0)
        status = [(key, condition[key]) for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if ttl < 0 or len(status) != 1:
            yield f"rule {place}: one status, and ttlSeconds of 0 or more"
            continue
        if job.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            yield f"rule {place}: {policy} with clusterSelector"
        if _has_autoscaler(manifests.cluster_spec(objects)) and policy == "DeleteWorkers":
            yield f"rule {place}: DeleteWorkers under an autoscaler"
        if policy in seen[status[0]]:
            yield f"rule {place}: a second {policy} for {status[0][1]}"
        seen[status[0]][policy] = ttl
    for (_, value), policies in seen.items():
        times = [policies[policy] for policy in _DELETION_ORDER if policy in policies]
        if times != sorted(times):
            yield f"for {value}: workers go first, then the cluster, then the job; seen are {policies}"


def kueue_admits(objects: list[Object]) -> Iterator[str]:
    """Kueue's webhook, for what has its label."""
    found = manifests.ray_object(objects)
    if "kueue.x-k8s.io/queue-name" not in found["metadata"].get("labels", {}):
        return
    job, spec = _job(objects), manifests.cluster_spec(objects)
    names = [group.name for group in manifests.groups(objects)[1:]]
    if job and not job.get("shutdownAfterJobFinishes"):
        yield "Kueue wants shutdownAfterJobFinishes"
    if job.get("clusterSelector"):
        yield "Kueue wants no clusterSelector"
    if _has_autoscaler(spec):
        yield "Kueue wants no autoscaler"
    if len(names) > 7 or "head" in names:
        yield f"Kueue wants at most 7 groups of workers, none called head; seen are {names}"


CHECKS = (
    name_is_short_enough,
    groups_have_containers,
    resources_are_said_once,
    labels_are_top_level,
    labels_are_well_formed,
    replicas_are_bounded,
    group_options_need_autoscaler_v2,
    autoscaler_is_said_once,
    pods_do_not_restart,
    workers_are_not_suspended,
    redis_is_not_used,
    token_auth_knows_its_ray,
    alpha_features_are_not_used,
    upgrade_strategy_is_for_clusters,
    suspended_job_shuts_down,
    deadlines_are_positive,
    time_to_live_needs_shutdown,
    cluster_is_said_once,
    submission_mode_is_consistent,
    runtime_env_is_yaml,
    deletion_is_said_once,
    deletion_rules_agree,
    kueue_admits,
)
