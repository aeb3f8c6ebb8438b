"""The check of ensembles over random graphs, compared with the real tritonserver's verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.random_ensembles import MODELS, configs_of, our_verdict, server_verdict, texts_of, write

from repo_manager.errors import ServerRefusedError
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration

AUTO_COMPLETE = False
GRAPHS, SEED = 80, 7


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ensembles")
    write(root, texts_of(GRAPHS, SEED))
    return root


def test_random_ensembles_are_judged_as_the_server_judges_them(server: EmbeddedServer) -> None:
    configs = configs_of(texts_of(GRAPHS, SEED))
    disagreements, refused = [], 0
    with TritonClient.connect(server.grpc_url) as client:
        for name in MODELS.keys() - {"broken"}:
            client.load(name)
        with pytest.raises(ServerRefusedError):
            client.load("broken")
        for name in texts_of(GRAPHS, SEED):
            ours, theirs = our_verdict(name, configs), server_verdict(name, client)
            refused += bool(theirs)
            if bool(ours) != bool(theirs):
                disagreements.append(f"{name}: the server: {theirs or 'loads it'}; ours: {ours}")
    assert not disagreements, "\n".join(disagreements)
    assert GRAPHS // 4 < refused < GRAPHS * 3 // 4, refused
