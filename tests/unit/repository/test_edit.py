from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.configuration import change_config, edit_config
from repo_manager.repository.stores import disk as disk_module
from repo_manager.triton_config.compare import ReloadEffect
from repo_manager.triton_config.config import parse_config, read_config
from repo_manager.triton_config.fields import get_field, set_fields

Put = Callable[..., Any]


@pytest.fixture
def path(root: Path, put: Put) -> Path:
    """A served model whose file holds a person's comment; its model file is not ONNX, so it is another backend's."""
    put()
    file = root / "m/config.pbtxt"
    file.write_text("# by hand\n" + file.read_text().replace('backend: "onnxruntime"', 'backend: "other"'))
    text = file.read_text() + 'default_model_filename: "model.onnx"  # plain\nfuture { x: 1 }\n'
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("field", "value", "effect"),
    [
        ("instance_group.count", "2", ReloadEffect.KEEP),
        ("instance_group[0].kind", "KIND_CPU", ReloadEffect.KEEP),
        ("version_policy.all", "{}", ReloadEffect.KEEP),
        ("dynamic_batching.max_queue_delay_microseconds", "500", ReloadEffect.RELOAD),
        ("dynamic_batching.preferred_batch_size", "[2, 4]", ReloadEffect.RELOAD),
        ("parameters.intra_op_thread_count", "4", ReloadEffect.RELOAD),
        ("max_batch_size", "8", ReloadEffect.NOTHING),
        ("response_cache.enable", "true", ReloadEffect.RELOAD),
    ],
)
def test_one_field_changes_and_the_rest_stays(
    root: Path, path: Path, field: str, value: str, effect: ReloadEffect
) -> None:
    before = path.read_text()
    change = change_config(root, "m", {field: value}, dry_run=True)
    assert path.read_text() == before
    assert change.effect == effect
    assert change.reloaded == ((1,) if effect == ReloadEffect.RELOAD else ())
    done = change_config(root, "m", {field: value})
    assert done.applied == (effect != ReloadEffect.NOTHING)
    after = path.read_text()
    assert after == change.after
    assert after.startswith("# by hand\n")
    assert "# plain\nfuture { x: 1 }\n" in after
    assert (done.diff == "") == (effect == ReloadEffect.NOTHING)


def test_what_was_set_is_what_is_got(root: Path, path: Path) -> None:
    change_config(root, "m", {"parameters.a.b": "x y", "dynamic_batching.preserve_ordering": "true"})
    config = read_config(path)
    assert get_field(config, "parameters.a.b") == "x y"
    assert get_field(config, "dynamic_batching.preserve_ordering") == "True"
    assert get_field(config, "instance_group.kind") == "KIND_AUTO"
    assert get_field(config, "input.dims") == "dims: [3]"
    assert get_field(config, "sequence_batching.max_sequence_idle_microseconds") == ""
    assert get_field(config, "parameters.none") == ""
    change_config(root, "m", {"parameters.a.b": None, "dynamic_batching.preserve_ordering": None})
    assert get_field(read_config(path), "parameters.a.b") == ""
    change_config(root, "m", {"dynamic_batching": None})
    assert not read_config(path).message().HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("nme", "x", "no field 'nme'"),
        ("dynamic_batching.x", "1", "no field 'x'"),
        ("max_batch_size", "many", "not a value"),
        ("max_batch_size", "-1", "max_batch_size is -1"),
        ("max_batch_size", '1 backend: "evil"', "not a value"),
        ("name.x", "1", "single value"),
        ("name", "other", "the folder's is 'm'"),
        ("version_policy.specific.versions", "[7]", "serves none"),
        ("dynamic_batching.preferred_batch_size", "[99]", "preferred batch size 99"),
        ("default_model_filename", "gone.onnx", "no file 'gone.onnx'"),
        ("instance_group[5].count", "1", "has 1 elements"),
        ("output[0].label_filename", "none.txt", "does not exist"),
        ("", "1", "no field"),
        ("input[0]", "1", "whole element"),
    ],
)
def test_what_would_not_load_is_not_written(root: Path, path: Path, field: str, value: str, message: str) -> None:
    before = path.read_text()
    with pytest.raises(ConfigError, match=message):
        change_config(root, "m", {field: value})
    assert path.read_text() == before


def test_parts_of_a_newer_triton_stay_in_a_field_that_changes_and_are_never_lost() -> None:
    text = "instance_group { count: 1 future: 2 }\n"
    assert set_fields(text, {"instance_group.count": "2"}, where="f") == text.replace("count: 1", "count: 2")
    for change in ({"instance_group": None}, {"instance_group": "[]"}):
        with pytest.raises(ConfigError, match=r"instance_group\.future would be lost"):
            set_fields(text, change, where="f")


def test_a_served_onnx_model_is_asked(root: Path, put: Put) -> None:
    put()  # Its model file is no ONNX at all.
    with pytest.raises(ConfigError, match="ONNX Runtime"):
        change_config(root, "m", {"max_batch_size": "4"})


def test_a_whole_text_is_taken_as_it_is(root: Path, path: Path) -> None:
    text = path.read_text().replace("count: 1", "count: 3  # three")
    change = edit_config(root, "m", text)
    assert change.applied
    assert change.fields == ("instance_group",)
    assert path.read_text() == text
    with pytest.raises(ConfigError, match="not a Triton model configuration"):
        edit_config(root, "m", "max_batch_size: x")
    with pytest.raises(ConfigError, match="'nme' is not in Triton's schema"):
        edit_config(root, "m", text + "nme: 1\n")
    assert path.read_text() == text


def test_a_broken_file_can_be_replaced(root: Path, path: Path) -> None:
    good = path.read_text().replace("future { x: 1 }\n", "")
    path.write_text("{")
    assert edit_config(root, "m", good).applied
    assert path.read_text() == good


def test_a_change_in_between_is_noticed(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk_module.repository_lock

    def slow(where: Path) -> Any:
        path.write_text(path.read_text() + "# other\n")
        return real(where)

    monkeypatch.setattr(disk_module, "repository_lock", slow)
    with pytest.raises(RepositoryError, match="changed at the same time"):
        change_config(root, "m", {"instance_group.count": "2"})
    assert parse_config(path.read_text()).message().instance_group[0].count == 1
