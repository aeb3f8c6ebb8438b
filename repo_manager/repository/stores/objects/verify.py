"""What is wrong with a repository in object storage: the same questions as on disk, and what only stores have."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.adopt import Adoption, adopt_each, plan_adoptions
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.manifest import FileRecord, manifest_text
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.facts import ChangedMeanwhileError
from repo_manager.repository.stores.objects.fetch import fetch_version
from repo_manager.repository.stores.objects.ledger import change_ledger, ledger_key, read_ledger
from repo_manager.repository.stores.objects.mirror import Mirror, mirrored, take_snapshot
from repo_manager.repository.stores.objects.scan import existing_snapshot, model_names, pending_sentences
from repo_manager.repository.stores.objects.transport import object_record
from repo_manager.repository.verify import verify as verify_on_disk
from repo_manager.repository.verify_version import verify_version
from repo_manager.triton_config import CONFIG_FILENAME, Problem, Severity, parse_config
from repo_manager.triton_config.version_policy import version_policy

__all__ = ["adopt", "verify"]

_MAX_LOOKS = 5


def verify(
    repository: ObjectRepository,
    name: str | None = None,
    *,
    version: int | None = None,
    digests: bool = True,
    models: bool = True,
) -> tuple[Problem, ...]:
    """As `repository.verify.verify`. Files are fetched one version at a time, to compare them and to load the models;
    without `digests` nothing but manifests is fetched.
    """
    store = open_client(repository)
    with disk_errors(f"verify {repository}"):
        if name is not None:
            existing_or_pending(store, name)
            return tuple(_verify_model(store, name, version, digests, models))
        found: list[Problem] = []
        for folder in store.list().folders:
            if folder.startswith("."):
                text = "is a hidden prefix, which Triton takes for a model"
                found.append(Problem(folder, text, hint="move it elsewhere"))
        for model in model_names(store):
            found += _verify_model(store, model, version, digests, models)
        return tuple(found)


def existing_or_pending(store: ObjectClient, name: str) -> None:
    """See that there is anything of a model.

    Raises:
        RepositoryError: there is not.
    """
    with contextlib.suppress(RepositoryError):
        if read_ledger(store, name).pending:
            return
    existing_snapshot(store, name)


def _verify_model(store: ObjectClient, name: str, only: int | None, digests: bool, models: bool) -> list[Problem]:
    """Check one model; what was found while somebody changed it is not believed but looked at again."""
    found: list[Problem] = []
    for _ in range(_MAX_LOOKS):
        try:
            before = take_snapshot(store, name)
        except RepositoryError as exc:
            return [Problem(ledger_key(name), exc.message, hint=exc.hint or "")]
        found = list(_verify_once(store, name, only, digests, models))
        if not found:
            break
        after = take_snapshot(store, name)
        if (after.ledger.mark, after.config, after.level) == (before.ledger.mark, before.config, before.level):
            break
    return found


def _verify_once(store: ObjectClient, name: str, only: int | None, digests: bool, models: bool) -> Iterator[Problem]:
    with mirrored(store, name, must_exist=False) as mirror:
        yield from _verify_pending(mirror)
        if not mirror.snapshot.exists or (mirror.snapshot.ledger.pending and not mirror.snapshot.versions):
            return  # Not a model yet, or not any more.
        seen = set()
        for problem in verify_on_disk(mirror.root, name, digests=False, models=False):
            seen.add(problem)
            yield _of_the_store(store, mirror, problem)
        if not digests:
            return
        for version in mirror.snapshot.versions:
            if only not in (None, version):
                continue
            for problem in _verify_content(store, mirror, version, models):
                if problem not in seen:
                    yield _of_the_store(store, mirror, problem)


def _of_the_store(store: ObjectClient, mirror: Mirror, problem: Problem) -> Problem:
    """Return a finding in the picture as one in the store."""
    here, there = str(mirror.root), str(store.location)
    return dataclasses.replace(problem, what=problem.what.replace(here, there), hint=problem.hint.replace(here, there))


def _verify_pending(mirror: Mirror) -> Iterator[Problem]:
    snapshot = mirror.snapshot
    text = "" if snapshot.config is None else snapshot.config[0].decode(errors="replace")
    try:
        open_policy = isinstance(version_policy(parse_config(text)), str)
    except ConfigError:
        open_policy = True
    for version, sentence, gone in pending_sentences(snapshot.ledger):
        where = f"{snapshot.name}/{version}"
        served = str(version) in snapshot.level.folders and open_policy and snapshot.config is not None
        if served:
            text = f"{sentence}, and the version policy lets Triton load what is there of it"
            yield Problem(where, text, hint="name the versions to serve in config.pbtxt, then run `repo-manager gc`")
        elif gone:
            hint = "the same command goes on where it broke off; `repo-manager gc` removes the rest"
            yield Problem(where, sentence, Severity.WARNING, hint)


def _verify_content(store: ObjectClient, mirror: Mirror, version: int, models: bool) -> Iterator[Problem]:
    """Fetch a version into the picture, ask the same questions of its content, and empty its files again."""
    folder = mirror.folder / str(version)
    facts = {fact.key: fact for fact in mirror.files.get(str(version), ())}
    config = None
    if mirror.snapshot.config is not None:
        with contextlib.suppress(ConfigError):
            where = f"{mirror.snapshot.name}/{CONFIG_FILENAME}"
            config = parse_config(mirror.snapshot.config[0].decode(errors="replace"), where=where)
    for key in facts:
        if key != MANIFEST_FILENAME:
            (folder / key).unlink(missing_ok=True)
    # Right or wrong: what is wrong is for the questions to find.
    fetch_version(store, mirror.snapshot.name, version, folder, compare=False)
    yield from verify_version(mirror.root, folder, version, config, digests=True, models=models)
    for key, fact in facts.items():
        if key != MANIFEST_FILENAME and (folder / key).is_file():
            with (folder / key).open("wb") as file:
                file.truncate(fact.size_bytes)


def adopt(repository: ObjectRepository, name: str | None = None, *, dry_run: bool = False) -> tuple[Adoption, ...]:
    """As `repository.adopt.adopt`."""
    store = open_client(repository)

    def adopt_one(model: str) -> list[Adoption]:
        with mirrored(store, model) as mirror:

            def record(file: Path) -> FileRecord:
                version, _, key = file.relative_to(mirror.folder).as_posix().partition("/")
                fact = next(each for each in mirror.files[version] if each.key == key)
                return object_record(store, f"{mirror.snapshot.name}/{version}/{key}", fact)

            plans = plan_adoptions(mirror.folder, record)
        return _adopt(store, model, plans) if plans and not dry_run else plans

    with disk_errors(f"adopt versions in {repository}"):
        if name is not None:
            return tuple(adopt_one(name))
        return adopt_each([each for each in store.list().folders if not each.startswith(".")], adopt_one)


def _adopt(store: ObjectClient, name: str, plans: list[Adoption]) -> list[Adoption]:
    highest = max(plan.version for plan in plans)
    change_ledger(store, name, lambda led: dataclasses.replace(led, state=led.state.numbered(highest)))
    for plan in plans:
        try:
            store.create(f"{name}/{plan.version}/{MANIFEST_FILENAME}", manifest_text(plan.manifest).encode())
        except ChangedMeanwhileError as exc:
            raise RepositoryError(f"{name}:{plan.version} was adopted by somebody else at this moment") from exc
    return [dataclasses.replace(plan, applied=True) for plan in plans]
