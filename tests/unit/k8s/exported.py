"""Which names a query may have: those of ray_kd's own table, as Prometheus sees them, and a few of Ray's."""

import re

from ray_kd.ray_metrics import COUNTER, HISTOGRAM, METRICS

OF_RAY = {"ray_object_store_memory": ("Location", "SPILLED")}
"""Names of Ray's own -> a label and one of its values; a test holds them against Ray's dashboards."""

OF_HISTOGRAM = ("_bucket", "_sum", "_count")

_NAME = re.compile(r"\bray_[a-z0-9_]+(?=\s*[{\[)]|\s+[a-z<>=]|\s*$)")


def names_in(query: str) -> set[str]:
    """Names of metrics; labels (`ray_io_cluster`) are in brackets or follow one of a list."""
    bare = re.sub(r"\b(by|without|on)\s*\([^)]*\)", "", query)
    return set(_NAME.findall(bare))


def names() -> set[str]:
    """Of all series."""
    found = set(OF_RAY)
    for metric in METRICS.values():
        found |= {f"ray_{metric.name}{end}" for end in (OF_HISTOGRAM if metric.kind == HISTOGRAM else ("",))}
    return found


def unknown(query: str) -> set[str]:
    return names_in(query) - names()


def is_counter(name: str) -> bool:
    metric = METRICS.get(name.removeprefix("ray_"))
    return (metric is not None and metric.kind == COUNTER) or name.endswith(OF_HISTOGRAM)
