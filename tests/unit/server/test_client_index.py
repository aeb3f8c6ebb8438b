"""The repository index while something in the repository comes and goes."""

from __future__ import annotations

import pytest
from support.bad_peers import AnsweringPeer

from repo_manager.errors import ServerRefusedError
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions, IndexEntry, ServerUrl

GONE = "grpc://h:1 refused: repository index: failed to stat file /models/.repo-manager.stage-0.probe"


class Listing:
    """The one call under test: it fails as often as told."""

    def __init__(self, *errors: str) -> None:
        self.errors, self.calls = list(errors), 0

    def index(self, timeout_s: float) -> tuple[IndexEntry, ...]:
        self.calls += 1
        if self.errors:
            raise ServerRefusedError(self.errors.pop(0))
        return (IndexEntry("m", 1, "READY", ""),)


def client(listing: Listing) -> TritonClient:
    return TritonClient(ServerUrl("grpc", "h:1", False), listing, ClientOptions())  # type: ignore[arg-type]


def test_an_entry_that_vanished_is_no_refusal() -> None:
    listing = Listing(GONE, GONE)
    assert [entry.name for entry in client(listing).repository_index()] == ["m"]
    assert listing.calls == 3


@pytest.mark.parametrize(("errors", "calls"), [([GONE] * 9, 5), (["grpc://h:1 refused: restricted"], 1)])
def test_what_stays_is_one(errors: list[str], calls: int) -> None:
    listing = Listing(*errors)
    with pytest.raises(ServerRefusedError):
        client(listing).repository_index()
    assert listing.calls == calls


def test_null_is_no_empty_index() -> None:
    """Else a model would count as unloaded because a server says nothing."""
    with (
        AnsweringPeer({"": None}) as peer,
        TritonClient.connect(f"http://127.0.0.1:{peer.port}") as asked,
        pytest.raises(ServerRefusedError, match="something other than JSON"),
    ):
        asked.repository_index()
