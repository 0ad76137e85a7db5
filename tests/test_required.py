"""Required words: every sample has them, and q is a distribution over all texts that do, for learner, engine and decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.decoder import Decoder
from actors.decoding import draw
from actors.engine import Engine
from actors.function_reward import Function
from actors.settings import EngineSettings
from learner.learner import Learner
from system.config_file import parse
from system.constraints import Constraints
from system.prefix_tree import PrefixTree
from system.required import Required, has_word
from system.scores import Scores
from system.text import decode
from system.trajectory import Behaviour, Group, Prompt, Request, Trajectory, sampled
from tests import lora, tiny

TOKENIZER = tiny.tokenizer()
SPACE, A, B, STOP = TOKENIZER.encode(" ab.", add_special_tokens=False)
PROMPT = Prompt("p", (1, 30, 31), (1, 30, 31))
Tokens = tuple[int, ...]


def text_of(tokens: Tokens) -> str:
    return decode(TOKENIZER, tokens)


def constraints(max_tokens: int = 5, min_tokens: int = 1, words: tuple[str, ...] = ("ab",)) -> Constraints:
    """Of texts of `a`, `b` and spaces."""
    written = tuple(tuple(TOKENIZER.encode(f" {word}", add_special_tokens=False)) for word in words)
    support = Constraints.of(
        stop_token=STOP, min_tokens=min_tokens, max_tokens=max_tokens, vocab_size=64, allowed=(SPACE, A, B)
    )
    return replace(support, required=Required(TOKENIZER, words, written, max_tokens))


def complete(support: Constraints, tokens: Tokens = ()) -> Iterator[Tokens]:
    """Every sample that the support admits."""
    may_stop, certain = support.after(tokens)
    if may_stop:
        yield tokens
    if len(tokens) < support.max_tokens:
        for token in (SPACE, A, B) if certain is None else (certain,):
            yield from complete(support, (*tokens, token))


def test_every_sample_has_the_words_but_where_later_tokens_make_others_of_them() -> None:
    for support in (constraints(), constraints(6, 4), constraints(7, words=("ab", "b")), constraints(3)):
        assert support.required is not None
        words, samples = support.required.words, list(complete(support))
        assert len(set(samples)) == len(samples) > 0
        for tokens in samples:
            assert support.min_tokens <= len(tokens) <= support.max_tokens
            if not all(has_word(text_of(tokens), word) for word in words):
                assert len(tokens) == support.max_tokens
                earlier = [text_of(tokens[:length]) for length in range(support.max_tokens)]
                assert any(has_word(text, word) for text in earlier for word in words)


def test_every_text_with_the_word_can_be_drawn_but_for_other_forms_at_the_last_places() -> None:
    support = constraints(6)
    samples = set(complete(support))
    texts = [z for length in range(1, 7) for z in itertools.product((SPACE, A, B), repeat=length)]
    for tokens in (z for z in texts if has_word(text_of(z), "ab")):
        late = len(tokens) > 3 and not has_word(text_of(tokens[:3]), "ab") and text_of(tokens[3:]) != " ab"
        assert (tokens in samples) or late
    assert not any(len(tokens) < 2 for tokens in samples)


def test_words_of_more_tokens_than_a_sample_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['ab', 'b'\] are 5 tokens, more than max_tokens=4"):
        constraints(4, words=("ab", "b"))


def test_a_certain_token_is_no_choice_of_the_policy() -> None:
    support = constraints(5)
    tree = PrefixTree.of([sampled([A, A, SPACE, A, B]), sampled([A, B])])
    may_stop_N, chosen_N = support.of_tree(tree)
    state = {path: (bool(may), bool(chose)) for path, may, chose in zip(tree.paths(), may_stop_N, chosen_N, strict=True)}
    assert state == {
        (): (False, False),
        (A,): (False, True),
        (A, A): (False, True),
        (A, A, SPACE): (False, False),
        (A, A, SPACE, A): (False, False),
        (A, A, SPACE, A, B): (True, False),
        (A, B): (True, True),
    }


def test_a_function_is_not_called_where_a_word_is_missing(folder: Path) -> None:
    called: list[str] = []

    def noted(prompt: Prompt, text: str, tokens: list[int]) -> float:
        called.append(text)
        return 0.0

    support = constraints(5)
    reward = Function(noted, lambda tokens: text_of(tuple(tokens)), every_prefix=True, may_stop=support.can_stop)
    reward.score(PROMPT, [sampled((A, B, SPACE, A)), sampled((SPACE, A, B))])
    assert called == ["ab", "ab ", "ab a", " ab"]


def test_a_certain_token_is_no_action_of_a_baseline(folder: Path) -> None:
    """Else GRPO and PPO would divide by tokens at which there is nothing to learn."""
    support = constraints(5)
    config = parse({"task": {"kind": "random_number"}, "lora": {"rank": 4}, "loss": {"kind": "mle"}})
    learner = Learner(config, folder, support, "base", list(range(10, 40)))
    samples = [(A, A, SPACE, A, B), (A, B)]
    trajectories = tuple(sampled(tokens, max_tokens=support.max_tokens) for tokens in samples)
    group = Group(PROMPT, trajectories, tuple(np.zeros(len(tokens) + 1) for tokens in samples), 0, 0)
    log_q_K = learner.score([group])[0].log_q_K
    # Two choices before ` ab` comes for certain, then the forced stop; and two with a stop that was drawn.
    assert learner.update([group])["loss"] == pytest.approx(-log_q_K.sum() / 5, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


def scored(folder: Path) -> tuple[Learner, list[Tokens], np.ndarray]:
    """A learner away from the base model, all samples, and its log q of each."""
    support = constraints(7)
    config = parse({"task": {"kind": "random_number"}, "lora": {"rank": 4}})
    learner = Learner(config, folder, support, "base", list(range(10, 40)))
    tiny.perturb(learner.policy.parameters.values())
    samples = list(complete(support))
    trajectories = tuple(sampled(tokens, max_tokens=support.max_tokens) for tokens in samples)
    rewards = tuple(np.zeros(len(tokens) + 1) for tokens in samples)
    [score] = learner.score([Group(PROMPT, trajectories, rewards, 0, 0)])
    return learner, samples, score.log_q_K


def test_the_learners_log_q_adds_up_to_one_over_all_samples(folder: Path) -> None:
    _, samples, log_q_K = scored(folder)
    assert len(samples) > 50 and log_q_K.min() < -5
    assert math.fsum(np.exp(log_q_K)) == pytest.approx(1.0, abs=1e-5)


def test_decoding_draws_with_the_learners_log_q(folder: Path) -> None:
    learner, samples, log_q_K = scored(folder)
    expected = dict(zip(samples, log_q_K, strict=True))

    class Unit:
        tokens_forwarded = progress = 0

        def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
            return Scores([np.zeros(len(trajectory) + 1) for trajectory in trajectories_K])

    decoder = Decoder(learner.policy.language_model.model, constraints(7), Unit())
    draws = draw(decoder, "ancestral", PROMPT, 64)
    assert draws.log_q_K == pytest.approx([expected[tokens] for tokens in draws.tokens_K], abs=1e-4)
    for method in ("beam", "smc"):
        assert all(tokens in expected for tokens in draw(decoder, method, PROMPT, 4).tokens_K)


def test_the_engine_draws_what_the_support_admits_with_the_log_probs_of_the_definition(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    model = lora.adapted(folder, lora.TARGETS["llama"], seed=1)
    support = replace(constraints(7), vocab_size=tiny.VOCABULARY)
    engine = Engine(folder, lora.NAME, support, EngineSettings(max_model_len=96, kv_cache_mb=16, max_lora_rank=4))
    try:
        engine.install(lora.publish(0, model))
        behaviours = (Behaviour(), Behaviour(1.5, 0.3), Behaviour(planted=((2, A),)), Behaviour(planted=((4, SPACE), (5, B))))
        ticket = engine.add(Request(0, PROMPT, behaviours * 40, 3))
        done = [group for _ in range(200) if engine.busy for number, group in engine.step() if number == ticket]
    finally:
        engine.close()
    admitted = set(complete(support))
    [group] = done
    for trajectory in group:
        assert tuple(trajectory.tokens_T.tolist()) in admitted
        np.testing.assert_allclose(trajectory.logp_T, lora.drawn_log_probs(model, support, PROMPT, trajectory), atol=1e-3)
    assert any(text_of(tuple(t.tokens_T.tolist()))[4:] == " ab" for t in group)
    assert len({t.key for t in group}) > 20
