from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.tags import (
    model_state,
    previous_deployment,
    record_deployment,
    remove_tag,
    resolve_version,
    set_tag,
)
from repo_manager.repository.verify import verify

Put = Callable[..., Any]


def versions(root: Path, name: str = "m") -> list[int]:
    return [entry.version for entry in find_model(root, name).versions]


@pytest.fixture
def five(root: Path, put: Put) -> Path:
    for _ in range(5):
        put()
    return root


def test_a_removed_number_is_never_given_out_again(five: Path, put: Put) -> None:
    removal = remove(five, "m", 5)
    assert removal.applied
    assert removal.size_bytes > 8600
    assert versions(five) == [1, 2, 3, 4]
    assert put().version == 6
    assert verify(five, models=False) == ()


def test_a_whole_model_goes_at_once_and_its_numbers_go_on(five: Path, put: Put) -> None:
    record_deployment(five, "m", 1)
    with pytest.raises(RepositoryError, match="m:1 is selected by the version policy and was deployed last"):
        remove(five, "m")
    assert remove(five, "m", force=True).whole_model
    assert scan(five) == ()
    assert put().version == 6
    assert put().first is False


@pytest.mark.parametrize("life", ["only added", "undeployed"])
def test_a_model_that_nobody_serves_is_removed_unless_a_tag_keeps_it(five: Path, life: str) -> None:
    if life == "undeployed":
        for version in (2, 1, None):
            record_deployment(five, "m", version)
    set_tag(five, "m", "prod", 3)
    with pytest.raises(RepositoryError, match=r"^in use: m:3 has the tag 'prod'\n"):
        remove(five, "m")
    remove_tag(five, "m", "prod")
    assert remove(five, "m").whole_model
    assert scan(five) == ()


@pytest.mark.parametrize("use", ["served", "tag", "current", "previous"])
def test_what_is_in_use_stays_unless_told(five: Path, use: str) -> None:
    if use == "served":
        set_served_versions(five, "m", (1, 3))
    elif use == "tag":
        set_tag(five, "m", "prod", 3)
    else:
        record_deployment(five, "m", 3)
        if use == "previous":
            record_deployment(five, "m", 4)
    with pytest.raises(RepositoryError, match="in use: m:3"):
        remove(five, "m", 3)
    assert versions(five) == [1, 2, 3, 4, 5]
    removal = remove(five, "m", 3, force=True)
    assert len(removal.in_use) == 1
    assert versions(five) == [1, 2, 4, 5]
    assert find_model(five, "m").selected == (1,)
    assert "prod" not in model_state(five, "m").tags
    assert verify(five, models=False) == ()


def test_the_last_served_version_cannot_go_alone(five: Path) -> None:
    with pytest.raises(RepositoryError, match="would serve nothing"):
        remove(five, "m", 1, force=True)
    assert versions(five) == [1, 2, 3, 4, 5]


def test_under_a_latest_policy_an_older_version_takes_over(five: Path) -> None:
    path = five / "m/config.pbtxt"
    path.write_text(path.read_text().replace("specific {\n    versions: [1]", "latest {\n    num_versions: 1"))
    before = path.read_text()
    with pytest.raises(RepositoryError, match="m:5 is selected by the version policy"):
        remove(five, "m", 5)
    remove(five, "m", 5, force=True)
    assert path.read_text() == before
    assert find_model(five, "m").selected == (4,)


def test_the_only_version_takes_its_model_along(root: Path, put: Put) -> None:
    put()
    assert remove(root, "m", 1, force=True).whole_model
    assert scan(root) == ()


def test_a_dry_run_changes_nothing(five: Path) -> None:
    before = sorted(five.rglob("*"))
    assert not remove(five, "m", 4, dry_run=True).applied
    assert not gc(five, keep=1, dry_run=True).applied
    assert set_tag(five, "m", "t", 2, dry_run=True) is None
    assert sorted(five.rglob("*")) == before
    assert model_state(five, "m").tags == {}


def test_what_does_not_exist_cannot_be_removed(five: Path) -> None:
    with pytest.raises(RepositoryError, match="no version 9"):
        remove(five, "m", 9)
    with pytest.raises(RepositoryError, match="no model 'n'"):
        remove(five, "n")
    for name in ("../models/m", "..", ".", "", "m/1", "m\0"):
        with pytest.raises(RepositoryError, match="no model"):
            remove(five, name, force=True)
    (five / "link").symlink_to("m")
    with pytest.raises(RepositoryError, match="symbolic link"):
        remove(five, "link", force=True)
    assert versions(five) == [1, 2, 3, 4, 5]


def test_gc_keeps_what_is_new_or_needed(five: Path, put: Put) -> None:
    put()
    put("other")
    set_tag(five, "m", "best", 2)
    record_deployment(five, "m", 3)
    result = gc(five, keep=1)
    assert result.applied
    assert [(removal.name, removal.versions) for removal in result.removals] == [("m", (4, 5))]
    assert versions(five) == [1, 2, 3, 6]
    assert versions(five, "other") == [1]
    assert gc(five, keep=1).removals == ()


def test_gc_by_age_reads_the_manifests_time(five: Path) -> None:
    manifest = five / "m/2/manifest.json"
    created = read_manifest(five / "m/2").created
    manifest.write_text(manifest.read_text().replace(created, "2020-01-01T00:00:00Z"))
    assert gc(five, keep=1, older_than_s=3600).removals[0].versions == (2,)
    (five / "m/3/manifest.json").unlink()
    os.utime(five / "m/3", (0, 0))
    assert gc(five, keep=1, older_than_s=3600).removals[0].versions == (3,)


def test_gc_cleans_up_while_the_version_that_the_policy_names_is_not_there_yet(five: Path) -> None:
    """Its number is claimed first and its folder comes last: meanwhile the model serves nothing, whatever goes."""
    (five / "m" / "1").rename(five / "m" / ".1")
    assert [removal.versions for removal in gc(five, keep=2).removals] == [(2, 3)]
    (five / "m" / ".1").rename(five / "m" / "1")
    assert versions(five) == [1, 4, 5]


def test_gc_must_keep_something(five: Path) -> None:
    with pytest.raises(RepositoryError, match="keep is 0"):
        gc(five, keep=0)


def test_roll_back_goes_to_the_last_other_version_that_exists(five: Path) -> None:
    assert previous_deployment(five, "m") is None
    for version in (1, 2, 2, 4):
        record_deployment(five, "m", version)
    assert previous_deployment(five, "m") == 2
    remove(five, "m", 2, force=True)
    assert previous_deployment(five, "m") == 1
    record_deployment(five, "m", 1)
    assert previous_deployment(five, "m") == 4
    assert [d.version for d in model_state(five, "m").deployments] == [1, 2, 4, 1]


def test_tags_stand_at_one_version(five: Path) -> None:
    assert set_tag(five, "m", "prod", 2) is None
    assert set_tag(five, "m", "prod", 3) == 2
    assert resolve_version(five, "m:prod") == ("m", 3)
    assert resolve_version(five, "m:2") == ("m", 2)
    assert resolve_version(five, "m") == resolve_version(five, "m:latest") == ("m", 5)
    assert remove_tag(five, "m", "prod") == 3
    with pytest.raises(RepositoryError, match="no version 'prod'"):
        resolve_version(five, "m:prod")
    with pytest.raises(RepositoryError, match="no tag"):
        remove_tag(five, "m", "prod")
    with pytest.raises(RepositoryError, match="no version 9"):
        set_tag(five, "m", "prod", 9)


@pytest.mark.parametrize("tag", ["", "3", "latest", "newest", "a b", "-x", "a/b", "x" * 65])
def test_tags_that_could_be_misread_are_refused(five: Path, tag: str) -> None:
    with pytest.raises(RepositoryError, match="cannot be a tag"):
        set_tag(five, "m", tag, 1)


def test_a_model_whose_configuration_is_broken_does_not_keep_the_others_from_being_cleaned_up(five: Path) -> None:
    (five / "a").mkdir()
    (five / "a/config.pbtxt").write_text("nonsense {{")
    for number in ("1", "2"):
        (five / "a" / number).mkdir()
    result = gc(five, keep=1)
    assert [removal.name for removal in result.removals] == ["m"]
    assert len(result.failed) == 1
    assert result.failed[0].startswith("a: ")
    assert sorted(path.name for path in (five / "a").iterdir()) == ["1", "2", "config.pbtxt"]
    with pytest.raises(ConfigError):
        gc(five, "a", keep=1)
