"""A fake cluster for helm's install, upgrade and rollback: its records, and applying on the server or by helm.

Applying on the server has the conflicts of the real API server: changing a field owned by another manager is a
conflict, unless the request forces it. So a real API server behaved with helm 3.17 and 4.3. helm writes its records,
Secrets, as protobuf.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml
from support.fake_cluster import Handler, Object, ServedCluster, claim, claimed, merged, touch

_PATH = re.compile(r"/(?:api/v1|apis/apps/v1)/namespaces/([^/]+)/(secrets|services|deployments)(?:/([^/?]+))?")


_MAGIC = b"k8s\0"


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        number, kind = divmod(varint(), 8)
        size = varint()
        if kind == 0:
            yield number, size
        else:
            yield number, data[place : place + size]
            place += size


def _entries(pairs: Iterator[tuple[int, Any]], number: int) -> dict[str, bytes]:
    """Return a map of a message: each entry is a message of key and value."""
    found = [dict(_fields(value)) for each, value in pairs if each == number]
    return {entry[1].decode(): entry.get(2, b"") for entry in found}


def _secret(data: bytes) -> Object:
    """Read a Secret out of Kubernetes' protobuf envelope: metadata 1 (name 1, namespace 3, labels 11), data 2."""
    secret = dict(_fields(data[len(_MAGIC) :]))[2]
    metadata = dict(_fields(secret))[1]
    labels = {key: value.decode() for key, value in _entries(_fields(metadata), 11).items()}
    held = {key: base64.b64encode(value).decode() for key, value in _entries(_fields(secret), 2).items()}
    named = dict(_fields(metadata))
    about = {"name": named[1].decode(), "namespace": named[3].decode() if 3 in named else "models", "labels": labels}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": about, "data": held, "type": "helm.sh/release.v1"}


class HelmHandler(Handler):
    """Handles helm's requests about Secrets, Services and Deployments."""

    def do_PUT(self) -> None:  # noqa: N802 - the name that http.server asks for
        self._answer("PUT", self._sent())

    def do_POST(self) -> None:  # noqa: N802
        self._answer("POST", self._sent())

    def do_PATCH(self) -> None:  # noqa: N802
        self._answer("PATCH", self._sent())

    def _sent(self) -> Any:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        return _secret(data) if data.startswith(_MAGIC) else yaml.safe_load(data)

    def _answer(self, method: str, body: Any) -> None:
        path, _, query = self.path.partition("?")
        match = _PATH.fullmatch(path)
        if match is None:
            super()._answer(method, body)
            return
        space, kind, name = match[1], match[2], match[3]
        asked = {key: values[0] for key, values in parse_qs(query).items()}
        with self.lock:
            if method == "GET" and name is None and kind == "secrets":
                wanted = dict(part.split("=", 1) for part in asked.get("labelSelector", "").split(",") if part)
                found = [item for key, item in self.cluster.objects.items() if key[:2] == (kind, space)]
                chosen = [item for item in found if wanted.items() <= item["metadata"].get("labels", {}).items()]
                self._json(200, {"apiVersion": "v1", "kind": "SecretList", "metadata": {}, "items": chosen})
                return
            key = (kind, space, name or body["metadata"]["name"])
            self.cluster.manager = asked.get("fieldManager", "helm")
            code, result = self._changed(method, key, body, force=asked.get("force") == "true")
            self._status(code, result, key[2]) if isinstance(result, str) else self._json(code, result)

    def _changed(self, method: str, key: tuple[str, str, str], body: Any, *, force: bool) -> tuple[int, Object | str]:
        live = self.cluster.objects.get(key)
        applied = self.headers.get("Content-Type", "").startswith("application/apply-patch")
        if live is None and (method == "POST" or applied):
            return 201, self._created_object(key, body)
        if live is None:
            return 404, f"{key[0]} {key[2]!r} not found"
        if method == "GET":
            return 200, live
        if method == "PUT":
            body["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
            touch(body)
            self.cluster.objects[key] = live | body
            return 200, self.cluster.objects[key]
        if not applied:
            return self.cluster.patch(key, body, strategic="strategic" in self.headers["Content-Type"])
        wrong = [] if force else conflicts(live, body, self.cluster.manager)
        if wrong:
            return 409, f"Apply failed with {len(wrong)} conflict(s): {', '.join(wrong)}"
        self.cluster.objects[key] = changed = merged(live, body, strategic=True)
        claim(changed, claimed(live, {"spec": body.get("spec", {})}), self.cluster.manager, "Apply")
        touch(changed)
        return 200, changed

    def _created_object(self, key: tuple[str, str, str], body: Object) -> Object:
        body["metadata"] |= {"resourceVersion": "1", "generation": 1, "uid": key[2]}
        body.setdefault("spec", {})
        claim(body, claimed({}, {"spec": body["spec"]}), self.cluster.manager, "Apply")
        self.cluster.objects[key] = body
        return body


def conflicts(live: Object, body: Object, manager: str) -> list[str]:
    """Return the fields an apply would change although another manager owns them."""
    wanted = claimed(live, {"spec": body.get("spec", {})})
    others = [each for each in live["metadata"].get("managedFields", ()) if each["manager"] != manager]
    return [f"{path} of {each['manager']}" for each in others for path in _common(wanted, each["fieldsV1"])]


def _common(one: Object, other: Object, path: str = "") -> list[str]:
    found = []
    for key in one.keys() & other.keys():
        if one[key] and other[key]:
            found += _common(one[key], other[key], f"{path}/{key}")
        elif not one[key] and not other[key]:
            found.append(f"{path}/{key}")
    return found


class HelmCluster(ServedCluster):
    """A served cluster for helm to change."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, HelmHandler)
        self.cluster.frozen = True
