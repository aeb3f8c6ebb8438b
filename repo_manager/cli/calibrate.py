"""Calibration data: calibrate make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import ModelFile, Output, check_outputs, parse_pairs, parse_shapes, writing
from repo_manager.pipeline.calibrating import CalibrationOptions, make_calibration
from repo_manager.report.tables import calibration_view

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class MakeFlags:
    """The choice of samples, and the way from images to inputs."""

    samples: int = option(
        "--samples", sets=(CalibrationOptions, "samples"), min=1, help="Largest number of samples, chosen at random."
    )
    seed: int = option("--seed", sets=(CalibrationOptions, "seed"), min=0, help="Seed of the random choice.")
    image: list[str] | None = option(
        "--image",
        metavar="KEY=VALUE",
        sets=(CalibrationOptions, "image"),
        read=lambda texts: parse_pairs(texts, "--image"),
        help="How images become inputs: resize, color, scale, mean, std, layout (may be given often).",
    )
    shape: list[str] | None = option(
        "--shape",
        metavar="NAME:SIZES",
        sets=(CalibrationOptions, "shapes"),
        read=parse_shapes,
        help="Size of images if the model leaves it open: x:3,224,224 (without the batch axis).",
    )


@grouped
def make_command(
    model: ModelFile,
    source: Annotated[
        Path,
        typer.Option(
            "--from", metavar="IMAGES|REQUESTS", help="A folder of images, or requests: .jsonl, .json, .npz, .npy."
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.npz|calibration.yaml|FOLDER",
            help="Where to write. A folder holds samples of different shapes. A YAML file records how images are read.",
        ),
    ],
    *,
    flags: MakeFlags,
    output: Output,
) -> None:
    """Make calibration data from images or recorded requests, for --calibration, loadtest --input-data and --sample.

    The same samples can then calibrate, prune and load the model. `add` records the file's digest in the manifest.
    """
    terminal = output.terminal()
    check_outputs(target)
    with writing(target):
        made = make_calibration(model, source, target, CalibrationOptions(**settings_of(CalibrationOptions, flags)))
    terminal.result(made, *calibration_view(made))


group = typer.Typer(rich_markup_mode="rich", help="Make calibration data from images or recorded requests.")
group.command("make")(make_command)
app.add_typer(group, name="calibrate")
