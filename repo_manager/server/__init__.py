"""The embedded tritonserver, its Python-based backends, and the model-control client."""

from repo_manager.server.backend_directory import backend_directory
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions, ServerSecurity, ServerSettings
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.guard import StubGuard
from repo_manager.server.records import RunningServer, running_server, running_servers
from repo_manager.server.transport import ClientOptions, Endpoint, IndexEntry, ServerMetadata, VersionStatistics

__all__ = [
    "ClientOptions",
    "EmbeddedServer",
    "Endpoint",
    "IndexEntry",
    "RunningServer",
    "ServerMetadata",
    "ServerOptions",
    "ServerSecurity",
    "ServerSettings",
    "StubGuard",
    "TritonClient",
    "VersionStatistics",
    "backend_directory",
    "running_server",
    "running_servers",
]
