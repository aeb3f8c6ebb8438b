"""The race on real copies: which settings take turns, for how long, and what its blocks leave in the journal.

It is separate from `race.py` because the journal and the load on the copies both need what a duel is made of.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.tuning.journal import Journal
from repo_manager.tuning.measuring import BudgetEndedError, Loads
from repo_manager.tuning.race import FEWEST_ROUNDS, MOST_ROUNDS, Duel, RaceBlock, duel, rivals_of
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.scratch import CANDIDATE, WINNER, Changes
from repo_manager.tuning.search import MARGIN, MeasuredSetting
from repo_manager.tuning.space import Setting

__all__ = ["Race"]

_LIVE_S = 2.0


class Race:
    """Lets the settings nearest to the best one take turns with it.

    Args:
        options: goal and limits of the search.
        loads: puts load on the copies.
        journal: keeps each block. Those already in it are not repeated.
        changes_of: returns the changes to the configurations that make settings from today's.
        spare_s: returns the time left for the race, in seconds.
        tell: called with each duel in words.

    Attributes:
        duels: the duels so far.
        best: the best setting after them. `None` before the first one.
    """

    def __init__(
        self,
        options: TuneOptions,
        loads: Loads,
        journal: Journal,
        changes_of: Callable[[Mapping[str, Setting]], Changes],
        spare_s: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self._options, self._loads, self._journal = options, loads, journal
        self._changes_of, self._spare_s, self._tell = changes_of, spare_s, tell
        self.duels: list[Duel] = []
        self.best: MeasuredSetting | None = None

    def longest_s(self, best: MeasuredSetting, measured: Sequence[MeasuredSetting]) -> float:
        """Return how long a race takes at most, in seconds. 0 where no setting is near the best one.

        Args:
            best: the best setting so far.
            measured: every measurement so far.
        """
        if best.value is None:
            return 0.0
        rivals = len(rivals_of(best, measured, self._options.seeks))
        return rivals * MOST_ROUNDS * 2 * self._loads.block_s(self._loads.rate or best.value)

    def best_of(self, best: MeasuredSetting, measured: Sequence[MeasuredSetting]) -> MeasuredSetting:
        """Return the setting that wins, `best` where no other one does.

        Args:
            best: the best setting of the search.
            measured: every measurement of the search, today's setting first.

        Raises:
            ServerError: a server elsewhere has ended, or the own one does not start again.
        """
        if best.value is None:
            return best
        rate = self._loads.rate or best.value
        for rival in rivals_of(best, measured, self._options.seeks):
            if self._spare_s() < FEWEST_ROUNDS * 2 * self._loads.block_s(rate):
                break
            # A change of today's setting needs a gain, as in the search.
            found = self._duel(best, rival, rate, MARGIN if best.state == measured[0].state else 0.0)
            if found is None:
                break
            self.best = best = self._winner_of(found, best, rival) if found.is_won else best
            self.duels.append(found)
            self._tell(found.text)
            rate = self._loads.rate or found.level
        return best

    def _winner_of(self, found: Duel, best: MeasuredSetting, rival: MeasuredSetting) -> MeasuredSetting:
        """Return a rival in the place of the best setting, with a value by the ratio of the two.

        A rate is never above the one that half of its own blocks hold: the ratio of a winner is often too large.
        """
        assert best.value is not None
        is_rate = self._options.seeks == "throughput"
        value = min(best.value * found.ratio, found.level) if is_rate else best.value / found.ratio
        reason = f"{found.ratio:.2f} times as good as {found.best} in {found.rounds} rounds in turn with it"
        return dataclasses.replace(rival, is_better=True, value=float(f"{value:.4g}"), reason=reason)

    def _duel(self, best: MeasuredSetting, rival: MeasuredSetting, rate: float, margin: float) -> Duel | None:
        """Let two settings take turns. `None` where that cannot be done to its end."""
        try:
            return self.between(best, rival, rate, has_time=lambda time_s: self._spare_s() > time_s, margin=margin)
        except (BudgetEndedError, ServerRefusedError):  # two at a time may not fit where one did
            return None
        except ServerUnreachableError:
            if not self._loads.copies.revive():
                raise
            return None

    def between(
        self,
        best: MeasuredSetting,
        rival: MeasuredSetting,
        rate: float,
        *,
        has_time: Callable[[float], bool] = lambda _: True,
        rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS),
        margin: float = 0.0,
    ) -> Duel | None:
        """Serve two settings, and put them under load in turn. `benchmarks/tune.py` compares any two by it.

        Args:
            best: the best setting so far.
            rival: the one that may take its place.
            rate: of the first block, in requests a second.
            has_time: whether there are so many seconds for one more round.
            rounds: smallest and largest number of them.
            margin: share by which the rival must be better.

        Returns:
            `None` when the time ended before the smallest number of rounds.

        Raises:
            BudgetEndedError: the budget ended within a block.
            ServerError: one of the two does not load, or the server has ended.
        """
        copies, served, states = self._loads.copies, (WINNER, CANDIDATE), (best.state, rival.state)
        known = deque(self._journal.race(states))
        for copy, state in zip(served, states, strict=True):
            copies.load(copy, self._changes_of(state))

        def run(side: int, level: float) -> RaceBlock:
            if known and (known[0]["side"], known[0]["rate"]) == (side, level):
                line = known.popleft()
                return RaceBlock(line["is_held"], line["number"], tuple(line["rows"]))
            known.clear()
            block = self._loads.block(served[side], level)
            if not block.is_held:  # perhaps because the server has ended
                copies.client.wait_live(_LIVE_S)
            self._journal.add_block(states, side, level, block)
            return block

        return duel(
            best,
            rival,
            run,
            rate=rate,
            is_rate_sought=self._options.seeks == "throughput",
            has_time=lambda level: bool(known) or has_time(2 * self._loads.block_s(level)),
            rounds=rounds,
            margin=margin,
        )
