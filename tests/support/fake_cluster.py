"""A Kubernetes API server for tests: real HTTP, stateful, with just enough of a Deployment controller.

Objects keep `resourceVersion` and `generation` as the real one does: a patch with an old version is a conflict, only
a change of the spec makes a new generation, strategic patches merge containers and variables by name, null removes.
The controller takes a step at each read of a Deployment, sees a change some reads late, and its pods end slowly. A
test's `Behaviour` decides about new pods.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml

Object = dict[str, Any]
Behaviour = Callable[["FakeCluster", Object, Object], None]
"""cluster, deployment, pod: turns a freshly created pod into the state a test wants."""

_LAG = 2
"""How many reads after a change the Deployment controller sees it, and after its end a pod is gone."""
_MERGE_KEYS = {"containers": "name", "initContainers": "name", "env": "name", "volumes": "name"}
_PATHS = {
    "deployments": re.compile(r"/apis/apps/v1/namespaces/([^/]+)/deployments(?:/([^/?]+))?"),
    "replicasets": re.compile(r"/apis/apps/v1/namespaces/([^/]+)/replicasets(?:/([^/?]+))?"),
    "events": re.compile(r"/api/v1/namespaces/([^/]+)/events(?:/([^/?]+))?"),
    "pods": re.compile(r"/api/v1/namespaces/([^/]+)/pods(?:/([^/?]+))?(/log)?"),
    "inferenceservices": re.compile(r"/apis/serving\.kserve\.io/v1beta1/namespaces/([^/]+)/inferenceservices/([^/?]+)"),
    "httproutes": re.compile(r"/apis/gateway\.networking\.k8s\.io/v1/namespaces/([^/]+)/httproutes/([^/?]+)"),
}


def merged(old: Any, patch: Any, *, strategic: bool, key: str = "") -> Any:
    """Apply a merge patch; a strategic one merges some lists by name."""
    if isinstance(patch, dict) and isinstance(old, dict):
        result = dict(old)
        for name, value in patch.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = merged(result.get(name), value, strategic=strategic, key=name)
        return result
    if strategic and key in _MERGE_KEYS and isinstance(old, list):
        by = _MERGE_KEYS[key]
        result_list = [dict(item) for item in old]
        for item in patch:
            places = [index for index, other in enumerate(result_list) if other[by] == item[by]]
            if places:
                result_list[places[0]] = merged(result_list[places[0]], item, strategic=True)
            else:
                result_list.append(item)
        return result_list
    if isinstance(patch, dict):
        return {
            name: merged(None, value, strategic=strategic, key=name)
            for name, value in patch.items()
            if value is not None
        }
    return copy.deepcopy(patch)


def claimed(old: Any, patch: Any, *, key: str = "") -> Object:
    """Return the fields changed by a patch, as `managedFields` writes them."""
    found: Object = {}
    for name, value in patch.items():
        before = old.get(name) if isinstance(old, dict) else None
        if isinstance(value, list) and name in _MERGE_KEYS and value and _MERGE_KEYS[name] in value[0]:
            by = _MERGE_KEYS[name]
            was = {each[by]: each for each in before or ()}
            inner = {
                f"k:{json.dumps({by: each[by]}, separators=(',', ':'))}": claimed(was.get(each[by], {}), each)
                for each in value
            }
            found |= {f"f:{name}": changed} if (changed := {k: v for k, v in inner.items() if v}) else {}
        elif isinstance(value, dict):
            inner = claimed(before or {}, value)
            found |= {f"f:{name}": inner} if inner else {}
        elif value is not None and value != before:
            found[f"f:{name}"] = {}
    return found


def dropped(patch: Any) -> Object:
    """Return the fields removed by a merge patch, as `managedFields` writes them: they have no owner any more."""
    found: Object = {}
    for name, value in patch.items():
        if value is None:
            found[f"f:{name}"] = {}
        elif isinstance(value, dict) and (inner := dropped(value)):
            found[f"f:{name}"] = inner
    return found


def _without(fields: Object, taken: Object) -> Object:
    """Return a manager's remaining fields after another one has changed some."""
    left = {}
    for key, value in fields.items():
        if key not in taken:
            left[key] = value
        elif value and taken[key] and (inner := _without(value, taken[key])):
            left[key] = inner
    return left


def _joined(one: Object, other: Object) -> Object:
    return {key: _joined(one.get(key, {}), other.get(key, {})) for key in {**one, **other}}


def claim(item: Object, fields: Object, manager: str, operation: str = "Update") -> None:
    """Give a manager the fields its request changes, as the API server does. Others lose them."""
    if not fields:
        return
    entries = item["metadata"].setdefault("managedFields", [])
    own = next((each for each in entries if (each["manager"], each["operation"]) == (manager, operation)), None)
    for entry in entries:
        if entry is not own:
            entry["fieldsV1"] = _without(entry["fieldsV1"], fields)
    if own is None:
        own = {"manager": manager, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": {}}
        entries.append(own)
    own["fieldsV1"] = _joined(own["fieldsV1"], fields)
    item["metadata"]["managedFields"] = [entry for entry in entries if entry["fieldsV1"]]


def touch(item: Object) -> None:
    """Give an object the next resource version, as every write does, one of the status too."""
    item["metadata"]["resourceVersion"] = str(int(item["metadata"]["resourceVersion"]) + 1)


def ready(_cluster: FakeCluster, deployment: Object, pod: Object) -> None:
    """Make the pod answer its probes."""
    pod["status"] = {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
        "containerStatuses": [_container_status(deployment, {"running": {}}, ready=True)],
    }


def waiting(reason: str, message: str = "", *, restarts: int = 0, ended: Mapping[str, Any] | None = None) -> Behaviour:
    """Make the pod's container wait for a reason, for ever."""

    def behave(_cluster: FakeCluster, deployment: Object, pod: Object) -> None:
        state = {"waiting": {"reason": reason, "message": message}}
        status = _container_status(deployment, state, ready=False)
        status["restartCount"] = restarts
        if ended is not None:
            status["lastState"] = {"terminated": dict(ended)}
        pod["status"] = {
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}],
            "containerStatuses": [status],
        }

    return behave


def unschedulable(_cluster: FakeCluster, _deployment: Object, pod: Object) -> None:
    """Leave the pod without a node."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    condition["message"] = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    pod["status"] = {"phase": "Pending", "conditions": [condition]}


def _container_status(deployment: Object, state: Mapping[str, Any], *, ready: bool) -> Object:
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "state": dict(state),
    }


@dataclasses.dataclass
class FakeCluster:
    """The state, and its changes."""

    behaviour: Behaviour = ready
    objects: dict[tuple[str, str, str], Object] = dataclasses.field(default_factory=dict)
    pods: list[Object] = dataclasses.field(default_factory=list)
    replica_sets: dict[tuple[str, str], Object] = dataclasses.field(default_factory=dict)
    """Every template a Deployment ever had, by namespace and name: an undo leaves them, without pods."""
    logs: str = ""
    requests: list[tuple[str, str, Any]] = dataclasses.field(default_factory=list)
    refuse: Callable[[str, str], tuple[int, str] | None] = lambda _method, _path: None
    """method, path -> status and message, to refuse a request."""
    on_patch: Callable[[Object], None] = lambda _item: None
    """Called with every patched object, custom ones too: a test's own controller."""
    on_read: Callable[[Object], None] = lambda _item: None
    """Called with every object read by its name, before it is sent."""
    manager: str = "unknown"
    """The field manager of the current request."""
    events: list[Object] = dataclasses.field(default_factory=list)
    """The created Events, in order."""
    frozen: bool = False
    """The Deployment controller does nothing."""
    _unseen: dict[tuple[str, str, str], int] = dataclasses.field(default_factory=dict)
    _ending: list[tuple[int, Object]] = dataclasses.field(default_factory=list)

    def add(self, item: Object, *, settled: bool = True) -> Object:
        """Put an object there, as applied; a settled Deployment has its pods at once."""
        plural = {"Deployment": "deployments", "InferenceService": "inferenceservices", "HTTPRoute": "httproutes"}
        meta = item["metadata"]
        meta.update(resourceVersion="1", generation=1, uid=meta["name"])
        claim(item, claimed({}, {"spec": item["spec"]}), "helm")
        self.objects[plural[item["kind"]], meta.get("namespace", "default"), meta["name"]] = item
        if item["kind"] == "Deployment":
            item["spec"].setdefault("replicas", 1)
            for _ in range(20 if settled else 0):
                self._step(item, ready)
        return item

    def remove(self, key: tuple[str, str, str]) -> None:
        """Delete an object, and a Deployment's pods."""
        gone = self.objects.pop(key)
        self.pods = [pod for pod in self.pods if pod["owner"] != gone["metadata"]["uid"]]

    def deployment(self, namespace: str, name: str) -> Object:
        return self.objects["deployments", namespace, name]

    def _step(self, deployment: Object, behaviour: Behaviour) -> None:
        """One turn of the Deployment controller: at most one pod more, then at most one less."""
        meta, spec = deployment["metadata"], deployment["spec"]
        self._ending = [(left - 1, pod) for left, pod in self._ending if left > 0]
        key = ("deployments", meta.get("namespace", "default"), meta["name"])
        self._unseen[key] = self._unseen.get(key, 0) - 1
        if self.frozen or self._unseen[key] >= 0:
            return
        template, wanted = spec["template"], spec["replicas"]
        mark = json.dumps(template, sort_keys=True)
        own = [pod for pod in self.pods if pod["owner"] == meta["uid"]]
        new = [pod for pod in own if pod["mark"] == mark]
        if len(new) < wanted and len(own) <= wanted:
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{meta['name']}-{len(self.requests)}-{len(self.pods)}",
                    "namespace": meta.get("namespace", "default"),
                    "labels": dict(template["metadata"]["labels"]),
                    "annotations": dict(template["metadata"].get("annotations") or {}),
                    "creationTimestamp": f"2026-01-01T00:00:{len(self.pods) % 60:02}Z",
                },
                "spec": copy.deepcopy(template["spec"]),
                "owner": meta["uid"],
                "mark": mark,
            }
            behaviour(self, deployment, pod)
            self.pods.append(pod)
            self._replica_set(deployment, mark)
            new.append(pod)
        alive = [pod for pod in new if _is_ready(pod)]
        old = [pod for pod in self.pods if pod["owner"] == meta["uid"] and pod["mark"] != mark]
        stuck = [pod for pod in old if not _is_ready(pod)]
        if stuck or (old and len(alive) + len(old) > wanted):
            self._end((stuck or old)[0])
        while len(new) > wanted:
            self._end(new.pop())
        own = [pod for pod in self.pods if pod["owner"] == meta["uid"]]
        available = len([pod for pod in own if _is_ready(pod)])
        before = deployment.get("status")
        conditions = (before or {}).get("conditions", [])
        deployment["status"] = {
            "observedGeneration": meta["generation"],
            "replicas": len(own),
            "updatedReplicas": len(new),
            "availableReplicas": available,
            "readyReplicas": available,
            "conditions": conditions,
        }
        if deployment["status"] != before:
            touch(deployment)

    def settle(self) -> None:
        """Remove the pods on their way out."""
        self._ending.clear()

    def _end(self, pod: Object) -> None:
        """Let a pod end: it is listed for a while still, ready and on its way out."""
        self.pods.remove(pod)
        going = copy.deepcopy(pod)
        going["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
        self._ending.append((_LAG, going))

    def _replica_set(self, deployment: Object, mark: str) -> None:
        """Make the ReplicaSet of a template, unless it is there: it is kept for `kubectl rollout undo`."""
        meta = deployment["metadata"]
        name, space = (
            f"{meta['name']}-{hashlib.sha256(mark.encode()).hexdigest()[:9]}",
            meta.get("namespace", "default"),
        )
        if (space, name) not in self.replica_sets:
            template = copy.deepcopy(deployment["spec"]["template"])
            labels = dict(template["metadata"]["labels"])
            own = {"name": name, "namespace": space, "labels": labels, "resourceVersion": "1", "uid": name}
            item = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": own}
            self.replica_sets[space, name] = {**item, "spec": {"selector": {}, "template": template}}

    def get(self, kind: str, namespace: str, name: str | None, labels: Mapping[str, str]) -> Object | None:
        if kind == "pods":
            there = [*self.pods, *(pod for _, pod in self._ending)]
            found = [{k: v for k, v in pod.items() if k not in ("owner", "mark")} for pod in there]
        elif kind == "replicasets":
            found = list(self.replica_sets.values())
        else:
            found = [item for key, item in self.objects.items() if key[:2] == (kind, namespace)]
            for item in list(found):
                if name in (None, item["metadata"]["name"]):
                    if kind == "deployments" and labels.items() <= item["metadata"]["labels"].items():
                        self._step(item, self.behaviour)
                    self.on_read(item)
            found = [item for key, item in self.objects.items() if key[:2] == (kind, namespace)]
        found = [item for item in found if item["metadata"].get("namespace", "default") == namespace]
        if name is not None:
            return next((item for item in found if item["metadata"]["name"] == name), None)
        chosen = [i for i in found if labels.items() <= (i["metadata"].get("labels") or {}).items()]
        return {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": chosen}

    def patch(self, key: tuple[str, str, str], patch: Object, *, strategic: bool) -> tuple[int, Object | str]:
        item = self.objects.get(key)
        if item is None:
            return 404, f'{key[0]} "{key[2]}" not found'
        expected = patch.get("metadata", {}).get("resourceVersion")
        if expected is not None and expected != item["metadata"]["resourceVersion"]:
            return 409, "the object has been modified; please apply your changes to the latest version and try again"
        before = copy.deepcopy(item["spec"])
        changed = copy.deepcopy(merged(item, patch, strategic=strategic))
        claim(changed, claimed(item, {key: value for key, value in patch.items() if key == "spec"}), self.manager)
        for entry in changed["metadata"].get("managedFields", ()):
            entry["fieldsV1"] = _without(entry["fieldsV1"], dropped(patch))
        changed["metadata"]["resourceVersion"] = item["metadata"]["resourceVersion"]
        touch(changed)
        if changed["spec"] != before:
            changed["metadata"]["generation"] = item["metadata"]["generation"] + 1
            self._unseen[key] = _LAG
        self.objects[key] = changed
        self.on_patch(changed)
        return 200, changed


def _is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))


def _discovery() -> dict[str, Object]:
    """The API server's description of itself, as far as helm asks before it renders a chart with `lookup`."""
    kinds = {
        ("", "v1"): {"secrets": "Secret", "services": "Service", "serviceaccounts": "ServiceAccount", "pods": "Pod"},
        ("apps", "v1"): {"deployments": "Deployment"},
        ("policy", "v1"): {"poddisruptionbudgets": "PodDisruptionBudget"},
        ("networking.k8s.io", "v1"): {"networkpolicies": "NetworkPolicy"},
        ("autoscaling", "v2"): {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    }
    groups = []
    found: dict[str, Object] = {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0", "platform": "linux/amd64"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
    }
    for (group, version), resources in kinds.items():
        name = f"{group}/{version}" if group else version
        verbs = ["get", "list", "patch", "create", "delete"]
        listed = [{"name": each, "namespaced": True, "kind": kind, "verbs": verbs} for each, kind in resources.items()]
        entry = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": listed}
        found[f"/apis/{name}" if group else "/api/v1"] = entry
        if group:
            served = {"groupVersion": name, "version": version}
            groups.append({"name": group, "versions": [served], "preferredVersion": served})
    found["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return found


_DISCOVERY = _discovery()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # Headers and body in one packet: two of them wait for each other's acknowledgement, 40 ms each time.
    cluster: FakeCluster
    lock: threading.Lock

    def do_GET(self) -> None:
        self._answer("GET", None)

    def do_POST(self) -> None:
        self._answer("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_PATCH(self) -> None:
        length = int(self.headers["Content-Length"])
        self._answer("PATCH", json.loads(self.rfile.read(length)))

    def _answer(self, method: str, body: Any) -> None:
        path, _, query = self.path.partition("?")
        with self.lock:
            self.cluster.requests.append((method, self.path, body))
            refused = self.cluster.refuse(method, path)
            if refused is not None and refused[0] != 404:
                self._status(*refused)
                return
            if refused is not None:
                self._unknown()
                return
            if path in _DISCOVERY:
                self._json(200, _DISCOVERY[path])
                return
            for kind, pattern in _PATHS.items():
                match = pattern.fullmatch(path)
                if match is None:
                    continue
                namespace, name = match[1], match[2]
                if kind == "pods" and match[3]:
                    self._send(200, self.cluster.logs.encode(), "text/plain")
                elif method == "POST":
                    self._created(kind, body)
                elif method == "PATCH":
                    strategic = "strategic" in self.headers["Content-Type"]
                    self.cluster.manager = _one(query, "fieldManager") or "unknown"
                    code, result = self.cluster.patch((kind, namespace, name), body, strategic=strategic)
                    self._status(code, result, str(name)) if isinstance(result, str) else self._json(code, result)
                else:
                    found = self.cluster.get(kind, namespace, name, _labels(query))
                    if found is None:
                        self._status(404, f'{kind} "{name}" not found', str(name))
                    else:
                        self._json(200, found)
                return
        self._unknown()

    def _unknown(self) -> None:
        """Answer as for an unknown kind: in plain text, without the object's name."""
        self._send(404, b"404 page not found\n", "text/plain; charset=utf-8")

    def _created(self, kind: str, body: Object) -> None:
        """Take over an Event, and nothing else: roll-outs create nothing."""
        if kind != "events" or body["involvedObject"].get("namespace") != body["metadata"].get("namespace"):
            self._status(422, f"{kind}: involvedObject.namespace does not match event.namespace")
            return
        self.cluster.events.append(body)
        self._json(201, body)

    def _json(self, code: int, item: Object) -> None:
        self._send(code, json.dumps(item).encode(), "application/json")

    def _status(self, code: int, message: str, name: str = "") -> None:
        body = {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure"}
        details = {"details": {"name": name}} if name else {}
        self._json(code, {**body, **details, "message": message, "code": code})

    def _send(self, code: int, data: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _one(query: str, name: str) -> str:
    return parse_qs(query).get(name, [""])[0]


def _labels(query: str) -> dict[str, str]:
    text = _one(query, "labelSelector")
    return dict(part.split("=", 1) for part in text.split(",") if part)


class ServedCluster:
    """A fake cluster behind a real port, with a kubeconfig for it."""

    def __init__(self, folder: Path, base: type[Handler] | None = None) -> None:
        self.cluster = FakeCluster()
        handler = type("Served", (base or Handler,), {"cluster": self.cluster, "lock": threading.Lock()})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [
                        {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}
                    ],
                    "users": [{"name": "me", "user": {"token": "secret-token"}}],
                    "contexts": [
                        {"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": "default"}}
                    ],
                }
            ),
            encoding="utf-8",
        )

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
