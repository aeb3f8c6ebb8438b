"""Options of a conversion, for every command that converts."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import typer

from repo_manager.cli.option_groups import option, settings_of
from repo_manager.precision import ConvertOptions
from repo_manager.types import Precision

__all__ = ["ConversionFlags", "PrecisionOption"]

PrecisionOption = Annotated[Precision, typer.Option("--precision", "-p", help="Compute precision of the version.")]


@dataclasses.dataclass(frozen=True)
class ConversionFlags:
    """Calibration data, gates and exceptions."""

    PANEL: ClassVar[str] = "Conversion"
    calibration: str | None = option(
        "--calibration",
        metavar="DATA",
        help="Representative inputs, needed for INT8: a .npz with one array per input, a folder of .npy "
        "files, a folder of images with its YAML, or module:function.",
    )
    keep_fp32: list[str] | None = option(
        "--keep-fp32",
        metavar="PATTERN",
        sets=(ConvertOptions, "keep_fp32"),
        help="Layers that stay in FP32 (may be given often).",
    )
    auto_keep: int = option(
        "--auto-keep",
        sets=(ConvertOptions, "auto_keep"),
        min=0,
        help="Search up to N layers to keep so that the gate passes.",
    )
    allow_unchanged: bool = option(
        "--allow-unchanged",
        sets=(ConvertOptions, "allow_unchanged"),
        help="Publish INT8 also when no layer could become INT8.",
    )
    max_drift: float | None = option(
        "--max-drift",
        sets=(ConvertOptions, "max_drift"),
        min=0.0,
        help="Largest relative error of an output against the source [default: the precision's].",
    )

    def convert_options(self) -> ConvertOptions:
        """Return the library's options."""
        return ConvertOptions(**settings_of(ConvertOptions, self))
