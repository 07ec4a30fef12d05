"""The disk tier: restarts, neighbours, and everything that a disk can do wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cache.disk import DiskTier
from cache.disk_folder import KEEP_S, layout_of, remove_unused

ROOT = Path(__file__).parents[2]
BLOCK = 4096
MODEL = {"model": "a", "dtype": "float32"}


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def open_tier():
    """Disk tiers that are closed in the end, whatever happened to their folders."""
    opened = []

    def open_one(path: Path, *, blocks: int = 8, identity=MODEL, **options) -> DiskTier:
        tier = DiskTier(
            path, limit_bytes=blocks * BLOCK, block_bytes=BLOCK, identity=identity, **options
        )
        opened.append(tier)
        return tier

    yield open_one
    for tier in opened:
        tier.close()


def store(tier: DiskTier, *numbers: int) -> None:
    for number in numbers:
        tier.offer(key(number), block(number))
    assert tier.drain(30)


def read(tier: DiskTier, *numbers: int) -> list[bytes | None]:
    return list(tier.read(keys(*numbers)))


def files(path: Path, name: str) -> list[Path]:
    return sorted(path.glob(f"*/*/{name}"))


def test_a_restart_finds_the_blocks_again(tmp_path, open_tier):
    tier = open_tier(tmp_path)
    store(tier, 1, 2, 3)
    assert tier.counts.stored == tier.counts.blocks == 3
    tier.close()
    again = open_tier(tmp_path)
    assert again.counts.blocks == 3
    assert [again.holds(key(one)) for one in (1, 2, 3, 4)] == [True, True, True, False]
    assert read(again, 1, 2, 3) == [block(1), block(2), block(3)]
    assert again.counts.loaded == 3


def test_another_revision_or_format_finds_nothing_and_harms_nothing(tmp_path, open_tier):
    """The same keys of another model, dtype or block size are other blocks."""
    tier = open_tier(tmp_path)
    store(tier, 1)
    tier.close()
    for identity in ({**MODEL, "model": "b"}, {**MODEL, "dtype": "int8"}):
        foreign = open_tier(tmp_path, identity=identity)
        assert not foreign.holds(key(1))
        store(foreign, 2)
        foreign.close()
    assert layout_of(MODEL, BLOCK)[0] != layout_of(MODEL, 2 * BLOCK)[0]
    again = open_tier(tmp_path)
    assert read(again, 1, 2) == [block(1), None]


def test_blocks_are_the_users_own(tmp_path, open_tier):
    """Keys and values tell what was said: nobody else may read them."""
    tier = open_tier(tmp_path / "kv")
    store(tier, 1)
    made = [one for one in (tmp_path / "kv").rglob("*") if one.name != "about.json"]
    assert len(made) >= 5
    for one in made:
        assert one.stat().st_mode & 0o077 == 0, one


def test_what_is_on_its_way_down_is_found_already(tmp_path, open_tier):
    """And a closing tier takes it along."""
    tier = open_tier(tmp_path)
    for number in range(5):
        tier.offer(key(number), block(number))
        assert tier.holds(key(number))
        assert read(tier, number) == [block(number)]
    tier.close()
    assert read(open_tier(tmp_path), *range(5)) == [block(number) for number in range(5)]


def test_a_full_queue_drops_what_comes(tmp_path, open_tier):
    """The engine never waits for a disk."""
    tier = open_tier(tmp_path, queue_bytes=BLOCK - 1)
    assert not tier.offer(key(1), block(1))
    assert tier.counts.dropped == 1
    assert not tier.holds(key(1))


def test_a_damaged_block_is_counted_told_and_not_given_out(tmp_path, open_tier, caplog):
    tier = open_tier(tmp_path)
    store(tier, 1, 2)
    (blocks,) = files(tmp_path, "blocks")
    with blocks.open("r+b") as file:
        file.write(b"x" * 10)
    assert read(tier, 1, 2) == [None, block(2)]
    assert read(tier, 1) == [None]
    assert tier.counts.corrupt == 1
    assert "computed again" in caplog.text
    store(tier, 1)
    assert read(tier, 1) == [block(1)]


def test_a_cut_file_gives_what_is_left(tmp_path, open_tier):
    tier = open_tier(tmp_path)
    store(tier, 1, 2, 3)
    (blocks,) = files(tmp_path, "blocks")
    os.truncate(blocks, BLOCK + 1)
    assert read(tier, 1, 2, 3) == [block(1), None, None]
    assert tier.counts.corrupt == 2


def test_a_removed_folder_is_made_again(tmp_path, open_tier):
    """What was in it is gone; what comes is stored in a new one, where a restart finds it."""
    tier = open_tier(tmp_path)
    store(tier, 1)
    for folder in tmp_path.iterdir():
        folder.rename(tmp_path.parent / f"{tmp_path.name}-gone")
    store(tier, 2)
    assert not tier.holds(key(1))
    assert read(tier, 1, 2) == [None, block(2)]
    tier.close()
    assert read(open_tier(tmp_path), 2) == [block(2)]


READ_ONLY = """
import logging, os, sys
from pathlib import Path
from tests.cache.test_disk import BLOCK, MODEL, block, key, read, store
from cache.disk import DiskTier
path = Path(sys.argv[1])
if os.geteuid() == 0:  # who may write everywhere
    os.setuid(65534)
logging.basicConfig(level=logging.WARNING)
options = {"limit_bytes": 8 * BLOCK, "block_bytes": BLOCK, "identity": MODEL}
tier = DiskTier(path, **options)
store(tier, 1, 2)
tier.close()
for one in [path, *path.rglob("*")]:
    one.chmod(0o500 if one.is_dir() else 0o400)
tier = DiskTier(path, **options)
assert not tier.counts.on
store(tier, 3)
assert not tier.holds(key(3))
assert read(tier, 1, 2, 3) == [block(1), block(2), None]
assert tier.counts.dropped == 1
tier.close()
for one in [path, *path.rglob("*")]:
    one.chmod(0o700)
"""


def test_a_folder_that_may_only_be_read_is_read(open_tier):
    """Nothing is stored, which is told once, and what is there is given out."""
    with tempfile.TemporaryDirectory() as path:  # pytest's own is closed to other users
        Path(path).chmod(0o777)
        command = [sys.executable, "-c", READ_ONLY, f"{path}/kv"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Permission denied") == 1


def test_a_path_that_is_no_folder_switches_the_tier_off_for_a_while(tmp_path, open_tier, caplog):
    """It is told once, nothing is taken, and when the mistake is mended the tier works again."""
    caplog.set_level(logging.INFO)
    clock = Clock()
    path = tmp_path / "kv"
    path.write_text("not a folder")
    tier = open_tier(path, clock=clock)
    assert not tier.counts.on
    store(tier, 1)
    assert not tier.holds(key(1))
    clock.now += 61
    store(tier, 2)
    assert caplog.text.count("rests for") == 1
    path.unlink()
    store(tier, 3)  # the second pause is longer
    assert not tier.holds(key(3))
    clock.now += 121
    store(tier, 4)
    assert tier.counts.on
    assert "works again" in caplog.text
    assert read(tier, 4) == [block(4)]


FULL = """
import logging, resource, sys
from pathlib import Path
from tests.cache.test_disk import BLOCK, Clock, MODEL, block, key, read, store
from cache.disk import DiskTier
logging.basicConfig(level=logging.WARNING)
clock = Clock()
limits = {"limit_bytes": 64 * BLOCK, "block_bytes": BLOCK}
tier = DiskTier(Path(sys.argv[1]), identity=MODEL, clock=clock, **limits)
store(tier, 0, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (4 * BLOCK + 100, resource.RLIM_INFINITY))
store(tier, *range(2, 20))
assert not tier.counts.on
assert tier.counts.failed == 1, tier.counts
held = [number for number in range(20) if tier.holds(key(number))]
assert held == [0, 1, 2, 3], held
assert read(tier, *held) == [block(number) for number in held]
clock.now += 61
store(tier, 30)
assert tier.counts.failed == 2 and not tier.counts.on
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
clock.now += 121
store(tier, 31)
assert tier.counts.on
assert read(tier, 0, 31) == [block(0), block(31)]
tier.close()
"""


def test_a_file_that_cannot_grow_leaves_what_is_there_in_use(tmp_path):
    """As on a full disk: off, told once, old blocks still given out, on again when there is room.

    In a process of its own, because the limit holds for a whole process.
    """
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("File too large") == 1


def test_a_disk_without_room_is_left_alone(tmp_path, open_tier, caplog):
    """The device itself says ENOSPC; where there is such a device."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    tier = open_tier(tmp_path, clock=Clock())
    store(tier, 1)
    tier.close()
    (blocks,) = files(tmp_path, "blocks")
    blocks.unlink()
    blocks.symlink_to("/dev/full")
    again = open_tier(tmp_path, clock=Clock())
    store(again, 2, 3)
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert not again.counts.on
    assert not again.holds(key(2))


def test_two_processes_share_what_they_store_and_never_a_file(tmp_path, open_tier):
    """Each writes to a folder of its own and reads the other's."""
    first, second = open_tier(tmp_path), open_tier(tmp_path)
    store(first, 1, 2)
    store(second, 3)
    assert len(files(tmp_path, "blocks")) == 2
    second.refresh()
    first.refresh()
    assert read(second, 1, 2, 3) == [block(1), block(2), block(3)]
    assert read(first, 3) == [block(3)]
    assert first.counts.corrupt == second.counts.corrupt == 0


def test_a_neighbour_that_overwrites_is_not_mistaken(tmp_path, open_tier):
    """A block that was replaced since the last look is not there, which is no damage."""
    first, second = open_tier(tmp_path, blocks=2), open_tier(tmp_path, blocks=2)
    store(first, 1, 2)
    second.refresh()
    store(first, 3, 4)
    assert read(second, 1, 2) == [None, None]
    second.refresh()
    assert read(second, 3, 4) == [block(3), block(4)]
    assert second.counts.corrupt == 0


def test_a_neighbour_that_goes_takes_only_its_own_along(tmp_path, open_tier):
    """Its folder is removed under the reader: what is ours is still given out."""
    first, second = open_tier(tmp_path), open_tier(tmp_path)
    store(first, 1)
    store(second, 2)
    second.refresh()
    (blocks, _) = files(tmp_path, "blocks")
    assert blocks.parent.name == "0"
    shutil.rmtree(blocks.parent)
    assert read(second, 1, 2) == [None, block(2)]
    assert second.counts.failed == 0


def test_what_is_forgotten_does_not_come_back(tmp_path, open_tier):
    """Neither here nor after a restart; the same key can be stored again."""
    tier = open_tier(tmp_path)
    store(tier, 1, 2, 3)
    tier.forget(keys(2))
    assert not tier.holds(key(2))
    assert tier.drain(30)
    assert read(tier, 1, 2) == [block(1), None]
    tier.close()
    again = open_tier(tmp_path)
    assert [again.holds(key(one)) for one in (1, 2, 3)] == [True, False, True]
    again.forget(None)
    store(again, 2)
    assert [again.holds(key(one)) for one in (1, 2, 3)] == [False, True, False]
    again.close()
    assert read(open_tier(tmp_path), 1, 2, 3) == [None, block(2), None]


def test_what_is_read_is_measured(tmp_path, open_tier):
    tier = open_tier(tmp_path)
    store(tier, 1)  # behind the measurement at the start
    assert tier.rate.bytes_per_s is not None
    assert tier.rate.bytes_per_s > 1e5


def test_folders_that_nobody_uses_are_removed_after_a_week(tmp_path, open_tier):
    """Those of other models too, never those in use, never a file that is not ours."""
    old = open_tier(tmp_path, identity={"model": "old"})
    store(old, 1)
    old.close()
    used = open_tier(tmp_path)
    store(used, 2)
    foreign = tmp_path / "photos" / "0"
    foreign.mkdir(parents=True)
    (foreign / "index").write_bytes(b"mine")
    (tmp_path / "photos" / "about.json").write_text(json.dumps(["mine too"]))
    week = time.time() + KEEP_S + 60
    remove_unused(tmp_path, time.time())
    assert len(files(tmp_path, "blocks")) == 2
    remove_unused(tmp_path, week)
    (left,) = files(tmp_path, "blocks")
    assert left.parent.parent.name == layout_of(MODEL, BLOCK)[0]
    assert not (tmp_path / layout_of({"model": "old"}, BLOCK)[0]).exists()
    assert (foreign / "index").read_bytes() == b"mine"
    assert read(used, 2) == [block(2)]


def test_a_layout_that_says_something_else_is_left_alone(tmp_path, open_tier, caplog):
    name, _ = layout_of(MODEL, BLOCK)
    (tmp_path / name).mkdir()
    (tmp_path / name / "about.json").write_text('{"headgate_kv": 99}')
    tier = open_tier(tmp_path)
    store(tier, 1)
    assert not tier.counts.on
    assert "not of this model and format" in caplog.text
    assert not files(tmp_path, "blocks")
