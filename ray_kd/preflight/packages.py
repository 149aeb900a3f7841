"""What has to be installed: the package's own requirements, and the extras that this config makes use of."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ray_kd import cluster, storage
from ray_kd.config import RunConfig, each_teacher
from ray_kd.errors import ConfigError
from ray_kd.preflight.report import FAILED, OK, WARNING, Finding, Subject, kind_of

_DISTRIBUTION = "ray_kd"
_OF_TEACHERS = ("vllm", "multi-gpu")
"""Extras that only the teachers' nodes need."""


def check_packages(subject: Subject) -> Iterator[Finding]:
    """Each package is there, in a version that pyproject.toml allows."""
    extras = dict(_extras(subject.config))
    missing: list[tuple[str, bool]] = []
    is_elsewhere = cluster.address(subject.config) is not None
    outside: list[str] = []
    right: list[str] = []
    for requirement, extra in _requirements(set(extras)):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            why = f" for {extras[extra]}: pip install '.[{extra}]'" if extra else ": pip install ."
            missing.append((f"{requirement.name} is not installed here{why}", is_elsewhere and extra in _OF_TEACHERS))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        (right if fits else outside).append(f"{requirement.name} {version}")
        if not fits:
            outside[-1] += f" (allowed: {requirement.specifier})"
    for line, is_of_nodes in missing:
        if is_of_nodes:
            yield Finding("packages", WARNING, f"{line} (the teachers' nodes need it, and are not looked into)")
        else:
            yield Finding("packages", FAILED, line, ConfigError.exit_code)
    if outside:
        yield Finding("packages", WARNING, f"other versions than ray_kd was tested with: {', '.join(outside)}")
    if not missing and not outside:
        used = f", extras {', '.join(sorted(extras))} included" if extras else ""
        yield Finding(
            "packages", OK, f"{len(right)} in the versions that are allowed{used}: {', '.join(right[:4])}, ..."
        )


def _extras(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(extra, what of the config needs it)."""
    sources = [config.data.source] + ([config.data.eval_source] if config.data.eval_source is not None else [])
    if any(kind_of(source) == "huggingface" for source in sources):
        yield "hub", "data.source=huggingface"
    if config.run.dir.startswith("s3://"):
        yield "s3", f"run.dir={storage.path(config.run.dir, 'run.dir')}"
    for _, alone in each_teacher(config):
        engine = alone.teacher.engine
        if kind_of(engine) == "vllm":
            yield "vllm", "teacher.engine=vllm"
        is_spread = isinstance(engine, dict) and engine.get("device_map") is not None
        if kind_of(engine) == "hf" and (is_spread or alone.teacher.pool.num_gpus > 1):
            yield "multi-gpu", "a teacher on several devices"


def _requirements(extras: set[str]) -> Iterator[tuple[Requirement, str | None]]:
    """(requirement, the extra it is of), of the package itself and of these extras, where they hold on this machine."""
    for line, extra in _of_checkout() or _of_installed():
        requirement = Requirement(line)
        is_here = requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        if is_here and (extra is None or extra in extras) and requirement.name != _DISTRIBUTION:
            yield requirement, extra


def _of_checkout() -> list[tuple[str, str | None]]:
    """What the pyproject.toml beside the package says; nothing where the package is installed without it."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"] if path.exists() else {}
    if project.get("name") != _DISTRIBUTION:
        return []
    extras = project["optional-dependencies"].items()
    return [(line, None) for line in project["dependencies"]] + [(line, name) for name, own in extras for line in own]


def _of_installed() -> list[tuple[str, str | None]]:
    lines = metadata.requires(_DISTRIBUTION) or []
    named = ((line, re.search(r"""extra == ['"]([\w-]+)['"]""", line)) for line in lines)
    return [(line, None if extra is None else extra[1]) for line, extra in named]
