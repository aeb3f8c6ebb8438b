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
    timeout: float | None = option(
        "--timeout",
        metavar="SECONDS",
        min=0.1,
        help="Deadline of a model's roll-out, and of each load in it "
        f"[default: {RolloutOptions.deadline_s:g}, a load {RolloutOptions.load_timeout_s:g}].",
    )

    @property
    def load_timeout_s(self) -> float:
        """The deadline of one load: the option's, else the library's."""
        return RolloutOptions.load_timeout_s if self.timeout is None else self.timeout

    def settings(self) -> dict[str, Any]:
        """Return the settings of `RolloutOptions` that the options hold."""
        settings = settings_of(RolloutOptions, self)
        if self.timeout is not None:
            settings |= {"deadline_s": self.timeout, "load_timeout_s": self.timeout}
        return settings
