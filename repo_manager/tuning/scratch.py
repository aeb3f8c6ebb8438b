"""Copies of a model to measure: what is served is never touched.

They are on a server of their own, as hard links in a folder of the user's cache (plain copies from another file
system), and end with this process, however that dies (`server/supervisor.py`). On a server elsewhere they are loaded
under names of their own by its load API, and unloaded at the end. What a killed process leaves, the next run removes:
the folder, and on that server the copies whose names are in the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from google.protobuf import json_format  # type: ignore[import-untyped]  # its stubs are a package of their own

from repo_manager.errors import RepositoryError, ServerError, ServerRefusedError
from repo_manager.files import link_files, write_atomic
from repo_manager.onnx_model.runtime import free_host_bytes
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.scan import find_model
from repo_manager.repository.transfer import version_files
from repo_manager.rollout.server_checks import Room, room_for
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.metrics_page import metrics_text, metrics_url_of
from repo_manager.server.paths import cache_directory
from repo_manager.server.process import is_running, start_ticks
from repo_manager.server.transport import ClientOptions
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.fields import set_fields

__all__ = ["CANDIDATE", "TODAY", "WINNER", "Copies", "copies_of", "tuning_directory"]

_LOAD_S = 300.0
_STOP_S = 5.0
_MARK = "__tune_"
CANDIDATE, TODAY, WINNER = NAMES = ("candidate", "today", "winner")
"""What copies are called."""


def tuning_directory() -> Path:
    """Return where tunings keep their records and copies, in the user's cache; created when missing."""
    folder = cache_directory() / "tune"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


class Copies(Protocol):
    """Copies of one version, each with its own configuration.

    Attributes:
        url: of the server that serves them.
        metrics_url: of its metrics; `None`: not known.
        access: how it is reached.
        files: path in a copy's folder -> file.
        cores: CPUs that the copies share; 0: not known.
    """

    url: str
    metrics_url: str | None
    access: ClientOptions
    files: Mapping[str, Path]
    cores: int

    @abstractmethod
    def named(self, name: str) -> str:
        """Return what the server calls a copy."""

    @abstractmethod
    def load(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Serve a copy with a changed configuration, in place of what has that name now.

        Label files and warm-up are left out: they change nothing of what is measured.

        Raises:
            ConfigError: a change does not fit.
            ServerRefusedError: it does not load.
        """

    @abstractmethod
    def unload(self, name: str) -> None:
        """Stop serving a copy, so that it takes neither memory nor threads while another one is measured."""

    @abstractmethod
    def room(self, *, on_gpu: bool) -> Room | None:
        """Return the memory that is free for copies; `None` when nobody tells."""


@contextlib.contextmanager
def copies_of(
    repository: Location,
    name: str,
    version: int,
    config: ModelConfig,
    *,
    url: str | None = None,
    access: ClientOptions | None = None,
) -> Iterator[Copies]:
    """Make ready to serve copies of a version; they are gone at the end of the block.

    Args:
        repository: where the version is.
        name: the model.
        version: the version.
        config: what the copies' configurations are changed from.
        url: a server that takes them; `None` starts one.
        access: how that server is reached.

    Raises:
        RepositoryError: no such model or version.
        MissingDependencyError: there is no tritonserver on this machine.
        ServerError: it does not start, or cannot be reached.
    """
    entry = next((each for each in find_model(repository, name).versions if each.version == version), None)
    if entry is None:
        raise RepositoryError(f"{name} has no version {version}", hint=f"See: repo-manager show {name}")
    local = local_folder(repository)
    access = access or ClientOptions()
    _sweep(url, access)
    with contextlib.ExitStack() as stack:
        files = _below(stack.enter_context(version_files(entry.path)), "1")
        if local is not None:
            for path in (local / name).iterdir():
                if not path.name.isdigit() and path.name != CONFIG_FILENAME and not path.name.startswith("."):
                    files |= _below(path, path.name) if path.is_dir() else {path.name: path}
        serve = _here(config, files) if url is None else _there(url, access, name, config, files)
        yield stack.enter_context(serve)


class _Here:
    """Copies on a server of this process's own."""

    def __init__(self, server: EmbeddedServer, client: TritonClient, text: str, files: Mapping[str, Path]) -> None:
        self.url, self.access = server.grpc_url, server.client_options
        self.metrics_url: str | None = server.metrics_url
        self.files, self.cores = files, len(os.sched_getaffinity(0))
        self._root, self._client, self._text = Path(server.options.repository), client, text

    def named(self, name: str) -> str:
        return name

    def load(self, name: str, changes: Mapping[str, str | None]) -> None:
        folder = self._root / name
        if not folder.is_dir():
            link_files(self.files, folder)
        config = _changed(self._text, name, changes)
        (folder / CONFIG_FILENAME).write_text(format_config(config), encoding="utf-8")
        self.unload(name)
        self._client.load(name, timeout_s=_LOAD_S)

    def unload(self, name: str) -> None:
        with contextlib.suppress(ServerRefusedError):
            self._client.unload(name, timeout_s=_LOAD_S)

    def room(self, *, on_gpu: bool) -> Room | None:
        if on_gpu:
            return room_for("", self.url, metrics_text(self.metrics_url or ""), wants_gpu=True)
        free = free_host_bytes()
        return None if free is None else Room("the machine", free)


@contextlib.contextmanager
def _here(config: ModelConfig, files: Mapping[str, Path]) -> Iterator[Copies]:
    message = config.message()
    is_whole = bool(message.backend and message.input and message.output)
    root = tuning_directory() / f"scratch-{os.getpid()}-{start_ticks(os.getpid())}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        (root / "models").mkdir(parents=True)
        server = EmbeddedServer(
            ServerOptions(
                repository=str(root / "models"), record=False, log_path=root / "server.log", auto_complete=not is_whole
            )
        )
        stack.callback(server.stop, deadline_s=_STOP_S)
        server.start()
        server.wait_ready()
        client = stack.enter_context(TritonClient.connect(server.http_url))
        yield _Here(server, client, format_config(config), files)


class _There:
    """Copies on a server elsewhere, by its load API: their files travel with the load."""

    def __init__(self, client: TritonClient, access: ClientOptions, names: tuple[str, str], text: str) -> None:
        self.url, self.metrics_url, self.access = client.url, metrics_url_of(client.url), access
        self.files: Mapping[str, Path] = {}
        self.cores = 0
        self.loaded: set[str] = set()
        self._client, (self._model, self._token), self._text = client, names, text

    def named(self, name: str) -> str:
        return f"{self._model}{_MARK}{self._token}_{name}"

    def load(self, name: str, changes: Mapping[str, str | None]) -> None:
        served = self.named(name)
        self.unload(name)
        document = json_format.MessageToJson(_changed(self._text, served, changes).message())
        contents = {place: path.read_bytes() for place, path in self.files.items() if place.startswith("1/")}
        self.loaded.add(name)
        self._client.load(served, document, files=contents, timeout_s=_LOAD_S)

    def unload(self, name: str) -> None:
        with contextlib.suppress(ServerRefusedError):
            self._client.unload(self.named(name), timeout_s=_LOAD_S)
        self.loaded.discard(name)

    def room(self, *, on_gpu: bool) -> Room | None:
        metrics = None if self.metrics_url is None else metrics_text(self.metrics_url)
        return room_for(self._model, self.url, metrics, wants_gpu=on_gpu)


@contextlib.contextmanager
def _there(
    url: str, access: ClientOptions, name: str, config: ModelConfig, files: Mapping[str, Path]
) -> Iterator[Copies]:
    token = f"{os.getpid()}_{start_ticks(os.getpid())}"
    record = tuning_directory() / f"remote-{os.getpid()}-{start_ticks(os.getpid())}.json"
    with TritonClient.connect(url, access) as client:
        client.wait_live(access.timeout_s)
        copies = _There(client, access, (name, token), format_config(config))
        copies.files = files
        # Triton's index does not list what came by the load API alone, so the names are kept here.
        write_atomic(record, json.dumps({"url": client.url, "names": [copies.named(each) for each in NAMES]}).encode())
        try:
            yield copies
        finally:
            for each in list(copies.loaded):
                copies.unload(each)
            record.unlink(missing_ok=True)


def _sweep(url: str | None, access: ClientOptions) -> None:
    """Remove what processes have left that ended without doing it themselves: their folders, their copies on `url`."""
    for path in (*tuning_directory().glob("scratch-*-*"), *tuning_directory().glob("remote-*-*.json")):
        kind, pid, ticks = path.stem.split("-")
        if is_running(int(pid), int(ticks)):
            continue
        if kind == "scratch":
            shutil.rmtree(path, ignore_errors=True)
        elif url is not None:
            left = json.loads(path.read_text(encoding="utf-8"))
            with contextlib.suppress(ServerError), TritonClient.connect(url, access) as client:
                if client.url == left["url"]:
                    for each in left["names"]:
                        with contextlib.suppress(ServerRefusedError):
                            client.unload(each)
                    path.unlink(missing_ok=True)


def _changed(text: str, name: str, changes: Mapping[str, str | None]) -> ModelConfig:
    """Return a configuration with changes, for a copy."""
    message = parse_config(set_fields(text, changes, where=CONFIG_FILENAME)).message()
    message.name = name
    for field in ("version_policy", "model_warmup"):
        message.ClearField(field)
    for output in message.output:
        output.label_filename = ""
    return ModelConfig.from_message(message)


def _below(folder: Path, place: str) -> dict[str, Path]:
    return {f"{place}/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*")) if path.is_file()}
