"""The race on real copies: which settings take turns, for how long, and what its blocks leave in the journal.

It is separate from `race.py` because the journal and the load on the copies both need its blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.stats.intervals import Z_95
from repo_manager.tuning.journal import Journal
from repo_manager.tuning.measuring import BudgetEndedError, Loads
from repo_manager.tuning.race import ROUNDS, Bout, Finalist, RaceBlock, Side, bout, side_of
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.scratch import CANDIDATE, WINNER, Changes
from repo_manager.tuning.search import MARGIN, MeasuredSetting, cost_of, rivals_of
from repo_manager.tuning.space import Setting
from repo_manager.tuning.standings import Standings

__all__ = ["Race"]

_LIVE_S = 2.0
_USUAL_ROUNDS = 6  # of each rival
_EQUAL = 0.02


class Race:
    """Lets the settings nearest to the best one take turns with it.

    Args:
        options: goal and limits of the search.
        loads: puts load on the copies.
        journal: keeps each block. Those already in it are not repeated.
        changes_of: returns the changes to the configurations that make settings from today's.
        spare_s: returns the time left for the race, in seconds.
        tell: called with each bout in words.

    Attributes:
        finalists: each setting with its place, the winner first. Empty before it, and where there was no rival.
        best: the winner. `None` before it.
        waiting: how many settings had no turns that count when the time or the memory ended.
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
        self._known: dict[str, deque[Mapping[str, Any]]] = {}
        self.finalists: tuple[Finalist, ...] = ()
        self.best: MeasuredSetting | None = None
        self.waiting = 0

    def usual_s(self, best: MeasuredSetting, measured: Sequence[MeasuredSetting]) -> float:
        """Return how long a race usually takes, in seconds. 0 where no setting is near the best one.

        Args:
            best: the best setting so far.
            measured: every measurement so far.
        """
        if best.value is None:
            return 0.0
        rivals = len(rivals_of(best, measured, self._options.seeks))
        return rivals * _USUAL_ROUNDS * 2 * self._loads.block_s(self._loads.rate or best.value)

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
        settings = [best, *rivals_of(best, measured, self._options.seeks)]
        standings = Standings(settings, self._options.seeks)
        is_rate = self._options.seeks == "throughput"
        sides = [
            side_of(self._loads.rate or float(f"{score:.4g}"), is_rate_sought=is_rate) for score in standings.scores
        ]
        while (rival := standings.challenger) is not None:
            leader = standings.leader
            pair = (settings[leader], settings[rival])
            found = self._bout(pair, (sides[leader], sides[rival]))
            if found is None or len(found.gains) < ROUNDS[0]:  # a single round may be luck
                self.waiting = len(settings) - len(standings.compared)
                break
            standings.add(leader, rival, found.gains)
            standings.out |= {at for at in (leader, rival) if sides[at].is_out}
            if len(standings.out) == len(settings):
                return best
            self._tell(
                f"{pair[1].label} is {found.ratio:.2f} times as good as {pair[0].label} (rounds: {found.rounds})"
            )
        return self._conclude(settings, standings, sides, is_todays=best.state == measured[0].state)

    def _conclude(
        self, settings: Sequence[MeasuredSetting], standings: Standings, sides: Sequence[Side], *, is_todays: bool
    ) -> MeasuredSetting:
        """Return the winner, with a value by the standings. The first setting is the best one of the search.

        A rate is never above the one that half of its own blocks hold.

        Args:
            settings: the settings of the race.
            standings: what it showed.
            sides: their blocks.
            is_todays: the first one is today's. A change of it needs a gain, as in the search.
        """
        raced = sorted(standings.compared)
        gains, _ = standings.against(0)
        within = [at for at in raced if at not in standings.out]
        top = max((gains[at] for at in within), default=0.0)
        equals = [at for at in within if gains[at] >= top - _EQUAL]
        winner = min(equals, key=lambda at: (cost_of(settings[at])[:2], -gains[at]), default=0)
        if is_todays and 0 not in standings.out and gains[winner] - gains[0] < math.log1p(MARGIN):
            winner = 0
        gains, errors = standings.against(winner)
        self.finalists = tuple(
            Finalist(
                settings[at].label,
                math.exp(gains[at]),
                math.exp(gains[at] - Z_95 * errors[at]),
                math.exp(gains[at] + Z_95 * errors[at]),
                sides[at].rounds,
            )
            for at in sorted(raced, key=lambda at: (at != winner, -gains[at]))
        )
        self.best = settings[0]
        if winner == 0:
            return self.best
        is_rate = self._options.seeks == "throughput"
        good = math.exp(standings.place(winner))
        value = min(good, sides[winner].level_held()) if is_rate else 1 / good
        reason = f"{1 / math.exp(gains[0]):.2f} times as good as {settings[0].label}, in turn with it and others"
        self.best = dataclasses.replace(settings[winner], is_better=True, value=float(f"{value:.4g}"), reason=reason)
        return self.best

    def _bout(self, pair: tuple[MeasuredSetting, MeasuredSetting], sides: tuple[Side, Side]) -> Bout | None:
        """Let two settings take turns. `None` where that cannot be done to its end."""
        try:
            return self.between(pair, sides, has_time=lambda time_s: self._spare_s() > time_s)
        except (BudgetEndedError, ServerRefusedError):  # two at a time may not fit where one did
            return None
        except ServerUnreachableError:
            if not self._loads.copies.revive():
                raise
            return None

    def between(
        self,
        pair: tuple[MeasuredSetting, MeasuredSetting],
        sides: tuple[Side, Side],
        *,
        has_time: Callable[[float], bool] = lambda _: True,
        rounds: tuple[int, int] = ROUNDS,
    ) -> Bout:
        """Serve two settings, and put them under load in turn. `benchmarks/tune.py` compares any two by it.

        Args:
            pair: the two settings.
            sides: their earlier blocks, in the same order.
            has_time: whether there are so many seconds for one more round.
            rounds: how many have to count, and the largest number of them.

        Raises:
            BudgetEndedError: the budget ended within a block.
            ServerError: one of the two does not load, or the server has ended.
        """
        copies, served, states = self._loads.copies, (WINNER, CANDIDATE), [each.state for each in pair]
        known = self._known.setdefault(" / ".join(each.label for each in pair), deque(self._journal.race(states)))
        for copy, state in zip(served, states, strict=True):
            copies.load(copy, self._changes_of(state))

        def run(side: int, level: float) -> RaceBlock:
            if known and (known[0]["side"], known[0]["rate"]) == (side, level):
                line = known.popleft()
                return RaceBlock(line["is_held"], line["number"], tuple(line["rows"]), line["shift"])
            known.clear()
            block = self._loads.block(served[side], level)
            if not block.is_held:  # perhaps because the server has ended
                copies.client.wait_live(_LIVE_S)
            self._journal.add_block(states, side, level, block)
            return block

        return bout(
            sides, run, has_time=lambda level: bool(known) or has_time(2 * self._loads.block_s(level)), rounds=rounds
        )
