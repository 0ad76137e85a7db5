"""The groups under way: asked for under a number, in flight, come back, taken for the next update.

How far the samplers may run ahead of the learner is decided here, and what becomes of a group whose sampler dies.

A number stands for one group alone. One that is lost with its sampler is asked for again under its number, so that no prompt
is skipped, whatever dies. One that comes staler than the gate meant, as long samples do, is counted, and used all the same,
since leaving it out would favour short ones; only a policy gradient, which is not valid off policy, does without.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from system.config import Config
from system.handles import Pool, SamplerDied, SamplerLeft
from system.learner_config import PolicyGradient
from system.loop_state import Counters
from system.requests import Requests
from system.run_error import RunError
from system.trajectory import Group

logger = logging.getLogger(__name__)

FAULT_WINDOW = 10_000
"""The last samples, of which so many may have no reward: one that fails now and then is not to stop a long run."""
FAULTS_TOLD = 5
"""Most different faults of a group that the log has."""
POLL_SECONDS = 0.5
"""Longest time between two looks at a request to stop."""


class Issued(NamedTuple):
    """A group in flight."""

    group_id: int
    waves: int
    """Waves of deaths before it was issued."""


def staleness_at_use(step: int, ahead: int, groups_per_update: int, published_step: int) -> int:
    """Staleness, in updates, that a group issued now will have when it is used, if the `ahead` groups under way are used before
    it and nothing is published meanwhile."""
    return step + ahead // groups_per_update - published_step


def _distinct(faults: Sequence[str]) -> str:
    """Each once, for a log; of many the first."""
    different = list(dict.fromkeys(faults))
    more = [f"and {len(different) - FAULTS_TOLD} others"] if len(different) > FAULTS_TOLD else []
    return "; ".join([*different[:FAULTS_TOLD], *more])


@dataclass
class GroupFlow:
    """Asks for groups as far ahead as the gate lets it, and hands them on in the order of their arrival."""

    config: Config
    requests: Requests
    samplers: Pool
    counters: Counters = field(default_factory=Counters, init=False)
    """The loop's, which counts in them too."""
    taken: list[Group] = field(default_factory=list, init=False)
    """For the next update, by number once they are all there: then a synchronous run repeats itself to the bit."""
    _reissue: deque[int] = field(default_factory=deque, init=False)
    _in_flight: dict[Future[Group], Issued] = field(default_factory=dict, init=False)
    _arrived: deque[Group] = field(default_factory=deque, init=False)
    _version_steps: dict[int, int] = field(default_factory=dict, init=False)
    """Version of an adapter -> updates that it contains."""
    _deaths_before: int = field(default=0, init=False)
    """Of the run before this pool, less those of the pool before `begin`: the pool's own come on top."""
    _dead: set[str] = field(default_factory=set, init=False)
    """Of those that died over a group, the names."""
    _waves: int = field(default=0, init=False)
    """Deaths of samplers, those that fell together as one."""
    _waves_in_a_row: int = field(default=0, init=False)
    _deaths_over: Counter[int] = field(default_factory=Counter, init=False)
    """Deaths of samplers that had a group which did not come back since, by its number."""
    _last_cause: str = field(default="", init=False)
    _recent: deque[tuple[int, int]] = field(default_factory=deque, init=False)
    """Of the groups of the last FAULT_WINDOW samples: (samples drawn, those of them without a reward)."""
    _recently_drawn: int = field(default=0, init=False)

    def begin(self) -> None:
        """What the pool lost before the loop ran does not count."""
        self._deaths_before = self.counters.deaths - self.samplers.deaths

    def published(self) -> None:
        """The version that the counters name is what samplers draw from."""
        self._version_steps[self.counters.version] = self.counters.published_step

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Groups that have come back and are not taken."""
        return len(self._arrived)

    def unused(self) -> list[int]:
        """Numbers that were issued and not used, in order."""
        back = [group.group_id for group in (*self._arrived, *self.taken)]
        return sorted([*(issued.group_id for issued in self._in_flight.values()), *back, *self._reissue])

    def use(self) -> list[Group]:
        """What was taken, which an update has used."""
        used, self.taken = self.taken, []
        return used

    def restore(self, counters: Counters, unused: list[int]) -> None:
        """As a checkpoint has them: what was under way is asked for again."""
        self.counters = counters
        self._reissue = deque(unused)

    def collect(self, wanted: int, should_stop: Callable[[], bool]) -> bool:
        """Takes the next `wanted` groups; False if a stop was asked for meanwhile.

        Raises RunError where samplers die without end or too many samples have no reward, and what a sampler or a reward
        raised."""
        while len(self.taken) < wanted:
            if should_stop():
                return False
            self._check_deaths()
            self.feed()
            if not self._arrived:
                self.receive()
                continue
            group = self._arrived.popleft()
            if not self._usable(group):
                continue
            if self.staleness(group) > self.config.learner.max_staleness:
                self.counters.too_stale += 1
                if isinstance(self.config.loss, PolicyGradient):
                    continue
            self.taken.append(group)
        self.taken.sort(key=lambda group: group.group_id)
        return True

    def settle(self, should_stop: Callable[[], bool]) -> None:
        """Waits for what is in flight, which no evaluation is to draw in the training's stead; a death leaves it to `feed`."""
        while self._in_flight and not should_stop():
            self.receive()

    def _check_deaths(self) -> None:
        """Raises RunError after more than actors.max_deaths deaths in a row: with no group coming back in between, or over one
        and the same group, which ends whoever has it and lets others live."""
        limit = self.config.actors.max_deaths
        if self._waves_in_a_row > limit:
            raise RunError(
                f"samplers died {self._waves_in_a_row} times with no group in between (actors.max_deaths={limit}); "
                f"the last cause: {self._last_cause}"
            )
        if over := [group_id for group_id, deaths in self._deaths_over.items() if deaths > limit]:
            prompts = {group_id: self.requests.training(group_id).prompt.id for group_id in over}
            raise RunError(
                f"samplers died {limit + 1} times in a row over the same group, one of {prompts} by number and prompt "
                f"(actors.max_deaths={limit}); the last cause: {self._last_cause}"
            )

    def feed(self) -> None:
        """Asks for groups as long as the gate is open."""
        while self._open():
            if self._reissue:
                group_id = self._reissue.popleft()
            else:
                group_id, self.counters.next_group = self.counters.next_group, self.counters.next_group + 1
            try:
                future = self.samplers.sample(self.requests.training(group_id))
            except BaseException:
                self._reissue.appendleft(group_id)  # no prompt is skipped
                raise
            self._in_flight[future] = Issued(group_id, self._waves)

    def _open(self) -> bool:
        """The capacity gate: a group issued now would be fresh enough when its turn comes.

        Groups are used in the order of their arrival, groups_per_update at a time, so everything in flight or waiting
        is used first. Right after a publication this reads: (max_staleness + 1) * groups_per_update exceeds them.
        """
        learner, counters = self.config.learner, self.counters
        ahead = len(self._in_flight) + len(self._arrived) + len(self.taken)
        stale = staleness_at_use(counters.step, ahead, learner.groups_per_update, counters.published_step)
        return stale <= learner.max_staleness and counters.published_step + stale < learner.steps

    def receive(self, update: Future[dict[str, float]] | None = None) -> None:
        """Takes in the groups that have come back, waiting a little if there is none. Raises what a sampler raised, unless it
        died."""
        awaited: list[Future[Any]] = [*self._in_flight, *([update] if update else [])]
        done, _ = wait(awaited, POLL_SECONDS, FIRST_COMPLETED)
        self.counters.deaths = self._deaths_before + self.samplers.deaths
        # Of those that came back together the one issued first: it is the stalest.
        for future in [future for future in self._in_flight if future in done]:
            issued = self._in_flight.pop(future)
            try:
                group = future.result()
            # Whatever went wrong, the group is still to be sampled: now, or by the run that is resumed.
            except Exception as error:
                self._reissue.append(issued.group_id)
                if not isinstance(error, SamplerDied):
                    raise
                self._mourn(issued, error)
                continue
            self._waves_in_a_row = 0
            self._deaths_over.pop(issued.group_id, None)
            self._arrived.append(group)

    def _usable(self, group: Group) -> bool:
        """Tolerated on purpose, up to a limit: samples without a reward. A group that they leave fewer than two is given up."""
        self._recent.append((group.drawn, len(group.faults)))
        self._recently_drawn += group.drawn
        while self._recently_drawn - self._recent[0][0] >= FAULT_WINDOW:
            self._recently_drawn -= self._recent.popleft()[0]
        if not group.faults:
            return True
        counters, limit = self.counters, self.config.sampler.max_reward_faults
        logger.warning("group %d: %d samples have no reward: %s", group.group_id, len(group.faults), _distinct(group.faults))
        if (faults := sum(without for _, without in self._recent)) > limit:
            # With a mended reward the run goes on from here, and this group is sampled again.
            self._reissue.append(group.group_id)
            raise RunError(
                f"{faults} of the last {self._recently_drawn} samples had no reward, more than "
                f"sampler.max_reward_faults={limit}; mend the reward or raise the limit, and resume; the last: "
                f"{group.faults[-1]}"
            )
        counters.reward_faults += len(group.faults)
        # A demonstration is alone by its nature.
        given_up = len(group) < 2
        counters.given_up += given_up
        return not given_up

    def _mourn(self, issued: Issued, death: SamplerDied) -> None:
        """Tolerated on purpose: a lost sampler costs time, not groups. Its request is issued again under its number."""
        self.counters.reissued += 1
        cause, name = death.args
        logger.warning("group %d is issued again: %s", issued.group_id, death)
        if isinstance(death, SamplerLeft):
            return
        self._deaths_over[issued.group_id] += 1
        # Its oldest group decides: a later one may have been issued again between two deaths of one wave.
        if name in self._dead:
            return
        self._dead.add(name)
        self._last_cause = cause
        # Samplers that were lost together, with their node for example, are one wave: all their requests are from before it.
        if issued.waves == self._waves:
            self._waves += 1
            self._waves_in_a_row += 1

    def staleness(self, group: Group) -> int:
        """Updates between the adapter that drew a group and the update that uses it now."""
        return self.counters.step - self._version_steps[group.adapter_version]
