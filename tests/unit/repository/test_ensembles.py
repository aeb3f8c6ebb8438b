"""Ensembles in a repository: their parts stay, and a misfit is found wherever a repository is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.python_models import write_python_model

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import change_config
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.scan import scan
from repo_manager.repository.stores.disk import DiskStore
from repo_manager.repository.transfer import CopyOptions, copy_needed, copy_version
from repo_manager.repository.verify import verify
from repo_manager.triton_config.problems import Severity

IO = (
    "max_batch_size: 8\n"
    'input { name: "x" data_type: TYPE_FP32 dims: 4 }\noutput { name: "y" data_type: TYPE_FP32 dims: 4 }\n'
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`part` in versions 1 to 4 with 1 and 4 served, and `whole`, an ensemble with version 1 pinned."""
    for version in (1, 2, 3, 4):
        (tmp_path / "part" / str(version)).mkdir(parents=True)
        (tmp_path / "part" / str(version) / "model.py").write_text("")
    policy = "version_policy { specific { versions: [1, 4] } }\n"
    (tmp_path / "part" / "config.pbtxt").write_text('backend: "python"\n' + policy + IO)
    (tmp_path / "whole" / "1").mkdir(parents=True)
    write_ensemble(tmp_path, "part", 1)
    return tmp_path


def write_ensemble(root: Path, model: str, version: int) -> None:
    step = (
        f'step {{ model_name: "{model}" model_version: {version} '
        'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } }'
    )
    text = f'platform: "ensemble"\n{IO}ensemble_scheduling {{ {step} }}\n'
    (root / "whole" / "config.pbtxt").write_text(text)


def errors(root: Path, name: str | None = None) -> list[str]:
    found = verify(root, name, models=False)
    return [f"{each.where}: {each.what}" for each in found if each.severity is Severity.ERROR]


def versions(root: Path) -> list[int]:
    (part,) = (entry for entry in scan(root) if entry.name == "part")
    return [entry.version for entry in part.versions]


def test_gc_keeps_what_an_ensemble_pins(root: Path) -> None:
    write_ensemble(root, "part", 2)
    assert gc(root, keep=1).removals[0].versions == (3,)
    assert versions(root) == [1, 2, 4]


@pytest.mark.parametrize("act", [lambda root: gc(root, keep=1), lambda root: remove(root, "part", 2, force=False)])
def test_what_an_ensemble_pins_meanwhile_stays(
    root: Path, act: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command changes the ensemble after it was read and before the lock is held."""
    lock = DiskStore.exclusive

    def late(store: DiskStore, name: str) -> contextlib.AbstractContextManager[None]:
        write_ensemble(root, "part", 2)
        return lock(store, name)

    monkeypatch.setattr(DiskStore, "exclusive", late)
    with contextlib.suppress(RepositoryError):
        act(root)
    assert 2 in versions(root)


def test_a_pinned_version_is_removed_by_force_only(root: Path) -> None:
    write_ensemble(root, "part", 2)
    with pytest.raises(RepositoryError, match="part:2 is pinned by the ensemble whole") as caught:
        remove(root, "part", 2)
    assert "--force" in str(caught.value.hint)
    assert remove(root, "part", 2, force=True).in_use == ("part:2 is pinned by the ensemble whole",)
    assert errors(root) == [
        "whole/config.pbtxt: needs version 2 of 'part', which is not served; 'part' serves 1, 4",
    ]


def test_a_part_of_an_ensemble_is_not_removed_whole(root: Path) -> None:
    write_ensemble(root, "part", -1)
    with pytest.raises(RepositoryError, match="part is needed by whole"):
        remove(root, "part", dry_run=True)
    assert remove(root, "whole", force=True).whole_model
    remove(root, "part", force=True)
    assert scan(root) == ()


def test_verify_compares_ensembles_with_their_models(root: Path) -> None:
    assert errors(root) == []
    write_ensemble(root, "nobody", 1)
    missing = ["whole/config.pbtxt: needs the model 'nobody', which is not in the repository"]
    assert errors(root) == missing == errors(root, "whole")
    assert errors(root, "part") == []
    write_ensemble(root, "part", 3)
    unserved = ["whole/config.pbtxt: needs version 3 of 'part', which is not served; 'part' serves 1, 4"]
    assert errors(root, "part") == unserved == errors(root, "whole")


def test_a_change_that_an_ensemble_cannot_follow_is_named(root: Path) -> None:
    (found,) = change_config(root, "part", {"max_batch_size": "4"}, dry_run=True).problems
    assert (found.where, found.rule, found.severity) == ("whole/config.pbtxt", "ensemble-batch", Severity.WARNING)
    (lost,) = change_config(root, "part", {"version_policy": "{ specific { versions: 4 } }"}, dry_run=True).problems
    assert "needs version 1 of 'part'" in lost.what
    with pytest.raises(ConfigError, match="needs the model 'nobody'"):
        change_config(root, "whole", {"ensemble_scheduling.step.model_name": "nobody"})
    assert errors(root) == []


def test_what_was_wrong_before_a_change_does_not_stand_in_its_way(root: Path) -> None:
    write_ensemble(root, "nobody", 1)
    assert change_config(root, "whole", {"parameters.note": "a"}).applied


def test_a_copy_takes_along_what_is_missing_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name, kind in (("scale", "scale"), ("opt", "opt"), ("ens", "ens"), ("bls", "bls")):
        write_python_model(source, name, kind=kind, versions=(1, 2))
        adopt(source, name)
    planned = copy_needed(source, "ens", target, dry_run=True)
    assert sorted(each.source for each in planned) == ["opt:2", "scale:2"]
    assert not target.exists()
    copy_version(source, "scale", 1, target)
    assert [each.source for each in copy_needed(source, "ens", target)] == ["opt:2"]
    copy_version(source, "ens", 2, target)
    assert [each.name for each in scan(target)] == ["ens", "opt", "scale"]
    assert copy_needed(source, "bls", target) == ()
    assert [each.source for each in copy_needed(source, "bls", tmp_path / "other")] == ["scale:2"]
    assert copy_needed(source, "scale", tmp_path / "third") == ()


def test_a_copy_takes_along_the_versions_that_are_asked_for_by_number(tmp_path: Path) -> None:
    source, target, other = (tmp_path / name for name in ("source", "target", "other"))
    for name, kind in (("scale", "scale"), ("opt", "opt"), ("ens", "ens")):
        write_python_model(source, name, kind=kind, versions=(1, 2, 3))
    config = source / "ens" / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale" model_version: 2'))
    for name in ("scale", "opt", "ens"):
        adopt(source, name)
    copy_version(source, "scale", 3, target)
    copy_version(source, "opt", 1, target)
    assert [each.source for each in copy_needed(source, "ens", target)] == ["scale:2"]
    assert copy_needed(source, "ens", target) == ()
    renumbered = copy_needed(source, "ens", other, keep_number=False)
    assert sorted((each.source, each.version) for each in renumbered) == [("opt:3", 1), ("scale:2", 2)]


def pinned_ensemble(root: Path, versions: tuple[int, ...]) -> None:
    """Write an ensemble of scale:2, with manifests."""
    for name, kind in (("scale", "scale"), ("opt", "opt"), ("ens", "ens")):
        write_python_model(root, name, kind=kind, versions=versions)
        adopt(root, name)
    config = root / "ens" / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale" model_version: 2'))


def test_a_copy_names_a_version_asked_for_by_number_that_is_another_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    pinned_ensemble(source, (1, 2))
    copy_version(source, "scale", 2, target)
    assert [each.source for each in copy_needed(source, "ens", target, dry_run=True)] == ["opt:2"]
    for file in ("model.py", "manifest.json"):
        (target / "scale" / "2" / file).unlink()
    (target / "scale" / "2" / "model.py").write_text("# another\n")
    with pytest.raises(RepositoryError, match=r"scale:2 in .*target has no manifest"):
        copy_needed(source, "ens", target)
    adopt(target, "scale")
    with pytest.raises(RepositoryError, match=r"scale:2 in .* has other content than the version copied"):
        copy_needed(source, "ens", target)
    assert [each.name for each in scan(target)] == ["scale"]


def test_a_copy_brings_a_version_under_the_number_asked_for_although_it_is_there_under_another(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    pinned_ensemble(source, (2,))
    copy_version(source, "scale", 2, target, CopyOptions(keep_number=False))
    assert (target / "scale" / "1").is_dir()
    assert sorted((each.source, each.version) for each in copy_needed(source, "ens", target)) == [
        ("opt:2", 2),
        ("scale:2", 2),
    ]
    assert [entry.version for entry in scan(target)[-1].versions] == [1, 2]


def test_verify_names_a_model_that_code_asks_and_that_is_missing(tmp_path: Path) -> None:
    write_python_model(tmp_path, "bls")
    step = 'step { model_name: "bls" model_version: -1 input_map { key: "X" value: "X" } '
    text = (tmp_path / "bls" / "config.pbtxt").read_text().partition("parameters")[0].replace('backend: "python"', "")
    (tmp_path / "outer" / "1").mkdir(parents=True)
    (tmp_path / "outer" / "config.pbtxt").write_text(
        f'platform: "ensemble"\n{text}ensemble_scheduling {{ {step}output_map {{ key: "Y" value: "Y" }} }} }}\n'
    )
    found = [each for each in verify(tmp_path, models=False) if each.rule == "ensemble-model"]
    assert [(each.where, each.what, each.severity) for each in found] == [
        ("bls/config.pbtxt", "its code asks the model 'scale', which is not in the repository", Severity.WARNING)
    ]
    write_python_model(tmp_path, "scale")
    assert not [each for each in verify(tmp_path, models=False) if each.rule == "ensemble-model"]
