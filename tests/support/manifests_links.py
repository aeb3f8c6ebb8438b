"""Rules about how the objects of a set refer to each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from support.manifests import (
    Finding,
    Object,
    containers,
    namespace,
    of_kind,
    pod_labels,
    port_names,
    quantity,
    selects,
    template,
    twice,
    walk,
    where,
    workloads,
)
from support.manifests_pods import check_pods

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"|[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def check_set(objects: list[Object], *, external: frozenset[str] = frozenset()) -> list[Finding]:
    """Check a set of manifests as a whole.

    Args:
        objects: everything applied together.
        external: `Kind/name` of objects in the cluster already.
    """
    rules: tuple[Callable[[list[Object], frozenset[str]], Iterator[Finding]], ...] = (
        *(_identity, _selectors, _services, _autoscalers, _budgets, _policies, _monitors, _accounts, _routes),
        _references,
    )
    found = [finding for rule in rules for finding in rule(objects, external)]
    return [*found, *check_pods(objects)]


def _pods(objects: list[Object], selector: Object | None, space: str) -> list[Object]:
    return [w for w in workloads(objects) if namespace(w) == space and selects(selector, pod_labels(w))]


def _identity(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """Names are valid, labels too, and no object stands twice."""
    for key in twice((item["kind"], namespace(item), item["metadata"]["name"]) for item in objects):
        yield Finding("identity", f"{key[0]}/{key[2]}", "stands twice")
    for item in objects:
        name = item["metadata"]["name"]
        if not all(_DNS_LABEL.fullmatch(part) for part in name.split(".")) or len(name) > 63:
            yield Finding("identity", where(item), f"{name!r} is no valid name")
        for path, value in walk(item):
            if path.endswith((".labels", "matchLabels")) and isinstance(value, dict):
                for label, text in value.items():
                    if not isinstance(text, str) or len(text) > 63 or not _LABEL_VALUE.fullmatch(text):
                        yield Finding("identity", where(item), f"label {label}: {text!r} is no valid value")


def _selectors(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """A workload selects its own pods, and no other's."""
    owners = [w for w in workloads(objects) if w["kind"] != "Job"]
    for owner in owners:
        selector = owner["spec"].get("selector")
        if not selects(selector, pod_labels(owner)):
            yield Finding("selector", where(owner), "its selector does not match its own pods' labels")
        for other in owners:
            if other is not owner and namespace(other) == namespace(owner) and selects(selector, pod_labels(other)):
                yield Finding("selector", where(owner), f"it also selects the pods of {where(other)}")


def _services(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """A Service selects pods, its ports are unique, named, and exist on each of these pods."""
    for service in of_kind(objects, "Service"):
        spec, place = service["spec"], where(service)
        pods = _pods(objects, {"matchLabels": spec.get("selector", {})}, namespace(service))
        if not spec.get("selector") or not pods:
            yield Finding("service", place, "selects no pod")
        ports = spec.get("ports", [])
        for name in twice(port.get("name") for port in ports):
            yield Finding("service", place, f"port name {name!r} stands twice")
        for number in twice((port["port"], port.get("protocol", "TCP")) for port in ports):
            yield Finding("service", place, f"port {number[0]} stands twice")
        for port in ports:
            target = port.get("targetPort", port["port"])
            for pod in pods:
                if target not in port_names(pod):
                    yield Finding("service", place, f"targetPort {target!r} is no port of {where(pod)}")


def _autoscalers(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """An HPA scales an existing object, between ordered limits, and alone sets the number."""
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        spec, place = scaler["spec"], where(scaler)
        target = spec["scaleTargetRef"]
        found = [
            item
            for item in of_kind(objects, target["kind"])
            if item["metadata"]["name"] == target["name"] and namespace(item) == namespace(scaler)
        ]
        if not found or found[0]["apiVersion"] != target.get("apiVersion"):
            yield Finding("autoscaler", place, f"its target {target['kind']}/{target['name']} is not there")
        if spec.get("minReplicas", 1) > spec["maxReplicas"]:
            yield Finding("autoscaler", place, f"minReplicas {spec['minReplicas']} > maxReplicas {spec['maxReplicas']}")
        if any("replicas" in item["spec"] for item in found):
            yield Finding("autoscaler", place, "its target sets replicas itself: every apply resets the number")
        for metric in spec.get("metrics", ()):
            kind = metric["type"].lower()
            goal = metric.get(kind, {}).get("target", {})
            value = goal.get("averageValue", goal.get("value", goal.get("averageUtilization", 0)))
            if not quantity(value) > 0:
                yield Finding("autoscaler", place, f"the target of {kind} is not above 0")


def _budgets(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """A PDB has one limit, covers pods, lets some go, and is alone in covering them."""
    covered: list[str] = []
    for budget in of_kind(objects, "PodDisruptionBudget"):
        spec, place = budget["spec"], where(budget)
        limits = [key for key in ("minAvailable", "maxUnavailable") if key in spec]
        if len(limits) != 1:
            yield Finding("budget", place, f"needs exactly one of minAvailable and maxUnavailable, has {limits}")
        pods = _pods(objects, spec.get("selector"), namespace(budget))
        if not pods:
            yield Finding("budget", place, "covers no pod")
        covered += [where(pod) for pod in pods]
        total = sum(pod["spec"].get("replicas", 1) for pod in pods)
        if str(spec.get("maxUnavailable")) in ("0", "0%") or str(spec.get("minAvailable")) == "100%":
            yield Finding("budget", place, "lets no pod go: nodes can never be drained")
        if isinstance(spec.get("minAvailable"), int) and spec["minAvailable"] >= total > 0:
            yield Finding("budget", place, f"wants {spec['minAvailable']} of {total} pods: nodes can never be drained")
    for pod in twice(covered):
        yield Finding("budget", pod, "is covered by two PodDisruptionBudgets: evictions of it fail")


def _policies(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """A NetworkPolicy covers pods, and the ports it names exist on them."""
    for policy in of_kind(objects, "NetworkPolicy"):
        pods = _pods(objects, policy["spec"].get("podSelector"), namespace(policy))
        if not pods:
            yield Finding("policy", where(policy), "covers no pod")
        for rule in policy["spec"].get("ingress", ()):
            for port in rule.get("ports", ()):
                for pod in pods:
                    if "port" in port and port["port"] not in port_names(pod):
                        yield Finding("policy", where(policy), f"port {port['port']!r} is no port of {where(pod)}")


def _monitors(objects: list[Object], _external: frozenset[str]) -> Iterator[Finding]:
    """A ServiceMonitor takes exactly one Service, so no pod is scraped twice, and a port of it."""
    for monitor in of_kind(objects, "ServiceMonitor"):
        taken = [
            service
            for service in of_kind(objects, "Service")
            if selects(monitor["spec"].get("selector"), service["metadata"].get("labels", {}))
        ]
        if len(taken) != 1:
            yield Finding("monitor", where(monitor), f"takes {len(taken)} Services, expected one")
        for service in taken:
            names = {port.get("name") for port in service["spec"]["ports"]}
            for endpoint in monitor["spec"]["endpoints"]:
                if endpoint.get("port") not in names:
                    yield Finding(
                        "monitor", where(monitor), f"port {endpoint.get('port')!r} is not in {where(service)}"
                    )


def _accounts(objects: list[Object], external: frozenset[str]) -> Iterator[Finding]:
    """Bindings bind existing roles to somebody. No rule has a wildcard, reads secrets, or seems restricted only."""
    known = {where(item) for item in objects} | external
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        reference = binding["roleRef"]
        if f"{reference['kind']}/{reference['name']}" not in known:
            yield Finding(
                "account", where(binding), f"binds {reference['kind']}/{reference['name']}, which is not there"
            )
        if not binding.get("subjects"):
            yield Finding("account", where(binding), "binds nobody")
        for subject in binding.get("subjects") or ():
            if subject["kind"] == "ServiceAccount" and "namespace" not in subject:
                yield Finding("account", where(binding), f"ServiceAccount {subject['name']} has no namespace")
    for role in of_kind(objects, "Role", "ClusterRole"):
        for rule in role["rules"]:
            if "*" in [*rule["verbs"], *rule.get("resources", ()), *rule.get("apiGroups", ())]:
                yield Finding("account", where(role), "a rule has a wildcard")
            if "secrets" in rule.get("resources", ()):
                yield Finding("account", where(role), "a rule reads secrets")
            if rule.get("resourceNames") and {"list", "watch", "create"} & set(rule["verbs"]):
                yield Finding("account", where(role), "resourceNames never match list, watch or create")


def _routes(objects: list[Object], external: frozenset[str]) -> Iterator[Finding]:
    """A route's weights send requests to existing services."""
    services = {where(item): item for item in of_kind(objects, "Service")}
    for route in of_kind(objects, "HTTPRoute", "GRPCRoute"):
        if not route["spec"].get("parentRefs"):
            yield Finding("route", where(route), "hangs on no gateway")
        for rule in route["spec"]["rules"]:
            backends = rule["backendRefs"]
            if sum(backend.get("weight", 1) for backend in backends) <= 0:
                yield Finding("route", where(route), "its weights add up to nothing")
            for name in twice(backend["name"] for backend in backends):
                yield Finding("route", where(route), f"backend {name} stands twice")
            for backend in backends:
                key = f"Service/{backend['name']}"
                service = services.get(key)
                if service is None and key not in external:
                    yield Finding("route", where(route), f"{key} is not there")
                if service and backend.get("port") not in {port["port"] for port in service["spec"]["ports"]}:
                    yield Finding("route", where(route), f"{key} has no port {backend.get('port')}")


def _references(objects: list[Object], external: frozenset[str]) -> Iterator[Finding]:
    """ServiceAccounts, ConfigMaps, Secrets and claims of pods exist."""
    known = {where(item) for item in objects} | external
    for workload in workloads(objects):
        spec = template(workload)["spec"]
        wanted = {f"ServiceAccount/{spec.get('serviceAccountName', 'default')}"} - {"ServiceAccount/default"}
        wanted |= {f"Secret/{secret['name']}" for secret in spec.get("imagePullSecrets", ())}
        for volume in spec.get("volumes", ()):
            if "persistentVolumeClaim" in volume:
                wanted.add(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
            if "configMap" in volume:
                wanted.add(f"ConfigMap/{volume['configMap']['name']}")
            if "secret" in volume:
                wanted.add(f"Secret/{volume['secret']['secretName']}")
        for container in containers(workload):
            for variable in container.get("env", ()):
                source = variable.get("valueFrom", {})
                for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                    if key in source and not source[key].get("optional"):
                        wanted.add(f"{kind}/{source[key]['name']}")
        for name in sorted(wanted - known):
            yield Finding("reference", where(workload), f"{name} is not there")
