"""Record the names in a TensorRT's Python API: python record.py tensorrt FILE.json (any Python that can import it)."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import sysconfig
from pathlib import Path
from sys import argv

CLASSES = [
    "Builder",
    "IBuilderConfig",
    "IProgressMonitor",
    "IProfiler",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "IOptimizationProfile",
    "EngineInspector",
    "IHostMemory",
    "INetworkDefinition",
    "ILayer",
    "ITensor",
]

for library in sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib/*.so*")):
    with contextlib.suppress(OSError):  # some of CUDA's libraries want a driver
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
module = importlib.import_module(argv[1])
enums = {name: list(kind.__members__) for name, kind in sorted(vars(module).items()) if hasattr(kind, "__members__")}
classes = {
    name: sorted(word for word in dir(getattr(module, name)) if not word.startswith("__"))
    for name in CLASSES
    if hasattr(module, name)
}
record = {"module": argv[1], "version": module.__version__, "enums": enums, "classes": classes}
Path(argv[2]).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
