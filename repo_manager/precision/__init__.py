"""FP16 and INT8 conversions of ONNX graphs, their calibration data and their post-conditions."""

from repo_manager.precision.calibration.load import CalibrationData, load_calibration
from repo_manager.precision.convert import convert
from repo_manager.precision.options import Check, Conversion, ConvertOptions, KeptNode
from repo_manager.stats.drift import OutputDrift

__all__ = [
    "CalibrationData",
    "Check",
    "Conversion",
    "ConvertOptions",
    "KeptNode",
    "OutputDrift",
    "convert",
    "load_calibration",
]
