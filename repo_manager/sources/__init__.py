"""Where a model comes from: a path here, object storage, the web, MLflow, or a plugin of another package."""

from repo_manager.sources.fetching import Fetch, Fetched, Receiver
from repo_manager.sources.source import Source, open_source

__all__ = ["Fetch", "Fetched", "Receiver", "Source", "open_source"]
