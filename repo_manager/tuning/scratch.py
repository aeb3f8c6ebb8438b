"""Copies of models to measure: served models are never touched.

They are on a server of their own, as hard links in a folder of the user's cache (plain copies from another file
system), and end with this process, however it dies (`server/supervisor.py`). On a server elsewhere they are loaded
under names of their own by its load API, and unloaded at the end. The next run removes the remains of a killed
process: the folder, and on the server the copies whose names are in the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from google.protobuf import json_format  # type: ignore[import-untyped]  # its stubs are a separate package

from repo_manager.errors import RepoManagerError, ServerError, ServerRefusedError, ServerUnreachableError
from repo_manager.files import link_files, sweep_work_folders, write_atomic
from repo_manager.onnx_model.runtime import free_host_bytes
from repo_manager.rollout.server_checks import Room, is_here, room_for
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.metrics_page import metrics_text, metrics_url_of
from repo_manager.server.paths import cache_directory
from repo_manager.server.process import is_running, start_ticks
from repo_manager.server.transport import ClientOptions
from repo_manager.triton_config.compare import changed_fields
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_config.ensembles import is_ensemble, models_of
from repo_manager.triton_config.fields import set_fields
from repo_manager.tuning.space import THREADS
from repo_manager.tuning.subjects import Subjects

__all__ = ["CANDIDATE", "SEALED", "TODAY", "WINNER", "Changes", "Copies", "copies_of", "tuning_directory"]

_LOAD_S = 300.0
_STOP_S = 5.0
_LIVE_S = 2.0
_MARK = "__tune_"
SEALED = "sealed-"
"""Start of the names of folders with checked copies of signed models."""
CANDIDATE, TODAY, WINNER = NAMES = ("candidate", "today", "winner")
"""Names of the sets of copies."""
Changes = Mapping[str, Mapping[str, str | None]]
"""Model -> field of config.pbtxt -> its value, `None` for a removed one."""


def tuning_directory() -> Path:
    """Return where tunings keep their records and copies, in the user's cache. Created when missing."""
    folder = cache_directory() / "tune"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


class Copies(ABC):
    """Sets of copies of the models of a tuning, each with its own configurations.

    Args:
        subjects: the models of each set, loaded in their order: needed models first.
        client: connected client of the server.
        reach: URL of the server, URL of its metrics (`None`: the default port), and options of its client.
        cores: number of CPU cores of the server.

    Attributes:
        subjects: the models behind the copies.
        client: client of the copies' server.
        url: the server's URL, for a load test.
        metrics_url: of its metrics. `None`: not known.
        access: how it is reached.
        cores: CPUs the copies share. 0: not known.
    """

    keeps_instances = False
    """Whether the server changes the number of instances without loading the model again."""

    def __init__(
        self,
        subjects: Subjects,
        client: TritonClient,
        reach: tuple[str, str | None, ClientOptions],
        cores: int,
    ) -> None:
        self.subjects, self.client, self.cores = subjects, client, cores
        self.url, self.metrics_url, self.access = reach
        self._served: dict[str, dict[str, ModelConfig]] = {}

    @abstractmethod
    def named(self, copy: str, model: str) -> str:
        """Return the server's name of a model of a set."""

    @abstractmethod
    def serve(self, served: str, model: str, config: ModelConfig) -> None:
        """Load one copy.

        Args:
            served: the copy's name on the server, by `named`.
            model: name in `subjects.models`. The copy gets the files of this one.
            config: configuration of the model (config.pbtxt).

        Raises:
            ServerRefusedError: it does not load.
        """

    @abstractmethod
    def room(self, *, on_gpu: bool) -> Room | None:
        """Return the free memory for copies, or `None` when unknown."""

    def revive(self) -> bool:
        """Start the server again if it has ended, without any copy. Return whether it had.

        Raises:
            ServerError: it does not start.
        """
        return False

    def load(self, copy: str, changes: Changes) -> None:
        """Serve a set of copies with changed configurations, in place of the present one of this name.

        Label files and warm-up are left out: they change no measurement. Unchanged models stay loaded.

        Raises:
            ConfigError: a change does not fit.
            ServerRefusedError: one does not load.
        """
        wanted = {name: self._config(copy, name, changes.get(name, {})) for name in self.subjects.models}
        served = self._served.setdefault(copy, {})
        changed = [name for name in wanted if name not in served or changed_fields(served[name], wanted[name])]
        leaving = {name for name in changed if name in served and not self._stays(served[name], wanted[name])}
        for name, subject in self.subjects.models.items():
            if name in served and set(models_of(subject.config)) & leaving:
                leaving.add(name)
        self._drop(copy, leaving)
        for name, config in wanted.items():
            if name in changed or name in leaving:
                try:
                    self.serve(self.named(copy, name), name, config)
                except RepoManagerError:
                    served[name] = config  # it may be loaded in part
                    self.unload(copy)
                    raise
                served[name] = config

    def unload(self, copy: str) -> None:
        """Stop serving a set, so it takes neither memory nor threads while another one is measured."""
        self._drop(copy, set(self._served.get(copy, {})))

    def _drop(self, copy: str, names: set[str]) -> None:
        served = self._served.get(copy, {})
        for name in reversed(list(self.subjects.models)):
            if name in names and name in served:
                with contextlib.suppress(ServerRefusedError):
                    self.client.unload(self.named(copy, name), timeout_s=_LOAD_S)
                del served[name]

    def _stays(self, before: ModelConfig, after: ModelConfig) -> bool:
        """Return whether only instances come or go, while the others are as in a new load."""
        shares_cores = after.backend == "onnxruntime" and THREADS not in after.message().parameters
        return self.keeps_instances and changed_fields(before, after) == ("instance_group",) and not shares_cores

    def _config(self, copy: str, name: str, changes: Mapping[str, str | None]) -> ModelConfig:
        """Return a model's configuration with changes, for a copy."""
        text = format_config(self.subjects.models[name].config)
        message = parse_config(set_fields(text, changes, where=CONFIG_FILENAME)).message()
        message.name = self.named(copy, name)
        for field in ("version_policy", "model_warmup"):
            message.ClearField(field)
        for output in message.output:
            output.label_filename = ""
        for step in message.ensemble_scheduling.step if message.HasField("ensemble_scheduling") else ():
            step.model_name, step.model_version = self.named(copy, step.model_name), -1
        return ModelConfig.from_message(message)


@contextlib.contextmanager
def copies_of(subjects: Subjects, *, url: str | None = None, access: ClientOptions | None = None) -> Iterator[Copies]:
    """Make ready to serve copies of models. They are gone at the end of the block.

    Args:
        subjects: models to copy. Their files must stay for as long as the block lasts.
        url: a server for the copies. `None` starts one.
        access: options of the server's client. `None`: the server is this machine's.

    Raises:
        MissingDependencyError: there is no tritonserver on this machine.
        ServerError: it does not start, or cannot be reached.
    """
    access = access or ClientOptions()
    _sweep(url, access)
    with _here(subjects) if url is None else _there(url, access, subjects) as copies:
        yield copies


class _Here(Copies):
    """Copies on a server of this process's own."""

    keeps_instances = True

    def __init__(self, server: EmbeddedServer, subjects: Subjects, stack: contextlib.ExitStack) -> None:
        self._root, self._stack = Path(server.options.repository), stack
        client = self._started(server)
        reach = (server.grpc_url, server.metrics_url, server.client_options)
        super().__init__(subjects, client, reach, len(os.sched_getaffinity(0)))

    def _started(self, server: EmbeddedServer) -> TritonClient:
        self._server = server
        self._stack.callback(server.stop, deadline_s=_STOP_S)
        server.start()
        server.wait_ready()
        return self._stack.enter_context(TritonClient.connect(server.http_url))

    def revive(self) -> bool:
        with contextlib.suppress(ServerUnreachableError):
            self.client.wait_live(_LIVE_S)
            return False
        if self._server.wait(_STOP_S) is None:
            return False
        self._served.clear()
        self.client = self._started(self._server.successor())
        self.access = self._server.client_options
        return True

    def named(self, copy: str, model: str) -> str:
        return f"{copy}__{model}"

    def serve(self, served: str, model: str, config: ModelConfig) -> None:
        folder = self._root / served
        if not folder.is_dir():
            (folder / "1").mkdir(parents=True)
            link_files(self.subjects.models[model].files, folder)
        (folder / CONFIG_FILENAME).write_text(format_config(config), encoding="utf-8")
        self.client.load(served, timeout_s=_LOAD_S)

    def room(self, *, on_gpu: bool) -> Room | None:
        if on_gpu:
            return room_for("", self.url, metrics_text(self.metrics_url or ""), wants_gpu=True)
        free = free_host_bytes()
        return None if free is None else Room("the machine", free)


@contextlib.contextmanager
def _here(subjects: Subjects) -> Iterator[Copies]:
    messages = [subject.config.message() for subject in subjects.models.values() if not is_ensemble(subject.config)]
    is_whole = all(message.backend and message.input and message.output for message in messages)
    root = tuning_directory() / f"scratch-{os.getpid()}-{start_ticks(os.getpid())}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        (root / "models").mkdir(parents=True)
        server = EmbeddedServer(
            ServerOptions(
                repository=str(root / "models"), record=False, log_path=root / "server.log", auto_complete=not is_whole
            )
        )
        yield _Here(server, subjects, stack)


class _There(Copies):
    """Copies on a server elsewhere, by its load API: their files travel with the load."""

    def __init__(self, client: TritonClient, access: ClientOptions, subjects: Subjects, token: str) -> None:
        super().__init__(subjects, client, (client.url, metrics_url_of(client.url), access), 0)
        self._token = token

    def named(self, copy: str, model: str) -> str:
        return f"{model}{_MARK}{self._token}_{copy}"

    def serve(self, served: str, model: str, config: ModelConfig) -> None:
        files = self.subjects.models[model].files
        contents = {place: path.read_bytes() for place, path in files.items() if place.startswith("1/")}
        document = json_format.MessageToJson(config.message())
        if contents:
            self.client.load(served, document, files=contents, timeout_s=_LOAD_S)
            return
        try:  # a load with a model needs a file, although an ensemble has none
            self.client.load(served, document, files={"1/ensemble": b"\n"}, timeout_s=_LOAD_S)
        except ServerRefusedError:
            # Triton also looks for the members in its repository, reports those loaded this way, and serves the
            # ensemble.
            if not self.client.model_ready(served):
                raise

    def room(self, *, on_gpu: bool) -> Room | None:
        metrics = None if self.metrics_url is None else metrics_text(self.metrics_url)
        return room_for(self.subjects.tops[0], self.url, metrics, wants_gpu=on_gpu)


@contextlib.contextmanager
def _there(url: str, access: ClientOptions, subjects: Subjects) -> Iterator[Copies]:
    token = f"{os.getpid()}_{start_ticks(os.getpid())}"
    record = tuning_directory() / f"remote-{os.getpid()}-{start_ticks(os.getpid())}.json"
    with TritonClient.connect(url, access) as client:
        client.wait_live(access.timeout_s)
        copies = _There(client, access, subjects, token)
        # Triton's index lists only the folders of its repositories (core, `ModelRepositoryManager::RepositoryIndex`),
        # not models loaded by the API alone. So we keep their names.
        names = [copies.named(each, model) for each in NAMES for model in reversed(list(subjects.models))]
        write_atomic(record, json.dumps({"url": client.url, "names": names}).encode())
        try:
            yield copies
        finally:
            for each in NAMES:
                copies.unload(each)
            record.unlink(missing_ok=True)


def _sweep(url: str | None, access: ClientOptions) -> None:
    """Remove the remains of processes ended without a clean-up: their folders, their copies on `url`."""
    sweep_work_folders(tuning_directory(), SEALED)
    for path in (*tuning_directory().glob("scratch-*-*"), *tuning_directory().glob("remote-*-*.json")):
        kind, pid, ticks = path.stem.split("-")
        if is_running(int(pid), int(ticks)):
            continue
        if kind == "scratch":
            shutil.rmtree(path, ignore_errors=True)
            continue
        left = json.loads(path.read_text(encoding="utf-8"))
        if _has_ended(left["url"]):
            path.unlink(missing_ok=True)
        elif url is not None:
            with contextlib.suppress(ServerError), TritonClient.connect(url, access) as client:
                if client.url == left["url"]:
                    for each in left["names"]:
                        with contextlib.suppress(ServerRefusedError):
                            client.unload(each)
                    path.unlink(missing_ok=True)


def _has_ended(url: str) -> bool:
    """Return whether a server on this machine has ended, and its copies with it: nothing listens on its port."""
    parts = urlsplit(url)
    if not is_here(url) or parts.port is None:
        return False
    try:
        socket.create_connection((parts.hostname, parts.port), _LIVE_S).close()
    except OSError as exc:
        return isinstance(exc, ConnectionRefusedError)
    return False
