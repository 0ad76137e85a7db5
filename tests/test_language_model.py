"""Packed log-probs against one sequence at a time through the model's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from system.config import ConfigError
from system.constraints import Constraints
from system.language_model import LanguageModel
from system.output_layer import Head
from system.prefix_tree import Packed, PrefixTree
from system.pretrained import load_pretrained, resolve_device
from system.trajectory import sampled
from tests import tiny

VOCAB = 64
CONTEXTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 2, 38, 4], [27, 18, 28]]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.KINDS[request.param](VOCAB)


def random_samples(rng: np.random.Generator, count: int = 8) -> list:
    """Sequences that share beginnings, with tool tokens in the middle, longer than Gemma's window of 8."""
    stem = rng.integers(5, VOCAB, 6).tolist()
    result = []
    for _ in range(count):
        tokens = stem[: rng.integers(0, 7)] + rng.integers(5, VOCAB, rng.integers(0, 9)).tolist()
        result.append(sampled(tokens, (rng.random(len(tokens)) < 0.8).tolist()))
    return result


def own_log_probs(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """[T, V]: row t predicts token t + 1, by an ordinary forward of this sequence alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1).double().numpy()


@pytest.mark.parametrize("suffix", [[], [11], [11, 12, 13]])
def test_packed_scores_equal_one_sequence_at_a_time(model: PreTrainedModel, suffix: list[int]) -> None:
    rng = np.random.default_rng(0)
    samples_G = [random_samples(rng), random_samples(rng)]
    pieces = [Packed.of(PrefixTree.of(s), c, suffix) for s, c in zip(samples_G, CONTEXTS, strict=True)]
    scores = LanguageModel(model, logits_chunk=7).score(pieces)
    for samples, context, piece, (edge_N, suffix_N) in zip(samples_G, CONTEXTS, pieces, scores, strict=True):
        for sample, nodes_T in zip(samples, piece.tree.nodes_K, strict=True):
            tokens = sample.tokens_T.tolist()
            for t in range(len(tokens) + 1):
                full = context + tokens[:t] + suffix
                table = own_log_probs(model, full)
                at = len(context) - 1
                expected = [table[at + i, token] for i, token in enumerate(tokens[:t])]
                assert edge_N[nodes_T[1 : t + 1]] == pytest.approx(expected, abs=1e-4)
                if suffix:
                    ending = sum(table[at + t + i, token] for i, token in enumerate(suffix))
                    assert suffix_N[nodes_T[t]] == pytest.approx(ending, abs=1e-4)


def test_rows_go_on_from_a_context_as_if_it_were_in_them(model: PreTrainedModel) -> None:
    rng, language_model = np.random.default_rng(0), LanguageModel(model)
    context = language_model.read(CONTEXTS[0][:-1])
    assert (context is None) == bool(getattr(model.config, "sliding_window", None)), "windows alone are read anew"
    if context is None:
        return
    for _ in range(2):  # what one row adds to it is gone for the next
        samples_G = [random_samples(rng), random_samples(rng)]
        whole, rest = (
            [Packed.of(PrefixTree.of(samples), tokens, [11, 12]) for samples in samples_G]
            for tokens in (CONTEXTS[0], CONTEXTS[0][-1:])
        )
        for expected, found in zip(language_model.score(whole), language_model.score(rest, context), strict=True):
            np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_a_model_that_cannot_go_on_from_a_cache_reads_its_context_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "_read", lambda self, tokens: 1 / 0)
    assert LanguageModel(tiny.llama(VOCAB)).read([3, 4]) is None


def test_chunks_change_neither_values_nor_gradients(model: PreTrainedModel) -> None:
    samples = random_samples(np.random.default_rng(1))
    piece = Packed.of(PrefixTree.of(samples), CONTEXTS[0])
    parameter = next(p for name, p in model.named_parameters() if "mlp" in name and p.ndim == 2)
    parameter.requires_grad_(True)
    results = []
    for chunk in (3, 1000):
        language_model = LanguageModel(model, chunk)
        values = language_model.log_probs(language_model.hidden([piece]), *piece.edge_queries())
        (gradient,) = torch.autograd.grad(values.square().sum(), parameter)
        results.append((values.detach(), gradient))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("chunk", "computed"), [(1000, 1), (20, 3)])
def test_the_backward_pass_begins_with_the_logits_that_the_forward_pass_ended_with(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, chunk: int, computed: int
) -> None:
    logits, calls = Head.logits, []
    monkeypatch.setattr(Head, "logits", lambda head, *at: calls.append(at) or logits(head, *at))
    language_model = LanguageModel(model, chunk)
    hidden = torch.randn(30, model.config.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    calls.clear()
    values = language_model.log_probs(hidden, np.arange(30), np.arange(30) + 5).square().sum()
    gradient, again = (torch.autograd.grad(values, hidden, retain_graph=True)[0] for _ in range(2))
    in_between = -(-30 // chunk)
    assert len(calls) == computed + in_between, "a second backward pass computes all of them again"
    assert torch.equal(gradient, again)


def test_gradients_equal_those_of_materialised_logits(model: PreTrainedModel) -> None:
    constraints = Constraints.of(stop_token=9, min_tokens=3, max_tokens=20, vocab_size=VOCAB, allowed=list(range(5, VOCAB)))
    piece = Packed.of(PrefixTree.of(random_samples(np.random.default_rng(2))), CONTEXTS[0])
    language_model = LanguageModel(model, logits_chunk=5)
    stops = np.flatnonzero(piece.tree.depth_N >= 3)
    positions = np.concatenate([piece.edge_queries()[0], piece.start_N[stops]])
    tokens = np.concatenate([piece.edge_queries()[1], np.full(len(stops), 9)])
    may_stop = np.concatenate([piece.tree.depth_N[piece.tree.parent_N[1:]], piece.tree.depth_N[stops]]) >= 3
    hidden = language_model.hidden([piece]).detach().requires_grad_(True)
    weights = torch.randn(len(tokens), generator=torch.Generator().manual_seed(0))
    values = language_model.log_probs(hidden, positions, tokens, constraints, may_stop)
    (chunked,) = torch.autograd.grad((values * weights).sum(), hidden)

    head: Any = model.get_output_embeddings()
    logits = head(hidden)[torch.from_numpy(positions)]
    if softcap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / softcap) * softcap
    outside = torch.ones(len(tokens), VOCAB, dtype=torch.bool)
    outside[:, torch.from_numpy(constraints.columns)] = False
    outside[:, 9] |= torch.from_numpy(~may_stop)
    table = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
    expected = table[torch.arange(len(tokens)), torch.from_numpy(tokens)]
    assert torch.allclose(values, expected, atol=1e-5)
    (materialised,) = torch.autograd.grad((expected * weights).sum(), hidden)
    assert torch.allclose(chunked, materialised, atol=1e-4)


def test_log_probs_follow_the_support(model: PreTrainedModel) -> None:
    allowed, stop = [5, 6, 7, 8], 9
    constraints = Constraints.of(stop_token=stop, min_tokens=2, max_tokens=4, vocab_size=VOCAB, allowed=allowed)
    tokens = [5, 7, 7]
    piece = Packed.of(PrefixTree.of([sampled(tokens)]), CONTEXTS[1])
    language_model = LanguageModel(model)
    depth = np.arange(len(tokens) + 1)
    positions = np.concatenate([piece.start_N[:-1], piece.start_N[2:]])
    targets = np.array([*tokens, stop, stop])
    may_stop = constraints.may_stop(np.concatenate([depth[:-1], depth[2:]]))
    with torch.no_grad():
        got = language_model.log_probs(language_model.hidden([piece]), positions, targets, constraints, may_stop)
    table = own_log_probs(model, CONTEXTS[1] + tokens)
    for value, position, target in zip(got.numpy(), positions, targets, strict=True):
        support = allowed + [stop] * int(position - piece.start_N[0] >= 2)
        logits = table[position, support]
        assert value == pytest.approx(logits[support.index(target)] - np.logaddexp.reduce(logits), abs=1e-4)


def test_a_target_outside_the_support_is_refused() -> None:
    constraints = Constraints.of(stop_token=9, min_tokens=0, max_tokens=4, vocab_size=VOCAB, allowed=[5, 6])
    piece = Packed.of(PrefixTree.of([sampled([5, 7])]), CONTEXTS[1])
    language_model = LanguageModel(tiny.llama(VOCAB))
    with pytest.raises(ValueError, match=r"\[7\].*support"):
        language_model.log_probs(language_model.hidden([piece]), *piece.edge_queries(), constraints)


def test_a_model_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(VOCAB)
    plain = type(model).forward

    def scaled(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ConfigError, match=r"tested architecture: Llama, GPT-2, Gemma 3$"):
        LanguageModel(model)


def test_a_model_with_an_attention_of_another_kind_is_refused() -> None:
    model = tiny.llama(VOCAB)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    model.name_or_path = "some/model"
    message = r"^model.path='some/model': LlamaForCausalLM has layers of chunked_attention, and .* tested architecture: Llama"
    with pytest.raises(ConfigError, match=message):
        LanguageModel(model)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LlamaModel has no output embeddings.*; use a model of a tested architecture: "):
        LanguageModel(tiny.llama(VOCAB).model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_layers_ask_no_mask_is_refused(dtype: torch.dtype) -> None:
    """A convolution over neighbours is right on one sequence, and mixes samples where a row branches."""
    with pytest.raises(
        ConfigError, match=r"Lfm2ForCausalLM has other log-probs in packed rows than by itself, by .* nats; use"
    ):
        LanguageModel(tiny.lfm2(VOCAB).bfloat16() if dtype == torch.bfloat16 else tiny.lfm2(VOCAB))


def test_a_token_that_bfloat16_gets_wrong_in_some_prompt_is_no_reason_to_refuse_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, wrong = LanguageModel._own_log_probs, 0

    def off_at_one_token(self: LanguageModel, tokens: list[int]) -> np.ndarray:
        nonlocal wrong
        log_probs_T, wrong = own(self, tokens), wrong + 1
        log_probs_T[-1] += 3.0 if wrong <= limit else 0.0
        return log_probs_T

    monkeypatch.setattr(LanguageModel, "_own_log_probs", off_at_one_token)
    limit = 2  # samples: those of one prompt
    LanguageModel(tiny.llama(VOCAB))
    wrong, limit = 0, 1000
    with pytest.raises(ConfigError, match=r"by 3 nats"):
        LanguageModel(tiny.llama(VOCAB))


def test_attention_whose_logits_are_capped_stays_capped(tmp_path: Path) -> None:
    tiny.gemma2(VOCAB).save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, torch.float32, torch.device("cpu"))
    tokens = list(range(10, 40))
    [(edge_N, _)] = LanguageModel(loaded).score([Packed.of(PrefixTree.of([sampled(tokens[2:])]), tokens[:2])])
    loaded.set_attn_implementation("eager")
    capped = own_log_probs(loaded, tokens)
    loaded.set_attn_implementation("sdpa")
    for table, same in ((capped, True), (own_log_probs(loaded, tokens), False)):
        expected = [table[at, token] - np.logaddexp.reduce(table[at]) for at, token in enumerate(tokens[2:], 1)]
        assert bool(np.abs(edge_N[1:] - expected).max() < 1e-4) is same


def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuda:97.*use auto or cpu"):
        resolve_device("cuda:97")


def test_gpus_that_are_reserved_and_that_torch_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu", 1.0) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"1 GPUs are reserved .* torch .* sees none: `make clean setup-gpu`"):
        resolve_device("auto", 1.0)


def test_an_output_bias_is_that_of_the_supports_columns() -> None:
    model, allowed, stop = tiny.llama(VOCAB), [5, 6, 7, 8], 9
    head: Any = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    constraints = Constraints.of(stop_token=stop, min_tokens=0, max_tokens=4, vocab_size=VOCAB, allowed=allowed)
    piece = Packed.of(PrefixTree.of([sampled([5, 7])]), CONTEXTS[1])
    language_model = LanguageModel(model)
    with torch.no_grad():
        found = language_model.log_probs(language_model.hidden([piece]), *piece.edge_queries(), constraints)
    table = own_log_probs(model, [*CONTEXTS[1], 5])
    for value, position, token in zip(found.numpy(), *piece.edge_queries(), strict=True):
        expected = table[position, token] - np.logaddexp.reduce(table[position, [*allowed, stop]])
        assert value == pytest.approx(expected, abs=1e-4)


def test_a_window_that_all_layers_have_is_kept() -> None:
    model, tokens = tiny.mistral(VOCAB), list(range(10, 40))
    [(edge_N, _)] = LanguageModel(model).score([Packed.of(PrefixTree.of([sampled(tokens[2:])]), tokens[:2])])
    table = own_log_probs(model, tokens)
    assert edge_N[1:] == pytest.approx([table[at, token] for at, token in enumerate(tokens[2:], 1)], abs=1e-4)
