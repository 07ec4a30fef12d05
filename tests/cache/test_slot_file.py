"""Blocks in a file of slots: what comes back is what was stored, or nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cache.slot_file import Damaged, SlotFile, SlotView, Taken, slot_bytes

ROOT = Path(__file__).parents[2]
BLOCK = 5000  # no whole page, so that slots have an unused end
SLOT = slot_bytes(BLOCK)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


def slot_file(folder, slots: int = 4) -> SlotFile:
    return SlotFile(folder, block_bytes=BLOCK, limit_bytes=slots * SLOT)


def stored(folder, numbers, slots: int = 4) -> None:
    """A folder that a process wrote these blocks to, and left."""
    file = slot_file(folder, slots)
    for number in numbers:
        file.write(key(number), block(number))
    file.close()


def test_the_least_recently_used_block_goes_first(tmp_path):
    """A read counts as use, and the file never grows beyond its limit."""
    file = slot_file(tmp_path)
    assert [file.write(key(at), block(at)) for at in range(4)] == [0, 0, 0, 0]
    assert file.read(key(0)) == block(0)
    assert file.write(key(4), block(4)) == 1
    assert [file.read(key(at)) == block(at) for at in (0, 2, 3, 4)] == [True] * 4
    assert file.read(key(1)) is None
    assert (tmp_path / "blocks").stat().st_size <= 4 * SLOT
    file.close()


def test_the_next_process_finds_everything_in_the_order_of_use(tmp_path):
    """Also what was read last before the end stays longest."""
    file = slot_file(tmp_path)
    for at in range(4):
        file.write(key(at), block(at))
    file.read(key(0))
    file.close()
    again = slot_file(tmp_path)
    assert len(again) == 4
    again.write(key(9), block(9))
    assert key(1) not in again
    assert [again.read(key(at)) == block(at) for at in (0, 2, 3, 9)] == [True] * 4
    again.close()


def test_two_processes_never_write_to_one_folder(tmp_path):
    """The second one is told; when the first has closed, it may."""
    first = slot_file(tmp_path)
    with pytest.raises(Taken):
        slot_file(tmp_path)
    first.close()
    slot_file(tmp_path).close()


def damage(path, at: int, count: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        was = file.read(count)
        file.seek(at)
        file.write(bytes(one ^ 0x5A for one in was))


def test_a_block_whose_bytes_changed_is_found_out_and_forgotten(tmp_path):
    """It is told once; after that, and in the next process, the block is simply not there."""
    stored(tmp_path, range(3))
    damage(tmp_path / "blocks", SLOT + 77)
    file = slot_file(tmp_path)
    with pytest.raises(Damaged):
        file.read(key(1))
    assert file.read(key(1)) is None
    assert file.read(key(0)) == block(0)
    file.close()
    again = slot_file(tmp_path)
    assert key(1) not in again
    assert again.read(key(2)) == block(2)
    again.close()


def test_blocks_behind_a_cut_are_not_found(tmp_path):
    """A file that was truncated between two processes, and one that is cut while it is open."""
    stored(tmp_path, range(4))
    os.truncate(tmp_path / "blocks", 3 * SLOT + BLOCK - 1)
    file = slot_file(tmp_path)
    assert key(3) not in file
    assert file.read(key(2)) == block(2)
    os.truncate(tmp_path / "blocks", SLOT + 10)
    with pytest.raises(Damaged):
        file.read(key(1))
    assert file.read(key(0)) == block(0)
    file.write(key(5), block(5))
    assert file.read(key(5)) == block(5)
    file.close()


def test_a_smaller_limit_cuts_the_file(tmp_path):
    """What an earlier, larger limit has left beyond it goes."""
    stored(tmp_path, range(4), slots=4)
    file = slot_file(tmp_path, slots=2)
    assert len(file) == 2
    assert (tmp_path / "blocks").stat().st_size <= 2 * SLOT
    file.close()


def test_two_blocks_are_the_least(tmp_path):
    """A limit that is too small says how much it would have to be."""
    with pytest.raises(ValueError, match="two blocks of 5000 bytes"):
        slot_file(tmp_path, slots=1)


def test_a_removed_folder_is_noticed(tmp_path):
    """The descriptors still work, but nobody would ever find what is written to them."""
    file = slot_file(tmp_path / "x")
    assert file.in_place
    (tmp_path / "x").rename(tmp_path / "y")
    assert not file.in_place
    file.close()


def test_another_process_reads_what_it_finds_and_nothing_else(tmp_path):
    """A slot that its owner has overwritten since the look is not taken for the old block."""
    file = slot_file(tmp_path, slots=2)
    file.write(key(1), block(1))
    view = SlotView(tmp_path, block_bytes=BLOCK)
    view.refresh()
    assert view.read(key(1)) == block(1)
    for at in (2, 3):
        file.write(key(at), block(at))
    assert key(1) in view
    assert view.read(key(1)) is None
    assert key(1) not in view
    view.refresh()
    assert [view.read(key(at)) == block(at) for at in (2, 3)] == [True, True]
    file.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_the_files_only_stored_blocks_come_back(tmp_path_factory, data):
    """Random writes, restarts, cuts and changed bytes in both files: right bytes or none."""
    folder = tmp_path_factory.mktemp("slots")
    file = slot_file(folder)
    for _ in range(data.draw(st.integers(1, 20))):
        action = data.draw(st.sampled_from(["write", "write", "read", "restart", "damage", "cut"]))
        number = data.draw(st.integers(0, 7))
        path = folder / data.draw(st.sampled_from(["blocks", "index"]))
        if action == "write" and key(number) not in file:
            file.write(key(number), block(number))
        elif action == "restart":
            file.close()
            file = slot_file(folder)
        elif action == "damage" and path.stat().st_size:
            damage(path, data.draw(st.integers(0, path.stat().st_size - 1)))
        elif action == "cut":
            os.truncate(path, data.draw(st.integers(0, path.stat().st_size)))
        try:
            assert file.read(key(number)) in (None, block(number))
        except Damaged:
            assert key(number) not in file
        assert len(file) <= 4
    file.close()


WRITER = """
import random, sys
from pathlib import Path
from cache.slot_file import SlotFile
file = SlotFile(Path(sys.argv[1]), block_bytes=int(sys.argv[2]), limit_bytes=int(sys.argv[3]))
blocks = [
    (at.to_bytes(32, "little"), random.Random(at).randbytes(int(sys.argv[2]))) for at in range(64)
]
while True:
    for key, data in blocks:
        if key not in file:
            file.write(key, data)
    print("round", flush=True)
"""


def test_a_process_killed_in_mid_write_leaves_nothing_wrong(tmp_path):
    """Its folder is free at once, and every block found in it is whole."""
    found = 0
    arguments = [str(tmp_path), str(BLOCK), str(8 * SLOT)]
    for rounds in (1, 7, 20):
        command = [sys.executable, "-c", WRITER, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
            assert writer.stdout is not None
            for _ in range(rounds):
                assert writer.stdout.readline() == "round\n"
            writer.send_signal(signal.SIGKILL)
        file = slot_file(tmp_path, slots=8)
        for number in range(64):
            try:
                data = file.read(key(number))
            except Damaged:
                continue
            assert data in (None, block(number))
            found += data is not None
        file.close()
    assert found > 0
