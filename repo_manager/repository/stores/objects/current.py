"""config.pbtxt in object storage: the current versions are changed by compare-and-swap."""

from __future__ import annotations

import time

from repo_manager.repository.stores.base import ChangedMeanwhileError
from repo_manager.repository.stores.objects.client import ObjectClient
from repo_manager.repository.stores.objects.facts import Mark, ObjectFact
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = ["put_config"]

_TICK_S = 0.05
_LONGEST_TICK_S = 3.0


def put_config(client: ObjectClient, name: str, data: bytes, before: ObjectFact | None) -> Mark:
    """Write config.pbtxt if no other process did first, and make sure Triton can tell it is new.

    S3 tells times of modification by the second (Last-Modified, an HTTP date: RFC 9110, 5.6.7), and Triton loads only
    files newer than those it saw: a second write within one second waits for the next and writes again.

    Args:
        client: the repository's open store. Its clock tells whether the file is newer.
        name: model whose config.pbtxt is written.
        data: the whole content. It is sent again where the store's time has not moved on.
        before: content and mark read before. `None`: nothing did.

    Raises:
        ChangedMeanwhileError: another content is there now.
    """
    key = f"{name}/{CONFIG_FILENAME}"
    mark = client.create(key, data) if before is None else client.replace(key, data, before.mark)
    deadline = time.monotonic() + _LONGEST_TICK_S
    while before is not None:
        now = client.head(key)
        if now is None or now.mark.e_tag != mark.e_tag:
            raise ChangedMeanwhileError(key)
        if now.modified > before.modified or time.monotonic() > deadline:
            break
        time.sleep(_TICK_S)
        mark = client.replace(key, data, now.mark)
    return mark
