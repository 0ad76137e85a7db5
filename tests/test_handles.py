from __future__ import annotations

from concurrent.futures import Future

import pytest

from system.handles import ATTEMPTS, SamplerDied, asked


def test_what_is_asked_of_a_sampler_that_is_lost_is_asked_again() -> None:
    def ask(deaths: int) -> int:
        left = iter(range(deaths))

        def sample() -> Future[int]:
            future: Future[int] = Future()
            if next(left, None) is None:
                future.set_result(7)
            else:
                future.set_exception(SamplerDied("killed", "sampler-0"))
            return future

        return asked(sample)()

    assert ask(0) == ask(ATTEMPTS - 1) == 7
    with pytest.raises(SamplerDied):
        ask(ATTEMPTS)
