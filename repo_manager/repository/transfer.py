"""Copying a version to another repository (or name). Every byte checked on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.configuration import replace_config
from repo_manager.repository.ensembles import ensembles_in, models_needed
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import is_bytecode, validate_model_name, version_number
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.look import changeable_model, with_beside, with_versions
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.plan.configuration import ConfigChange
from repo_manager.repository.plan.publishing import files_beside
from repo_manager.repository.publish import PublishedVersion, PublishTerms, plan_publish_sizes, publish
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Store
from repo_manager.repository.view import ModelView, VersionView
from repo_manager.triton_config.compare import changed_fields, same_signature
from repo_manager.triton_config.config import VARIANTS_FOLDER, ModelConfig, parse_config
from repo_manager.triton_config.ensembles import pinned_versions
from repo_manager.triton_config.text_fields import replace_field
from repo_manager.triton_config.version_policy import served_versions
from repo_manager.validation import check_fields

__all__ = ["CopyOptions", "Transfer", "copy_needed", "copy_version", "version_files"]


_OWN_FIELDS = ("schema_version", "model", "version", "created", "backend", "files", "config", "extra")


@dataclasses.dataclass(frozen=True)
class CopyOptions:
    """Options of a copy.

    Attributes:
        target_name: the model's name there. `None`: the same.
        keep_number: the copy has the same number, and it must be free, else it takes the next number there.
        with_config: the target's config.pbtxt becomes the source's, with labels and variants, except for the version
            policy. Without it, the config.pbtxt of an existing model stays as it is.
        again: also copy content that exists under another number, for an ensemble that pins this number.
    """

    target_name: str | None = None
    keep_number: bool = True
    with_config: bool = False
    again: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A copy, done or planned.

    Attributes:
        source: `NAME:VERSION` in the source repository.
        name: the model in the target repository.
        version: its number there. For a dry run, the number it would get now.
        identical: the target already has a version of the same content, and `version` names it.
        size_bytes: size of the files copied, or to copy.
        published: the new version. `None` when nothing was copied.
        config: with `with_config`, the fields changed, or to change, in the target's config.pbtxt. `None` without, and
            for a model's first version: it brings its config.pbtxt along.
        left_behind: fields of the target's config.pbtxt different from the source's, and kept.
    """

    source: str
    name: str
    version: int
    identical: bool
    size_bytes: int
    published: PublishedVersion | None
    config: ConfigChange | None = None
    left_behind: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Copy:
    """The subject of a copy: a version of a store, its record, and its config.pbtxt as text."""

    origin: Store
    name: str
    version: int
    manifest: Manifest
    text: str
    progress: Callable[[int], None] | None
    again: bool


class _IdenticalError(Exception):
    """Another command has brought the same content since it was looked for. `version` has it."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


def copy_version(
    source: LocationLike,
    name: str,
    version: int,
    target: LocationLike,
    options: CopyOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Transfer:
    """Copy a version to another repository, staging -> production for instance.

    Each file is compared with the source's manifest as it is read and again as it was written, before anything becomes
    visible. The new manifest keeps the old one's story and says where it came from. A first version takes the source's
    config.pbtxt along as a person wrote it. Copying a version the target has already does nothing. Files brought by an
    interrupted copy from or to object storage are not sent again.

    Args:
        source: the repository to copy from.
        name: model in `source`. `CopyOptions.target_name` can give the copy another.
        version: number of the version in `source`. It must have a manifest.
        target: the repository to copy to. A folder is made when it does not exist. May be `source` with another
            `target_name`.
        options: name, number and configuration in the target. `None`: `CopyOptions()`.
        dry_run: only check and describe the copy. The target is not changed.
        progress: called with the number of new bytes as they arrive. `None`: nothing is reported.

    Raises:
        RepositoryError: no such version, it has no manifest, its files differ from its manifest, its number is not
            free there, or the target serves something else under that name.
        ConfigError: with the source's config.pbtxt, the existing versions would not load.
    """
    options = options or CopyOptions()
    new_name = validate_model_name(name if options.target_name is None else options.target_name)
    with disk_errors(f"copy {name}:{version}"):
        origin = open_store(source)
        view, content = _look(origin, name, version)
        manifest = content.manifest()
        text, config = _source_config(view, new_name)
        _check_whole(content, manifest, f"{name}:{version}")
        there = open_store(target, may_be_new=True)
        twin = None if options.again else _identical_version(there, new_name, manifest)
        made = Transfer(f"{name}:{version}", new_name, twin or 0, twin is not None, manifest.size_bytes, None)
        exists, beside = there.look(new_name).has_config, files_beside(config)
        if exists and options.with_config:
            made = dataclasses.replace(made, config=replace_config(target, new_name, text, beside, dry_run=True))
            config = dataclasses.replace(config, labels={}, variants={})  # included in the configuration change
        elif exists:
            made = dataclasses.replace(made, left_behind=_differing(there, new_name, config))
        number = version if options.keep_number else None
        if dry_run:
            return made if twin is not None else _numbered(made, target, manifest, config, number)
        if twin is None:
            copy = _Copy(origin, name, version, manifest, text, progress, options.again)
            made = _brought(made, copy, target, config, number)
        if made.config is not None:
            made = dataclasses.replace(made, config=replace_config(target, new_name, text, beside))
    return made


def _numbered(
    planned: Transfer, target: LocationLike, manifest: Manifest, config: ModelConfig, number: int | None
) -> Transfer:
    """Return the plan with the number the version would have."""
    sizes = {file: record.size_bytes for file, record in manifest.files.items()}
    plan = plan_publish_sizes(target, planned.name, sizes, config, number)
    return dataclasses.replace(planned, version=plan.version)


def _brought(planned: Transfer, copy: _Copy, target: LocationLike, config: ModelConfig, number: int | None) -> Transfer:
    """Publish the copy. If another command copied the same at the same time, its copy counts."""
    try:
        published = _published(copy, target, planned.name, config, number)
    except _IdenticalError as exc:
        return dataclasses.replace(planned, version=exc.version, identical=True)
    return dataclasses.replace(planned, version=published.version, published=published)


def _published(
    copy: _Copy, target: LocationLike, name: str, config: ModelConfig, number: int | None
) -> PublishedVersion:
    """Publish the copy, each file compared on the way."""
    manifest, told = copy.manifest, copy.progress or (lambda _: None)

    def claiming() -> None:
        twin = None if copy.again else _identical_version(open_store(target, may_be_new=True), name, manifest)
        if twin is not None:
            raise _IdenticalError(twin)

    with copy.origin.fetch(copy.name, copy.version, resume=manifest.digest, progress=told) as folder:
        return publish(
            target,
            name,
            {file: folder / file for file in manifest.files},
            config,
            _copied_details(manifest, copy.origin.location.name),
            PublishTerms(manifest.files, copy.text, number, claiming),
            progress=told,
        )


def _differing(store: Store, name: str, config: ModelConfig) -> tuple[str, ...]:
    """Return the fields of a model's config.pbtxt different from the source's, except for name and policy."""
    existing = changeable_model(store, name).parsed_config()
    return tuple(field for field in changed_fields(existing, config) if field not in ("name", "version_policy"))


def copy_needed(
    source: LocationLike,
    name: str,
    target: LocationLike,
    *,
    keep_number: bool = True,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Transfer, ...]:
    """Copy a model's needed models missing in the target, in the order of loading.

    Of each, the versions pinned by ensembles are copied. They keep their numbers, so the ensembles find them. A
    version that exists in the target under such a number must have the same content. Where none is pinned, the newest
    served is copied, else the newest, unless the target has another.

    Args:
        source: the repository to copy from.
        name: an ensemble, or a model whose code asks others. Nothing is copied for any other.
        target: the repository to copy to.
        keep_number: also keep the numbers no ensemble asks for, as in `CopyOptions`.
        dry_run: only check and describe the copies. The target is not changed.
        progress: called with the number of new bytes as they arrive. `None`: nothing is reported.

    Raises:
        RepositoryError: as `copy_version`, or a version that an ensemble asks for by number has other content there.
    """
    origin, there = open_store(source), open_store(target, may_be_new=True)
    ensembles = ensembles_in(origin)
    needed = models_needed(origin, name, ensembles)
    pins = {key: config for key, config in ensembles.items() if key in (name, *needed)}
    wanted: list[tuple[str, int, CopyOptions]] = []
    for each in needed:
        present, asked_for = there.look(each), pinned_versions(pins, each)
        if present.exists and not asked_for:
            continue
        view = changeable_model(origin, each)
        pinned = [version for version in asked_for if version in view.versions]
        both = [version for version in pinned if version in present.versions]
        _check_same(with_versions(origin, view, both), with_versions(there, present, both), there.location)
        if pinned:
            options = CopyOptions(again=True)
            wanted += [(each, version, options) for version in pinned if version not in both]
        elif not present.exists:
            served = served_versions(view.parsed_config(), view.versions)
            wanted.append((each, max(served or view.versions), CopyOptions(keep_number=keep_number)))
    return tuple(
        copy_version(source, each, version, target, options, dry_run=dry_run, progress=progress)
        for each, version, options in wanted
    )


def _check_same(source: ModelView, target: ModelView, place: Location) -> None:
    """Check that versions which both repositories have are the same, by their manifests.

    Raises:
        RepositoryError: one is another, or has no manifest.
    """
    for version in sorted(source.contents.keys() & target.contents.keys()):
        content, found = source.contents[version], target.contents[version]
        for side, where in ((content, source.place.parent), (found, place)):
            if not side.has_manifest:
                raise RepositoryError(
                    f"{source.name}:{version} in {where} has no manifest, so its content cannot be compared, and an "
                    "ensemble asks for it by number",
                    hint=f"Write one: repo-manager adopt {source.name} -r {where}",
                )
        if found.manifest().digest != content.manifest().digest:
            raise RepositoryError(
                f"{source.name}:{version} in {place} has other content than the version copied, and an ensemble asks "
                "for it by number",
                hint="Point the ensemble to another version: publish this one under a new number, or change its "
                "model_version.",
            )


def _look(store: Store, name: str, version: int) -> tuple[ModelView, VersionView]:
    view = changeable_model(store, name)
    content = with_versions(store, view, (version,)).contents.get(version) if version in view.versions else None
    if content is None:
        raise RepositoryError(f"model {name!r} in {store.location} has no version {version}")
    return with_beside(store, view), content


def _check_whole(version: VersionView, manifest: Manifest, what: str) -> None:
    """Check whether a version holds exactly the files its manifest lists.

    Raises:
        RepositoryError: it does not.
    """
    odd = {entry.name for entry in version.files if not is_bytecode(entry.name)} ^ manifest.files.keys()
    if odd:
        raise RepositoryError(
            f"{what} does not hold what its manifest says: {', '.join(sorted(odd))}",
            hint="`repo-manager verify` shows all of it.",
        )


def _source_config(view: ModelView, name: str) -> tuple[str, ModelConfig]:
    """Return the source's config.pbtxt, renamed, as text and parsed, with its labels and its variants.

    Raises:
        ConfigError: it is broken, or a label file is missing.
    """
    text = _renamed(view.config_text(), name, view.config_place)
    config = parse_config(text, where=view.config_place)
    labels: dict[str, tuple[str, ...]] = {}
    for file in config.label_filenames:
        if file not in view.beside:
            raise ConfigError(f"{view.config_place} names the label file {file}, which does not exist")
        labels[file] = tuple(view.beside[file].decode(errors="replace").splitlines())
    variants = {
        file.removeprefix(f"{VARIANTS_FOLDER}/").removesuffix(".pbtxt"): _renamed(
            data.decode(errors="replace"), name, str(view.place / file)
        )
        for file, data in view.beside.items()
        if file.startswith(f"{VARIANTS_FOLDER}/") and file not in config.label_filenames
    }
    return text, dataclasses.replace(config, labels=labels, variants=variants)


def _renamed(text: str, name: str, where: str) -> str:
    if parse_config(text, where=where).name in ("", name):
        return text
    return replace_field(text, "name", f'name: "{name}"', where=where)


def _identical_version(store: Store, name: str, manifest: Manifest) -> int | None:
    """Return a model's newest version of the same content, served in the same way, or `None` when there is none."""
    view = store.look(name)
    for version in reversed(list(with_versions(store, view).contents.values())):
        try:
            found = version.manifest()
        except RepositoryError:
            continue
        if found.digest == manifest.digest and not same_signature(
            parse_config(found.config), parse_config(manifest.config)
        ):
            return version.number
    return None


def _copied_details(manifest: Manifest, origin_name: str) -> dict[str, Any]:
    """Return the fields of the copy's manifest: the source's story, and where it came from."""
    details = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in _OWN_FIELDS
    }
    origin = {
        "repository": origin_name,  # the name without its path: a manifest travels
        "model": manifest.model,
        "version": manifest.version,
        "created": manifest.created,
        "digest": manifest.digest,
    }
    return {**details, **manifest.extra, "copied_from": origin}


# A version's files on this machine.


@contextlib.contextmanager
def version_files(version: LocationLike, names: Sequence[str] | None = None) -> Iterator[Path]:
    """Give a folder on this machine with a version's files, for as long as the block lasts.

    On disk it is the version's own folder. From object storage the files are fetched, and files published with a
    digest are compared with it.

    Args:
        version: folder or URL of the version, `VersionEntry.path`.
        names: the files wanted. Missing ones are left out. `None`: all of them. The manifest is always there when the
            version has one.

    Raises:
        RepositoryError: a file cannot be fetched, or differs from its manifest.
    """
    version = as_location(version)
    number = version_number(version.name)
    if number is None:
        raise RepositoryError(f"{version} is no version's place", hint="Expected ROOT/MODEL/VERSION.")
    name = version.parent.name
    with contextlib.ExitStack() as stack:
        with disk_errors(f"fetch {name}:{number}"):
            store = open_store(version.parent.parent)
            folder = stack.enter_context(store.fetch(name, number, names))
        yield folder
