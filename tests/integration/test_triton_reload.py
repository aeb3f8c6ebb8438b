"""Triton's reload rules, one test each, on the real server: docs/triton-reload.md quotes these names.

Whether a version was reloaded shows in the process id of its stub.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.observe import observe
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
X = np.ones((1, 4), np.float32)


class Served:
    """A model of versions 1, 2 and 3 on the module's server; 1 and 2 are served."""

    def __init__(self, repository: Path, client: TritonClient, name: str) -> None:
        self.client, self.name = client, name
        versions = {1: scaling_model(2.0), 2: scaling_model(3.0), 3: scaling_model(4.0)}
        self.folder = write_model(repository, name, SCALING_CONFIG + policy(1, 2), versions)
        self.config = self.folder / "config.pbtxt"
        client.load(name)

    def change(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def load(self) -> None:
        self.client.load(self.name)

    def ready(self) -> tuple[int, ...]:
        return observe(self.client, self.name).ready

    def stubs(self) -> dict[int, set[int]]:
        """Version -> the process ids of its stubs, for READY versions."""
        found: dict[int, set[int]] = {version: set() for version in self.ready()}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                arguments = path.read_bytes().split(b"\0")
                model_file = Path(arguments[1].decode()) if len(arguments) > 1 else Path()
                if model_file.parent.parent == self.folder and int(model_file.parent.name) in found:
                    found[int(model_file.parent.name)].add(int(path.parent.name))
        return found


def policy(*versions: int) -> str:
    return f"version_policy {{ specific {{ versions: {list(versions)} }} }}\n"


@pytest.fixture
def served(repository: Path, client: TritonClient, request: pytest.FixtureRequest) -> Iterator[Served]:
    model = Served(repository, client, request.node.name.removeprefix("test_")[:60])
    yield model
    client.unload(model.name)
    shutil.rmtree(model.folder)


def test_a_load_of_an_unchanged_model_does_nothing(served: Served) -> None:
    before = served.stubs()
    assert set(before) == {1, 2}
    served.load()
    assert served.stubs() == before


def test_a_touched_config_without_a_change_reloads_nothing(served: Served) -> None:
    before = served.stubs()
    served.config.touch()
    served.load()
    assert served.stubs() == before


def test_a_policy_change_keeps_the_versions_that_stay(served: Served) -> None:
    before = served.stubs()
    served.change("[1, 2]", "[1, 2, 3]")
    served.load()
    after = served.stubs()
    assert set(after) == {1, 2, 3}
    assert (after[1], after[2]) == (before[1], before[2])
    served.change("[1, 2, 3]", "[2]")
    served.load()
    assert served.stubs() == {2: before[2]}


def test_a_change_of_the_instances_keeps_the_process_that_stays(served: Served) -> None:
    before = served.stubs()
    served.change("count: 1", "count: 2")
    served.load()
    after = served.stubs()
    assert len(after[1]) == len(after[2]) == 2
    assert before[1] < after[1]
    assert before[2] < after[2]


def test_any_other_change_of_the_config_reloads_every_version(served: Served) -> None:
    before = served.stubs()
    served.change("max_batch_size: 8", "max_batch_size: 4")
    served.load()
    after = served.stubs()
    assert set(after) == {1, 2}
    assert after[1] - before[1]
    assert after[2] - before[2]


def test_a_changed_version_reloads_alone(served: Served) -> None:
    before = served.stubs()
    (served.folder / "1" / "model.onnx").write_bytes(scaling_model(5.0).SerializeToString())
    served.load()
    after = served.stubs()
    assert after[1] - before[1]
    assert after[2] == before[2]
    assert served.client.infer(served.name, 1, {"x": X})["y"][0, 0] == 5.0


def test_a_file_beside_the_versions_reloads_every_version(served: Served) -> None:
    before = served.stubs()
    (served.folder / "labels.txt").write_text("a\n")
    served.load()
    after = served.stubs()
    assert set(after) == {1, 2}
    assert after[1] - before[1]
    assert after[2] - before[2]


def test_a_new_file_in_a_version_reloads_that_version(served: Served) -> None:
    """So a manifest is written before the version is published, and never changed."""
    before = served.stubs()
    (served.folder / "2" / "manifest.json").write_text("{}")
    served.load()
    after = served.stubs()
    assert after[1] == before[1]
    assert after[2] - before[2]


def test_restored_times_do_not_hide_a_change(served: Served) -> None:
    """The inode's change time counts as well, and nobody can set it back."""
    path = served.folder / "1" / "model.onnx"
    before, times = served.stubs(), path.stat()
    path.write_bytes(scaling_model(5.0).SerializeToString())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    served.load()
    assert served.client.infer(served.name, 1, {"x": X})["y"][0, 0] == 5.0
    assert served.stubs()[2] == before[2]


def test_a_hard_link_reloads_like_a_change(served: Served, tmp_path: Path) -> None:
    """A backup by hard links, or a chmod, changes the inode's change time."""
    before = served.stubs()
    (tmp_path / "backup.onnx").hardlink_to(served.folder / "2" / "model.onnx")
    served.load()
    after = served.stubs()
    assert after[1] == before[1]
    assert after[2] - before[2]


def test_all_wanted_versions_load_or_none_does(served: Served) -> None:
    before = served.stubs()
    (served.folder / "3" / "model.onnx").write_bytes(b"broken")
    served.change("[1, 2]", "[2, 3]")
    with pytest.raises(ServerRefusedError, match=r"model\.onnx failed"):
        served.load()
    assert served.stubs() == before
    assert "model.onnx failed" in observe(served.client, served.name).reasons[3]


def test_a_failed_load_makes_the_server_not_ready_until_that_version_loads(
    start_server: Callable[[ServerOptions], EmbeddedServer], tmp_path: Path
) -> None:
    versions = {1: scaling_model(2.0), 2: b"broken"}
    write_model(tmp_path, "failing", SCALING_CONFIG + policy(1), versions)
    strict = ("--strict-readiness=true",)  # Triton's default; the embedded server turns it off
    server = start_server(ServerOptions(repository=str(tmp_path), load=("failing",), extra_args=strict))
    with TritonClient.connect(server.grpc_url) as client:
        states = [client.ready()]
        config = tmp_path / "failing" / "config.pbtxt"
        text = config.read_text()
        config.write_text(text.replace("[1]", "[1, 2]"))
        with pytest.raises(ServerRefusedError):
            client.load("failing")
        states.append(client.ready())
        config.write_text(text)
        client.load("failing")
        states.append(client.ready())
        write_model(tmp_path, "failing", None, {2: scaling_model(3.0)})
        config.write_text(text.replace("[1]", "[1, 2]"))
        client.load("failing")
        states.append(client.ready())
    assert states == [True, False, False, True]


def test_a_config_sent_with_the_load_stays_until_a_newer_file(served: Served) -> None:
    config = json_format.MessageToDict(served.client.model_config(served.name), preserving_proto_field_name=True)
    config["version_policy"] = {"specific": {"versions": [1]}}
    served.client.load(served.name, json.dumps(config))
    assert served.ready() == (1,)
    served.load()
    kept = served.ready()
    served.config.touch()
    served.load()
    assert (kept, served.ready()) == ((1,), (1, 2))


def test_a_deleted_version_is_served_on(served: Served) -> None:
    shutil.rmtree(served.folder / "2")
    assert served.ready() == (1, 2)
    assert served.client.infer(served.name, 2, {"x": X})["y"][0, 0] == 3.0


def test_a_dropped_version_can_come_back_while_it_is_still_unloading(served: Served) -> None:
    served.change("[1, 2]", "[1]")
    served.load()
    served.change("[1]", "[1, 2]")
    served.load()
    assert served.ready() == (1, 2)
    assert served.client.infer(served.name, 2, {"x": X})["y"][0, 0] == 3.0
