from __future__ import annotations

import subprocess
import sys

import repo_manager.loadtest


def test_a_worker_imports_nothing_heavy():
    """A million requests stay under 150 MB of client memory because the worker is small."""
    script = (
        "import sys, repo_manager.loadtest.worker;"
        "heavy = ('onnx', 'onnxruntime', 'grpc', 'tritonclient', 'PIL', 'rich');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_load_test_without_images_needs_no_onnx():
    script = "import sys, repo_manager.loadtest.run; print('onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_public_name_is_there():
    for name in repo_manager.loadtest.__all__:
        assert getattr(repo_manager.loadtest, name).__module__.startswith("repo_manager.loadtest")
    assert not hasattr(repo_manager.loadtest, "no_such_name")
