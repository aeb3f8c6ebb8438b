"""Kubernetes manifests as a consistent set: checks beyond the schemas.

A schema compares one object with its type. Whether a Service selects any pod, whether a named port exists, whether an
undeclared volume is mounted: these checks need the whole set. The rules are in `manifests_pods` (inside a pod) and
`manifests_links` (between objects). Here are the objects, and the common parts of the rules.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([numkKMGTPE]i?|)")
_WORKLOADS = {"Deployment", "StatefulSet", "DaemonSet", "Job"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """An inconsistency."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.what}"


class _StrictLoader(yaml.SafeLoader):
    """YAML with a doubled key as an error, as in the API server's strict mode."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"keys stand twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def load_objects(text: str) -> list[Object]:
    """Parse a stream of YAML documents; empty ones are left out."""
    return [document for document in yaml.load_all(text, _StrictLoader) if document]


def load_files(paths: Iterable[Path]) -> list[Object]:
    return [document for path in paths for document in load_objects(path.read_text(encoding="utf-8"))]


def where(item: Object) -> str:
    return f"{item.get('kind')}/{item.get('metadata', {}).get('name')}"


def namespace(item: Object) -> str:
    return str(item.get("metadata", {}).get("namespace", "default"))


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item.get("kind") in kinds]


def workloads(objects: Sequence[Object]) -> list[Object]:
    return of_kind(objects, *_WORKLOADS)


def template(workload: Object) -> Object:
    return dict(workload["spec"]["template"])


def containers(workload: Object) -> list[Object]:
    spec = template(workload)["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def pod_labels(workload: Object) -> Mapping[str, str]:
    return dict(template(workload).get("metadata", {}).get("labels", {}))


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Say whether a label selector (`matchLabels`, `matchExpressions`) takes something with these labels."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", ()):
        value, wanted = labels.get(term["key"]), term.get("values", [])
        held = {
            "In": value in wanted,
            "NotIn": value not in wanted,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not held[term["operator"]]:
            return False
    return True


def quantity(value: Any) -> float:
    """Read a resource quantity (`500m`, `1.5Gi`, `2`). Else NaN, for which no comparison holds."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None or match[2] not in _SUFFIXES:
        return math.nan
    return float(Decimal(match[1]) * _SUFFIXES[match[2]])


def port_names(workload: Object) -> set[str | int]:
    """Return the names and numbers of a workload's container ports."""
    ports = [port for container in containers(workload) for port in container.get("ports", ())]
    return {port["containerPort"] for port in ports} | {port["name"] for port in ports if "name" in port}


def twice(values: Iterable[Any]) -> list[Any]:
    """Return the values present more than once."""
    listed = list(values)
    return sorted({value for value in listed if listed.count(value) > 1}, key=str)


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value inside an object with its dotted path."""
    yield path, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, f"{path}.{index}")
