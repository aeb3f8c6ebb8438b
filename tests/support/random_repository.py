"""Random changes of a model's folder, for tests of predictions against a real server."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        tensors = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", tensor)]) for tensor in tensors]
"""
BROKEN = "this is no Python\n"
FUTURE_S = 4_000_000_000


class RandomModel:
    """A model of Triton's python backend."""

    def __init__(self, repository: Path, name: str, rng: random.Random, *, bytecode: bool = False) -> None:
        self.folder, self.name, self.rng, self.bytecode = repository / name, name, rng, bytecode
        self.fields = {"batch": "max_batch_size: 4", "instances": "instance_group { count: 1 kind: KIND_CPU }"}
        self.policy = "version_policy { specific { versions: [1, 2] } }"
        for version in (1, 2):
            self.write_version(version)
        self.write_config()

    def write_version(self, version: int) -> None:
        folder = self.folder / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.py").write_text(MODEL)
        if self.bytecode:
            return
        # Blocks Python's bytecode, which would change the folder after each load.
        (folder / "__pycache__").touch()

    def config_text(self) -> str:
        fixed = (
            'backend: "python"',
            'input { name: "x" data_type: TYPE_FP32 dims: 1 }',
            f'output {{ name: "y" data_type: TYPE_FP32 dims: 1 {self.fields.get("labels", "")} }}',
        )
        others = (text for key, text in self.fields.items() if key != "labels")
        return "\n".join((*fixed, *others, self.policy)) + "\n"

    def write_config(self) -> None:
        (self.folder / "config.pbtxt").write_text(self.config_text())

    @property
    def versions(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name in "12345" and path.is_dir())

    @property
    def unloadable(self) -> dict[int, str]:
        """Version -> why it cannot load, as a checker of files would see it."""
        found = {}
        for version in self.versions:
            path = self.folder / str(version) / "model.py"
            if not path.is_file():
                found[version] = "model.py is missing"
            elif path.read_text() == BROKEN:
                found[version] = "model.py is broken"
        label = self.folder / "labels.txt"
        if "labels" in self.fields and not label.is_file():
            found = dict.fromkeys(self.versions, "labels.txt is missing")
        return found

    def change(self) -> str:
        """Make one random change; return its name."""
        changes, weights = zip(*CHANGES, strict=True)
        change = self.rng.choices(changes, weights)[0]
        change(self)
        return str(change.__name__)

    def some_version(self) -> Path:
        return self.folder / str(self.rng.choice(self.versions or [1]))

    def some_file(self) -> Path:
        files = [path for path in self.some_version().rglob("*") if path.is_file()]
        return self.rng.choice(sorted(files)) if files else self.folder / "config.pbtxt"


def add_version(model: RandomModel) -> None:
    model.write_version(model.rng.randint(1, 5))


def remove_version(model: RandomModel) -> None:
    if len(model.versions) > 1:
        shutil.rmtree(model.some_version())


def touch_file(model: RandomModel) -> None:
    model.some_file().touch()


def rewrite_file(model: RandomModel) -> None:
    path = model.some_file()
    path.write_bytes(path.read_bytes())


def restore_times(model: RandomModel) -> None:
    path = model.some_file()
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_mode(model: RandomModel) -> None:
    path = model.some_file()
    path.chmod(path.stat().st_mode ^ 0o010)


def hard_link(model: RandomModel) -> None:
    path = model.some_file()
    other = model.folder.parent.parent / f"backup-{model.rng.getrandbits(60)}"
    other.hardlink_to(path)


def add_file_to_version(model: RandomModel) -> None:
    folder = model.some_version()
    if folder.is_dir():
        (folder / f"extra-{model.rng.randint(1, 3)}").write_text("x")


def add_nested_file(model: RandomModel) -> None:
    folder = model.some_version()
    if folder.is_dir():
        (folder / "deep" / "deeper").mkdir(parents=True, exist_ok=True)
        (folder / "deep" / "deeper" / "file").write_text("x")


def remove_extra(model: RandomModel) -> None:
    for path in model.some_version().glob("extra-*"):
        path.unlink()


def change_policy(model: RandomModel) -> None:
    numbers = sorted(model.rng.sample(range(1, 6), model.rng.randint(1, 3)))
    latest = f"version_policy {{ latest {{ num_versions: {model.rng.randint(1, 2)} }} }}"
    policies = [f"version_policy {{ specific {{ versions: {numbers} }} }}"] * 3
    model.policy = model.rng.choice([*policies, latest, "version_policy { all {} }", ""])
    model.write_config()


def change_instances(model: RandomModel) -> None:
    count = model.rng.choice((1, 1, 2))
    model.fields["instances"] = f"instance_group {{ count: {count} kind: KIND_CPU }}"
    model.write_config()


def change_parameter(model: RandomModel) -> None:
    value = model.rng.randint(0, 2)
    model.fields["parameter"] = f'parameters {{ key: "a" value {{ string_value: "{value}" }} }}' if value else ""
    model.write_config()


def change_batch(model: RandomModel) -> None:
    model.fields["batch"] = model.rng.choice(("max_batch_size: 4", "max_batch_size: 8"))
    model.write_config()


def change_scheduler(model: RandomModel) -> None:
    schedulers = ("", "dynamic_batching {}", "dynamic_batching { max_queue_delay_microseconds: 100 }")
    model.fields["scheduler"] = model.rng.choice((*schedulers, "dynamic_batching { preferred_batch_size: [4] }"))
    model.write_config()


def say_the_default(model: RandomModel) -> None:
    """Write out, or leave out, the fields Triton fills in by itself."""
    defaults = (f'name: "{model.name}"', "optimization { input_pinned_memory { enable: true } }", "optimization {}", "")
    model.fields["default"] = model.rng.choice((*defaults, "# a comment"))
    model.write_config()


def change_optimization(model: RandomModel) -> None:
    choices = ("optimization { priority: PRIORITY_MAX }", "optimization { input_pinned_memory { enable: false } }")
    model.fields["default"] = model.rng.choice(choices)
    model.write_config()


def touch_config(model: RandomModel) -> None:
    path = model.folder / "config.pbtxt"
    if path.exists():
        path.touch()


def break_config(model: RandomModel) -> None:
    broken = ("max_batch_size: many\n", 'name: "another"\n' + model.config_text(), "no_such_field: 1\n")
    (model.folder / "config.pbtxt").write_text(model.rng.choice(broken))


def remove_config(model: RandomModel) -> None:
    (model.folder / "config.pbtxt").unlink(missing_ok=True)


def mend_config(model: RandomModel) -> None:
    model.write_config()


def change_labels(model: RandomModel) -> None:
    """Labels beside the versions: they appear, change, are named by the configuration, or vanish."""
    path = model.folder / "labels.txt"
    choice = model.rng.randint(0, 3)
    if choice == 0 and "labels" not in model.fields:
        path.unlink(missing_ok=True)
    elif choice == 1:
        model.fields["labels"] = 'label_filename: "labels.txt"'
        path.write_text("a\n")
        model.write_config()
    elif choice == 2:
        model.fields.pop("labels", None)
        model.write_config()
    else:
        path.write_text("b\n")


def stray_beside(model: RandomModel) -> None:
    name = model.rng.choice(("README.md", ".hidden", "7", "configs", "config.pbtxt.bak", "v2"))
    path = model.folder / name
    if path.exists():
        path.unlink()
    else:
        path.write_text("x")


def stray_folder(model: RandomModel) -> None:
    # Not `5.tmp`: it counts as version 5, whose load may never return (the stub dies without its model.py).
    path = model.folder / model.rng.choice(("notes", "04", "warmup", "v3", "x.tmp"))
    if path.exists():
        shutil.rmtree(path)
    else:
        path.mkdir()
        (path / "file").write_text("x")


def lookalike(model: RandomModel) -> None:
    """A prefix of `config.pbtxt` as a name: Triton takes it for the configuration, and then sees no times at all."""
    path = model.folder / model.rng.choice(("config", "c"))
    if path.exists():
        path.unlink()
    else:
        path.write_text("x")


def dangling_link(model: RandomModel) -> None:
    path = model.folder / "link"
    if path.is_symlink():
        path.unlink()
    else:
        path.symlink_to("nowhere")


def clear_strays(model: RandomModel) -> None:
    for name in ("config", "c", "link", "v3"):
        path = model.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def break_version(model: RandomModel) -> None:
    folder = model.some_version()
    if folder.is_dir():
        (folder / "model.py").write_text(BROKEN)


def mend_versions(model: RandomModel) -> None:
    for version in model.unloadable:
        model.write_version(version)


def date_ahead(model: RandomModel) -> None:
    os.utime(model.some_file(), (FUTURE_S, FUTURE_S))


def nothing(model: RandomModel) -> None:
    """Change nothing."""


CHANGES: list[tuple[Callable[[RandomModel], None], int]] = [
    (add_version, 6),
    (remove_version, 4),
    (touch_file, 3),
    (rewrite_file, 3),
    (restore_times, 2),
    (change_mode, 2),
    (hard_link, 1),
    (add_file_to_version, 3),
    (add_nested_file, 2),
    (remove_extra, 2),
    (change_policy, 10),
    (change_instances, 3),
    (change_parameter, 3),
    (change_batch, 3),
    (change_scheduler, 4),
    (say_the_default, 4),
    (change_optimization, 2),
    (touch_config, 2),
    (break_config, 2),
    (remove_config, 1),
    (mend_config, 6),
    (change_labels, 3),
    (stray_beside, 4),
    (stray_folder, 4),
    (lookalike, 1),
    (dangling_link, 1),
    (clear_strays, 6),
    (break_version, 2),
    (mend_versions, 5),
    (date_ahead, 1),
    (nothing, 2),
]
