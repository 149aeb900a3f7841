"""What an API server would refuse: unknown or missing fields, wrong types, and the rules in the resource definitions.

Custom resources are held against KubeRay's own definitions, strictly (a field they do not have is an error, as with
`kubectl apply --validate=strict`), with their CEL rules evaluated; all else against Kubernetes' published schemas.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
import pytest

from tests.unit.k8s import manifests
from tests.unit.k8s.manifests import Object

DEFINITIONS = manifests.ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.37"

WITHOUT_SCHEMA = {"PodMonitor", "PrometheusRule"}
"""Kinds whose definitions are not at hand; in cluster_policy monitors_find_the_pods and alerts_are_whole say what they
can, and promtool reads the rules in test_monitoring.py."""

_CUSTOM = ("RayJob", "RayCluster")


def needs_definitions() -> None:
    """Skip the test where KubeRay's definitions are not."""
    if not DEFINITIONS.is_dir():
        pytest.skip("KubeRay's resource definitions are not beside the repository: ../shared/kuberay-crds")


def fits_core_schema(objects: list[Object]) -> Iterator[str]:
    """Kubernetes' own kinds, and the pods of the custom ones."""
    for item in [*objects, *manifests.pods(objects)]:
        if item["kind"] in _CUSTOM or item["kind"] in WITHOUT_SCHEMA:
            continue
        try:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{manifests.name_of(item)}: {str(error).splitlines()[0]}"


def fits_definition(objects: list[Object]) -> Iterator[str]:
    """KubeRay's kinds, strictly."""
    for item in objects:
        if item["kind"] in _CUSTOM:
            validator = jsonschema.Draft202012Validator(_strict(_schema(item["kind"])))
            for error in validator.iter_errors(item):
                yield f"{manifests.name_of(item)}: {error.json_path}: {error.message[:200]}"


def keeps_cel_rules(objects: list[Object]) -> Iterator[str]:
    """The x-kubernetes-validations of KubeRay's kinds. Rules about a change (oldSelf) do not apply to a new object."""
    for item in objects:
        if item["kind"] in _CUSTOM:
            for where, rule, value in _rules(_schema(item["kind"]), item, item["kind"]):
                if "oldSelf" not in rule["rule"] and not _program(rule["rule"]).evaluate(
                    {"self": celpy.json_to_cel(value)}
                ):
                    yield f"{where}: {rule['message']}"


@functools.cache
def _schema(kind: str) -> Object:
    definition = json.loads((DEFINITIONS / f"ray.io_{kind.lower()}s.json").read_text())
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    schema: Object = version["schema"]["openAPIV3Schema"]
    # The API server's part, which a definition leaves open.
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "namespace": {"type": "string"},
            **{
                key: {"type": "object", "additionalProperties": {"type": "string"}} for key in ("labels", "annotations")
            },
        },
        "required": ["name", "namespace"],
    }
    return schema


def _strict(schema: Any) -> Any:
    """The schema with objects closed, as the API server's pruning sees them."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _strict(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        closed["additionalProperties"] = False
    return closed


def _rules(schema: Object, value: Any, where: str) -> Iterator[tuple[str, Object, Any]]:
    """(where, rule, the value it is about) of everything there is in value."""
    for rule in schema.get("x-kubernetes-validations", []):
        yield where, rule, value
    if isinstance(value, dict):
        for key, part in value.items():
            if key in schema.get("properties", {}):
                yield from _rules(schema["properties"][key], part, f"{where}.{key}")
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from _rules(schema.get("items", {}), part, f"{where}[{place}]")


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


CHECKS = (fits_core_schema,)
CUSTOM_CHECKS = (fits_definition, keeps_cel_rules)
