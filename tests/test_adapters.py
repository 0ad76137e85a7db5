"""An adapter folder that is damaged, or another model's, is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from system.adapters import MANIFEST, PEFT_CONFIG, WEIGHTS, Adapter, AdapterError, BaseWeights, read_folder, updates_of

TENSORS = {"a.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.lora_B.weight": np.ones((4, 2), np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Adapter.of(3, 7, TENSORS, {"r": 2}, "base").materialise(tmp_path / "adapter")


def test_what_was_written_is_read(folder: Path) -> None:
    found = read_folder(folder, "base")
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in TENSORS.items()}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", [WEIGHTS, PEFT_CONFIG])
def test_any_flipped_bit_and_any_cut_is_refused(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    cuts = [data[:length] for length in range(len(data))]
    flips = [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in range(8)]
    for damaged in cuts + flips:
        (folder / name).write_bytes(damaged)
        with pytest.raises(AdapterError, match=f"adapter {folder}: {name} is damaged.*; .*--resume"):
            read_folder(folder, "base")


def test_an_adapter_of_another_model_is_refused_with_both_names(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"belongs to 'base', not to model\.path='other'"):
        read_folder(folder, "other")


def test_an_adapter_that_does_not_fit_the_base_is_refused_with_what_would(tmp_path: Path) -> None:
    weights = {f"layers.0.{name}.weight": np.zeros((4, 3), np.float32) for name in ("q", "v")}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    base, plain = BaseWeights(tmp_path), {"lora_alpha": 2, "r": 2}
    [a_RI, b_OR] = TENSORS.values()

    def refusal(module: str, b_OR: np.ndarray = b_OR, **more: np.ndarray) -> str:
        tensors = {f"{module}.lora_A.weight": a_RI, f"{module}.lora_B.weight": b_OR} | more
        with pytest.raises(AdapterError) as refused:
            base.by_weight(updates_of(tensors, plain))
        return str(refused.value)

    assert "set model.path to the adapter's model, or lora.targets to some of q, v" in refusal("layers.0.head")
    assert "(5, 3), the weight (4, 3); set model.path to the model" in refusal("layers.0.q", np.ones((5, 2), np.float32))
    assert "train it without DoRA, a bias or modules_to_save" in refusal("layers.0.q", bias=b_OR)


@pytest.mark.parametrize("name", [WEIGHTS, PEFT_CONFIG, MANIFEST])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=f"adapter {folder} cannot be read: .*{name}"):
        read_folder(folder, "base")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_folder(folder, "base")


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "own.txt").write_text("x")
    with pytest.raises(OSError):
        Adapter.of(3, 7, TENSORS, {"r": 2}, "base").materialise(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
