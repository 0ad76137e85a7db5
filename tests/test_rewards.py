"""Rewards: the packed posterior against one sequence at a time, functions, products, and what is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from actors import rewards
from actors.build import build_reward
from actors.function_reward import Function
from actors.posterior_reward import Contrast, Posterior
from actors.rewards import Checked, Part, Product
from system import tasks
from system.config import ConfigError
from system.config_file import parse
from system.functions import import_function
from system.language_model import LanguageModel
from system.prefix_tree import PrefixTree
from system.reward_config import FunctionReward, LMPosterior, ProductReward, at_ends, factors, functions_at_every_prefix
from system.scores import RewardError, Scores
from system.trajectory import Prompt, Trajectory, sampled
from tests import faulty, tiny

SAMPLES = [[5, 6, 7, 8], [5, 6, 9], [5, 6], [], [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6], [30]]
PROMPT = Prompt("x", (1, 4), (1, 20, 21, 22))
EVIDENCE = Prompt("y", (1, 4), (1, 20, 21, 22), evidence_tokens=(31, 32, 33))


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.KINDS[request.param]()


def trajectories(samples: Sequence[list[int]] = SAMPLES) -> list[Trajectory]:
    return [sampled(tokens) for tokens in samples]


def log_prob(model: PreTrainedModel, context: Sequence[int], continuation: Sequence[int]) -> float:
    """log p(continuation | context) by a plain forward pass."""
    if not continuation:
        return 0.0
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logp = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    first = len(context) - 1
    return sum(float(logp[first + i, token]) for i, token in enumerate(continuation))


def one_at_a_time(model: PreTrainedModel, prompt: Prompt, stop: tuple[int, ...]) -> list[np.ndarray]:
    """log R of SAMPLES at every prefix, each by a pass of its own."""
    tail = (*stop, *(prompt.evidence_tokens or ()))
    return [np.array([log_prob(model, prompt.reward_tokens, [*z[:t], *tail]) for t in range(len(z) + 1)]) for z in SAMPLES]


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = 1e-4) -> None:
    assert [len(values) for values in found] == [len(values) for values in expected]
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, abs=tolerance)


# ------------------------------------------------------------------------------------------------------- posterior


@pytest.mark.parametrize("prompt", [PROMPT, EVIDENCE], ids=["alone", "with evidence"])
@pytest.mark.parametrize("stop", [(2,), (40, 2), ()], ids=["one token", "two tokens", "none"])
def test_every_prefix_is_scored_as_if_it_were_alone(model: PreTrainedModel, prompt: Prompt, stop: tuple[int, ...]) -> None:
    scores = Posterior(LanguageModel(model), stop).score(prompt, trajectories()).complete()
    assert_same(scores, one_at_a_time(model, prompt, stop))


@pytest.mark.parametrize("budget", [5, 12, 14])
def test_a_small_token_budget_changes_the_rows_and_not_the_numbers(model: PreTrainedModel, budget: int) -> None:
    for prompt in (PROMPT, EVIDENCE):
        whole, split = Posterior(LanguageModel(model), (2,)), Posterior(LanguageModel(model), (2,), budget)
        assert_same(split.score(prompt, trajectories()).complete(), whole.score(prompt, trajectories()).complete())
        assert split.tokens_forwarded > whole.tokens_forwarded


def test_a_prompt_is_read_once_for_all_rows_of_its_group_and_every_group_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny.llama())
    long = Prompt("long", (5, 6), tuple(3 + i % 30 for i in range(40)), evidence_tokens=EVIDENCE.evidence_tokens)
    once = Posterior(model, (2,), 64)
    for _ in range(2):
        assert_same(once.score(long, trajectories()).complete(), one_at_a_time(model.model, long, (2,)))
        assert_same(once.score(EVIDENCE, trajectories()).complete(), one_at_a_time(model.model, EVIDENCE, (2,)))
    monkeypatch.setattr(model, "read", lambda tokens: None)
    each = Posterior(model, (2,), 64)
    for _ in range(2):
        each.score(long, trajectories())
        each.score(EVIDENCE, trajectories())
    assert once.tokens_forwarded < each.tokens_forwarded - 2 * 40


def test_a_prompt_of_nearly_the_budget_is_not_read_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny.llama())
    monkeypatch.setattr(model, "read", lambda tokens: None)
    long = Prompt("long", (5, 6), tuple(3 + i % 30 for i in range(60)))
    reward = Posterior(model, (2,), 64)
    assert_same(reward.score(long, trajectories()).complete(), one_at_a_time(model.model, long, (2,)))
    assert reward.tokens_forwarded < 2 * 60


def test_rows_stay_within_the_budget_where_a_sample_alone_does(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = LanguageModel(model)
    score, rows = language_model.score, []
    monkeypatch.setattr(
        language_model, "score", lambda pieces, context: rows.append(sum(map(len, pieces))) or score(pieces, context)
    )
    before = 4 if language_model.read([3, 4]) is None else 1
    # The longest sample needs 11 behind that, and with evidence 11 + 12 * 3 = 47.
    for prompt, budget in ((PROMPT, before + 12), (EVIDENCE, before + 50)):
        rows.clear()
        Posterior(language_model, (2,), budget).score(prompt, trajectories())
        assert len(rows) > 1
        assert max(rows) <= budget


def test_a_sample_whose_branches_alone_are_too_many_is_scored_in_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny.llama())
    monkeypatch.setattr(model, "read", lambda tokens: None)
    score, rows = model.score, []
    monkeypatch.setattr(model, "score", lambda pieces, context: rows.append(sum(map(len, pieces))) or score(pieces, context))
    [longest] = sorted(trajectories(), key=len)[-1:]
    whole = Posterior(model, (2,)).score(EVIDENCE, [longest]).complete()
    assert np.isfinite(whole[0]).all()
    alone = len(EVIDENCE.reward_tokens) + len(longest)
    for budget in (alone + 10, 5):
        rows.clear()
        assert_same(Posterior(model, (2,), budget).score(EVIDENCE, [longest]).complete(), whole)
        # Of the sample itself as many tokens as of branches, at least.
        assert len(rows) > 1 and max(rows) <= max(budget, 2 * alone)


def test_copies_of_a_sample_that_is_longer_than_a_row_are_read_as_one() -> None:
    model, longest = LanguageModel(tiny.llama()), max(trajectories(), key=len)
    for prompt in (PROMPT, EVIDENCE):
        one, many = Posterior(model, (2,), 5), Posterior(model, (2,), 5)
        assert_same(many.score(prompt, [longest] * 16).complete(), [*one.score(prompt, [longest]).complete()] * 16)
        assert many.tokens_forwarded == one.tokens_forwarded


def test_each_distinct_prefix_is_forwarded_once() -> None:
    """With a stop of one token: the context and each node. With S more tokens behind a node, a branch of S - 1 inputs
    each, because the last is only predicted."""
    reward, nodes = Posterior(LanguageModel(tiny.llama()), (2,)), len(PrefixTree.of(trajectories()))
    reward.score(PROMPT, trajectories())
    assert nodes == 15  # the root, 5 6 7 8, 9, 10 11 12 13 14 15 16 17, 30
    assert reward.tokens_forwarded == len(PROMPT.reward_tokens) + nodes - 1
    reward.score(PROMPT, trajectories() * 10)
    assert (
        rewards.Checked(Product([Part("one", reward), Part("same", reward)]), str).tokens_forwarded
        == 2 * reward.tokens_forwarded
    )
    assert reward.tokens_forwarded == 2 * (len(PROMPT.reward_tokens) + nodes - 1)

    reward = Posterior(LanguageModel(tiny.llama()), (2,))
    reward.score(EVIDENCE, trajectories())
    assert reward.tokens_forwarded == len(EVIDENCE.reward_tokens) + nodes - 1 + nodes * 3


@pytest.mark.parametrize("budget", [17, 1024])
def test_rewards_at_the_ends_alone_are_the_same_there_and_cost_fewer_tokens(model: PreTrainedModel, budget: int) -> None:
    reward = Posterior(LanguageModel(model), (2,), budget, every_prefix=False)
    found, expected = reward.score(EVIDENCE, trajectories()).complete(), one_at_a_time(model, EVIDENCE, (2,))
    assert [values[-1] for values in found] == pytest.approx([values[-1] for values in expected], abs=1e-4)
    if budget > 17:  # one tree: [5, 6] and the empty sample are ends, [5] and [5, 6, 7] are not
        assert np.isfinite(found[0]).tolist() == [True, False, True, False, True]
        nodes, ends = len(PrefixTree.of(trajectories())), len({tuple(z) for z in SAMPLES})
        assert reward.tokens_forwarded == len(EVIDENCE.reward_tokens) + nodes - 1 + ends * 3


def test_evidence_is_not_scored_where_another_factor_of_the_product_is_not_known(own_module: str) -> None:
    at_end = {"kind": "function", "path": f"{own_module}:length"}
    costs, scores = [], []
    for every_prefix in (True, False):
        factors = [{"kind": "lm_posterior", "every_prefix": every_prefix}, at_end]
        built = rewards.build(
            section(kind="product", of=factors), model=LanguageModel(tiny.llama()), stop=(2,), decode=text_of, token_budget=1024
        )
        scores.append(built.score(EVIDENCE, trajectories()).complete())
        costs.append(built.tokens_forwarded)
    assert costs[0] == costs[1]
    for cheap, dear in zip(*scores, strict=True):
        np.testing.assert_array_equal(cheap, dear)


def test_a_contrast_is_the_share_of_the_own_evidence_at_every_prefix(model: PreTrainedModel) -> None:
    others = [(34, 35), (36, 32, 33, 37)]
    evidences = {EVIDENCE.id: ((31, 32, 33), *others)}
    contrast = Contrast(Posterior(LanguageModel(model), (2,)), evidences, power=3.0)
    own, *rest = [one_at_a_time(model, replace(EVIDENCE, evidence_tokens=y), (2,)) for y in evidences[EVIDENCE.id]]
    total = [np.log(np.exp(a) + np.exp(b) + np.exp(c)) for a, b, c in zip(own, *rest, strict=True)]
    assert_same(
        contrast.score(EVIDENCE, trajectories()).complete(), [3.0 * (a - t) for a, t in zip(own, total, strict=True)], 1e-3
    )
    # Asked about another label, as in a vote, it is over the same evidences.
    asked = contrast.score(replace(EVIDENCE, evidence_tokens=others[0]), trajectories()).complete()
    assert_same(asked, [3.0 * (b - t) for b, t in zip(rest[0], total, strict=True)], 1e-3)


def test_nothing_stops_inside_a_tools_output(model: PreTrainedModel) -> None:
    tool = replace(sampled([5, 6, 7, 8]), is_action_T=np.array([True, False, False, True]))
    checked = rewards.Checked(Posterior(LanguageModel(model), (2,)), str)
    (found,) = checked.score(EVIDENCE, [tool]).complete()
    (everywhere,) = Posterior(LanguageModel(model), (2,)).score(EVIDENCE, [tool]).complete()
    assert np.isfinite(found).tolist() == [True, False, False, True, True]
    assert found[[0, 3, 4]].tolist() == everywhere[[0, 3, 4]].tolist()


def test_samples_keep_their_order() -> None:
    reward = Posterior(LanguageModel(tiny.llama()), (2,), token_budget=16)
    forwards, backwards = reward.score(PROMPT, trajectories()).complete(), reward.score(PROMPT, trajectories()[::-1]).complete()
    assert_same(forwards, backwards[::-1])


# -------------------------------------------------------------------------------------------------------- function


def text_of(tokens: list[int]) -> str:
    return "".join(chr(97 + token) for token in tokens)


def function(value: Callable[..., Any], **options: Any) -> Function:
    return Function(value, text_of, **options)


def test_a_function_is_called_at_the_end_alone_unless_every_prefix_is_asked_for() -> None:
    def length(prompt: Prompt, text: str, tokens: list[int]) -> int:
        assert prompt is PROMPT
        assert text == text_of(tokens)
        return len(tokens)

    at_end = function(length).score(PROMPT, trajectories([[1, 2, 3], []])).complete()
    assert np.isnan(at_end[0][:3]).all()
    assert (at_end[0][3], at_end[1].tolist()) == (3.0, [0.0])
    everywhere = function(length, every_prefix=True).score(PROMPT, trajectories([[1, 2, 3], []])).complete()
    assert [values.tolist() for values in everywhere] == [[0.0, 1.0, 2.0, 3.0], [0.0]]


def last_letter(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """Knows nothing of the empty text."""
    return float(ord(text[-1]))


def test_a_function_is_not_called_where_a_sample_cannot_stop() -> None:
    """Below the fewest actions, and where a tool writes what is next: what fails there alone costs no sample."""
    calls: list[list[int]] = []

    def noted(prompt: Prompt, text: str, tokens: list[int]) -> float:
        calls.append(list(tokens))
        return last_letter(prompt, text, tokens)

    reward = function(noted, every_prefix=True, may_stop=lambda _, actions: actions >= 2)
    tool = replace(sampled([1, 2, 3, 4, 5]), is_action_T=np.array([True, False, False, True, True]))
    plain, written = reward.score(PROMPT, [sampled([6, 7, 8]), tool]).complete()
    assert calls == [[6, 7], [6, 7, 8], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert np.isfinite(plain).tolist() == [False, False, True, True]
    assert np.isfinite(written).tolist() == [False, False, False, False, True, True]
    # Where another factor knows a value and this one cannot stop, the product has none.
    [both] = Product([Part("given", Given([0.0] * 4)), Part("noted", reward)]).score(PROMPT, [sampled([6, 7, 8])]).complete()
    assert np.isfinite(both).tolist() == [False, False, True, True]


def test_a_function_of_a_batch_is_called_once_for_all_distinct_texts_of_a_group() -> None:
    calls: list[tuple[list[str], list[list[int]]]] = []

    def lengths(prompt: Prompt, texts: list[str], tokens: list[list[int]]) -> np.ndarray:
        assert prompt is PROMPT
        calls.append((list(texts), [list(each) for each in tokens]))
        return np.array([float(len(each)) for each in tokens])

    group = trajectories([[1, 2], [3], [1, 2]])
    at_end = function(lengths, batch=True, beta=0.5).score(PROMPT, group).complete()
    assert calls == [(["bc", "d"], [[1, 2], [3]])]
    assert [values[-1] for values in at_end] == [4.0, 2.0, 4.0]
    one_by_one = function(lambda _, __, tokens: float(len(tokens)), every_prefix=True)
    assert_same(
        function(lengths, batch=True, every_prefix=True).score(PROMPT, group).complete(),
        one_by_one.score(PROMPT, group).complete(),
    )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("answer", "faulty", "message"),
    [
        ([1.0], [0, 1], "returned 1 values for prompt 'p', 2 texts; return one for each"),
        (ValueError("no model"), [0, 1], "failed for prompt 'p', 2 texts: ValueError: no model"),
        (3.0, [0, 1], "returned 3.0, which is no list, for prompt 'p', 2 texts; return one for each"),
        ([1.0, float("nan")], [1], "returned nan for prompt 'p', text 'd'; return a finite number"),
    ],
)
def test_what_a_function_of_a_batch_does_wrong_is_the_fault_of_those_that_it_concerns(
    answer: Any, faulty: list[int], message: str
) -> None:
    def score(*_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = function(score, batch=True).score(replace(PROMPT, id="p"), trajectories([[1, 2], [3]]))
    assert sorted(found.faults) == faulty
    assert all(message in fault for fault in found.faults.values())
    if faulty == [1]:
        assert found.log_reward_K[0][-1] == 1.0


def test_beta_divides() -> None:
    scores = function(lambda *_: -3.0, beta=0.5).score(PROMPT, trajectories([[1]])).complete()
    assert scores[0][-1] == -6.0


def test_a_function_is_called_once_for_each_distinct_prefix() -> None:
    calls: list[tuple[int, ...]] = []

    def value(prompt: Prompt, text: str, tokens: list[int]) -> float:
        calls.append(tuple(tokens))
        tokens.append(99)  # a function that spoils its argument harms nobody else
        return 0.0

    samples = trajectories([[1, 2], [1, 3], [1, 2], []])
    function(value, every_prefix=True).score(PROMPT, samples)
    assert sorted(calls) == [(), (1,), (1, 2), (1, 3)]
    assert [sample.tokens_T.tolist() for sample in samples] == [[1, 2], [1, 3], [1, 2], []]


@pytest.mark.parametrize("value", [1, 1.5, np.float32(1.5), np.float64(-2), np.int64(3)])
def test_python_and_numpy_numbers_are_taken(value: Any) -> None:
    assert function(lambda *_: value).score(PROMPT, trajectories([[1]])).complete()[0][-1] == float(value)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, np.float32("nan"), None, True, np.True_, "1.0", [1.0], 1 + 0j, np.complex64(1), np.ones(1)],
    ids=repr,
)
def test_what_is_no_finite_number_is_refused_with_prompt_and_text(value: Any) -> None:
    def judge(*_: Any) -> Any:
        return value

    found = function(judge).score(PROMPT, trajectories([[1, 2]]))
    [message] = found.faults.values()
    assert repr(value) in message
    assert "prompt 'x', text 'bc'" in message
    assert "judge" in message
    assert "return a finite number (a floor, not -inf, for the impossible)" in message


# ----------------------------------------------------------------------------------------------- product, checked


class Given:
    """A reward that gives what it is told to."""

    tokens_forwarded = progress = 0

    def __init__(self, *values: list[float]) -> None:
        self.values = [np.array(value, np.float64) for value in values]

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        return Scores(self.values)


def test_a_product_adds_logs_and_has_a_reward_where_all_factors_have_one() -> None:
    given = Given([1.0, 2.0, 3.0], [4.0]), Given([math.nan, 10.0, 20.0], [40.0]), Given([0.5, 0.5, 0.5], [0.5])
    product = Product([Part(str(number), factor) for number, factor in enumerate(given)])
    first, second = product.score(PROMPT, trajectories([[1, 2], []])).complete()
    assert np.isnan(first[0])
    assert (first[1:].tolist(), second.tolist()) == ([12.5, 23.5], [44.5])


def test_a_product_tells_what_each_factor_says_in_its_own_unit() -> None:
    """A function's value as it returned it, also where beta divides it; with their place where two have one name."""
    score = {"kind": "function", "path": "tests.faulty:length", "seconds": None}
    contrast: dict[str, Any] = {"kind": "contrast", "power": 4}
    twice = section(kind="product", of=[score | {"beta": 0.5}, score | {"beta": 2}])
    built = rewards.build(twice, model=None, stop=(), decode=text_of, token_budget=64)
    samples = trajectories([[1, 2, 3], [1]])
    answer = built.score(PROMPT, samples)
    assert [log_reward_T[-1] for log_reward_T in answer.log_reward_K] == [3 / 0.5 + 3 / 2, 1 / 0.5 + 1 / 2]
    assert {name: value_K.tolist() for name, value_K in answer.factors_K.items()} == {"0.length": [3, 1], "1.length": [3, 1]}
    left = replace(answer, faults={0: "none"}).group(PROMPT, samples, 3, 7)
    assert (left.trajectories_K, left.faults, left.factors_K["1.length"].tolist()) == ((samples[1],), ("none",), [1])
    reward = {"kind": "product", "of": [{"kind": "lm_posterior"}, contrast, score]}
    found = factors(parse({"task": {"kind": "subjectivity", "reward": reward}}).task.reward)
    assert [(part.name, part.unit) for _, part in found] == [("lm_posterior", 1), ("contrast", 0.25), ("length", 1)]


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, math.nan], [0.0, 0.0, math.inf], [0.0, -math.inf, 0.0], [-math.inf] * 3],
)
def test_a_reward_that_cannot_be_learned_from_is_refused_with_prompt_and_text(values: list[float]) -> None:
    found = Checked(Given(values), text_of).score(PROMPT, trajectories([[1, 2]]))
    [message] = found.faults.values()
    assert "prompt 'x'" in message
    assert "'bc' (2 tokens); 3 values are needed, finite at the end" in message


def test_nan_before_the_end_is_a_state_without_a_reward() -> None:
    [scores] = Checked(Given([math.nan, 1.0, 2.0]), text_of).score(PROMPT, trajectories([[1, 2]])).complete()
    assert scores[1:].tolist() == [1.0, 2.0]


def test_the_others_of_a_group_keep_their_rewards_and_each_fault_is_named() -> None:
    """A product has the log R of the good ones from every factor; wrong numbers of values are found by what checks it."""
    words = ["good", "raise", "nan", "list", "fine"]

    def judge(prompt: Prompt, text: str, tokens: list[int]) -> Any:
        return faulty.score(prompt, words[tokens[0]], tokens)

    samples = trajectories([[k] for k in range(5)])
    other = Given(*[[math.nan, 10.0 * k] for k in range(4)], [math.nan, math.nan])
    checked = Checked(Product([Part("judge", function(judge)), Part("other", other)]), text_of)
    found = pickle.loads(pickle.dumps(checked.score(PROMPT, samples)))  # as it crosses processes
    assert found.log_reward_K[0][-1] == -4.0
    assert list(found.faults) == [1, 2, 3, 4]
    expected = ["ArithmeticError: log of zero", "returned nan", "returned [0.0, 0.0]", "finite at the end"]
    assert all(piece in fault for piece, fault in zip(expected, found.faults.values(), strict=True))
    with pytest.raises(RewardError, match=r"ArithmeticError.*\(and 3 more of this group\)"):
        found.complete()


def test_samples_of_a_group_are_judged_at_the_same_time_and_each_text_once(tmp_path: Path) -> None:
    options: Any = {"model": None, "stop": (), "token_budget": 64, "decode": lambda tokens: " ".join(map(str, tokens))}
    asked = replace(PROMPT, meta={"folder": str(tmp_path)})
    judge = {"kind": "function", "path": "tests.faulty:in_company", "every_prefix": True}
    for processes in (1, 4):
        built = rewards.build(section(**judge, concurrency=processes), **options)
        company = [values[-1] for values in built.score(asked, trajectories([[k, 1] for k in range(6)])).complete()]
        assert (max(company) > 1) == (processes > 1)
        assert built.progress == 1 + 6 + 6, "the empty text, and what begins with each"
        equal = built.score(asked, trajectories([[1], [1], [1]])).complete()
        assert len({values[-1] for values in equal}) == 1
        assert built.progress == 13 + 2
    words = ["good", "raise", "fine", "nan"]
    options["decode"] = lambda tokens: words[tokens[0]]
    built = rewards.build(section(kind="function", path="tests.faulty:score", concurrency=3), **options)
    found = built.score(PROMPT, trajectories([[k] for k in range(4)]))
    assert [found.log_reward_K[k][-1] for k in (0, 2)] == [-4.0, -4.0]
    assert list(found.faults) == [1, 3]


@pytest.mark.parametrize("field", [{"batch": True}, {"seconds": None}])
def test_concurrency_without_calls_or_processes_to_share_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"concurrency=2 shares calls out over processes, but .*; set concurrency=1"):
        section(kind="function", path="tests.faulty:score", concurrency=2, **field)


def test_a_function_that_hangs_costs_its_sample_and_no_other() -> None:
    options: dict[str, Any] = {"model": None, "stop": (), "token_budget": 64}
    words = ["good", "sleep", "spin", "fine"]
    reward = section(kind="function", path="tests.faulty:score", seconds=2)
    built = rewards.build(reward, decode=lambda tokens: words[tokens[0]], **options)
    found = built.score(PROMPT, trajectories([[k] for k in range(4)]))
    assert [found.log_reward_K[k][-1] for k in (0, 3)] == [-4.0, -4.0]
    assert list(found.faults) == [1, 2]
    assert all("no answer after 2 s" in fault and "prompt 'x'" in fault for fault in found.faults.values())


def test_a_reward_for_another_number_of_samples_is_refused() -> None:
    found = Checked(Given([0.0, 0.0]), text_of).score(PROMPT, trajectories([[1], [2]]))
    assert found.faults == dict.fromkeys((0, 1), "prompt 'x': 1 log-rewards for 2 trajectories")
    assert found.group(PROMPT, trajectories([[1], [2]]), 0, 0).trajectories_K == ()


# --------------------------------------------------------------------------------------------------- from a config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("math:no_such_function", "no attribute 'no_such_function'"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_by_its_path(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        import_function(path, "task.reward.path")
    assert f"task.reward.path={path!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [("def f(:\n", "SyntaxError: .*line 1"), ("x = y\n", "NameError: name 'y'"), ("x = 1 / 0\n", "ZeroDivisionError")],
)
def test_a_module_that_fails_while_it_is_imported_is_refused_by_its_path(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{message[:6].lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"task\.reward\.path='{name}:f' cannot be imported: {message}"):
        import_function(f"{name}:f", "task.reward.path")


def section(**reward: Any) -> Any:
    return parse({"task": {"kind": "continuation", "reward": reward}}).task.reward


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = "def length(prompt, text, tokens):\n    return len(tokens)\n\ndef broken(*_):\n    return float('nan')\n"
    (tmp_path / "own_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_rewards"


def test_the_reward_of_a_config_is_built_as_it_says(own_module: str) -> None:
    model = tiny.llama()
    factor = {"kind": "function", "path": f"{own_module}:length", "beta": 2.0, "every_prefix": True}
    options: dict[str, Any] = {"stop": (2,), "decode": text_of, "token_budget": 64}
    built = rewards.build(section(kind="product", of=[{"kind": "lm_posterior"}, factor]), model=LanguageModel(model), **options)
    expected = [v + np.arange(len(v)) / 2 for v in one_at_a_time(model, PROMPT, (2,))]
    assert_same(built.score(PROMPT, trajectories()).complete(), expected)
    alone = rewards.build(section(**factor), model=None, **options)
    assert alone.score(PROMPT, trajectories([[1, 2]])).complete()[0].tolist() == [0.0, 0.5, 1.0]


def test_a_built_reward_has_the_fewest_actions_of_the_task() -> None:
    tokenizer = tiny.tokenizer(64)
    factor = {"kind": "function", "path": "tests.test_rewards:last_letter", "every_prefix": True, "seconds": None}
    config = parse({"task": {"kind": "continuation", "min_tokens": 1, "reward": factor}})
    built = build_reward(config, tasks.build(config.task, tokenizer), tokenizer, None)
    [scores] = built.score(PROMPT, [sampled(tokenizer.encode("ab", add_special_tokens=False))]).complete()
    assert np.isnan(scores[0])
    assert scores[1:].tolist() == [97.0, 98.0]


@pytest.mark.parametrize(("loss", "inside"), [("pooled", True), ("subtb", True), ("vargrad", False), ("grpo", False)])
def test_a_loss_that_learns_from_the_ends_alone_has_the_reward_there_alone(loss: str, inside: bool) -> None:
    tokenizer = tiny.tokenizer(64)
    factor = {"kind": "function", "path": "tests.test_rewards:last_letter", "every_prefix": True, "seconds": None}
    on_policy = {"sampler": {"exploration": {"on_policy": 1}}}
    config = parse(on_policy | {"task": {"kind": "continuation", "reward": factor}, "loss": {"kind": loss}})
    built = build_reward(config, tasks.build(config.task, tokenizer), tokenizer, None)
    [scores] = built.score(PROMPT, [sampled(tokenizer.encode("ab", add_special_tokens=False))]).complete()
    assert bool(np.isfinite(scores[1])) is inside
    assert scores[-1] == 98.0


def test_a_reward_at_the_ends_alone_has_no_factor_at_every_prefix() -> None:
    for reward in ({"kind": "lm_posterior"}, {"kind": "product", "of": [{"kind": "lm_posterior"}, {"kind": "contrast"}]}):
        section = parse({"task": {"kind": "subjectivity", "reward": reward}}).task.reward
        factors = getattr(at_ends(section), "of", (at_ends(section),))
        assert section.every_prefix and not any(factor.every_prefix for factor in factors)


def test_only_rewards_with_a_posterior_need_the_model() -> None:
    function = {"kind": "function", "path": "a:b"}
    assert rewards.needs_language_model(section(kind="lm_posterior"))
    assert rewards.needs_language_model(section(kind="product", of=[function, {"kind": "lm_posterior"}]))
    contrast = {"kind": "product", "of": [function, {"kind": "contrast"}]}
    assert rewards.needs_language_model(parse({"task": {"kind": "subjectivity", "reward": contrast}}).task.reward)
    assert not rewards.needs_language_model(section(**function))
    assert not rewards.needs_language_model(section(kind="product", of=[function, function]))
    with pytest.raises(ValueError, match="needs the frozen model"):
        rewards.build(section(kind="lm_posterior"), model=None, stop=(), decode=text_of, token_budget=64)


def test_what_a_built_reward_gives_is_checked(own_module: str) -> None:
    built = rewards.build(
        section(kind="function", path=f"{own_module}:broken"), model=None, stop=(), decode=text_of, token_budget=64
    )
    [fault] = built.score(PROMPT, trajectories([[1]])).faults.values()
    assert "prompt 'x', text 'b'" in fault
    assert isinstance(built, Checked)


def test_what_is_known_at_every_prefix_without_a_model_is_a_reward_of_its_own() -> None:
    end, early, other = (FunctionReward(path=f"m:{name}", every_prefix=name != "end") for name in ("end", "early", "other"))
    of = {
        (LMPosterior(), end): None,
        (LMPosterior(), early): early,
        (LMPosterior(), early, end, other): ProductReward(of=(early, other)),
    }
    assert [functions_at_every_prefix(ProductReward(of=factors)) for factors in of] == list(of.values())
    assert functions_at_every_prefix(LMPosterior()) is None
    assert functions_at_every_prefix(early) is early
