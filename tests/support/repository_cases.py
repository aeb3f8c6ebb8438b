"""Damaged repositories: one file of a small one changed at random, and everything that reads it called.

Used by tests/unit/repository/test_damaged_files.py with a few cases and by tests/fuzz/fuzz_repository.py with many.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from repo_manager.declared import parse_declaration
from repo_manager.declared.export import document_text, export_document
from repo_manager.errors import RepoManagerError, RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.publish import publish
from repo_manager.repository.relabel import read_labels
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.repair import repair
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.signing import check_signature, sign_version
from repo_manager.repository.tags import model_states, previous_deployment, record_deployment, resolve_version, set_tag
from repo_manager.repository.verify import verify
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.types import Backend, TensorSpec

CONFIG, MANIFEST, STATE = "m/config.pbtxt", "m/1/manifest.json", ".repo-manager.json"
SIGNATURE, LABELS = ".repo-manager.m.1.sig.json", "m/labels_0_y.txt"
FILES = (CONFIG, MANIFEST, STATE, SIGNATURE, LABELS)
TOKENS = [
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"#", b"null", b"true"),
    *(
        b"NaN",
        b"1e999",
        b"-1",
        b"0",
        b"9223372036854775808",
        b"18446744073709551616",
        b"1" * 5000,
        b"../",
        b"/etc/passwd",
    ),
    *(b"specific", b"latest", b"versions", b"[" * 3000, b"{" * 3000, b"dims: [-2]", b"name", b'"sha256": "sha256:"'),
    *(b"labels_filename", b"instance_group", b"\\u0000", b"\xe2\x80\xae", b"3.tmp", b"cc_model_filenames"),
]
YAML = b"""
x-common: &common {precision: fp16}
targets: [grpc://a:8001]
models:
  m:
    <<: *common
    source: {path: a.onnx, digest: "sha256:%s"}
    config: {max_batch_size: 8, instance_group: {count: 2, kind: cpu}, set: {parameters.a: 1}}
    labels: {y: [cat, dog]}
    tags: {stable: 1}
    serve: stable
    shapes: {x: [1, 3], z: {min: [1], opt: [2], max: [3]}}
""" % (b"0" * 64)


class Batched:
    kind, reason = "batched", ""


class Cases:
    """A good repository, and copies of it with one file damaged."""

    def __init__(self, folder: Path) -> None:
        self.good, self.place = folder / "good", folder / "place"
        root = self.good / "models"
        source = folder / "source"
        source.write_bytes(b"content " * 20)
        signature = ServedSignature((TensorSpec("x", "float32", ("N", 3)),), (TensorSpec("y", "float32", ("N", 2)),))
        batched: Any = Batched()
        options = ConfigOptions(labels={"y": ("cat", "dog")})
        config = derive_config("m", signature, batched, Backend.ONNXRUNTIME, options)
        for _ in range(2):
            publish(root, "m", {"model.onnx": source}, config, {"precision": "fp16", "tools": {"a": "1"}})
        set_tag(root, "m", "best", 2)
        record_deployment(root, "m", 1)
        record_deployment(root, "m", 2)
        key = ec.generate_private_key(ec.SECP256R1())
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / "key.pem").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
        self.key = folder / "key.pub"
        self.key.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        sign_version(root, "m", 1, folder / "key.pem")
        self.contents = {file: (root / file).read_bytes() for file in FILES}

    def run(self, seed: int) -> str:
        """Run one case. Return the damaged file's name.

        Raises:
            AssertionError: a damage was accepted.
            Exception: anything but our own errors is a finding.
        """
        chance = random.Random(seed)
        file = chance.choice((*FILES, "repository.yaml"))
        if file == "repository.yaml":
            with contextlib.suppress(RepoManagerError):
                parse_declaration(mutate(YAML, chance).decode(errors="surrogateescape"), name="r")
            return file
        before = self.contents[file]
        damaged = mutate(before, chance)
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.good, self.place)
        root = self.place / "models"
        (root / file).write_bytes(damaged)
        self._check_signature(root, file, before, damaged)
        for call in readers(root):
            with contextlib.suppress(RepoManagerError):
                call()
        for call in chance.sample(writers(root), 2):
            with contextlib.suppress(RepoManagerError):
                call()
        assert (root / "m/1/model.onnx").read_bytes() == b"content " * 20 or not (root / "m/1").exists()
        return file

    def _check_signature(self, root: Path, file: str, before: bytes, damaged: bytes) -> None:
        try:
            check_signature(root, "m", 1, [self.key])
        except RepositoryError:
            return
        if file == MANIFEST:
            assert damaged == before, "a changed manifest was taken for the signed one"
        if file == SIGNATURE:
            assert envelope(damaged) == envelope(before), "a changed signature was taken for a good one"


def envelope(content: bytes) -> Any:
    """The meaningful parts of a signature: the statement, and its signature."""
    found = json.loads(content)["dsseEnvelope"]
    return base64.b64decode(found["payload"]), base64.b64decode(found["signatures"][0]["sig"]), found["payloadType"]


def readers(root: Path) -> list[Callable[[], object]]:
    return [
        lambda: scan(root),
        lambda: scan(root, deep=False),
        lambda: find_model(root, "m"),
        lambda: verify(root, models=False),
        lambda: model_states(root),
        lambda: previous_deployment(root, "m"),
        lambda: resolve_version(root, "m:best"),
        lambda: read_labels(root, "m"),
        lambda: change_config(root, "m", {"instance_group.count": "2"}, dry_run=True),
        lambda: gc(root, keep=1, dry_run=True),
        lambda: repair(root, dry_run=True),
        lambda: adopt(root, dry_run=True),
        lambda: document_text(export_document(root)[0]),
    ]


def writers(root: Path) -> list[Callable[[], object]]:
    return [
        lambda: set_served_versions(root, "m", (1,)),
        lambda: set_tag(root, "m", "other", 1),
        lambda: change_config(root, "m", {"instance_group.count": "3"}),
        lambda: remove(root, "m", 1),
        lambda: gc(root, keep=1),
        lambda: repair(root),
        lambda: adopt(root),
    ]


ODD = [None, True, -1, 0, 1.5, float("inf"), float("nan"), "", "x", "../x", "\0", [], {}, 2**70, [[]], {"a": 1}]
ODD.append("\ud800")  # Half a surrogate pair: JSON can hold it, UTF-8 cannot.


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Return a JSON document with one of its values replaced by an odd one, or one key renamed or dropped."""
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            visit(value[key])

    visit(document)
    holder, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["", "..", "/x", "a/../b", "x" * 300, "\0", "\ud800"])] = holder.pop(key)
    else:
        holder[key] = chance.choice(ODD)
    return json.dumps(document).encode()


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return the data with one to four places changed."""
    if data.startswith(b"{") and chance.random() < 0.5:
        return mutate_json(data, chance)
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice((1, 1, 4, 20, 200)))
        kind = chance.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[at:end]
        elif kind == 2:
            content[at:at] = content[at:end]
        elif kind == 3:
            content[at:end] = chance.choice(TOKENS)
        elif kind == 4:
            content[at:at] = chance.choice(TOKENS)
        elif kind == 5:
            del content[at:]
        else:
            digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
            if digits:
                place = chance.choice(digits)
                content[place : place + 1] = chance.choice(TOKENS)
    return bytes(content)
