"""What we ask of our own manifests: who a pod runs as, what it may reach and be reached by, where secrets lie."""

import re
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from tests.unit.k8s import manifests
from tests.unit.k8s.manifests import Group, Object

PROJECT = tomllib.loads((manifests.ROOT / "pyproject.toml").read_text())["project"]

SECRETS = {"ray-kd-object-store", "ray-kd-hf"}
"""What k8s/README.md tells users to create."""

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{30,}|-----BEGIN|://[^/\s:]+:[^/\s@]+@"
)
_PART_OF = ("app.kubernetes.io/part-of", "ray-kd")


def images_are_pinned(objects: list[Object]) -> Iterator[str]:
    """To this version of the project, whatever the variant."""
    for group in manifests.groups(objects):
        for container in group.containers:
            _, _, tag = container["image"].rpartition(":")
            if tag.split("-")[0] != PROJECT["version"]:
                yield f"{group.name}: image {container['image']}: allowed is the tag {PROJECT['version']}[-variant]"


def ray_is_the_projects(objects: list[Object]) -> Iterator[str]:
    version = manifests.cluster_spec(objects).get("rayVersion", "none")
    if not is_projects_ray(version):
        yield f"rayVersion {version}: pyproject.toml has {ray_requirement()}"


def ray_requirement() -> Requirement:
    found = (Requirement(text) for text in PROJECT["dependencies"])
    return next(requirement for requirement in found if requirement.name == "ray")


def is_projects_ray(version: str) -> bool:
    """Whether pyproject.toml takes this version, and pip would leave it in place."""
    return bool(re.fullmatch(r"\d+\.\d+\.\d+", version)) and Version(version) in ray_requirement().specifier


def pods_are_confined(objects: list[Object]) -> Iterator[str]:
    for group in manifests.groups(objects):
        context = group.pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{group.name} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{group.name} has no seccomp profile"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if group.pod.get(key):
                yield f"{group.name} has {key}"
        for name, volume in group.volumes.items():
            if "hostPath" in volume:
                yield f"{group.name} mounts a path of its host: {name}"
        for name, container in _confined(objects, group):
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{name} may gain privileges"
            if context.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name} has capabilities"
            if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
                yield f"{name} may run as root"


def _confined(objects: list[Object], group: Group) -> Iterator[tuple[str, Object]]:
    """The containers, the autoscaler's too, which KubeRay makes of its options."""
    for container in group.containers:
        yield f"{group.name}/{container['name']}", container
    spec = manifests.cluster_spec(objects)
    if group.is_head and spec.get("enableInTreeAutoscaling"):
        yield "head/autoscaler", spec.get("autoscalerOptions", {})


def only_the_autoscaler_has_a_token(objects: list[Object]) -> Iterator[str]:
    """A service account's token is in a pod that asks the API server for something, and in no other."""
    has_autoscaler = manifests.cluster_spec(objects).get("enableInTreeAutoscaling", False)
    for group in manifests.groups(objects):
        if group.pod.get("automountServiceAccountToken") is not (group.is_head and has_autoscaler):
            yield f"{group.name}: automountServiceAccountToken is {group.pod.get('automountServiceAccountToken')}"
    for account in manifests.of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{manifests.name_of(account)} hands its token to every pod"


def token_authentication_is_on(objects: list[Object]) -> Iterator[str]:
    if manifests.cluster_spec(objects).get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the dashboard runs code"
    for group in manifests.groups(objects):
        if "RAY_AUTH_MODE" in manifests.env_of(group.ray):
            yield f"{group.name} sets RAY_AUTH_MODE, which is the operator's"


def secrets_are_not_written_down(objects: list[Object]) -> Iterator[str]:
    for item in objects:
        if item["kind"] == "Secret":
            yield f"{manifests.name_of(item)} is part of the manifests"
    for group in manifests.groups(objects):
        for container in group.containers:
            for item in container.get("env", []):
                if "value" in item and _SECRET_NAME.search(item["name"]):
                    yield f"{group.name}: {item['name']} has a literal value"
    for where, text in _strings(objects):
        if _SECRET_VALUE.search(text):
            yield f"{where} looks like a secret"


def _strings(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _strings(part, f"{where}.{key}")
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from _strings(part, f"{where}[{place}]")


def network_is_closed(objects: list[Object]) -> Iterator[str]:
    """Every Ray pod is under a policy that allows nothing, and what others open is what Ray needs."""
    policies = manifests.of_kind(objects, "NetworkPolicy")
    closed = [
        policy
        for policy in policies
        if set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
    ]
    for group in manifests.groups(objects):
        labels = group.pod_labels | group.labels
        if not any(_selects(policy, labels) for policy in closed):
            yield f"{group.name} is under no policy that denies all"
        if labels.get(_PART_OF[0]) != _PART_OF[1]:
            yield f"{group.name} lacks the label {'='.join(_PART_OF)}"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            if not rule.get("from"):
                yield f"{manifests.name_of(policy)} lets everybody in"
    opened = {(direction, port) for policy in policies for direction, port in _ports(policy)}
    for direction, port, why in (
        ("ingress", 8265, "the operator follows the job there"),
        ("egress", 53, "DNS"),
        ("egress", 6443, "the API server, for the autoscaler"),
    ):
        if (direction, port) not in opened:
            yield f"no policy opens {direction} {port}: {why}"
    if not any(_opens_to_itself(policy) for policy in policies):
        yield "no policy lets the Ray pods reach one another"


def _selects(policy: Object, labels: dict[str, str]) -> bool:
    wanted = policy["spec"]["podSelector"].get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def _ports(policy: Object) -> Iterator[tuple[str, int]]:
    for direction in ("ingress", "egress"):
        for rule in policy["spec"].get(direction, []):
            yield from ((direction, item["port"]) for item in rule.get("ports", []))


def _opens_to_itself(policy: Object) -> bool:
    peers = [{"podSelector": {"matchLabels": dict([_PART_OF])}}]
    return policy["spec"].get("ingress") == [{"from": peers}] and policy["spec"].get("egress") == [{"to": peers}]


def namespace_is_guarded(objects: list[Object]) -> Iterator[str]:
    for namespace in manifests.of_kind(objects, "Namespace"):
        labels = namespace["metadata"].get("labels", {})
        if labels.get("pod-security.kubernetes.io/enforce") not in ("baseline", "restricted"):
            yield f"{manifests.name_of(namespace)} enforces no pod security standard"


CHECKS = (
    images_are_pinned,
    ray_is_the_projects,
    pods_are_confined,
    only_the_autoscaler_has_a_token,
    token_authentication_is_on,
    secrets_are_not_written_down,
    network_is_closed,
    namespace_is_guarded,
)
