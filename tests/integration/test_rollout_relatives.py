"""Roll-outs of ensembles and parts: needed models come along, dependent ones are proven and undone together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.python_models import write_python_model
from support.serving import running_server
from support.waiting import PAUSE_S

from repo_manager.errors import RepositoryError, RolloutUndoneError
from repo_manager.pipeline.adding_files import FilesOptions, add_files
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.repository.remove import remove
from repo_manager.repository.tags import model_state
from repo_manager.rollout.deploy import deploy, rollback, undeploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import Rollout
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions

pytestmark = pytest.mark.integration
FIRST = "version_policy { specific { versions: [1] } }\n"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    write_python_model(root, "scale", versions=(1, 2, 3), extra=FIRST)
    write_python_model(root, "opt", extra=FIRST)
    write_python_model(root, "ens", versions=(1, 2), extra=FIRST)
    write_python_model(root, "bls", extra=FIRST)
    return root


@pytest.fixture
def client(models: Path) -> Iterator[TritonClient]:
    with (
        running_server(ServerOptions(repository=str(models), auto_complete=False)) as server,
        TritonClient.connect(server.grpc_url) as connected,
    ):
        yield connected


def ready(client: TritonClient) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for entry in client.repository_index():
        if entry.state == "READY" and entry.version is not None:
            found.setdefault(entry.name, []).append(entry.version)
    return {name: sorted(versions) for name, versions in found.items()}


def plan_of(rollout: Rollout) -> tuple[list[str], list[str]]:
    plan = rollout.servers[0].plan
    assert plan is not None
    return [each.model for each in plan.brings], [each.model for each in plan.dependents]


def answer(client: TritonClient) -> float:
    return float(client.infer("ens", None, {"IN": np.ones((1, 2), np.float32)})["OUT"][0, 0])


def test_an_ensemble_brings_its_models_and_takes_them_back(models: Path, client: TritonClient) -> None:
    before = {name: read_config_bytes(models, name) for name in ("scale", "opt", "ens")}
    planned = deploy(models, "ens", 1, client, options=RolloutOptions(dry_run=True))
    assert sorted(plan_of(planned)[0]) == ["opt", "scale"]
    assert ready(client) == {}

    code = models / "opt" / "1" / "model.py"
    sound = code.read_text()
    code.write_text(sound.replace("def answer", "def other"))
    with pytest.raises(RolloutUndoneError, match="inference on opt"):
        deploy(models, "ens", 1, client)
    assert ready(client) == {}
    assert {name: read_config_bytes(models, name) for name in before} == before
    assert model_state(models, "scale").deployments == ()

    code.write_text(sound)
    done = deploy(models, "ens", 1, client)
    assert ready(client) == {"ens": [1], "opt": [1], "scale": [1]}
    assert answer(client) == 2.0
    assert model_state(models, "scale").deployments[-1].version == 1
    assert done.changed
    assert not deploy(models, "ens", 1, client).changed


def test_what_a_served_model_needs_is_not_undeployed(models: Path, client: TritonClient) -> None:
    deploy(models, "ens", 1, client)
    deploy(models, "bls", 1, client)
    before = ready(client)
    with pytest.raises(
        RepositoryError, match=r"scale was not undeployed, and nothing.*(bls, ens|ens, bls) are served"
    ) as caught:
        undeploy(models, "scale", None, client)
    assert "repo-manager undeploy ens" in (caught.value.hint or "")
    assert ready(client) == before
    undeploy(models, "bls", None, client)
    assert undeploy(models, "ens", None, client).servers[0].plan.notes[0].startswith("opt, scale")  # type: ignore[union-attr]
    assert ready(client) == {"opt": [1], "scale": [1]}
    undeploy(models, "scale", None, client)
    assert ready(client) == {"opt": [1]}


def test_what_needs_a_model_is_proven_and_undone_with_it(models: Path, client: TritonClient) -> None:
    deploy(models, "ens", 1, client)
    deploy(models, "bls", 1, client)
    done = deploy(models, "scale", 2, client)
    assert sorted(plan_of(done)[1]) == ["bls", "ens"]
    assert any("ens, which needs scale, answers" in event for event in done.events)
    assert (answer(client), ready(client)["ens"], ready(client)["scale"]) == (4.0, [1], [2])

    # Version 3 answers a direct request, and no request after its first.
    code = models / "scale" / "3" / "model.py"
    code.write_text(
        code.read_text().replace('read(request, "X") * 3', 'self.once(read(request, "X"))')
        + """
    calls = 0

    def once(self, x):
        self.calls += 1
        if self.calls > 1:
            raise ValueError("only one answer")
        return x * 3
"""
    )
    with pytest.raises(RolloutUndoneError, match="which needs scale, does not answer"):
        deploy(models, "scale", 3, client)
    assert (answer(client), ready(client)["scale"]) == (4.0, [2])
    assert rollback(models, "scale", client).ready == (1,)
    assert answer(client) == 2.0


def test_a_pinned_version_is_brought_and_kept(models: Path, client: TritonClient) -> None:
    config = models / "ens" / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale" model_version: 2'))
    deploy(models, "scale", 1, client)
    deploy(models, "ens", 1, client)
    assert ready(client)["scale"] == [1, 2]
    assert answer(client) == 4.0


def test_what_code_asks_cannot_be_removed(models: Path) -> None:
    with pytest.raises(RepositoryError, match=r"scale is needed by bls, ens"):
        remove(models, "scale")


def asked_code(client: TritonClient) -> float:
    return float(client.infer("bls", None, {"X": np.ones((1, 2), np.float32)})["Y"][0, 0])


def test_no_request_fails_while_an_ensemble_or_a_part_of_it_changes(models: Path, client: TritonClient) -> None:
    deploy(models, "ens", 1, client)
    deploy(models, "bls", 1, client)
    ended, failures, answers = threading.Event(), [], set()

    def load(ask: Callable[[TritonClient], float]) -> None:
        with client.another() as own:
            while not ended.is_set():
                try:
                    answers.add(ask(own))
                except Exception as exc:  # noqa: BLE001 - whatever it is, it is a failed request
                    failures.append(str(exc))
                ended.wait(PAUSE_S)

    threads = [threading.Thread(target=load, args=(ask,)) for ask in (answer, answer, asked_code)]
    for thread in threads:
        thread.start()
    try:
        for name, version in (("scale", 2), ("ens", 2), ("scale", 3), ("ens", 1), ("scale", 1)):
            deploy(models, name, version, client)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert answers == {2.0, 4.0, 6.0, 1.5, 2.5, 3.5}


def test_recorded_answers_hold_for_the_parts_that_gave_them(models: Path, client: TritonClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "sample.npz", IN=np.ones((1, 2), np.float32))
    source = write_python_model(tmp_path / "source", "whole", kind="ens")
    add_files(source, "whole", models, FilesOptions(sample=tmp_path / "sample.npz"))
    first = deploy(models, "whole", 1, client).servers[0].smoke
    assert first is not None
    assert first.reference == "golden"
    deploy(models, "scale", 3, client)
    again = deploy(models, "whole", 1, client).servers[0].smoke
    assert again is not None
    assert (again.reference, again.note) == (
        "none",
        "not compared with the recorded answers: scale is 3 instead of 1",
    )


def test_recorded_answers_hold_while_the_pinned_part_is_served(
    models: Path, client: TritonClient, tmp_path: Path
) -> None:
    np.savez(tmp_path / "sample.npz", IN=np.ones((1, 2), np.float32))
    source = write_python_model(tmp_path / "source", "whole", kind="ens")
    config = source / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale" model_version: 1'))
    add_files(source, "whole", models, FilesOptions(sample=tmp_path / "sample.npz"))
    deploy(models, "scale", 3, client, options=RolloutOptions(keep_previous=True))
    rollout = deploy(models, "whole", 1, client).servers[0].smoke
    assert rollout is not None
    assert (rollout.reference, rollout.note) == ("golden", "")
