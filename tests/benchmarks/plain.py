"""Attention and LoRA as transformers and PEFT have them, for what is compared with ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import Linear

from learner.learner import Learner
from learner.policy import LoraLinear

OURS = LoraLinear.forward


@contextmanager
def plain(learner: Learner, *, attention: bool = True, lora: bool = True) -> Iterator[None]:
    """Inside, the learner's model has torch's fused attention under dense masks, as rows that are no trees always have it, and
    PEFT's own layer; or one of the two."""
    model = learner.policy.language_model.model
    before = str(model.config._attn_implementation)
    if attention:
        model.set_attn_implementation("sdpa")
    if lora:
        LoraLinear.forward = Linear.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        LoraLinear.forward = OURS  # type: ignore[method-assign]
