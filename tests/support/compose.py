"""Checks beyond the compose schema: files, volumes, ports and services a compose file refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support.manifests import twice

_VARIABLE = re.compile(r"\$\{([A-Z_0-9]+)(:[-?])?")
_LOCAL_PORT = re.compile(r"127\.0\.0\.1:(\d+):(\d+)")


def check_compose(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the inconsistencies of a compose file in `folder`."""
    services = document["services"]
    found: list[str] = []
    for name, service in services.items():
        for rule in (_image, _mounts, _order, _ports, _hardening):
            found += [f"{name}: {what}" for what in rule(service, services, document, folder)]
    taken = [port.split(":")[1] for service in services.values() for port in service.get("ports", ())]
    found += [f"port {port} is published twice" for port in twice(taken)]
    used = {str(mount).partition(":")[0] for service in services.values() for mount in service.get("volumes", ())}
    found += [f"volume {name} is declared and not used" for name in document.get("volumes", {}) if name not in used]
    return found


def variables(text: str) -> dict[str, bool]:
    """Return the variables a file asks for, and whether it has a default for them."""
    return {name: mode == ":-" for name, mode in _VARIABLE.findall(text)}


def _image(service: Any, *_: Any) -> Iterator[str]:
    if not re.fullmatch(r"\$\{\w+:\?[^}]+\}", service.get("image", "")):
        yield f"image {service.get('image')!r} is not a variable that has to be set"


def _mounts(service: Any, _services: Any, document: Any, folder: Path) -> Iterator[str]:
    targets = []
    for mount in service.get("volumes", ()):
        source, target, *mode = mount.split(":")
        targets.append(target)
        if source.startswith("."):
            if not (folder / source).exists():
                yield f"{source} does not exist"
            if mode != ["ro"]:
                yield f"{source} is mounted writable"
        elif source not in document.get("volumes", {}):
            yield f"volume {source} is not declared"
    for target in twice([*targets, *service.get("tmpfs", ())]):
        yield f"two mounts at {target}"


def _order(service: Any, services: Any, *_: Any) -> Iterator[str]:
    for name, wait in service.get("depends_on", {}).items():
        other = services.get(name)
        if other is None:
            yield f"depends on {name}, which is not there"
        elif wait["condition"] == "service_healthy" and "healthcheck" not in other:
            yield f"waits for {name} to be healthy, which nobody checks"
        elif wait["condition"] == "service_completed_successfully" and other.get("restart") != "no":
            yield f"waits for {name} to end, which is restarted"
        elif wait["condition"] == "service_started":
            yield f"waits for {name} to be started, which says nothing"
    seen, todo = set(), list(service.get("depends_on", {}))
    while todo:
        name = todo.pop()
        if services.get(name) is service:
            yield "depends on itself"
            return
        if name not in seen:
            seen.add(name)
            todo += list(services.get(name, {}).get("depends_on", {}))


def _ports(service: Any, *_: Any) -> Iterator[str]:
    for port in service.get("ports", ()):
        if not _LOCAL_PORT.fullmatch(port):
            yield f"port {port} is open to others"


def _hardening(service: Any, *_: Any) -> Iterator[str]:
    if service.get("privileged") or not service.get("read_only"):
        yield "its root file system can be written"
