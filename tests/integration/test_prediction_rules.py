"""Reload rules of docs/triton-reload.md, used by `rollout.prediction`: one test each, on the real server.

A version was loaded again if its counter of inferences restarted.
"""

from __future__ import annotations

import compileall
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from support.random_repository import BROKEN, FUTURE_S, RandomModel
from support.serving import SCALING_CONFIG, scaling_model, write_model
from support.waiting import eventually

from repo_manager.client import VersionWeights, published_name, published_weights
from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.observe import observe
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import parse_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
X = np.ones((1, 1), np.float32)


class Served(RandomModel):
    """Versions 1, 2 and 3, with 1 and 2 served. Changed by hand here."""

    def __init__(self, repository: Path, name: str, client: TritonClient, *, bytecode: bool = False) -> None:
        super().__init__(repository, name, random.Random(0), bytecode=bytecode)
        self.client = client
        self.write_version(3)
        client.load(name)
        self._ask()

    def _ask(self) -> None:
        before = self._counts()
        for version in before:
            self.client.infer(self.name, version, {"x": X})
        assert eventually(lambda: all(count > before[version] for version, count in self._counts().items()))

    def ready(self) -> tuple[int, ...]:
        return observe(self.client, self.name).ready

    def load(self) -> set[int]:
        """Load. Return the versions loaded again."""
        before = self._counts()
        self.client.load(self.name)
        after = self._counts()
        self._ask()
        return {version for version in before if version in after and after[version] < before[version]}

    def _counts(self) -> dict[int, int]:
        return {each: self.client.statistics(self.name, each)[0].success_count for each in self.ready()}


@pytest.fixture
def served(repository: Path, client: TritonClient, request: pytest.FixtureRequest) -> Iterator[Served]:
    model = Served(repository, request.node.name.split("[")[0].removeprefix("test_")[:60], client)
    yield model
    client.unload(model.name)
    shutil.rmtree(model.folder)


def serve(model: Served, *versions: int) -> None:
    model.policy = f"version_policy {{ specific {{ versions: {list(versions)} }} }}"
    model.write_config()


def test_a_served_version_whose_folder_is_gone_is_dropped_by_the_next_load(served: Served) -> None:
    shutil.rmtree(served.folder / "2")
    assert served.ready() == (1, 2)
    assert served.load() == set()
    assert served.ready() == (1,)


def test_a_load_that_leaves_no_version_is_refused(served: Served) -> None:
    serve(served, 8, 9)
    with pytest.raises(ServerRefusedError, match="at least one version must be available"):
        served.load()
    assert served.ready() == (1, 2)


def test_a_name_of_digits_only_belongs_to_no_version(served: Served) -> None:
    (served.folder / "7").write_text("a file")
    (served.folder / "007").mkdir()
    assert served.load() == set()


def test_a_lookalike_of_the_configuration_hides_every_change(served: Served) -> None:
    """`config`, `conf`, even `c`: Triton finds two configurations, gives the times up, and nothing is ever newer."""
    (served.folder / "conf").write_text("x")
    serve(served, 3)
    assert served.load() == set()
    assert served.ready() == (1, 2)
    (served.folder / "conf").unlink()
    assert served.load() == set()
    assert served.ready() == (3,)


def test_a_file_dated_ahead_hides_every_later_change_until_an_unload(served: Served) -> None:
    os.utime(served.folder / "1" / "model.py", (FUTURE_S, FUTURE_S))
    assert served.load() == {1}
    os.utime(served.folder / "1" / "model.py")
    serve(served, 3)
    assert served.load() == set()
    assert served.ready() == (1, 2)
    served.client.unload(served.name)
    served.load()
    assert served.ready() == (3,)


def test_a_configuration_sent_with_the_load_is_always_looked_at(served: Served) -> None:
    os.utime(served.folder / "1" / "model.py", (FUTURE_S, FUTURE_S))
    served.load()
    served.policy = "version_policy { specific { versions: [3] } }"
    sent = json_format.MessageToJson(parse_config(served.config_text()).message(), preserving_proto_field_name=True)
    served.client.load(served.name, sent)
    assert served.ready() == (3,)


def test_a_link_to_nothing_beside_the_versions_refuses_the_load(served: Served) -> None:
    (served.folder / "link").symlink_to("nowhere")
    served.write_config()
    with pytest.raises(ServerRefusedError, match="failed to poll from model repository"):
        served.load()
    assert served.ready() == (1, 2)
    (served.folder / "link").unlink()
    assert served.load() == set()


def test_a_configuration_that_cannot_be_read_refuses_the_load(served: Served) -> None:
    cases = {
        "max_batch_size: many": r"failed to read text proto .*\(1:17: Expected integer, got: many\)",
        "no_such_field: 1": r"failed to read text proto .*has no field named \"no_such_field\"",
        'name: "another"\n' + served.config_text(): "unexpected directory name .* for model 'another'",
        None: "",
    }
    for text, reason in cases.items():
        config = served.folder / "config.pbtxt"
        config.unlink() if text is None else config.write_text(text)
        with pytest.raises(ServerRefusedError, match=f"failed to poll from model repository.*{reason}"):
            served.load()
        assert served.ready() == (1, 2)
    served.write_config()
    assert served.load() == set()


def test_a_field_that_is_taken_away_reloads_every_version(served: Served) -> None:
    served.fields["scheduler"] = "dynamic_batching { max_queue_delay_microseconds: 100 }"
    served.write_config()
    assert served.load() == {1, 2}
    del served.fields["scheduler"]
    served.write_config()
    assert served.load() == {1, 2}


def test_saying_a_default_is_no_change(served: Served) -> None:
    served.fields["default"] = (
        f'name: "{served.name}" optimization {{ input_pinned_memory {{ enable: true }} }} # words'
    )
    served.write_config()
    assert served.load() == set()


def test_a_bad_version_that_stays_loaded_does_not_hinder_a_load(served: Served) -> None:
    """Its folder changes and breaks: the load tries it again, fails, and everything is as it was."""
    (served.folder / "2" / "model.py").write_text(BROKEN)
    with pytest.raises(ServerRefusedError, match="version 2"):
        served.load()
    assert served.ready() == (1, 2)
    serve(served, 1, 3)
    assert served.load() == set()
    assert served.ready() == (1, 3)


def test_a_failed_load_changes_the_instances_of_what_stays(served: Served) -> None:
    (served.folder / "3" / "model.py").write_text(BROKEN)
    served.fields["instances"] = "instance_group { count: 2 kind: KIND_CPU }"
    serve(served, 1, 2, 3)
    with pytest.raises(ServerRefusedError, match="version 3"):
        served.load()
    assert served.client.model_config(served.name, 1).instance_group[0].count == 2


def test_the_name_of_an_instance_group_is_free_and_told_to_clients(served: Served) -> None:
    """So a canary's weights stand there: no reload, and any client reads them with the configuration."""
    weights = VersionWeights.of({1: 0.95, 2: 0.05})
    name = published_name(served.client.model_config(served.name).instance_group[0].name, weights)
    served.fields["instances"] = f'instance_group {{ name: "{name}" count: 1 kind: KIND_CPU }}'
    served.write_config()
    assert served.load() == set()
    for version in (1, 2):
        assert published_weights(served.client.model_config(served.name, version).instance_group[0].name) == weights


def test_a_folder_whose_name_begins_with_a_number_is_that_version(repository: Path, client: TritonClient) -> None:
    folder = write_model(repository, "phantom", SCALING_CONFIG, {1: scaling_model(2.0)})
    client.load("phantom")
    shutil.copytree(folder / "1", folder / "5.tmp")
    with pytest.raises(ServerRefusedError, match="version 5"):
        client.load("phantom")
    (folder / "5.tmp").rename(folder / "05")
    client.load("phantom")
    assert observe(client, "phantom").ready == (1,)
    client.unload("phantom")


def test_a_python_models_bytecode_is_a_change(repository: Path, client: TritonClient) -> None:
    """A server's Python may write __pycache__ into a version: the next load reloads it. The embedded one's does not."""
    model = Served(repository, "written", client, bytecode=True)
    assert not (model.folder / "1" / "__pycache__").exists()
    assert model.load() == set()
    compileall.compile_dir(model.folder / "1", quiet=2)
    assert model.load() == {1}
    assert model.load() == set()
    client.unload("written")


def test_deploy_says_what_blinds_triton(repository: Path, client: TritonClient) -> None:
    text = SCALING_CONFIG + "version_policy { specific { versions: [1] } }\n"
    folder = write_model(repository, "blind", text, {1: scaling_model(2.0), 2: scaling_model(3.0)})
    client.load("blind")
    (folder / "config").write_text("x")
    with pytest.raises(RepositoryError, match=r"blind/config: is taken for a second config\.pbtxt"):
        deploy(repository, "blind", 2, client)
    assert observe(client, "blind").ready == (1,)
    (folder / "config").unlink()
    assert deploy(repository, "blind", 2, client).ready == (2,)
    client.unload("blind")
