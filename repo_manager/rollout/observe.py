"""A server's present word on a model. Nothing here changes anything."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.files import work_folder
from repo_manager.optional import deferred
from repo_manager.repository.location import Location
from repo_manager.repository.sealed_repository import SealedRepository
from repo_manager.repository.sealing import LargeModelError, SealedModel, Sealing, seal
from repo_manager.repository.verify import verify
from repo_manager.server.client import TritonClient
from repo_manager.server.process import POLL_FAILED
from repo_manager.server.records import local_server
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig
from repo_manager.triton_config.ensembles import is_ensemble
from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.version_policy import with_version_policy

json_format = deferred("google.protobuf.json_format")

__all__ = [
    "READY",
    "ServedState",
    "load_on_server",
    "observe",
    "require_control",
    "require_known",
    "wait_until_only_ready",
]

_POLL_S = 0.02
# A load request goes over the network and is held in memory three times. Triton's gRPC limit is 2 GiB (server,
# `MAX_GRPC_MESSAGE_SIZE` of common.h).
_MOST_SENT_BYTES = 512 << 20
# This backend's files are data: none of them is executed.
_DATA_BACKEND = "onnxruntime"
_LEFT_OUT = "left-out"
_BUSY = {"LOADING", "UNLOADING"}
READY = "READY"
_LOOKS = 2
_NO_MODEL = "repo-manager.no-such-model"
_RESTRICTED = "is restricted"  # wording of both front ends of triton-inference-server/server


@dataclasses.dataclass(frozen=True)
class ServedState:
    """A model on a server.

    Attributes:
        url: address of the server, as given.
        ready: READY versions, ascending. Says nothing of whether they answer: a killed stub stays READY.
        busy: versions being loaded or unloaded.
        reasons: Triton's reason for the other versions, where it gives one.
        config: the configuration the server runs the model with. `None` when it is not loaded, or not told.
        hidden: why the server does not show the configuration of a READY model. Empty when it does. What is
            served is then unknown: neither served nor not served may be concluded from it.
        is_listed_twice: several repositories of the server have a model of this name (`--model-namespacing`). Loading
            and unloading reach all of them: Triton's API takes no namespace.
    """

    url: str
    ready: tuple[int, ...]
    busy: tuple[int, ...]
    reasons: dict[int, str]
    config: ModelConfig | None
    hidden: str = ""
    is_listed_twice: bool = False

    @property
    def sentence(self) -> str:
        """Describe the served versions, for a person."""
        if not self.ready:
            return f"{self.url} serves no version of it"
        plural = "s" if len(self.ready) > 1 else ""
        return f"{self.url} serves version{plural} {', '.join(map(str, self.ready))}"


def load_on_server(
    client: TritonClient, repository: Location, name: str, timeout_s: float, signed_by: Sequence[Path] = ()
) -> None:
    """Ask a server to load what a model's config.pbtxt serves.

    Nothing can be exchanged between the check of signatures and the load. A server that was started under the policy
    reads private copies, which are renewed here. To any other one the files go with the load: they are copied to a
    folder of this user, checked there and sent.

    Args:
        client: connected client of the server.
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model, in `repository` and on the server.
        timeout_s: deadline of the call in seconds.
        signed_by: keys one of which must vouch for each version that is loaded. Empty: the server reads the folder.

    Raises:
        ServerRefusedError: it does not load. Where the server only says it could not read the folder, the message
            names what `verify` finds in it.
        ServerUnreachableError: the server gives no answer in time.
        RepositoryError: under the policy, no key vouches for what is to be loaded.
    """
    server = local_server(client.url)
    is_sealed = server is not None and server.sealed is not None
    if not is_sealed and not signed_by:
        _load(client, repository, name, timeout_s)
        return
    served = [version for version, entry in client.versions(name).items() if entry.state == READY]
    if server is not None and server.sealed is not None:
        SealedRepository.at(server.sealed).refresh(name, served=served)
        _load(client, repository, name, timeout_s)
        return
    sealing = Sealing(signed_by, served=served, limit_bytes=_MOST_SENT_BYTES)
    try:
        with work_folder("repo-manager-sealed-") as root:
            model = seal(repository, name, root, sealing)
            if is_ensemble(model.config) or model.has_variants:
                _load(client, repository, name, timeout_s)
            else:
                _send(client, name, model, timeout_s)
    except LargeModelError as exc:
        if exc.config.backend != _DATA_BACKEND:
            raise RepositoryError(
                f"{exc.message}, and a load from the folder could run code that was exchanged by then",
                hint="Start the server with the policy (repo-manager serve).",
            ) from exc
        client.load(name, _as_json(exc.config, name), timeout_s=timeout_s)


def _send(client: TritonClient, name: str, model: SealedModel, timeout_s: float) -> None:
    """Load a model from what is sent. Triton keeps a version as it is that is READY with the same configuration."""
    config = model.config
    if not model.versions:  # without a signed version, config.pbtxt is unsigned too
        config = with_version_policy(ModelConfig.from_message(client.model_config(name)), model.left_out)
    if config.unknown_fields:
        raise RepositoryError(
            f"{CONFIG_FILENAME} of {name} has fields that this repo-manager does not know, so it cannot be sent: "
            f"{', '.join(config.unknown_fields)}",
            hint="Remove them, or upgrade repo-manager.",
        )
    files = {place: path.read_bytes() for place, path in model.files.items()}
    # Triton expects a folder for each version. It cannot load this one, so it keeps the loaded version or refuses.
    files |= {f"{version}/{_LEFT_OUT}": b"\n" for version in model.left_out}
    client.load(name, _as_json(config, name), files=files, timeout_s=timeout_s)


def _as_json(config: ModelConfig, name: str) -> str:
    message = config.message()
    message.name = name
    return str(json_format.MessageToJson(message))


def _load(client: TritonClient, repository: Location, name: str, timeout_s: float) -> None:
    """Ask a server to look at a model's folder again."""
    try:
        client.load(name, timeout_s=timeout_s)
    except ServerRefusedError as exc:
        if not exc.reason.endswith(f"{POLL_FAILED} from model repository"):
            raise
        problems = verify(repository, name, digests=False, models=False)
        errors = [each for each in problems if each.severity is Severity.ERROR or each.rule == "config-unknown-field"]
        if errors:
            found = f"In {repository}: {'; '.join(map(str, errors[:3]))}"
        else:
            found = f"Nothing is wrong with {name} in {repository}: the server may read other files. Its log says why"
        refused = ServerRefusedError(f"{exc.message}. {found}", hint=exc.hint)
        refused.reason = exc.reason
        raise refused from exc


def observe(client: TritonClient, name: str) -> ServedState:
    """Ask a server for its versions of a model.

    Raises:
        ServerUnreachableError: the server gives no answer in time.
        ServerRefusedError: the server answers the question with an error.
    """
    config, hidden = None, ""
    for _ in range(_LOOKS):
        listed = [entry for entry in client.repository_index() if entry.name == name]
        entries = {entry.version: entry for entry in listed if entry.version is not None}
        ready = tuple(sorted(version for version, entry in entries.items() if entry.state == READY))
        if not ready:
            hidden = ""
            break
        try:
            config, hidden = ModelConfig.from_message(client.model_config(name)), ""
            break
        except ServerRefusedError as exc:
            hidden = exc.message  # it was unloaded since the index was read, or access is restricted
    return ServedState(
        url=client.url,
        ready=ready,
        busy=tuple(sorted(version for version, entry in entries.items() if entry.state in _BUSY)),
        reasons={version: entry.reason for version, entry in entries.items() if entry.reason and entry.state != READY},
        config=config,
        hidden=hidden,
        # The index has one line per version, or one line without a version if the model was never loaded.
        is_listed_twice=len(listed) > max(1, len(entries)),
    )


def require_known(state: ServedState, client: TritonClient, name: str) -> None:
    """Check that a server lists its versions of a model, also after a roll-out: an undo must be able to confirm
    itself.

    Args:
        state: the model's versions on the server.
        client: connected client of the server.
        name: name of the model. Where `state` has no READY version, its configuration is asked for.

    Raises:
        ServerRefusedError: it does not show the model's configuration, or has several models of this name.
    """
    if state.is_listed_twice:
        raise ServerRefusedError(
            f"{client.url} lists {name} more than once: several of its repositories have it. Triton's API takes no "
            "namespace, so a load or unload would reach all of them. Nothing was changed.",
            hint="Serve each repository from a server of its own, or give the models different names.",
        )
    hidden = state.hidden
    if not state.ready:
        try:
            client.model_config(name)
        except ServerRefusedError as exc:  # the model is not loaded; only a restriction also applies once it is
            hidden = exc.message if _RESTRICTED in exc.message else ""
    if hidden:
        raise ServerRefusedError(
            f"{client.url} does not show the configuration of {name}, so what it serves is unknown: {hidden}. "
            "Nothing was changed.",
            hint="A roll-out and its undo need the server's model-repository and model-config APIs for this model: "
            "give the header they expect with --header-file FILE.",
        )


def require_control(client: TritonClient) -> None:
    """Check that models may be loaded and unloaded on a server, as a roll-out and its undo do.

    Raises:
        ServerRefusedError: the server refuses, without `--model-control-mode=explicit` for instance.
    """
    try:
        client.unload(_NO_MODEL)  # in explicit mode, unloading an unknown model is no error
    except ServerRefusedError as exc:
        raise ServerRefusedError(
            f"{client.url} does not let models be loaded and unloaded: {exc.message}. Nothing was changed.",
            hint="Start the server with --model-control-mode=explicit, as `repo-manager serve` does.",
        ) from exc


def wait_until_only_ready(
    client: TritonClient, name: str, wanted: tuple[int, ...], timeout_s: float, *, settled: bool = False
) -> ServedState:
    """Wait until exactly these versions are READY. Return the last state seen.

    Whether it is the wanted one is for the caller to see.

    Args:
        client: connected client of the server.
        name: name of the model to observe again and again. Other models do not matter.
        wanted: numbers of the versions, ascending.
        timeout_s: deadline of the call in seconds.
        settled: wait also until nothing is on its way (a dropped version stays UNLOADING until its last request has
            ended and its process is gone).
    """
    deadline = time.monotonic() + timeout_s
    while True:
        state = observe(client, name)
        if state.ready == wanted and not (settled and state.busy):
            return state
        if not state.busy and set(wanted) - set(state.ready):
            return state  # no load is in progress: waiting changes nothing
        if time.monotonic() >= deadline:
            return state
        time.sleep(_POLL_S)
