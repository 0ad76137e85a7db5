from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from system import diversity
from system.config import ConfigError
from system.diversity import Encoder


def test_without_the_encoder_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--extra eval"):
        Encoder()


@pytest.mark.skipif(find_spec(diversity.PACKAGE) is None, reason="the extra `eval` is not installed")
def test_texts_of_other_meanings_are_more_diverse_than_paraphrases_and_copies() -> None:
    encoder = Encoder()
    copies = encoder.diversity(["The cat sat."] * 3)
    paraphrases = encoder.diversity(["The cat sat.", "A cat was sitting."])
    others = encoder.diversity(["The cat sat.", "Stocks fell sharply on Monday."])
    assert copies == pytest.approx(0.0, abs=1e-5)
    assert copies < paraphrases < others
    assert np.isnan(encoder.diversity(["alone"]))
    # Padding beside a longer text changes nothing.
    alone, beside = encoder.embed(["Hi."]), encoder.embed(["Hi.", "A sentence with many more words than that has."])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)
