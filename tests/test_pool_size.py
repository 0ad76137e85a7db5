"""When a pool gets another sampler, and when one goes."""

from __future__ import annotations

import pytest

from deploy.pool_size import SPARE_STEPS, PoolSize


def step(size: PoolSize, idle: float, asked: int, *, built: int | None = None, rests: bool = True, room: bool = True) -> int:
    size.asked(asked)
    built = size.target if built is None else built
    return size.after_step(idle, built=built, one_rests=rests, has_room=lambda: room)


def test_it_grows_one_at_a_time_while_the_learner_waits_and_there_is_work_and_room() -> None:
    size = PoolSize(1, 3)
    assert [step(size, 0.9, 5) for _ in range(4)] == [1, 1, 0, 0]
    assert size.target == 3


@pytest.mark.parametrize(
    ("idle", "asked", "more"),
    [(0.05, 5, {}), (0.9, 1, {}), (0.9, 5, {"room": False}), (0.9, 5, {"built": 0})],
    ids=["the learner is busy", "no work is left over", "no room", "one is still being built"],
)
def test_it_does_not_grow(idle: float, asked: int, more: dict[str, bool]) -> None:
    size = PoolSize(1, 2)
    assert step(size, idle, asked, **more) == 0  # type: ignore[arg-type]
    assert size.target == 1


def test_work_counts_for_one_step() -> None:
    size = PoolSize(1, 2)
    size.asked(9)
    assert step(size, 0.0, 1) == 0
    assert step(size, 0.9, 1) == 0


def test_one_goes_after_many_steps_without_work_for_all_and_the_fewest_stay() -> None:
    size = PoolSize(1, 2)
    step(size, 0.9, 2)
    assert size.target == 2
    changes = [step(size, 0.9, 1) for _ in range(3 * SPARE_STEPS)]
    assert changes == [0] * (SPARE_STEPS - 1) + [-1] + [0] * 2 * SPARE_STEPS
    assert size.target == 1


def test_one_that_cannot_be_had_is_not_wanted_until_the_learner_waits_again() -> None:
    size = PoolSize(1, 3)
    step(size, 0.9, 5)
    assert size.give_up()
    assert size.target == 1
    assert not size.give_up(), "the fewest that the run is to have"
    assert step(size, 0.9, 5) == 1


def test_work_in_between_keeps_it_and_one_that_works_does_not_go() -> None:
    size = PoolSize(1, 2)
    step(size, 0.9, 2)
    for _ in range(3):
        assert not any(step(size, 0.0, 1) for _ in range(SPARE_STEPS - 1))
        step(size, 0.0, 2)
    assert not any(step(size, 0.0, 1, rests=False) for _ in range(SPARE_STEPS))
    assert step(size, 0.0, 1) == -1
