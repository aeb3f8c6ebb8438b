from __future__ import annotations

import subprocess
import sys


def test_a_worker_imports_nothing_heavy():
    """A million requests stay under 150 MB of client memory because the worker is small."""
    script = (
        "import sys, repo_manager.loadtest.worker.process;"
        "heavy = ('onnx', 'onnxruntime', 'grpc', 'tritonclient', 'PIL', 'rich');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_load_test_without_images_needs_no_onnx():
    script = "import sys, repo_manager.loadtest.run; print('onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
