"""What we ask of our own manifests: pools, sizes, retries, and a run that fits the cluster it is started on."""

import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ray_kd import config, validate
from ray_kd.errors import ConfigError
from ray_kd.layout import SUBCLUSTER, Layout, Node, find_problem, matches
from tests.unit.k8s import exported, manifests
from tests.unit.k8s.manifests import Group, Object
from tests.unit.k8s.security_policy import SECRETS

POOL = "ray-kd.io/pool"
MIN_HEAD_CPUS = 4

_GPU = "nvidia.com/gpu"
_SHELL = set(";&|<>$`(){}\n")
_BESIDE_OBJECTS = 512 * 2**20  # of /dev/shm, for gloo and NCCL


def objects_are_unique(objects: list[Object]) -> Iterator[str]:
    """And in one namespace."""
    keys = Counter((item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects)
    for (kind, _, name), count in keys.items():
        if count > 1:
            yield f"{kind}/{name} is there {count} times"
    spaces = {item["metadata"].get("namespace") for item in objects if item["kind"] != "Namespace"}
    if spaces != {item["metadata"]["name"] for item in manifests.of_kind(objects, "Namespace")}:
        yield f"objects are in the namespaces {sorted(map(str, spaces))}"


def references_are_met(objects: list[Object]) -> Iterator[str]:
    """What a pod mounts is part of the manifests, or a secret that the README asks for."""
    there = {(item["kind"], item["metadata"]["name"]) for item in objects} | {("Secret", name) for name in SECRETS}
    for group in manifests.groups(objects):
        for reference in manifests.references(group):
            if reference not in there:
                yield f"{group.name} needs {'/'.join(reference)}"
        for container in group.containers:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            if mounted - set(group.volumes):
                yield f"{group.name}/{container['name']} mounts {sorted(mounted - set(group.volumes))}"


def pools_are_labelled(objects: list[Object]) -> Iterator[str]:
    """A teacher and a student group; Ray Data's key on the teachers alone; the pods say the same as the Ray nodes."""
    found = [group.labels.get(POOL) for group in manifests.groups(objects)[1:]]
    if sorted(map(str, found)) != ["student", "teacher"]:
        yield f"pools are {found}: allowed are a teacher and a student"
    for group in manifests.groups(objects):
        pool = group.labels.get(POOL)
        if group.labels.get(SUBCLUSTER) != (pool if pool == "teacher" else None):
            yield f"{group.name} has {SUBCLUSTER}={group.labels.get(SUBCLUSTER)}"
        if group.pod_labels.get(POOL) != pool:
            yield f"{group.name}: its pods have {POOL}={group.pod_labels.get(POOL)}, its nodes {pool}"
        if group.is_head and group.labels:
            yield f"the head has labels {group.labels}"


def groups_scale_as_meant(objects: list[Object]) -> Iterator[str]:
    """Students stay; teachers move where there is an autoscaler, of version 2, and say when they are idle."""
    spec = manifests.cluster_spec(objects)
    is_elastic = spec.get("enableInTreeAutoscaling", False)
    for group in manifests.groups(objects)[1:]:
        least, now, most = (group.replicas(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        moves = is_elastic and group.labels.get(POOL) == "teacher"
        if not 1 <= least <= now <= most or (least != most) != moves:
            yield f"{group.name} has {least} to {most} replicas, {now} at first, and the autoscaler is {is_elastic}"
        if moves and "idleTimeoutSeconds" not in group.spec:
            yield f"{group.name} has no idleTimeoutSeconds"
    if is_elastic and spec.get("autoscalerOptions", {}).get("version") != "v2":
        yield "the autoscaler's version is not said to be v2"


def head_does_no_work(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects)[:1]:
        if group.params.get("num-cpus") != "0" or group.num_gpus:
            yield "the head takes work: rayStartParams.num-cpus is not 0, or it has GPUs"
        if group.limit("cpu") < MIN_HEAD_CPUS:
            yield f"the head has {group.limit('cpu')} CPUs: at least {MIN_HEAD_CPUS}, for the driver and Ray's services"


def resources_are_said(objects: list[Object]) -> Iterator[str]:
    """Requests and limits of each container; equal with a GPU, whose node is shared with nobody."""
    for group in manifests.groups(objects):
        for container in group.containers:
            where = f"{group.name}/{container['name']}"
            asked = container.get("resources", {})
            requests, limits = asked.get("requests", {}), asked.get("limits", {})
            for key in ("cpu", "memory", "ephemeral-storage"):
                if key not in requests or key not in limits:
                    yield f"{where} does not say {key}"
            if _GPU in limits and requests != limits:
                yield f"{where} has a GPU and requests {requests}, limits {limits}"
            if requests.get("memory") != limits.get("memory"):
                yield f"{where} may be killed for memory that it did not request"
        tolerated = [item.get("key") for item in group.pod.get("tolerations", [])]
        if group.num_gpus and _GPU not in tolerated:
            yield f"{group.name} has a GPU and does not tolerate {_GPU}"


def memory_is_sized(objects: list[Object]) -> Iterator[str]:
    """The object store fits /dev/shm, and /dev/shm half of the memory; what is spilled the disk that was asked for.

    Volumes must have KubeRay's names: it adds its own, of other sizes, where it does not find them.
    """
    for group in manifests.groups(objects):
        mounts = {mount["mountPath"]: mount["name"] for mount in group.ray.get("volumeMounts", [])}
        if (mounts.get("/dev/shm"), mounts.get("/tmp/ray")) != ("shared-mem", "ray-logs"):
            yield f"{group.name}: /dev/shm and /tmp/ray are {mounts}"
            continue
        shm, spill = group.volumes["shared-mem"]["emptyDir"], group.volumes["ray-logs"]["emptyDir"]
        if shm.get("medium") != "Memory" or "sizeLimit" not in shm or "sizeLimit" not in spill:
            yield f"{group.name}: shared-mem is {shm}, ray-logs {spill}"
            continue
        store = int(group.params.get("object-store-memory", 0))
        size = manifests.quantity(shm["sizeLimit"])
        if not 0 < store <= size - _BESIDE_OBJECTS:
            yield f"{group.name}: an object store of {store} bytes in {size} of /dev/shm"
        if size > group.limit("memory") / 2:
            yield f"{group.name}: {size} of /dev/shm is more than half of its memory"
        if manifests.quantity(spill["sizeLimit"]) > group.limit("ephemeral-storage"):
            yield f"{group.name}: /tmp/ray may grow beyond its ephemeral-storage"


def probes_are_kuberays(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects):
        for key in ("livenessProbe", "readinessProbe", "startupProbe"):
            if key in group.ray:
                yield f"{group.name} has a {key}: KubeRay's knows what Ray answers"


def retries_resume(objects: list[Object]) -> Iterator[str]:
    """A retry is the same command for the same run folder; it leaves no cluster behind."""
    if manifests.ray_object(objects)["kind"] != "RayJob":
        return
    job = manifests.ray_object(objects)["spec"]
    if job.get("submissionMode") != "SidecarMode":
        yield f"submissionMode {job.get('submissionMode')}"
    if job.get("backoffLimit") not in (2, 3):
        yield f"backoffLimit {job.get('backoffLimit')}: 2 or 3"
    if job.get("entrypointNumCpus"):
        yield "entrypointNumCpus: the head has no logical CPUs, the job would wait for ever"
    if "preRunningDeadlineSeconds" not in job:
        yield "no preRunningDeadlineSeconds: pods that cannot be placed hold the others for ever"
    if _SHELL & set(job.get("entrypoint", "")) or shlex.split(job.get("entrypoint", ""))[:4] != _COMMAND:
        yield f"entrypoint '{job.get('entrypoint')}' is not one plain {' '.join(_COMMAND)}"
    rules = job.get("deletionStrategy", {}).get("deletionRules", [])
    ends = {
        rule["condition"].get(key)
        for rule in rules
        for key in ("jobStatus", "jobDeploymentStatus")
        if rule["policy"] == "DeleteCluster"
    }
    if not job.get("shutdownAfterJobFinishes") and (stays := {"SUCCEEDED", "FAILED", "Failed"} - ends):
        yield f"the cluster stays after {sorted(stays)}"


_COMMAND = ["python", "-m", "ray_kd", "distill"]


def run_fits_the_cluster(objects: list[Object]) -> Iterator[str]:
    """The run's config is valid, its folder on what all nodes share, and its layout neither lacks room nor starves.

    By the rules with which ray_kd itself holds a layout against a cluster, at the least and the most that there may be.
    """
    try:
        run = _run_config(objects)
        validate.check_values(run)
    except ConfigError as error:
        yield str(error)
        return
    head, *_ = manifests.groups(objects)
    where = run.run.dir
    if "://" not in where and not PurePosixPath(where).is_relative_to(_storage(head)):
        yield f"run.dir {where} is not on the shared volume"
    if run.cluster.address != "auto":
        yield f"cluster.address is {run.cluster.address}: a job that finds no cluster must not start one in the head"
    is_elastic = manifests.cluster_spec(objects).get("enableInTreeAutoscaling", False)
    for key in ("minReplicas", "maxReplicas"):
        problem = find_problem(Layout.of(run), _nodes(objects, key), can_grow=is_elastic)
        if problem is not None:
            yield f"at {key}: {problem.text}"
    for pool, selector in (("teacher", run.teacher.pool.label_selector), ("student", run.train.label_selector)):
        meant = [group.labels.get(POOL) for group in manifests.groups(objects) if matches(group.labels, selector)]
        if meant != [pool]:
            yield f"{pool}s would run on {meant}"


def _run_config(objects: list[Object]) -> config.RunConfig:
    (run,) = (
        item
        for item in manifests.of_kind(objects, "ConfigMap")
        if ("ConfigMap", item["metadata"]["name"]) in manifests.references(manifests.groups(objects)[0])
    )
    command = shlex.split(manifests.ray_object(objects)["spec"].get("entrypoint", ""))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(run["data"]["run.yaml"])
        return config.load(path, command[len(_COMMAND) + 1 :])


def _storage(group: Group) -> str:
    """Where the shared volume is mounted."""
    (path,) = (mount["mountPath"] for mount in group.ray["volumeMounts"] if mount["name"] == "storage")
    return str(path)


def _nodes(objects: list[Object], key: str) -> list[Node]:
    return [
        Node(f"{group.name}-{place}", group.num_cpus, group.num_gpus, group.labels, is_head=group.is_head)
        for group in manifests.groups(objects)
        for place in range(group.replicas(key))
    ]


def disruption_budgets_hold(objects: list[Object]) -> Iterator[str]:
    """For the head and every student, and not for teachers; as a number, which is all that works for KubeRay's pods."""
    budgets = manifests.of_kind(objects, "PodDisruptionBudget")
    for budget in budgets:
        if not isinstance(budget["spec"].get("minAvailable"), int):
            yield f"{manifests.name_of(budget)} has no minAvailable as a number"
    for group in manifests.groups(objects):
        labels = {"ray.io/node-type": "head" if group.is_head else "worker", **group.pod_labels, **group.labels}
        held = [
            budget["spec"].get("minAvailable")
            for budget in budgets
            if all(labels.get(key) == value for key, value in budget["spec"]["selector"]["matchLabels"].items())
        ]
        wanted = [] if group.labels.get(POOL) == "teacher" else [group.replicas("minReplicas")]
        if held != wanted:
            yield f"{group.name} is held at {held}: allowed is {wanted}"


def monitors_find_the_pods(objects: list[Object]) -> Iterator[str]:
    """A PodMonitor, whose definition is not at hand: it means every Ray pod, by a port that is there and open."""
    opened = {
        item["port"]
        for policy in manifests.of_kind(objects, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for item in rule.get("ports", [])
    }
    for monitor in manifests.of_kind(objects, "PodMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        scraped = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
        for group in manifests.groups(objects):
            ports = {port["name"]: port["containerPort"] for port in group.ray.get("ports", [])}
            if any(group.pod_labels.get(key) != value for key, value in wanted.items()):
                yield f"{manifests.name_of(monitor)} does not mean {group.name}"
            if any(ports.get(name) not in opened for name in scraped):
                yield f"{group.name} has the ports {ports}: {scraped} is not among them, or no policy opens it"


def alerts_are_whole(objects: list[Object]) -> Iterator[str]:
    """A PrometheusRule, whose definition is not at hand: alerts of one name each, that say how bad it is and what
    to do.

    Of metrics that are exported; what they find is tested by promtool.
    """
    for item in manifests.of_kind(objects, "PrometheusRule"):
        if set(item["spec"]) != {"groups"} or any(set(group) != {"name", "rules"} for group in item["spec"]["groups"]):
            yield f"{manifests.name_of(item)}: {item['spec']}"
            continue
        rules = [rule for group in item["spec"]["groups"] for rule in group["rules"]]
        names = Counter(rule.get("alert") for rule in rules)
        for rule in rules:
            name = rule.get("alert")
            if names[name] > 1 or set(rule) - {"for"} != {"alert", "expr", "labels", "annotations"}:
                yield f"{name}: {sorted(rule)}, {names[name]} of them"
                continue
            if rule["labels"].get("severity") not in ("warning", "critical"):
                yield f"{name} has the labels {rule['labels']}"
            if not all(rule["annotations"].get(key) for key in ("summary", "description")):
                yield f"{name} does not say what it is and what to do"
            for unknown in exported.unknown(rule["expr"]):
                yield f"{name}: nothing exports {unknown}"


CHECKS = (
    objects_are_unique,
    references_are_met,
    pools_are_labelled,
    groups_scale_as_meant,
    head_does_no_work,
    resources_are_said,
    memory_is_sized,
    probes_are_kuberays,
    retries_resume,
    run_fits_the_cluster,
    disruption_budgets_hold,
    monitors_find_the_pods,
    alerts_are_whole,
)
