"""Tiny random causal language models, one for each kind of attention that the packed pass must get right.

Weights are drawn far wider than for training, so that a token that sees what it should not changes log-probs by nats and
not by rounding errors. All are float32, seeded, in eval mode, without dropout, and on CPU.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 64
CONTEXT = 128
"""Tokens that each model was made for."""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = [*string.digits, *string.ascii_lowercase, " ", ".", ",", "\n", '"', "?", "!", ":", ";", "'", "-", "A", "T", "é"]


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def _build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def llama(vocab_size: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """Rotary positions, grouped-query attention, an output layer of its own."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU kernels take
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **SMALL,
    )
    return _build(config, seed)


def mistral(vocab_size: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A sliding window of 16 tokens in all layers, longer than the samples that a model is checked with when it is loaded."""
    config = MistralConfig(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        bos_token_id=1,
        eos_token_id=2,
        **SMALL,
    )
    return _build(config, seed)


def gpt2(vocab_size: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """Learned absolute positions, Conv1D layers, tied embeddings."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=64,
        n_layer=2,
        n_head=2,  # of 32 dimensions, the fewest that vLLM's CPU kernels take
        n_positions=CONTEXT,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(config, seed)


def gemma2(vocab_size: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """The logits of attention are capped."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        attn_logit_softcapping=2.0,
        **SMALL,
    )
    return _build(config, seed)


def lfm2(vocab_size: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """One layer that convolves neighbouring tokens, one with attention."""
    config = Lfm2Config(
        vocab_size=vocab_size,
        num_key_value_heads=4,
        block_multiple_of=8,
        layer_types=["conv", "full_attention"],
        **SMALL,
    )
    return _build(config, seed)


def gemma3(vocab_size: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """One layer with a sliding window of 8 tokens, one with full attention, a scale that is not of the head's size, tied
    embeddings, capped logits."""
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=30.0,
        bos_token_id=1,
        eos_token_id=2,
        **SMALL,
    )
    return _build(config, seed)


KINDS: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "gpt2": gpt2, "gemma3": gemma3}


def tokenizer(vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token a character, `<s>` in front of a text, and unused tokens `<u0>`, `<u1>`, … up to the vocabulary size."""
    words = [*SPECIAL, *CHARACTERS]
    words += [f"<u{index}>" for index in range(vocab_size - len(words))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", add_bos_token=True
    )
    fast.clean_up_tokenization_spaces = False
    return fast


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Model and tokenizer as an ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer(model.config.get_text_config().vocab_size).save_pretrained(folder)
    return folder


def folder(tmp_path: Path, kind: str = "llama", vocab_size: int = VOCABULARY) -> Path:
    """`tmp_path/KIND` with a tiny model and its tokenizer."""
    return save(KINDS[kind](vocab_size), tmp_path / kind)


def perturb(parameters: Iterable[torch.nn.Parameter], seed: int = 3, scale: float = 0.05) -> None:
    """LoRA's B starts at 0: away from there every LoRA weight matters, and the policy is not the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
