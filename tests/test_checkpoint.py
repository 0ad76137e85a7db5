"""A checkpoint is whole or it is not there, and a damaged one is never taken for a good one."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from system import checkpoint
from system.checkpoint import MANIFEST, CheckpointError, read_latest, steps, whole_steps, write


def files(step: int) -> dict[str, bytes]:
    return {"weights.safetensors": bytes([step, 0, 255] * 20), "state.json": b'{"step": %d}' % step, "empty": b""}


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def assert_refused_and_offered(folder: Path, wrong: str, offered: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_latest(folder)
    message = str(caught.value)
    assert wrong in message
    assert f"step-{offered:08d} is whole; go on from there with --from-step {offered}" in message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    target = write(tmp_path / "checkpoints", 7, files(7))
    assert target == tmp_path / "checkpoints" / "step-00000007"
    assert read_latest(tmp_path / "checkpoints") == files(7)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 50, 100):
        write(tmp_path, step, files(step), keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000050", "step-00000100"]
    write(tmp_path, 100, files(100))
    assert names(tmp_path) == ["step-00000050", "step-00000100"]
    assert read_latest(tmp_path) == files(100)


def test_copies_that_a_user_made_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    write(tmp_path, 50, files(50))
    for name in ("step-00000050.bak", "step-best"):
        shutil.copytree(tmp_path / "step-00000050", tmp_path / name)
    for step in (100, 150):
        write(tmp_path, step, files(step), keep=2)
    assert names(tmp_path) == ["step-00000050.bak", "step-00000100", "step-00000150", "step-best"]
    assert steps(tmp_path) == whole_steps(tmp_path) == [100, 150]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    write(tmp_path, 1, files(1))
    write(tmp_path, 2, files(2))
    write(tmp_path, 2, files(3))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert read_latest(tmp_path) == files(3)


def test_without_a_checkpoint_the_folder_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        anew = f"start it anew: python deploy/job.py {folder.parent}/config.yaml"
        with pytest.raises(CheckpointError, match=rf"{folder} holds no checkpoint.*; {anew}"):
            read_latest(folder)


@pytest.mark.parametrize("name", [*files(2), MANIFEST])
def test_one_with_a_missing_or_truncated_file_is_refused_by_name_and_the_one_before_offered(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1, files(1))
    newest = write(tmp_path, 2, files(2))
    data = (newest / name).read_bytes()
    for length in range(len(data)):
        (newest / name).write_bytes(data[:length])
        assert_refused_and_offered(tmp_path, f"checkpoint {newest} is refused", 1)
    (newest / name).unlink()
    assert_refused_and_offered(tmp_path, f"checkpoint {newest} is refused", 1)
    assert read_latest(tmp_path, 1) == files(1)
    (newest / name).write_bytes(data)
    assert read_latest(tmp_path) == files(2)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_any_flipped_bit_of_a_file_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1, files(1))
    newest = write(tmp_path, 2, files(2))
    for bit in range(8 * (newest / name).stat().st_size):
        flipped(newest / name, bit)
        assert_refused_and_offered(tmp_path, f"damaged: {name}", 1)
        flipped(newest / name, bit)


def test_a_flipped_bit_of_the_manifest_never_gives_other_files(tmp_path: Path) -> None:
    """`a` and `c` differ by one bit: a manifest that names one twice must not pass for a checkpoint with one file."""
    two = {"a": b"first", "c": b"second"}
    write(tmp_path, 1, files(1))
    newest = write(tmp_path, 2, two)
    refused = 0
    for bit in range(8 * (newest / MANIFEST).stat().st_size):
        flipped(newest / MANIFEST, bit)
        try:
            assert read_latest(tmp_path) == two
        except CheckpointError:
            refused += 1
        flipped(newest / MANIFEST, bit)
    assert refused > 1000


def test_a_damaged_checkpoint_with_none_before_it_says_so(tmp_path: Path) -> None:
    flipped(write(tmp_path, 1, files(1)) / "state.json", 3)
    with pytest.raises(CheckpointError, match=r"step-00000001 is refused: damaged: state.json; .* start the run anew"):
        read_latest(tmp_path)


def test_a_step_that_is_not_there_is_refused_with_one_that_is(tmp_path: Path) -> None:
    write(tmp_path, 5, files(5))
    with pytest.raises(CheckpointError, match=r"step-00000007 is not there: step-00000005 is whole"):
        read_latest(tmp_path, 7)


@pytest.mark.parametrize("fails_at", [0, 1, 3])
@pytest.mark.parametrize("same_step", [False, True])
def test_a_full_disk_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, same_step: bool
) -> None:
    write(tmp_path, 1, files(1))
    write(tmp_path, 2, files(2))
    genuine, calls = checkpoint._write_durably, []

    def full(path: Path, data: bytes) -> None:
        if len(calls) == fails_at:
            genuine(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        calls.append(path)
        genuine(path, data)

    monkeypatch.setattr(checkpoint, "_write_durably", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; make room .* step-00000002 is whole"):
        write(tmp_path, 2 if same_step else 3, files(3))
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert read_latest(tmp_path) == files(2)
    write(tmp_path, 4, files(4))
    assert read_latest(tmp_path) == files(4)


def test_a_folder_that_cannot_be_made_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2, files(2))

    def read_only(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CheckpointError, match=r"step-00000003 cannot be written: Read-only file system; make room"):
        write(tmp_path, 3, files(3))
    monkeypatch.undo()
    assert read_latest(tmp_path) == files(2)


def test_what_a_killed_process_left_is_no_checkpoint_and_does_no_harm(tmp_path: Path) -> None:
    whole = write(tmp_path, 1, files(1))
    shutil.copytree(whole, tmp_path / ".step-00000002.part")
    assert read_latest(tmp_path) == files(1)
    write(tmp_path, 2, files(2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert read_latest(tmp_path) == files(2)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    """A run that went on from step 10, since 20 was damaged, writes 12 and 14: both are kept, and 20 is not."""
    write(tmp_path, 10, files(10))
    flipped(write(tmp_path, 20, files(20)) / "state.json", 0)
    assert read_latest(tmp_path, 10) == files(10)
    write(tmp_path, 12, files(12))
    newest = write(tmp_path, 14, files(14))
    assert names(tmp_path) == ["step-00000012", "step-00000014"]
    flipped(newest / "state.json", 0)
    assert read_latest(tmp_path, 12) == files(12)


@contextlib.contextmanager
def full_disk(allowed: int) -> Iterator[None]:
    """No file of this process grows beyond `allowed` bytes: a write gets an error of the kernel's, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("allowed", [0, 10, 100, 5000])
def test_a_write_that_the_kernel_refuses_names_the_path_and_the_way_on(tmp_path: Path, allowed: int) -> None:
    write(tmp_path, 1, files(1))
    with full_disk(allowed), pytest.raises(CheckpointError) as caught:
        write(tmp_path, 2, {"large": bytes(10_000)})
    message = str(caught.value)
    assert f"checkpoint {tmp_path}/step-00000002 cannot be written: File too large" in message
    assert "step-00000001 is whole; go on from there with --from-step 1" in message
    assert names(tmp_path) == ["step-00000001"]
    assert read_latest(tmp_path) == files(1)


def test_a_full_or_read_only_file_system_leaves_the_last_good_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no test mount a file system")
    try:
        write(disk, 1, files(1))
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: No space left on device; .*--from-step 1"):
            write(disk, 2, {"large": bytes(100_000)})
        assert names(disk) == ["step-00000001"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: Read-only file system; .*--from-step 1"):
            write(disk, 2, files(2))
        assert read_latest(disk) == files(1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
