"""Attention by blocks and by stretches against dense masks: by itself, and in log-probs and gradients of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.piece import Piece
from learner.policy import Policy
from system import tree_attention
from system.config import ConfigError, Lora
from system.constraints import Constraints
from system.language_model import LanguageModel
from system.prefix_tree import Packed, PrefixTree
from system.trajectory import sampled
from tests import tiny
from tests.test_language_model import CONTEXTS, VOCAB, random_samples

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")


@pytest.fixture
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the plain gradient of block attention, but offers it on a GPU alone."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def row(seed: int, pieces: int = 3, suffix: tuple[int, ...] = (11, 12, 13)) -> list[Packed]:
    """Trees of several prompts, with a branch at every node: a row of several blocks."""
    rng = np.random.default_rng(seed)
    return [Packed.of(PrefixTree.of(random_samples(rng, 12)), CONTEXTS[i % 2], suffix) for i in range(pieces)]


def log_q(policy: Policy) -> torch.Tensor:
    """Of a row's edges and stops, end to end."""
    rng = np.random.default_rng(1)
    trees = [PrefixTree.of(random_samples(rng, 12)) for _ in range(3)]
    contexts = [CONTEXTS[number % 2] for number in range(3)]
    pieces = [
        Piece.of(tree, context, policy.constraints, np.ones(len(tree), bool))
        for tree, context in zip(trees, contexts, strict=True)
    ]
    pairs = policy.log_q(pieces)
    return torch.cat([values for pair in pairs for values in pair])


def trained(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """(log q of a row, the gradients of all LoRA weights)."""
    values = log_q(policy)
    values.square().mean().backward()
    gradients = [parameter.grad for parameter in policy.parameters.values()]
    return values.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def laid_out(pieces: list[Packed]) -> tuple[np.ndarray, np.ndarray]:
    """(end_L, position_L) of a whole row, padded."""
    offsets = np.cumsum([0, *map(len, pieces)])
    end = np.concatenate([piece.end_L + offset for piece, offset in zip(pieces, offsets, strict=False)])
    position = np.concatenate([piece.position_ids_L for piece in pieces])
    more = tree_attention.padded(len(end)) - len(end)
    return np.concatenate([end, len(end) + 1 + np.arange(more)]), np.pad(position, (0, more))


def chosen(count: torch.Tensor | None, index: torch.Tensor | None) -> np.ndarray:
    """bool [query blocks, key blocks] of a list of blocks."""
    assert count is not None
    assert index is not None
    result = np.zeros(index.shape[2:], bool)
    for i, (n, blocks) in enumerate(zip(count[0, 0].tolist(), index[0, 0].tolist(), strict=True)):
        result[i, blocks[:n]] = True
    return result


def tiles(seen: torch.Tensor) -> np.ndarray:
    """A dense mask as bool [query blocks, queries, key blocks, keys]."""
    side = len(seen) // tree_attention.BLOCK
    return seen.numpy().reshape(side, tree_attention.BLOCK, side, tree_attention.BLOCK)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_the_blocks_hold_what_the_dense_mask_shows(window: int | None, pieces: int) -> None:
    end, position = laid_out(row(pieces, pieces))
    mask = tree_attention.blocks(end, position, window, CPU)
    partial, full = chosen(mask.kv_num_blocks, mask.kv_indices), chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    seen = tree_attention.dense(end, position, window, torch.float32, CPU)[0, 0] == 0
    at = torch.arange(len(end))
    assert torch.equal(mask.mask_mod(at[:1], at[:1], at[:, None], at[None, :]), seen)
    some, whole = tiles(seen).any((1, 3)), tiles(seen).all((1, 3))
    assert not (partial & full).any()
    assert not (some & ~(partial | full)).any()
    assert not (full & ~whole).any()
    if window is None:
        np.testing.assert_array_equal(partial | full, some)
        np.testing.assert_array_equal(full, whole)


def test_a_long_prompt_has_whole_blocks_and_branches_skip_theirs() -> None:
    samples = [sampled([5 + k] + [20 + t % 40 for t in range(300)]) for k in range(4)]
    end, position = laid_out([Packed.of(PrefixTree.of(samples), [7] * 300)])
    mask = tree_attention.blocks(end, position, None, CPU)
    assert chosen(mask.full_kv_num_blocks, mask.full_kv_indices)[-2, :2].all()
    assert mask.sparsity() > 50


def test_blocks_that_are_taken_whole_are_within_the_window_to_the_last_pair() -> None:
    samples = [sampled([5 + k] + [20 + t % 40 for t in range(149)]) for k in range(3)]
    end, position = laid_out([Packed.of(PrefixTree.of(samples), [7] * 700)])
    mask = tree_attention.blocks(end, position, 400, CPU)
    full = chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    seen = tree_attention.dense(end, position, 400, torch.float32, CPU)[0, 0] == 0
    assert full.any()
    assert not (full & ~tiles(seen).all((1, 3))).any()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_blocks_and_dense_masks_score_alike(kind: str) -> None:
    pieces = row(0)
    with torch.no_grad():
        dense, block = (LanguageModel(tiny.KINDS[kind](VOCAB), attention=way).score(pieces) for way in ("dense", "block"))
    for expected, got in zip(dense, block, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.usefixtures("gradients_on_cpu")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_blocks_and_dense_masks_train_alike(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    folder = tiny.folder(tmp_path, kind, VOCAB)
    constraints = Constraints.of(stop_token=4, min_tokens=0, max_tokens=20, vocab_size=VOCAB)
    results = []
    for way in ("dense", "block"):
        torch.manual_seed(0)
        policy = Policy(
            folder, Lora(rank=4), constraints,
            dtype=torch.float32, device=CPU, gradient_checkpointing=checkpointing, attention=way,
        )  # fmt: skip
        assert policy.language_model.attention == way
        tiny.perturb(policy.parameters.values())
        results.append(trained(policy))
    (log_q, gradients), (block_log_q, block_gradients) = results
    assert float(gradients.abs().max()) > 0.1
    torch.testing.assert_close(block_log_q, log_q, rtol=0, atol=1e-5)
    torch.testing.assert_close(block_gradients, gradients, rtol=1e-5, atol=1e-5)


def test_rows_of_any_length_are_whole_blocks_and_never_one() -> None:
    assert [tree_attention.padded(n) for n in (1, 128, 256, 257, 384)] == [256, 256, 256, 384, 384]


def test_ordinary_forwards_of_the_model_stay_as_they_are() -> None:
    model, tokens = tiny.gemma3(VOCAB), torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        LanguageModel(model, attention="block")
        torch.testing.assert_close(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "context"), [(None, 0), (8, 0), (None, 5)])
def test_attention_by_stretches_is_that_of_the_dense_mask(dtype: torch.dtype, window: int | None, context: int) -> None:
    torch.manual_seed(0)
    end, position = laid_out(row(0, 5))
    mask = tree_attention.dense(end, position, window, dtype, CPU, context)
    assert isinstance(mask, tree_attention.TreeMask)
    assert sum(stretch.mask.numel() for stretch in mask.stretches) < 0.5 * mask.numel()
    shapes = ((4, len(end), 8), (2, context + len(end), 8), (2, context + len(end), 12))
    # Scores with a spread of 6, where a token has most of the attention.
    query, key, value = ((4 * torch.randn(1, *shape)).to(dtype).requires_grad_() for shape in shapes)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]

    def attend(mask: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """The output, and the gradients of all three, float32."""
        out, _ = tree_attention._attend(layer, query.to(dtype), key.to(dtype), value.to(dtype), mask.to(dtype), scaling=0.3)
        return [
            out.detach().float(),
            *(each.float() for each in torch.autograd.grad(out.float().sin().sum(), (query, key, value))),
        ]

    found, expected = attend(mask, dtype), attend(mask.as_subclass(torch.Tensor), torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < (1e-5 if dtype == torch.float32 else 0.01)


def test_no_pairs_are_kept_for_the_backward_pass_but_the_masks_that_all_layers_share() -> None:
    end, position = laid_out(row(0, 5))
    mask = tree_attention.dense(end, position, None, torch.float32, CPU)
    assert isinstance(mask, tree_attention.TreeMask)
    masks = {stretch.mask.untyped_storage().data_ptr() for stretch in mask.stretches}
    query, key, value = (torch.randn(1, heads, len(end), 8).requires_grad_() for heads in (4, 1, 1))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        tree_attention._attend(torch.nn.Module(), query, key, value, mask)
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // 4 for tensor in kept}
    # Queries, outputs and their log-normalisers, and of each stretch keys and values: a third here, where a head has 8 numbers.
    pairs = 4 * sum(stretch.mask.numel() for stretch in mask.stretches)
    assert sum(size for storage, size in own.items() if storage not in masks) < 0.5 * pairs


def test_a_mask_that_a_model_cuts_stands_for_itself() -> None:
    mask = tree_attention.dense(np.array([3, 3, 3]), np.arange(3), None, torch.float32, CPU)
    assert isinstance(mask, tree_attention.TreeMask)
    assert type(mask[..., :2]) is torch.Tensor


def test_rows_on_a_cpu_are_attended_by_stretches_with_a_context_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(key.shape[2])
        return by_stretches(query, key, *rest)

    by_stretches = tree_attention._by_stretches
    monkeypatch.setattr(tree_attention, "_by_stretches", spy)
    model = LanguageModel(tiny.llama(VOCAB))
    [piece] = row(0, 1)
    context = model.read([1, 2, 3, 4])
    assert context is not None
    lengths.clear()
    model.score([piece])
    model.score([piece], context)
    assert set(lengths) == {len(piece), 4 + len(piece)}


def test_block_attention_is_refused_on_a_gpu_whose_compiler_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._dynamo.config.patch(disable=True):
        LanguageModel(tiny.llama(VOCAB), attention="block")
        monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
        with pytest.raises(ConfigError, match=r"attention=block.*TORCH_COMPILE_DISABLE is set"):
            LanguageModel(tiny.llama(VOCAB), attention="block")


def test_what_block_attention_cannot_do_falls_back_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(tree_attention, "_compiled", refuses)
    with pytest.raises(ConfigError, match=r"attention=block.*no compiler here.*use auto or dense"):
        LanguageModel(tiny.llama(VOCAB), attention="block")
    model = LanguageModel(tiny.llama(VOCAB))
    (expected,) = model.score(row(2, 1))
    model._use_blocks(required=False)
    assert model.attention == "dense"
    assert "no compiler here" in caplog.text
    (got,) = model.score(row(2, 1))
    np.testing.assert_array_equal(got, expected)


def test_capped_attention_is_refused_by_blocks() -> None:
    with pytest.raises(ConfigError, match=r"Gemma2Attention has \['softcap'\], which block attention here does not do"):
        LanguageModel(tiny.gemma2(VOCAB), attention="block")
