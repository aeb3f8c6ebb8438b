"""Cards of a repository's versions, with their signatures and load tests.

It is separate from `report/card.py` because it opens the repository and reads the settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from repo_manager.errors import RepositoryError
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.pipeline.load_records import read_kept
from repo_manager.report.card import Card, version_card
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.signing import check_signature
from repo_manager.repository.signing_files import signature_name
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import model_state, resolve_version
from repo_manager.settings import load_settings

__all__ = ["version_cards"]


def version_cards(
    repository: LocationLike, target: str | None = None, *, loads: Sequence[LoadTestReport] = ()
) -> tuple[Card, ...]:
    """Return the cards of one version, of a model's versions, or of all, by name and version.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        target: `NAME:VERSION` (a number or a tag), or `NAME`. `None`: the whole repository.
        loads: load tests besides the kept ones. Each goes to the card of its version.

    Raises:
        RepositoryError: no such repository, model or version.
    """
    root = as_location(repository)
    number = None
    if target is None:
        models = scan(root)
    elif ":" in target:
        name, number = resolve_version(root, target)
        models = (find_model(root, name),)
    else:
        models = (find_model(root, target),)
    cards = []
    for model in models:
        state = model_state(root, model.name)
        known = (*read_kept(model.name, state.load_tests), *loads)
        for version in model.versions if number is None else (model.version(number),):
            signature = _signature(root, model.name, version.version)
            cards.append(version_card(model, version, state, signature=signature, loads=known))
    return tuple(cards)


def _signature(root: Location, name: str, version: int) -> str:
    """Return the state of a version's signature: the settings' keys decide whether it is valid."""
    keys = load_settings().signed_by
    if keys:
        try:
            return f"vouched for by {check_signature(root, name, version, keys).key}"
        except RepositoryError as exc:
            return f"not vouched for: {exc.message}"
    found = open_store(root).read(signature_name(name, version)) is not None
    return "there is one; no key to check it with is in the settings (signed_by)" if found else "none"
