"""Inference for applications: requests spread over a model's versions by weight or key, through every deployment."""

from repo_manager.client.versioned import Answer, VersionedClient
from repo_manager.client.weights import VersionWeights, WeightsSource, published_name, published_weights, read_weights

__all__ = [
    "Answer",
    "VersionWeights",
    "VersionedClient",
    "WeightsSource",
    "published_name",
    "published_weights",
    "read_weights",
]
