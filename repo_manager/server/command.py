"""Options of the embedded server, and the command line and environment of tritonserver for them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import ServerError, UsageError
from repo_manager.repository.layout import COPIES
from repo_manager.server.backend_directory import WITHHELD, BackendDirectory
from repo_manager.server.credentials import check_header
from repo_manager.server.installation import TritonInstallation, libpython_directory
from repo_manager.server.paths import cache_directory
from repo_manager.validation import check_fields, check_range

__all__ = [
    "LOOPBACK",
    "ServerOptions",
    "ServerSecurity",
    "ServerSettings",
    "check_port_is_free",
    "command_of",
    "environment_of",
    "free_ports",
    "listens_on",
    "restrictions_of",
    "shell_safe",
    "takes_connections",
]


# Paths that the stub of Triton's Python backend can start from.
# Triton 2.51 starts the stub by a shell command and writes the model's path into it unquoted (`StubLauncher::Launch` in
# triton-inference-server/python_backend). A blank shifts the stub's arguments: the stub dies with `stol`, and the load
# never returns. Other characters would run as code. Such a path gets a link with a plain name.

_PLAIN = re.compile(r"[A-Za-z0-9_./+:@%,=-]+")


def shell_safe(path: Path) -> Path:
    """Return `path`, or a link to it where its name would be misread by a shell.

    Args:
        path: an absolute path. The link is in the user's cache, or in a folder of the user's own below `/tmp` when the
            cache's path is no better. The same path always gets the same link.

    Raises:
        ServerError: the folder below `/tmp` belongs to another user.
        OSError: no link can be made.
    """
    if _PLAIN.fullmatch(str(path)):
        return path
    folder = cache_directory() / "links"
    if not _PLAIN.fullmatch(str(folder)):
        folder = Path(f"/tmp/repo-manager-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ServerError(f"{folder} belongs to another user", hint="Set XDG_CACHE_HOME to a folder without blanks.")
    link = folder / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    if not (link.is_symlink() and link.readlink() == path):
        temporary = folder / f".{link.name}.{os.getpid()}"
        temporary.symlink_to(path)
        temporary.replace(link)
    return link


# Free TCP ports, and error messages about taken ones.

_LISTEN = "0A"
_CONNECT_S = 1.0


def free_ports(host: str, count: int) -> tuple[int, ...]:
    """Return `count` different ports nobody listens on at `host` right now.

    Another process may take one before it is used: anyone who binds them tries again with new ones.

    Args:
        host: the address to bind, `127.0.0.1` or `::1` for instance.
        count: number of ports to return.

    Raises:
        ServerError: the address is not one of this machine.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(_family(host), socket.SOCK_STREAM)) for _ in range(count)]
        try:
            for each in sockets:
                each.bind((host, 0))
        except OSError as exc:
            raise ServerError(
                f"The server cannot listen on {host}: {exc.strerror or exc}",
                hint="Give an address of this machine: 127.0.0.1, or 0.0.0.0 for all of its interfaces.",
            ) from exc
        return tuple(each.getsockname()[1] for each in sockets)


def check_port_is_free(host: str, port: int, purpose: str) -> None:
    """Check whether a given port can be bound.

    Args:
        host: name or address to listen on.
        port: TCP port, 1 to 65535.
        purpose: use of the port, for the message.

    Raises:
        ServerError: it is taken, or the address is not one of this machine.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        # tritonserver sets it too: an old connection in TIME_WAIT does not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ServerError(
                f"The {purpose} port {port} on {host} cannot be used: {exc.strerror or exc}",
                hint="Give another port, or 0 to take a free one.",
            ) from exc


def takes_connections(host: str, port: int) -> bool:
    """Return whether somebody listens on a port of this machine. A refusal costs a tenth of a millisecond."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        return probe.connect_ex((host, port)) == 0


def listens_on(pid: int, ports: Iterable[int]) -> bool:
    """Return whether a process of this user listens on all of these TCP ports, by /proc.

    The kernel takes about 5 ms to list each table of sockets. So the second is read only if the first lacks a port.
    """
    missing = set(ports)
    inodes = set()
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                target = str(Path(descriptor.path).readlink())
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        if not missing:
            break
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and fields[9] in inodes:
                    missing.discard(int(fields[1].rpartition(":")[2], 16))
    return not missing


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
RESTRICTED_APIS = ("model-repository", "shared-memory", "trace", "logging")
"""Scope of a restriction: all calls that change the server. Inference, metadata, statistics and health stay open."""
KEY_HEADER = "repo-manager-key"
# Environment variables passed on to the server and its models' processes. All others may be secrets, and a model's code
# could read them.
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|TMPDIR|HOSTNAME|PYTHON(?!PATH|HOME).*|(LC|LD|XDG|SSL_CERT)_.*|COLUMNS"
    r"|(CUDA|NVIDIA|NCCL|CUBLAS|CUDNN|OMP|GOMP|KMP|MKL|OPENBLAS|NUMEXPR|BLIS|ORT|ONNX|TRT|TENSORRT|TF|TORCH|UCX"
    r"|TRITON|TRITONSERVER|MALLOC|GLIBC|JAX|XLA)_.*"
)
_FOR_OBJECTS = re.compile(
    r"(AWS|GOOGLE|GCE|AZURE)_[A-Z0-9_]*|TRITON_CLOUD_CREDENTIAL_PATH|(HTTPS?|NO|ALL)_PROXY", re.IGNORECASE
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)(API|ACCESS|PRIVATE)_?KEY|_KEY$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ServerSecurity:
    """Who may talk to the server.

    Attributes:
        certificate: PEM file: gRPC speaks TLS with it. Triton's HTTP has no TLS, so HTTP and metrics then stay on the
            loopback, regardless of the host.
        key: PEM file with the certificate's key.
        client_authority: PEM file: clients must show a certificate of this authority (mutual TLS).
        restricted: header and value demanded by both protocols for calls with an effect on the server. `None`: a
            random key in the server's record, so this user's commands on this machine show it by themselves.
        open_control: anyone who reaches the server may change it, without a key.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_authority: Path | None = None
    restricted: tuple[str, str] | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
    open_control: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.open_control and self.restricted is not None:
            raise UsageError("Control of the server is either open to everybody or needs a header, not both")
        if (self.certificate is None) != (self.key is None):
            raise UsageError("TLS needs both a certificate and its key")
        if self.client_authority is not None and self.certificate is None:
            raise UsageError("Clients' certificates can be asked for only with TLS: give a certificate and its key")
        for path in (self.certificate, self.key, self.client_authority):
            if path is not None and not path.is_file():
                raise UsageError(f"{path}: no such file")
        if self.restricted is not None:
            check_header(*self.restricted, "The restriction of the server")
            if set(self.restricted[0]) & set(":=,") or not self.restricted[1]:
                raise UsageError("The restriction's header needs a value, and no ':', '=' or ',' in its name")

    @property
    def tls(self) -> bool:
        """Whether gRPC speaks TLS."""
        return self.certificate is not None

    def with_key(self) -> ServerSecurity:
        """Return it with a random key where nothing else says who may change the server."""
        if self.open_control or self.restricted is not None:
            return self
        return dataclasses.replace(self, restricted=(KEY_HEADER, secrets.token_hex(32)))

    @property
    def headers(self) -> dict[str, str]:
        """The header our own requests must carry."""
        return {} if self.restricted is None else {self.restricted[0]: self.restricted[1]}


def _handed_on(argument: str, value: str, *, default: Any) -> Any:
    """Declare a setting with one argument of tritonserver, left out at its default.

    Args:
        argument: tritonserver's argument with its dashes, such as `--log-verbose`.
        value: form of its value. `{}` represents the setting.
        default: tritonserver's own value. A setting equal to it adds no argument.
    """
    return dataclasses.field(default=default, metadata={"argument": f"{argument}={value}"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Options of the embedded server whatever it loads, of `serve` as well.

    A setting with one argument of tritonserver is one line here, and an option of `serve` if people need it.

    Attributes:
        host: the address to bind. The loopback unless told otherwise.
        http_port: 0 takes a free port.
        grpc_port: 0 takes a free port.
        metrics_port: 0 takes a free port.
        security: TLS, and who may change the server: without more, who has its random key.
        rate_limiter: heed the `rate_limiter` of configurations (resources and priorities). Triton ignores it
            otherwise.
        cache_bytes: size of the response cache, for models whose configuration turns it on. 0 has none.
        verbosity: how much Triton logs of each request: 0 nothing, 1 a few lines, 2 and more everything.
    """

    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    security: ServerSecurity = dataclasses.field(default_factory=ServerSecurity)
    rate_limiter: bool = _handed_on("--rate-limit", "execution_count", default=False)
    cache_bytes: int = _handed_on("--cache-config", "local,size={}", default=0)
    verbosity: int = _handed_on("--log-verbose", "{}", default=0)

    def __post_init__(self) -> None:
        check_fields(self)
        for port in (self.http_port, self.grpc_port, self.metrics_port):
            check_range("the port", port, most=65535)

    @property
    def http_host(self) -> str:
        """The address of HTTP and metrics. They have no TLS."""
        return self.host if not self.security.tls or self.host in LOOPBACK else "127.0.0.1"

    def arguments(self) -> list[str]:
        """Return the arguments of tritonserver for all settings not at their default."""
        given = [
            (field, getattr(self, field.name)) for field in dataclasses.fields(self) if "argument" in field.metadata
        ]
        return [field.metadata["argument"].format(value) for field, value in given if value != field.default]


@dataclasses.dataclass(frozen=True)
class ServerOptions(ServerSettings):
    """How to run the embedded server.

    Attributes:
        repository: a folder, or a URL for tritonserver (`s3://...`).
        load: models to load at the start. `*` represents all of them, and implies `load_what_loads`.
        load_what_loads: list failed models in `EmbeddedServer.failures`, and serve the rest. Else one ends the start.
        refused: models not allowed to load -> why. They are in the failures from the start.
        log_path: where the log goes (appended). `None` keeps it in the user's cache.
        auto_complete: let the backend fill in missing fields of a config.pbtxt. Off, every load is about a second
            faster (Triton starts no extra stub for it), and a model whose config lacks inputs or outputs is refused.
        extra_args: more arguments for tritonserver, passed on unchecked behind our own.
        environment: more environment variables for it.
        record: let `running_server` find this server.
        sealed: folder with private copies of signed models, read in place of the repository. `None`: there are none.
    """

    repository: str
    load: tuple[str, ...] = ()
    load_what_loads: bool = False
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    log_path: Path | None = None
    auto_complete: bool = True
    extra_args: tuple[str, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict, metadata={"json": False})
    record: bool = True
    sealed: Path | None = None


def command_of(
    options: ServerOptions,
    ports: tuple[int, int, int],
    name: str,
    triton: TritonInstallation,
    backends: Path,
    prefix: str,
) -> list[str]:
    """Return tritonserver's command line.

    Args:
        options: settings of the server. Its ports are not read (see `ports`), its key is left out.
        ports: ports of HTTP, gRPC and metrics.
        name: the server's own name, unlike any other's.
        triton: the installed tritonserver and its libraries.
        backends: the backend directory, as `BackendDirectory.path`. A link replaces a path unsafe in a shell.
        prefix: beginning of its shared memory's names, from `shared_memory_prefix`.
    """
    repository = options.repository if options.sealed is None else str(options.sealed / COPIES)
    if "://" not in repository:
        repository = str(shell_safe(Path(repository).absolute()))
    command = [str(triton.binary), f"--id={name}", f"--model-repository={repository}"]
    command += ["--model-control-mode=explicit", f"--backend-directory={shell_safe(backends)}"]
    for protocol, host, port in zip(
        ("http", "grpc", "metrics"), (options.http_host, options.host, options.http_host), ports, strict=True
    ):
        command += [f"--{protocol}-address={host}", f"--{protocol}-port={port}"]
    # Otherwise one failed version keeps the whole server "not ready" for good (docs/triton-reload.md).
    command.append("--strict-readiness=false")
    # Backends written in Python use the settings of the python backend.
    command.append(f"--backend-config=python,shm-region-prefix-name={prefix}")
    if not options.auto_complete:
        command.append("--disable-auto-complete-config")
    if triton.caches is not None:
        command.append(f"--cache-directory={triton.caches}")
    return [*command, *options.arguments(), *_security_of(options.security), *options.extra_args]


def _security_of(security: ServerSecurity) -> list[str]:
    arguments = []
    if security.tls:
        arguments += ["--grpc-use-ssl=true", f"--grpc-server-cert={security.certificate}"]
        arguments.append(f"--grpc-server-key={security.key}")
    if security.client_authority is not None:
        arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={security.client_authority}"]
    return arguments


def restrictions_of(security: ServerSecurity) -> list[str]:
    """Return the arguments with the key: Triton takes it in no other way, and no other process may see them."""
    if security.restricted is None:
        return []
    setting = f"{','.join(RESTRICTED_APIS)}:{security.restricted[0]}={security.restricted[1]}"
    return [f"--grpc-restricted-protocol={setting}", f"--http-restricted-api={setting}"]


def environment_of(
    given: Mapping[str, str], triton: TritonInstallation, backends: BackendDirectory, *, remote: bool = False
) -> dict[str, str]:
    """Return tritonserver's environment: the needed part of this process's, since models' code runs in its stubs.

    Args:
        given: more variables, whatever they are.
        triton: the installed tritonserver and its libraries.
        backends: the assembled backend directory. Its `python_bin`, if any, becomes first in PATH.
        remote: its repository is in object storage, so it needs the credentials for it. Stubs do not get them.
    """
    own = os.environ
    kept = {name: value for name, value in own.items() if _PASSED.fullmatch(name) and not _SECRET.search(name)}
    for_store = {name: value for name, value in own.items() if remote and _FOR_OBJECTS.fullmatch(name)}
    withheld = sorted(for_store.keys() - kept.keys() - given.keys())
    environment = {**kept, **for_store, **given, WITHHELD: " ".join(withheld)}
    libraries = [str(folder) for folder in triton.libraries]
    if backends.python_bin is not None:
        python_library = libpython_directory()
        if python_library is not None:
            libraries.insert(0, str(python_library))
        environment["PATH"] = f"{backends.python_bin}:{environment.get('PATH', os.defpath)}"
    libraries += [entry for entry in environment.get("LD_LIBRARY_PATH", "").split(":") if entry]
    environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    return environment
