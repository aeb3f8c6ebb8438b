"""Options of a roll-out, for every command that deploys."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from repo_manager.cli.option_groups import option, settings_of
from repo_manager.rollout.options import RolloutOptions

__all__ = ["RolloutFlags"]


@dataclasses.dataclass(frozen=True)
class RolloutFlags:
    """How long a roll-out may take, and what it leaves."""

    PANEL: ClassVar[str] = "Roll-out"
    keep_previous: bool = option(
        "--keep-previous",
        sets=(RolloutOptions, "keep_previous"),
        help="Leave the previous version loaded, so that going back is instant.",
    )
    timeout: float = option(
        "--timeout",
        metavar="SECONDS",
        sets=(RolloutOptions, "deadline_s"),
        min=0.1,
        help=f"Deadline of a model's roll-out; one load takes at most {RolloutOptions.load_timeout_s:g} seconds of it.",
    )

    @property
    def load_timeout_s(self) -> float:
        """The deadline of one load: the library's, or the whole roll-out's where that is shorter."""
        return min(self.timeout, RolloutOptions.load_timeout_s)

    def settings(self) -> dict[str, Any]:
        """Return the settings of `RolloutOptions` that the options hold."""
        return {**settings_of(RolloutOptions, self), "load_timeout_s": self.load_timeout_s}
