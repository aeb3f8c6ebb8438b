"""Checks made before anything is touched: the version itself, and whether the server can take it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from repo_manager.errors import ConfigError, ModelError, RepositoryError
from repo_manager.repository.ensembles import ensembles_problems
from repo_manager.repository.location import Location
from repo_manager.repository.scan import ModelEntry
from repo_manager.repository.signing import SignatureCheck, check_served, check_signature
from repo_manager.repository.stores import open_store
from repo_manager.repository.transfer import version_files
from repo_manager.repository.verify import verify
from repo_manager.repository.vouching import differing_facts
from repo_manager.rollout.options import RolloutOptions
from repo_manager.triton_config.compare import check_config, misfits, same_signature
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, parse_config
from repo_manager.triton_config.ensembles import is_ensemble
from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_config.served_signature import runtime_signature

__all__ = [
    "Check",
    "CheckOutcome",
    "check_loaded",
    "check_needed",
    "check_pinned",
    "check_signatures",
    "check_version",
    "refuse",
]

MANIFEST = "manifest.json"


class CheckOutcome(str, enum.Enum):
    """How a check ended."""

    PASSED = "passed"
    WARNING = "warning"
    REFUSED = "refused"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: `files`, `config`, `ensembles`, `signature`, `engine` or `memory`.
        outcome: `refused` stops the roll-out before anything is changed. `unknown`: it could not be checked.
        detail: the finding, with its numbers.
        hint: the next step. Empty when there is none.
        estimate: it rests on an estimate, so `--force` overrides it.
    """

    name: str
    outcome: CheckOutcome
    detail: str
    hint: str = ""
    estimate: bool = False

    def blocks(self, options: RolloutOptions) -> bool:
        """Return whether it stops the roll-out."""
        return self.outcome is CheckOutcome.REFUSED and not (self.estimate and options.force)


def check_version(
    repository: Location,
    entry: ModelEntry,
    version: int,
    *,
    signed_by: Sequence[Path] = (),
    vouched: list[SignatureCheck] | None = None,
    serving: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Check, ...]:
    """Make the checks common to all servers: files, configuration, signature.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        entry: the model and its versions, as `scan` lists them.
        version: the version to be served.
        signed_by: public keys. One of them must vouch for the version. Empty asks for no signature.
        vouched: list, extended by the valid signatures. `None`: they are not kept.
        serving: model -> versions the roll-out serves first, because this one needs them. `None`: no others.
    """
    try:
        config = entry.config()
    except ConfigError as exc:
        return (Check("config", CheckOutcome.REFUSED, exc.message, exc.hint or ""),)
    checks = [_files(repository, entry, version)]
    if checks[0].outcome is not CheckOutcome.REFUSED:
        checks.append(_config(entry, version, config))
    if config is not None and is_ensemble(config):
        checks.append(_ensemble(repository, entry.name, serving))
    if signed_by:
        checks.append(check_signatures(repository, entry.name, [version], signed_by, vouched))
    return tuple(checks)


def check_pinned(
    name: str,
    pinned: Mapping[int, Sequence[str]],
    before: Sequence[int],
    after: Sequence[int],
    options: RolloutOptions,
    served: Collection[str] | None = None,
) -> tuple[Check, ...]:
    """Check whether an ensemble would lose a version it asks for by number.

    Args:
        name: name of the model whose versions change, for the findings.
        pinned: version -> the ensembles pinned to it.
        before: versions served now. Those absent from `after` count as lost.
        after: the versions served after the roll-out.
        options: `drop_pinned` allows the loss of a version an ensemble asks for.
        served: models that the server serves. An ensemble that is not among them loses nothing now, which is a warning.
            `None`: all ensembles are to be served.
    """
    lost = {version: pinned[version] for version in before if version in pinned and version not in after}
    now = {version: [each for each in names if served is None or each in served] for version, names in lost.items()}
    later = {version: [each for each in names if each not in now[version]] for version, names in lost.items()}
    checks = []
    if any(now.values()):
        detail = "; ".join(
            f"{name}:{version} would not be served any more, and {', '.join(ensembles)} needs it: Triton drops "
            f"{'the ensemble' if len(ensembles) == 1 else 'the ensembles'} then"
            for version, ensembles in now.items()
            if ensembles
        )
        hint = (
            "Serve both with --keep-previous, or change model_version in the ensemble's config.pbtxt first. "
            "--drop-pinned goes on without the ensemble."
        )
        refused = Check("ensembles", CheckOutcome.REFUSED, detail, hint)
        checks.append(Check("ensembles", CheckOutcome.WARNING, detail) if options.drop_pinned else refused)
    if any(later.values()):
        detail = "; ".join(
            f"{name}:{version} would not be served any more; {', '.join(ensembles)} asks for it and is not served now"
            for version, ensembles in later.items()
            if ensembles
        )
        checks.append(Check("ensembles", CheckOutcome.WARNING, detail))
    return tuple(checks)


def check_needed(what: str, dependents: Sequence[str]) -> tuple[Check, ...]:
    """Refuse to take a model out of service needed by others.

    Args:
        what: the model, or its only version served.
        dependents: the served models in need of it, the inner ones first.
    """
    if not dependents:
        return ()
    several = len(dependents) > 1
    detail = f"{', '.join(dependents)} {'are' if several else 'is'} served and {'need' if several else 'needs'} {what}"
    hint = "Undeploy its dependents first: " + ", then ".join(
        f"repo-manager undeploy {dependent}" for dependent in dependents[::-1]
    )
    return (Check("ensembles", CheckOutcome.REFUSED, detail, hint),)


def refuse(
    what: str,
    checks: Sequence[Check],
    options: RolloutOptions,
    *,
    served_by: Sequence[str] = (),
    action: str = "deploy",
) -> None:
    """Stop a roll-out a check speaks against.

    Args:
        what: subject of the message: the version, `NAME:VERSION`, or the model.
        checks: results of all checks. One that failed stops the roll-out, unless `force` covers it.
        options: how to roll out. `force` goes on against an estimate.
        served_by: URLs of the servers with this version loaded already. They go on doing so, and the message says it.
        action: `deploy`, `rollback` or `undeploy`. Decides the verb of the message alone.

    Raises:
        RepositoryError: with everything that was found.
    """
    found = [
        check for check in checks if check.outcome is CheckOutcome.REFUSED and not (check.estimate and options.force)
    ]
    if not found:
        return
    hints = [check.hint for check in found if check.hint]
    if any(check.estimate for check in found):
        hints.append("--force overrides an estimate.")
    done = "undeployed" if action == "undeploy" else "deployed"
    outcome = f"{what} was not {done}, and nothing was changed"
    if served_by:
        outcome = f"{what} was not confirmed, and nothing was changed: {', '.join(served_by)} still serves it"
        name = what.partition(":")[0]
        hints.append(f"Take it out of service: repo-manager rollback {name}, or repo-manager undeploy {what}.")
    raise RepositoryError(
        f"{outcome}: " + "; ".join(f"{check.name}: {check.detail}" for check in found),
        hint=" ".join(dict.fromkeys(hints)) or None,
    )


def _files(repository: Location, entry: ModelEntry, version: int) -> Check:
    where = f"{entry.name}/{version}"
    problems = verify(repository, entry.name, version=version, models=False)
    found = [each for each in problems if each.where == where or each.where.startswith(f"{where}/")]
    hiding = [each for each in problems if each.rule == "config-lookalike"]
    if hiding:
        return Check("files", CheckOutcome.REFUSED, "; ".join(map(str, hiding)), "Rename it, or move it elsewhere.")
    # The next check compares config.pbtxt with the version.
    errors = [each for each in found if each.severity is Severity.ERROR and each.rule != "config-signature"]
    if errors:
        return Check(
            "files",
            CheckOutcome.REFUSED,
            f"{entry.name}:{version} is damaged: " + "; ".join(f"{each.where} {each.what}" for each in errors),
            "Publish it again as a new version.",
        )
    if found:
        return Check("files", CheckOutcome.WARNING, "; ".join(problem.what for problem in found))
    return Check("files", CheckOutcome.PASSED, "every file is there and has the recorded size and digest")


def _config(entry: ModelEntry, version: int, config: ModelConfig | None) -> Check:
    """Compare config.pbtxt with the version: with the configuration derived for it, else with the model itself."""
    if config is None:
        detail = f"there is no {CONFIG_FILENAME}: what is served could not be chosen, nor put back"
        hint = f"Write down the server's configuration: repo-manager adopt {entry.name} --write-config"
        return Check("config", CheckOutcome.REFUSED, detail, hint)
    broken = [problem for problem in check_rules(config, where=CONFIG_FILENAME) if problem.severity is Severity.ERROR]
    if broken:
        return Check("config", CheckOutcome.REFUSED, "; ".join(map(str, broken)), "Correct it: repo-manager config.")
    manifest = entry.version(version).manifest
    text = "" if manifest is None else manifest.config
    derived = parse_config(text, where=f"{entry.name}/{version}/{MANIFEST}") if text else None
    if derived is not None and not same_signature(derived, config):
        return Check("config", CheckOutcome.PASSED, "inputs and outputs are those that the version was published with")
    if config.backend != "onnxruntime":
        unfit = misfits(config, derived) if derived is not None else ()
        if unfit:
            text = f"{CONFIG_FILENAME} does not fit {entry.name}:{version}: {'; '.join(unfit)}"
            return Check("config", CheckOutcome.REFUSED, text, "Correct it: repo-manager config.")
        return Check(
            "config", CheckOutcome.UNKNOWN, f"a model for {config.backend or 'no backend'} is read by the server only"
        )
    file = config.message().default_model_filename or "model.onnx"
    try:
        with version_files(entry.version(version).path, [file]) as folder:
            problems = check_config(config, runtime_signature(folder / file, config))
    except ModelError as exc:
        return Check("config", CheckOutcome.WARNING, f"the model cannot be read here: {exc.message}")
    errors = [problem for problem in problems if problem.severity is Severity.ERROR]
    if errors:
        return Check("config", CheckOutcome.REFUSED, "; ".join(map(str, errors)), "Correct it: repo-manager config.")
    return Check("config", CheckOutcome.PASSED, "inputs and outputs are the model's")


def _ensemble(repository: Location, name: str, serving: Mapping[str, tuple[int, ...]] | None) -> Check:
    """Compare an ensemble with the models it consists of."""
    problems = [
        problem
        for problem in ensembles_problems(open_store(repository), [name], serving=serving)
        if problem.where == f"{name}/{CONFIG_FILENAME}"
    ]
    if problems:
        hints = " ".join(dict.fromkeys(problem.hint for problem in problems if problem.hint))
        return Check(
            "ensembles", CheckOutcome.REFUSED, "; ".join(f"{name} {problem.what}" for problem in problems), hints
        )
    return Check("ensembles", CheckOutcome.PASSED, "its models are there, and their tensors fit")


def check_signatures(
    repository: Location,
    name: str,
    versions: Sequence[int],
    keys: Sequence[Path],
    vouched: list[SignatureCheck] | None = None,
) -> Check:
    """Check the signatures of versions, and for the models of an ensemble.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model. The models of an ensemble are checked with it.
        versions: versions of this model a load runs. Those of an ensemble's models come from their policies.
        keys: public keys, of which one must fit each version.
        vouched: list, extended by the valid signatures. `None`: they are not kept.
    """
    try:
        found = check_served(repository, name, versions, keys)
    except (RepositoryError, ConfigError) as exc:
        return Check("signature", CheckOutcome.REFUSED, exc.message, exc.hint or "Sign it: repo-manager sign.")
    if vouched is not None:
        vouched += found
    keys_found = ", ".join(dict.fromkeys(check.key.name for check in found))
    what = "it" if len(found) == 1 else ", ".join(f"{check.name}:{check.version}" for check in found)
    return Check("signature", CheckOutcome.PASSED, f"{keys_found} vouches for {what}")


def check_loaded(
    repository: Location,
    entry: ModelEntry,
    version: int,
    keys: Sequence[Path],
    vouched: Sequence[SignatureCheck],
    config: ModelConfig | None,
) -> None:
    """Check a server's fresh load against the signatures checked before it.

    A file exchanged in between, even for a moment, is noticed on a local disk, from the times the file system keeps.
    In object storage only a lasting difference is noticed.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        entry: the model and its versions, as `scan` lists them.
        version: the loaded version. The configuration in its manifest is compared with `config`.
        keys: public keys, of which one must fit.
        vouched: the signatures found valid before the load.
        config: the configuration the server runs the model with. `None`: it does not tell.

    Raises:
        RepositoryError: something was exchanged, or the server runs it with another configuration.
    """
    for before in vouched:
        now = check_signature(repository, before.name, before.version, keys)
        then_state, now_state = before.state or {}, now.state or {}
        odd = sorted(file for file in {*then_state, *now_state} if then_state.get(file) != now_state.get(file))
        if odd:
            raise RepositoryError(
                f"{before.name}:{before.version} was changed between the check of its signature and the load: "
                f"{', '.join(odd)}",
                hint="Somebody else writes to the repository. Find out who, and deploy again.",
            )
    manifest = entry.version(version).manifest
    if config is None or manifest is None:
        return
    signed = parse_config(manifest.config, where=f"{entry.name}/{version}/{MANIFEST}")
    facts = differing_facts(signed, config, loaded=True)
    if facts:
        raise RepositoryError(
            f"the server runs {entry.name}:{version} by other code than its signed manifest says: {', '.join(facts)}"
        )
