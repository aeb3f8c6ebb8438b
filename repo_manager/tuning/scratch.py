"""A server of its own with copies of a model: what is served is never touched.

The copies are hard links in a folder of the user's cache (plain copies from another file system). The server
ends with this process, however that dies (`server/supervisor.py`); the next run removes the folder of a killed one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.repository import Location, find_model, local_folder, version_files
from repo_manager.server import EmbeddedServer, ServerOptions, TritonClient
from repo_manager.server.paths import cache_directory
from repo_manager.server.process import is_running, start_ticks
from repo_manager.triton_config import CONFIG_FILENAME, ModelConfig, format_config, parse_config, set_fields

__all__ = ["Scratch", "scratch_server", "sweep", "tuning_directory"]

_LOAD_S = 300.0
_STOP_S = 5.0


def tuning_directory() -> Path:
    """Return where tunings keep their records and copies, in the user's cache; created when missing."""
    folder = cache_directory() / "tune"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def sweep() -> None:
    """Remove the copies of processes that have ended without doing it themselves."""
    for folder in tuning_directory().glob("scratch-*-*"):
        _, pid, ticks = folder.name.split("-")
        if not is_running(int(pid), int(ticks)):
            shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """Copies of one version on a server of their own, each with its own configuration.

    Args:
        server: it runs.
        client: of it.
        text: the config.pbtxt of the model as it is today.
        files: path in a copy's folder -> file.
    """

    def __init__(self, server: EmbeddedServer, client: TritonClient, text: str, files: Mapping[str, Path]) -> None:
        self.server = server
        self.files = files
        self._client, self._text = client, text

    def load(self, name: str, changes: Mapping[str, str | None]) -> ModelConfig:
        """Serve a copy with a changed configuration, in place of what has that name now.

        Label files and warm-up are left out: they change nothing of what is measured.

        Returns:
            The configuration that it is served with.

        Raises:
            ConfigError: a change does not fit.
            ServerRefusedError: it does not load.
        """
        model = Path(self.server.options.repository) / name
        if not model.is_dir():
            _copy(self.files, model)
        message = parse_config(set_fields(self._text, changes, where=CONFIG_FILENAME)).message()
        message.name = name
        for field in ("version_policy", "model_warmup"):
            message.ClearField(field)
        for output in message.output:
            output.label_filename = ""
        config = ModelConfig.from_message(message)
        (model / CONFIG_FILENAME).write_text(format_config(config), encoding="utf-8")
        self.unload(name)
        self._client.load(name, timeout_s=_LOAD_S)
        return config

    def unload(self, name: str) -> None:
        """Stop serving a copy, so that it takes neither memory nor threads while another one is measured."""
        with contextlib.suppress(ServerRefusedError):
            self._client.unload(name, timeout_s=_LOAD_S)


@contextlib.contextmanager
def scratch_server(repository: Location, name: str, version: int) -> Iterator[Scratch]:
    """Start a server for copies of a version; it, and they, are gone at the end of the block.

    Raises:
        RepositoryError: no such model or version, or it has no config.pbtxt.
        MissingDependencyError: there is no tritonserver on this machine.
        ServerError: it does not start.
    """
    sweep()
    model = find_model(repository, name)
    entry = next((each for each in model.versions if each.version == version), None)
    config = model.config()
    if entry is None or config is None:
        missing = f"version {version}" if entry is None else "config.pbtxt"
        raise RepositoryError(f"{name} has no {missing}", hint=f"See: repo-manager show {name}")
    local = local_folder(repository)
    with contextlib.ExitStack() as stack:
        files = _below(stack.enter_context(version_files(entry.path)), "1")
        if local is not None:
            for path in (local / name).iterdir():
                if not path.name.isdigit() and path.name != CONFIG_FILENAME and not path.name.startswith("."):
                    files |= _below(path, path.name) if path.is_dir() else {path.name: path}
        root = tuning_directory() / f"scratch-{os.getpid()}-{start_ticks(os.getpid())}"
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        (root / "models").mkdir(parents=True)
        message = config.message()
        is_whole = bool(message.backend and message.input and message.output)
        options = ServerOptions(
            repository=str(root / "models"), record=False, log_path=root / "server.log", auto_complete=not is_whole
        )
        server = EmbeddedServer(options)
        stack.callback(server.stop, deadline_s=_STOP_S)
        server.start()
        server.wait_ready()
        client = stack.enter_context(TritonClient.connect(server.http_url))
        yield Scratch(server, client, format_config(config), files)


def _below(folder: Path, place: str) -> dict[str, Path]:
    return {f"{place}/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*")) if path.is_file()}


def _copy(files: Mapping[str, Path], model: Path) -> None:
    """Link files into a folder; copy those of another file system."""
    for place, source in files.items():
        target = model / place
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, target)
