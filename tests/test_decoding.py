"""Sampling and search without training against exact enumeration, on a tiny model with a support of a few dozen sequences."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from actors import smc
from actors.decoder import Decoder, DecodingSettings, Tokens
from actors.decoding import METHODS, draw
from actors.function_reward import Function
from actors.posterior_reward import Posterior
from actors.rewards import Part, Product
from system.constraints import Constraints
from system.language_model import LanguageModel
from system.posterior import log_mean_exp
from system.trajectory import Prompt
from tests import tiny

STOP, LETTERS = 20, (10, 11, 12)
TEMPERATURE = 0.7
"""Of the reward: the target is R^(1/T)."""
PROMPTS = (Prompt("a", (1, 30, 31), (1, 30, 31), (35, 36)), Prompt("b", (1, 40, 33, 12), (1, 7), (9,)))


@dataclass
class Exact:
    decoder: Decoder
    outcomes: list[Tokens]
    log_q_O: np.ndarray
    log_target_O: np.ndarray

    @property
    def log_z(self) -> float:
        return log_mean_exp(self.log_target_O) + np.log(len(self.outcomes))


def decoder(
    kind: str = "llama",
    min_tokens: int = 1,
    max_tokens: int = 3,
    seed: int = 0,
    bonus: float = 0.0,
    **settings: Any,
) -> Decoder:
    """`bonus`: nats for each token, a factor of the reward that is known at every prefix."""
    model = tiny.KINDS[kind]()
    constraints = Constraints.of(stop_token=STOP, min_tokens=min_tokens, max_tokens=max_tokens, vocab_size=64, allowed=LETTERS)
    posterior = Posterior(LanguageModel(model), (STOP,))
    length = Function(lambda prompt, text, tokens: bonus * len(tokens), decode=str)
    reward = Product([Part("posterior", posterior), Part("length", length)]) if bonus else posterior
    return Decoder(model, constraints, reward, TEMPERATURE, DecodingSettings(**settings), seed, length if bonus else None)


def log_q(decoder: Decoder, prompt: Prompt, tokens: Tokens) -> float:
    """By one forward of the whole sequence, with no cache and nothing of the code under test."""
    constraints, total = decoder.constraints, 0.0
    with torch.no_grad():
        logits_LV = decoder.policy.model(torch.tensor([[*prompt.policy_tokens, *tokens]])).logits[0]
    for depth, token in enumerate((*tokens, STOP)):
        if depth == constraints.max_tokens:
            break
        allowed = [*LETTERS, STOP] if depth >= constraints.min_tokens else [*LETTERS]
        logits = logits_LV[len(prompt.policy_tokens) - 1 + depth]
        total += float(logits[token] - logits[allowed].logsumexp(0))
    return total


def enumerated(prompt: Prompt, **settings: Any) -> Exact:
    made = decoder(**settings)
    lengths = range(made.constraints.min_tokens, made.constraints.max_tokens + 1)
    outcomes = [z for length in lengths for z in itertools.product(LETTERS, repeat=length)]
    log_target_O = made.log_target(prompt, outcomes)
    return Exact(made, outcomes, np.array([log_q(made, prompt, z) for z in outcomes]), log_target_O)


def shares(outcomes: list[Tokens], drawn: list[Tokens]) -> np.ndarray:
    counts = Counter(drawn)
    assert set(counts) <= set(outcomes), "outside the support"
    return np.array([counts[z] for z in outcomes]) / len(drawn)


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_ancestral_samples_are_as_frequent_as_the_policy_says(kind: str) -> None:
    exact = enumerated(PROMPTS[0], kind=kind, min_tokens=0)
    assert np.exp(exact.log_q_O).sum() == pytest.approx(1.0, abs=1e-5)
    draws = draw(exact.decoder, "ancestral", PROMPTS[0], 4000)
    assert distance(shares(exact.outcomes, draws.tokens_K), np.exp(exact.log_q_O)) < 0.05
    assert draws.log_q_K is not None
    expected = [exact.log_q_O[exact.outcomes.index(tokens)] for tokens in draws.tokens_K]
    np.testing.assert_allclose(draws.log_q_K, expected, atol=1e-4)


def test_tempered_samples_come_with_the_log_probs_that_they_were_drawn_with() -> None:
    exact = enumerated(PROMPTS[0], temperature=0.5)
    draws = draw(exact.decoder, "tempered", PROMPTS[0], 4000)
    assert draws.log_q_K is not None
    own = dict(zip(draws.tokens_K, draws.log_q_K, strict=True))
    frequent = {z: share for z, share in Counter(draws.tokens_K).items() if share > 200}
    assert frequent
    for z, count in frequent.items():
        assert np.exp(own[z]) == pytest.approx(count / 4000, rel=0.25)
    target_K = np.array([exact.log_target_O[exact.outcomes.index(z)] for z in draws.tokens_K])
    weights = draws.log_weights(target_K)
    assert weights is not None and log_mean_exp(weights) == pytest.approx(exact.log_z, abs=0.4)


def test_the_nucleus_leaves_out_unlikely_tokens_and_claims_no_weights() -> None:
    exact = enumerated(PROMPTS[0], top_p=0.3)
    draws = draw(exact.decoder, "nucleus", PROMPTS[0], 500)
    everything = draw(exact.decoder, "ancestral", PROMPTS[0], 500)
    assert len(set(draws.tokens_K)) < len(set(everything.tokens_K))
    assert draws.log_weights(np.zeros(500)) is None


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)
def test_a_beam_as_wide_as_the_support_finds_all_of_it_in_order(prompt: Prompt) -> None:
    exact = enumerated(prompt)
    draws = draw(exact.decoder, "beam", prompt, len(exact.outcomes))
    order = np.argsort(-exact.log_q_O)
    assert draws.tokens_K == [exact.outcomes[index] for index in order]


def test_a_beam_gives_what_there_is_where_the_support_is_smaller() -> None:
    exact = enumerated(PROMPTS[0], max_tokens=1)
    assert len(draw(exact.decoder, "beam", PROMPTS[0], 10).tokens_K) == 3


def test_groups_that_are_penalised_for_repeating_differ_more() -> None:
    alike = draw(decoder(penalty=0.0), "diverse_beam", PROMPTS[0], 3).tokens_K
    apart = draw(decoder(penalty=50.0), "diverse_beam", PROMPTS[0], 3).tokens_K
    assert len(set(alike)) == 1
    assert {tokens[0] for tokens in apart} == set(LETTERS)


def test_best_of_n_is_better_than_the_policy_and_costs_the_reward() -> None:
    exact = enumerated(PROMPTS[0], oversample=8)
    best, plain = (draw(exact.decoder, method, PROMPTS[0], 100) for method in ("best_of_n", "ancestral"))
    mean = [np.mean(exact.decoder.log_target(PROMPTS[0], draws.tokens_K)) for draws in (best, plain)]
    assert mean[0] > mean[1] + 1.0
    assert best.model_tokens > 8 * plain.model_tokens / 2


def test_the_two_prompts_have_different_partition_functions() -> None:
    a, b = (enumerated(prompt).log_z for prompt in PROMPTS)
    assert abs(a - b) > 1.0


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sir", {}),
        ("smc", {"twist": "likelihood"}),
        ("smc", {"twist": "reward"}),
        ("smc", {"bonus": 0.3}),
    ],
    ids=["sir", "smc-likelihood", "smc-reward", "smc-bonus"],
)
def test_weighted_methods_draw_from_the_target_and_estimate_its_log_z(
    prompt: Prompt, method: str, settings: dict[str, Any]
) -> None:
    exact = enumerated(prompt, oversample=4, **settings)
    target_O = np.exp(exact.log_target_O - exact.log_z)
    draws = [draw(exact.decoder, method, prompt, 500) for _ in range(4)]
    estimates = [draw.log_z for draw in draws if draw.log_z is not None]
    assert len(estimates) == 4
    assert np.mean(estimates) == pytest.approx(exact.log_z, abs=0.15)
    drawn = [tokens for draw in draws for tokens in draw.tokens_K]
    q_distance = distance(np.exp(exact.log_q_O), target_O)
    assert distance(shares(exact.outcomes, drawn), target_O) < min(0.1, q_distance / 2)
    np.testing.assert_array_equal(draws[0].log_weights(np.zeros(500)), np.full(500, draws[0].log_z))


@pytest.mark.parametrize("twist", ["likelihood", "reward"])
@pytest.mark.parametrize(
    ("min_tokens", "without"), [(2, {1}), (1, {2})], ids=["what is too short to be a sample", "samples of two tokens"]
)
def test_a_prefix_without_a_reward_costs_what_goes_on_from_it_nothing(twist: str, min_tokens: int, without: set[int]) -> None:
    def score(prompt: Prompt, text: str, tokens: list[int]) -> float:
        if len(tokens) in without:
            raise ArithmeticError
        return 0.0

    made = decoder(min_tokens=min_tokens, oversample=4, twist=twist)
    function = Function(score, decode=str)
    made.reward = Product([Part("posterior", made.reward), Part("function", function)])
    made.prefix_reward = function if twist == "likelihood" else None
    lengths = {1, 2, 3} - without - set(range(min_tokens))
    outcomes = [z for length in sorted(lengths) for z in itertools.product(LETTERS, repeat=length)]
    exact = log_mean_exp(made.log_target(PROMPTS[0], outcomes)) + np.log(len(outcomes))
    draws = [draw(made, "smc", PROMPTS[0], 500) for _ in range(4)]
    assert np.mean([draw.log_z for draw in draws if draw.log_z is not None]) == pytest.approx(exact, abs=0.15)
    assert {len(tokens) for draw in draws for tokens in draw.tokens_K} == lengths
    assert (made.faults > 0) == (min_tokens == 1), "a sample without a reward counts, what is none does not"


def test_resampling_is_systematic_and_without_bias() -> None:
    made, log_weight_P = decoder(), np.log([0.3, 0.7])
    drawn = np.array([made.resample(log_weight_P, 1)[0] for _ in range(2000)])
    assert (drawn == 0).mean() == pytest.approx(0.3, abs=0.04)
    counts = Counter(int((made.resample(log_weight_P, 10) == 0).sum()) for _ in range(50))
    assert set(counts) == {3}


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_the_nucleus_is_the_fewest_tokens_that_have_its_share(top_p: float) -> None:
    made = decoder(top_p=top_p)
    p_C = np.exp(made.policy.start(PROMPTS[0].policy_tokens).log_q_BC[0].double().numpy())
    order = np.argsort(-p_C)
    columns = order[: int((np.cumsum(p_C[order]) < top_p).sum()) + 1]
    first = {tokens[0] for tokens in draw(made, "nucleus", PROMPTS[0], 400).tokens_K}
    assert first == {int(made.constraints.columns[column]) for column in columns}


def test_every_sample_lies_in_the_support() -> None:
    made = decoder(min_tokens=2, max_tokens=4)
    for method in METHODS:
        for tokens in draw(made, method, PROMPTS[0], 8).tokens_K:
            assert made.constraints.admits(tokens), method


def test_model_tokens_are_what_the_model_has_read() -> None:
    made = decoder()
    read = []
    made.policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompt = PROMPTS[0]
    draws = draw(made, "ancestral", prompt, 50)
    # The prompt once, and each token that another draw was needed after.
    needed = sum(min(len(tokens), made.constraints.max_tokens - 1) for tokens in draws.tokens_K)
    assert draws.model_tokens == sum(read) == len(prompt.policy_tokens) + needed
    before = made.reward.tokens_forwarded
    weighted = draw(made, "sir", prompt, 50)
    scored = made.reward.tokens_forwarded - before
    assert scored > 0
    assert weighted.model_tokens == sum(read) - draws.model_tokens + scored


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_rows_go_on_from_a_fork_as_from_their_own_beginning(kind: str) -> None:
    # Longer than the window of Gemma's local layers.
    policy, tokens = decoder(kind).policy, (*PROMPTS[0].policy_tokens, *range(30, 40))
    beginning = policy.start(tokens)
    first = beginning.log_q_BC.clone()
    for rows in (1, 4, 1):
        column_B = np.array([0, 1, 2, 0])[:rows]
        expected, forked = policy.start(tokens), beginning.fork(np.zeros(rows, np.int64))
        expected.select(np.zeros(rows, np.int64))
        for _ in range(2):
            expected.advance(np.arange(rows), column_B)
            forked.advance(np.arange(rows), column_B)
        torch.testing.assert_close(forked.log_q_BC, expected.log_q_BC)
        torch.testing.assert_close(beginning.log_q_BC, first, rtol=0, atol=0)


@pytest.mark.parametrize("min_tokens", [0, 2])
def test_what_the_support_leaves_of_a_token_and_its_mass_make_the_models_own_probability(min_tokens: int) -> None:
    made = decoder(min_tokens=min_tokens)
    rows, tokens = made.policy.start(PROMPTS[0].policy_tokens), list(PROMPTS[0].policy_tokens)
    for letter in LETTERS[:2]:
        with torch.no_grad():
            own_V = made.policy.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        own_C = own_V[torch.from_numpy(made.constraints.columns)]
        drawable = torch.isfinite(rows.log_q_BC[0])
        torch.testing.assert_close((rows.log_q_BC[0] + rows.log_mass_B[0])[drawable], own_C[drawable])
        rows.advance(np.zeros(1, np.int64), made.constraints.column_of(np.array([letter])))
        tokens.append(letter)


@pytest.mark.parametrize("bonus", [0.0, 1.5])
def test_a_particle_pays_at_once_for_what_is_not_drawn(monkeypatch: pytest.MonkeyPatch, bonus: float) -> None:
    found: list[tuple[Tokens, float]] = []

    def spied(decoder: Decoder, prompt: Prompt, tokens_B: list[Tokens], log_p_B: np.ndarray, stopped_B: np.ndarray) -> Any:
        target_B = targets(decoder, prompt, tokens_B, log_p_B, stopped_B)
        found.extend((tokens_B[b], float(target_B[b])) for b in np.flatnonzero(~stopped_B))
        return target_B

    targets = smc._targets
    monkeypatch.setattr(smc, "_targets", spied)
    made = decoder(min_tokens=2, bonus=bonus, oversample=2)
    draw(made, "smc", PROMPTS[0], 4)
    assert {len(tokens) for tokens, _ in found} == {1, 2, 3}
    for tokens, target in found:
        whole = [*PROMPTS[0].policy_tokens, *tokens]
        with torch.no_grad():
            log_p_TV = made.policy.model(torch.tensor([whole])).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
        log_p = float(sum(log_p_TV[t, z] for t, z in enumerate(tokens)))
        # One that is too short to be a sample is not shown to the function.
        assert target == pytest.approx((log_p + bonus * len(tokens) * (len(tokens) >= 2)) / TEMPERATURE, abs=1e-4)


def test_draws_are_repeated_by_the_seed() -> None:
    for method in METHODS:
        first, again = (draw(decoder(seed=3), method, PROMPTS[0], 6).tokens_K for _ in range(2))
        assert first == again, method


def searched(exact: Exact, widths: list[int], penalty: float) -> list[Tokens]:
    """The same search over the listed log-probs: groups of beams, of which later ones pay for what earlier ones took."""
    log_q = dict(zip(exact.outcomes, exact.log_q_O.tolist(), strict=True))
    live: list[list[Tokens]] = [[()] for _ in widths]
    ended: list[list[tuple[float, Tokens]]] = [[] for _ in widths]
    while any(live):
        taken: Counter[int] = Counter()
        for group, width in enumerate(widths):
            ended[group] = heapq.nlargest(width, ended[group] + [(log_q[z], z) for z in live[group] if z in log_q])
            least = ended[group][-1][0] if len(ended[group]) == width else -np.inf
            longer = [(*z, letter) for z in live[group] if len(z) < 3 for letter in LETTERS]
            score = {z: np.logaddexp.reduce([value for o, value in log_q.items() if o[: len(z)] == z]) for z in longer}
            kept = heapq.nlargest(width, ((score[z] - penalty * taken[z[-1]], z) for z in longer if score[z] > least))
            live[group] = [z for _, z in kept]
            taken.update(z[-1] for z in live[group])
    return [z for _, z in sorted((end for each in ended for end in each), reverse=True)]


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)
def test_beams_narrower_than_the_support_are_the_textbooks(prompt: Prompt, width: int) -> None:
    exact = enumerated(prompt, penalty=2.0)
    assert draw(exact.decoder, "beam", prompt, width).tokens_K == searched(exact, [width], 0.0)
    assert draw(exact.decoder, "diverse_beam", prompt, width).tokens_K == searched(exact, [1] * width, 2.0)
