"""A failed build's log, as one error with the next step."""

from __future__ import annotations

import re
from pathlib import Path

from repo_manager.engine.build_log import BuildLog
from repo_manager.engine.capabilities import Capabilities
from repo_manager.errors import EngineError

__all__ = ["build_error"]

_TURING = re.compile(r"for Turing \(SM75\)")
_HINTS = (
    (
        re.compile(r"workspace limit|requires workspace memory|insufficient workspace", re.IGNORECASE),
        "Give the builder more scratch memory with --workspace, or leave the option out.",
    ),
    (_TURING, "Leave 7.5 out of --compute-capability, or use --precision fp16."),
    (
        re.compile(r"timing cache.*miss|cache miss", re.IGNORECASE),
        "The timing cache lacks a kernel of this model: build once without --deterministic, then again with it.",
    ),
    (
        re.compile(r"CUDA_SUCCESS|cudaError|CUDA initialization|no CUDA-capable device", re.IGNORECASE),
        "This needs a GPU with a driver on the building machine (nvidia-smi shows it). Without one, leave out "
        "--strip, --refit and --optimization-level.",
    ),
    (re.compile(r"out of memory|OutOfMemory", re.IGNORECASE), "Give less with --workspace or --max-batch-size."),
    (
        re.compile(r"optimization profile|kMIN|dimension", re.IGNORECASE),
        "A smallest shape may be too small for the model: give the range with --shape-range NAME:MIN:OPT:MAX.",
    ),
)
_FALLBACK = "Try --precision fp32 to see whether the conversion matters, or use --backend onnxruntime."
_PLACE = re.compile(r" In \w+ at /\S+")


def build_error(path: Path, log: BuildLog, able: Capabilities) -> EngineError:
    """Describe why `build_serialized_network` returned nothing.

    Args:
        path: the model.
        log: of that build.
        able: the library.
    """
    reasons = [_PLACE.sub("", message).strip() for message in dict.fromkeys(log.errors)]
    text = "\n".join(f"  {reason}" for reason in reasons[:3]) or "  it gave no reason"
    everything = " ".join(reasons)
    hint = next((hint for pattern, hint in _HINTS if pattern.search(everything)), _FALLBACK)
    return EngineError(f"{path}: {able.backend} {able.version} cannot build this model:\n{text}", hint=hint)
