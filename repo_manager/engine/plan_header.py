"""What the first bytes of a plan say of it, without a GPU and without the library.

Layout of the first 28 bytes, little endian: tag (4), serialization version (4), then 16 bytes that differ between the
two libraries, then the library's version, one byte a part. Source for TensorRT: `printPlanVersion` in
samples/common/sampleEngines.cpp of NVIDIA/TensorRT (tag `ftrt`, serialization version 0). For TensorRT-RTX the tag is
`vtrt`, and a second one at 28 is followed by a bit for each compute capability; seen in engines that 1.4.0 and
1.7.1 built for each of them in turn (tests/integration/test_engine_rtx.py repeats it).
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

from repo_manager.errors import EngineError
from repo_manager.types import Backend

__all__ = ["HEADER_BYTES", "PlanHeader", "parse_plan_header", "read_plan_header"]

_TAGS = {b"ftrt": Backend.TENSORRT, b"vtrt": Backend.TENSORRT_RTX}
HEADER_BYTES = 36
"""How many of a plan's first bytes are read."""
_VERSION = slice(24, 28)
_RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclasses.dataclass(frozen=True)
class PlanHeader:
    """The head of a plan.

    Attributes:
        backend: which Triton backend can load it.
        version: of the library that built it, for instance `10.13.3.9`.
        compute_capabilities: GPUs it was built for; empty where the header does not tell (TensorRT).
    """

    backend: Backend
    version: str
    compute_capabilities: tuple[str, ...]


def read_plan_header(path: Path) -> PlanHeader:
    """Read the head of a TensorRT plan or a TensorRT-RTX engine.

    Raises:
        EngineError: it is neither, or of a layout that is not known here.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return parse_plan_header(file.read(HEADER_BYTES), where=str(path))


def parse_plan_header(head: bytes, *, where: str) -> PlanHeader:
    """Read a plan's first bytes.

    Args:
        head: `HEADER_BYTES` of them, or more.
        where: the plan's name, for an error.

    Raises:
        EngineError: it is no plan, or of a layout that is not known here.
    """
    backend = _TAGS.get(head[:4])
    if backend is None or len(head) < HEADER_BYTES:
        raise EngineError(
            f"{where}: not a TensorRT plan: it starts with {head[:4]!r}, expected b'ftrt' (TensorRT) or b'vtrt' "
            "(TensorRT-RTX)",
            hint="Give a file that IBuilder.build_serialized_network or trtexec --saveEngine wrote.",
        )
    (layout,) = struct.unpack_from("<I", head, 4)
    if layout != 0:
        raise EngineError(f"{where}: a plan of serialization version {layout}; this program knows version 0")
    return PlanHeader(backend, ".".join(str(part) for part in head[_VERSION]), _rtx_targets(backend, head))


def _rtx_targets(backend: Backend, head: bytes) -> tuple[str, ...]:
    if backend is not Backend.TENSORRT_RTX or head[28:32] != b"vtrt":
        return ()
    (bits,) = struct.unpack_from("<I", head, 32)
    return tuple(target for index, target in enumerate(_RTX_TARGETS) if bits >> index & 1)
