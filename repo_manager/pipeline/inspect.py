"""One ONNX file: its inputs and outputs, and how sparse its weights are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_manager.errors import RepositoryError
from repo_manager.onnx_model.model import load_model, parameter_count
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.optional import deferred
from repo_manager.sparsity import SparsityReport, sparsity_report
from repo_manager.summary import Summarized
from repo_manager.types import Digest, StrPath

if TYPE_CHECKING:
    from repo_manager.repository import manifest as manifests
else:
    manifests = deferred("repo_manager.repository.manifest")

__all__ = ["Inspection", "inspect_model"]


@dataclasses.dataclass(frozen=True, repr=False)
class Inspection(Summarized):
    """The result of `repo-manager inspect`.

    Attributes:
        path: the ONNX file inspected, as given to `inspect_model`.
        digest: of the file and its external data.
        size_bytes: size of the file and its external data.
        signature: inputs and outputs with types and shapes, and the opset.
        parameters: the number of stored weight values.
        sparsity: the 2:4 state of every weight.
        pruned: result of pruning, from the manifest of the version the file belongs to. `None`: it does not say.
    """

    path: Path
    digest: Digest
    size_bytes: int
    signature: Signature
    parameters: int
    sparsity: SparsityReport
    pruned: Mapping[str, Any] | None = None

    def _summary(self) -> Mapping[str, Any]:
        signature = self.signature
        return {
            "model": self.path,
            "inputs": ", ".join(map(str, signature.inputs)),
            "outputs": ", ".join(map(str, signature.outputs)),
            "parameters": f"{self.parameters:,}",
            "2:4": self.sparsity.share_text,
        }


def inspect_model(path: StrPath, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Inspection:
    """Read a model and judge its weights. Changes nothing.

    Args:
        path: the ONNX file. External data is read from its folder. In a version's folder, the manifest is read, too.
        shapes: input name -> shape, for the multiply-accumulate counts. `None` counts at batch 1.

    Raises:
        ModelError: the file is not a valid ONNX model.
    """
    path = Path(path)
    model = load_model(path)
    return Inspection(
        path=path,
        digest=model.digest,
        size_bytes=model.size_bytes,
        signature=signature_of(model),
        parameters=parameter_count(model),
        sparsity=sparsity_report(model, shapes=shapes),
        pruned=_pruned(path),
    )


def _pruned(path: Path) -> Mapping[str, Any] | None:
    """Read the result of pruning, if the file is in a version."""
    if not path.parent.name.isdigit():
        return None  # Triton's version folders are numbers
    try:
        manifest = manifests.read_manifest(path.parent)
    except RepositoryError:
        return None
    return None if manifest is None else manifest.extra.get("pruned")
