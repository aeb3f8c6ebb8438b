"""Rules about the inside of one pod template."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from support.manifests import (
    Finding,
    Object,
    containers,
    of_kind,
    port_names,
    quantity,
    template,
    twice,
    where,
    workloads,
)

_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_SECURITY_MARGIN_S = 1


def check_pods(objects: list[Object]) -> Iterator[Finding]:
    """Yield the faults inside each workload's pod template."""
    for workload in workloads(objects):
        place = where(workload)
        for rule in (_names, _volumes, _environment, _probes, _resources, _shared_memory, _security, _images, _drain):
            for what in rule(workload):
                yield Finding(rule.__name__.strip("_"), place, what)
    for workload in of_kind(objects, "Deployment"):
        yield from (Finding("strategy", where(workload), what) for what in _strategy(workload))
    for job in of_kind(objects, "Job"):
        yield from (Finding("job", where(job), what) for what in _job(job))


def _names(workload: Object) -> Iterator[str]:
    """Names of containers and ports are unique in a pod; a port's has at most 15 characters."""
    every = containers(workload)
    ports = [port for container in every for port in container.get("ports", ())]
    for name in twice(container["name"] for container in every):
        yield f"container {name!r} stands twice"
    for name in twice(port["name"] for port in ports if "name" in port):
        yield f"port name {name!r} stands twice"
    for number in twice((port["containerPort"], port.get("protocol", "TCP")) for port in ports):
        yield f"port {number[0]}/{number[1]} stands twice"
    for port in ports:
        if len(port.get("name", "")) > 15:
            yield f"port name {port['name']!r} has more than 15 characters"


def _volumes(workload: Object) -> Iterator[str]:
    """Every mount has its volume, every volume its mount, and no two mounts share a path."""
    declared = [volume["name"] for volume in template(workload)["spec"].get("volumes", ())]
    declared += [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
    mounted = {mount["name"] for container in containers(workload) for mount in container.get("volumeMounts", ())}
    for name in twice(declared):
        yield f"volume {name!r} stands twice"
    for name in sorted(mounted - set(declared)):
        yield f"volume {name!r} is mounted and not declared"
    for name in sorted(set(declared) - mounted):
        yield f"volume {name!r} is declared and not mounted"
    for container in containers(workload):
        for path in twice(mount["mountPath"].rstrip("/") for mount in container.get("volumeMounts", ())):
            yield f"two volumes are mounted at {path} in {container['name']!r}"


def _environment(workload: Object) -> Iterator[str]:
    """No variable is doubled, and `$(NAME)` in a command names an existing one."""
    for container in containers(workload):
        names = [variable["name"] for variable in container.get("env", ())]
        for name in twice(names):
            yield f"environment variable {name} stands twice in {container['name']!r}"
        used = _REFERENCE.findall("\n".join([*container.get("command", ()), *container.get("args", ())]))
        for name in sorted(set(used) - set(names)):
            if not container.get("envFrom"):
                yield f"$({name}) is used in the arguments of {container['name']!r} and not in its environment"


def _probes(workload: Object) -> Iterator[str]:
    """A probe asks an existing port, waits no longer than its period, and start-up fits the deadline."""
    for container in containers(workload):
        for kind in _PROBES:
            probe = container.get(kind)
            if probe is None:
                continue
            handler = probe.get("httpGet") or probe.get("tcpSocket") or probe.get("grpc") or {}
            if "port" in handler and handler["port"] not in port_names(workload):
                yield f"{kind} asks port {handler['port']!r}, which no container has"
            if probe.get("timeoutSeconds", 1) > probe.get("periodSeconds", 10):
                yield f"{kind} waits longer ({probe['timeoutSeconds']} s) than its period"
        startup, deadline = container.get("startupProbe"), workload["spec"].get("progressDeadlineSeconds")
        if startup and deadline is not None:
            allowed = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
            if allowed + workload["spec"].get("minReadySeconds", 0) >= deadline:
                yield f"start-up may take {allowed} s, which progressDeadlineSeconds ({deadline}) does not allow"
        if "livenessProbe" in container and "startupProbe" not in container:
            yield f"a liveness probe without a start-up probe kills {container['name']!r} while it loads its models"


def _resources(workload: Object) -> Iterator[str]:
    """Quantities can be read, a request is no more than its limit, and a GPU's request is its limit."""
    for container in containers(workload):
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}) or {}, resources.get("requests", {}) or {}
        if not requests:
            yield f"{container['name']!r} requests nothing"
        for group in (limits, requests):
            for name, value in group.items():
                if math.isnan(quantity(value)):
                    yield f"{name}: {value!r} is no quantity"
        for name in set(limits) & set(requests):
            if quantity(requests[name]) > quantity(limits[name]):
                yield f"{name}: requested {requests[name]}, limited to {limits[name]}"
        for name in set(requests) | set(limits):
            if "/" in name and name in requests and requests[name] != limits.get(name):
                yield f"{name}: an extended resource's request must be its limit"


def _shared_memory(workload: Object) -> Iterator[str]:
    """The content of a memory volume counts against the memory limit."""
    for volume in template(workload)["spec"].get("volumes", ()):
        directory = volume.get("emptyDir") or {}
        if directory.get("medium") != "Memory":
            continue
        for container in containers(workload):
            mounted = any(mount["name"] == volume["name"] for mount in container.get("volumeMounts", ()))
            limit = (container.get("resources", {}).get("limits") or {}).get("memory") if mounted else None
            if limit is not None and quantity(directory.get("sizeLimit", 0)) >= quantity(limit):
                yield f"memory volume {volume['name']!r} may fill the whole memory limit of {limit}"


def _security(workload: Object) -> Iterator[str]:
    """Not root, no privileges, a read-only root file system."""
    pod = template(workload)["spec"].get("securityContext", {})
    for container in containers(workload):
        own = {**pod, **container.get("securityContext", {})}
        wanted = {"runAsNonRoot": True, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
        for key, value in wanted.items():
            if own.get(key) is not value:
                yield f"{container['name']!r}: {key} is not {value}"
        if own.get("runAsUser") == 0:
            yield f"{container['name']!r}: runAsUser is 0"
        if "ALL" not in own.get("capabilities", {}).get("drop", ()):
            yield f"{container['name']!r}: capabilities are not dropped"
        if own.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{container['name']!r}: no seccomp profile"


def _images(workload: Object) -> Iterator[str]:
    """An image has a tag or a digest, and not `latest`."""
    for container in containers(workload):
        name = container["image"].rpartition("/")[2]
        tag = name.partition("@")[2] or name.partition(":")[2]
        if tag in ("", "latest"):
            yield f"image {container['image']!r} is not pinned"


def _drain(workload: Object) -> Iterator[str]:
    """The grace period is longer than the preStop sleep and Triton's own wait together."""
    grace = template(workload)["spec"].get("terminationGracePeriodSeconds", 30)
    for container in containers(workload):
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        sleep = int(command[1]) if command[:1] == ["sleep"] else 0
        exits = [arg.partition("=")[2] for arg in container.get("args", ()) if arg.startswith("--exit-timeout-secs=")]
        needed = sleep + (int(exits[-1]) if exits else 0)
        if needed + _SECURITY_MARGIN_S > grace:
            yield f"draining takes up to {needed} s, and the pod is killed after {grace} s"


def _strategy(workload: Object) -> Iterator[str]:
    """A rolling update can go on, and takes no pod away before its successor is there."""
    update = workload["spec"].get("strategy", {}).get("rollingUpdate", {})
    surge, unavailable = str(update.get("maxSurge", "25%")), str(update.get("maxUnavailable", "25%"))
    if surge in ("0", "0%") and unavailable in ("0", "0%"):
        yield "maxSurge and maxUnavailable are both 0: it can never roll"
    elif unavailable not in ("0", "0%"):
        yield f"maxUnavailable is {unavailable}: pods go before their successors are ready"
    deadline = workload["spec"].get("progressDeadlineSeconds", 600)
    if workload["spec"].get("minReadySeconds", 0) >= deadline:
        yield "minReadySeconds is not below progressDeadlineSeconds: no roll-out can succeed"


def _job(job: Object) -> Iterator[str]:
    """An Indexed Job says how many indexes it has, and ends."""
    spec = job["spec"]
    if spec.get("completionMode") == "Indexed" and "completions" not in spec:
        yield "an Indexed Job needs completions"
    if spec.get("parallelism", 1) > spec.get("completions", spec.get("parallelism", 1)):
        yield "parallelism exceeds completions"
    if template(job)["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        yield "a Job's pods need restartPolicy Never or OnFailure"
    if "activeDeadlineSeconds" not in spec:
        yield "a Job without activeDeadlineSeconds may run for ever"
