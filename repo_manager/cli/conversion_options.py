"""Options of a conversion, for every command that converts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.types import Precision

if TYPE_CHECKING:
    from repo_manager.precision import ConvertOptions

__all__ = ["ConversionFlags", "PrecisionOption"]

PrecisionOption = Annotated[Precision, typer.Option("--precision", "-p", help="Compute precision of the version.")]


@dataclasses.dataclass(frozen=True)
class ConversionFlags:
    """Calibration data, gates and exceptions."""

    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="Representative inputs, needed for INT8: a .npz with one array per input, a folder of .npy "
            "files, a folder of images with its YAML, or module:function.",
            show_default=False,
        ),
    ] = None
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option("--keep-fp32", metavar="PATTERN", help="Layers that stay in FP32 (may be given often)."),
    ] = None
    auto_keep: Annotated[
        int, typer.Option("--auto-keep", min=0, help="Search up to N layers to keep so that the gate passes.")
    ] = 0
    max_drift: Annotated[
        float | None,
        typer.Option("--max-drift", min=0.0, help="Largest relative error of an output against the source."),
    ] = None

    def convert_options(self) -> ConvertOptions:
        """Return the library's options."""
        from repo_manager.precision import ConvertOptions

        return ConvertOptions(keep_fp32=tuple(self.keep_fp32 or ()), auto_keep=self.auto_keep, max_drift=self.max_drift)
