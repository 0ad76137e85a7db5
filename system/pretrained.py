"""Models and tokenizers from a folder, and the device that they are put on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from system.config import ConfigError
from system.run_error import first_line


def resolve_device(device: str, gpus: float = 0.0) -> torch.device:
    """`auto` is CUDA where there is one. `gpus` are reserved for this process.

    Raises:
        ConfigError: a CUDA device that is not there, or none where some are reserved.
    """
    if device == "auto":
        if gpus and not torch.cuda.is_available():
            raise ConfigError(
                f"{gpus:g} GPUs are reserved for this process (learner.gpus or actors.gpus), but torch {torch.__version__} "
                "sees none: `make clean setup-gpu` installs the build for GPUs; where there are none, reserve none"
            )
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"learner.device={device!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return resolved


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ConfigError if the folder has no tokenizer that transformers can load."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"model.path={str(folder)!r} has no tokenizer that can be loaded: {first_line(error)}; "
            "save the tokenizer beside the model (tokenizer.save_pretrained)"
        ) from error


def load_pretrained(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A frozen causal language model without dropout: log q of a sequence must not depend on chance.

    Raises:
        ConfigError: the architecture is not one that transformers knows as a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # The fused attention of torch knows no cap of the attention's logits, and would leave it out.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        for name in [name for name in config.to_dict() if name.endswith(("dropout", "pdrop"))]:
            setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="eager" if capped else "sdpa", trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"model.path={str(folder)!r} cannot be loaded as a causal language model: {first_line(error)}. "
            "Use an architecture that transformers supports (Llama, Qwen, Gemma, GPT-2, …) with safetensors weights"
        ) from error
    model.requires_grad_(False).eval()
    torch.nn.Module.to(model, device)
    return model
