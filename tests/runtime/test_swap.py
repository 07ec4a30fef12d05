"""Blocks that left the pool come back from memory and disk, and never change an answer."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from transformers import AutoModelForCausalLM

from cache.disk import DiskTier
from cache.disk_folder import layout_of
from cache.slot_file import slot_bytes
from cache.tiers import MemoryTier, Tiers
from cache.tokens import Tokenizer
from policies import schema as policy
from runtime.costs import StepCosts
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.model import Model, ModelRefused
from runtime.sequence import Output, Sampling, Service
from runtime.swap import COPY_S_MAX, Swap, open_swap
from tests.runtime.test_oracle import EXAMPLES, generate
from tests.runtime.tiny_models import FAMILIES, VOCAB, write_model

torch.set_num_threads(1)
ANSWER = 12
IDENTITY = {"model": "tiny"}
ONE_BLOCK_S = 1e-9  # time for copying that is up after one block
# One head for all, a middle for each of three, an end for each of nine: as conversations come back.
HEAD, MIDDLE, END = 33, 48, 17
FAMILY_NAMES = ("llama", "gemma3", "deepseek_v3")  # plain, sliding windows, keys unlike values


@dataclass(frozen=True)
class Family:
    """A model, prompts that share beginnings, and what `generate` says to each of them."""

    model: Model
    tokenizer: Tokenizer
    prompts: list[list[int]]
    expected: list[list[int]]

    @property
    def slot(self) -> int:
        return slot_bytes(self.model.block_bytes)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Name -> Family, built once each."""

    @cache
    def build(name: str) -> Family:
        folder = write_model(tmp_path_factory.mktemp(name), *FAMILIES[name])
        rng = random.Random(name)

        def some(count: int) -> list[int]:
            return [rng.randrange(VOCAB) for _ in range(count)]

        head = some(HEAD)
        prompts = []
        for _ in range(3):
            middle = head + some(MIDDLE)
            prompts += [middle, middle[:64], *(middle + some(END) for _ in range(2))]
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = [generate(reference, prompt, ANSWER) for prompt in prompts]
        model, _ = load_model(folder, kv_tokens=1024)
        return Family(model, Tokenizer.load(folder), prompts, expected)

    return build


class World:
    """An engine with a small pool over tiers, run step by step."""

    def __init__(
        self,
        one: Family,
        *,
        disk: Path | None = None,
        blocks: int = 11,
        host_blocks: int = 0,
        disk_blocks: int = 64,
        costs: StepCosts | None = None,
        copy_s_max: float = COPY_S_MAX,
        **limits: int,
    ) -> None:
        self.family = one
        size = one.model.block_bytes
        self.memory = MemoryTier(host_blocks * size)
        self.disk = None
        if disk is not None:
            limit = disk_blocks * one.slot
            self.disk = DiskTier(disk, limit_bytes=limit, block_bytes=size, identity=IDENTITY)
        tiers = Tiers(self.memory, self.disk)
        self.swap = Swap(one.model, tiers, costs=costs, copy_s_max=copy_s_max)
        self.swap.measure()
        one.model.blocks = blocks  # a smaller pool than the tensors hold: eviction comes early
        self.engine = Engine(
            one.model, one.tokenizer, emit=lambda _: None, swap=self.swap, **limits
        )

    def __enter__(self) -> World:
        return self

    def __exit__(self, *failure: object) -> None:
        self.swap.close()
        if failure[0] is None:
            self.engine.check()
            counts = self.engine.load().blocks
            assert (counts.free + counts.cached, counts.in_use) == (counts.total, 0)
            assert self.memory.pinned == 0
            assert self.memory.counts.bytes <= self.memory.counts.limit_bytes

    def submit(self, prompt: int, tokens: int = ANSWER, priority: int = 0) -> int:
        sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
        order = Order(self.family.prompts[prompt], sampling, Service(priority))
        (key,) = self.engine.submit([order])
        return key

    def step(self) -> list[Output]:
        self.engine.take_orders(wait=False)
        outputs = self.engine.step()
        assert not any(output.error for output in outputs)
        return outputs

    def ask(self, prompt: int, tokens: int = ANSWER) -> int:
        """Runs one prompt alone and checks its answer; the tokens that were found."""
        key = self.submit(prompt, tokens)
        got: list[int] = []
        found = 0
        for _ in range(5000):
            for output in self.step():
                assert output.key == key
                got += output.token_ids
                found = output.cached_tokens
                if output.finish_reason:
                    assert got == self.family.expected[prompt][:tokens]
                    return found
        raise AssertionError("the answer does not end")

    def drain(self) -> None:
        assert self.disk is not None
        assert self.disk.drain(30)


@dataclass(frozen=True)
class Arrival:
    prompt: int
    step: int
    tokens: int
    cancel_step: int | None


worlds = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([16, 33, 64, 512]),
        "max_sequences": st.integers(1, 6),
        "blocks": st.sampled_from([8, 11, 16, 30]),
        "host_blocks": st.sampled_from([0, 2, 9, 100]),
        "disk_blocks": st.sampled_from([0, 2, 7, 64]),
        "copy_s_max": st.sampled_from([COPY_S_MAX, ONE_BLOCK_S]),
        "arrivals": st.lists(
            st.builds(
                Arrival,
                prompt=st.integers(0, 11),
                step=st.integers(0, 40),
                tokens=st.integers(1, ANSWER),
                cancel_step=st.one_of(st.none(), st.none(), st.integers(0, 60)),
            ),
            min_size=2,
            max_size=12,
        ),
    }
)


def play(world: World, arrivals: list[Arrival]) -> list[list[int]]:
    """Runs a schedule step by step; the tokens that each arrival got."""
    keys: dict[int, int] = {}
    got: list[list[int]] = [[] for _ in arrivals]
    step = 0
    while len(keys) < len(arrivals) or world.engine.load().running or world.engine.load().waiting:
        for at, arrival in enumerate(arrivals):
            if arrival.step == step:
                keys[world.submit(arrival.prompt, arrival.tokens)] = at
            if arrival.cancel_step == step:
                world.engine.cancel([key for key, number in keys.items() if number == at])
        for output in world.step():
            got[keys[output.key]] += output.token_ids
        step += 1
        assert step < 5000, "the schedule does not end"
    return got


@pytest.mark.parametrize("name", FAMILY_NAMES)
@settings(
    max_examples=EXAMPLES or 8,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)
@given(world=worlds)
def test_any_schedule_over_any_tiers_gives_what_generate_gives(
    family, tmp_path_factory, name, world
):
    """Evictions, reloads, restarts of the disk tier, preemption and cancels change no answer."""
    one = family(name)
    arrivals = world.pop("arrivals")
    disk = tmp_path_factory.mktemp("kv") if world["disk_blocks"] else None
    for _ in range(2):  # the second time it begins with what the first one left on the disk
        with World(one, disk=disk, **world) as running:
            got = play(running, arrivals)
        for arrival, tokens in zip(arrivals, got, strict=True):
            expected = one.expected[arrival.prompt][: arrival.tokens]
            assert tokens == (expected if arrival.cancel_step is None else expected[: len(tokens)])


def test_a_conversation_comes_back_from_memory(family):
    """All full blocks but the last token's row are found, whoever pushed them out of the pool."""
    with World(family("llama"), host_blocks=100) as world:
        assert world.ask(2) == 0
        for other in (6, 10):
            world.ask(other)
        assert world.ask(2) == (HEAD + MIDDLE + END) // 16 * 16
        counts = world.swap.counts
        assert counts.host_hits > 0
        assert counts.lower_hits == 0


def test_a_conversation_comes_back_from_disk(family, tmp_path):
    """Its sequence waits until its blocks are staged, and another one is not held up by that."""
    with World(family("llama"), disk=tmp_path) as world:
        world.ask(2)
        for other in (6, 10):
            world.ask(other)
        world.drain()
        assert world.ask(2) == (HEAD + MIDDLE + END) // 16 * 16
        counts = world.swap.counts
        assert counts.lower_hits > 0
        assert counts.waits == 1
        assert counts.timeouts == 0


def test_a_prompt_that_is_known_whole_is_computed_from_its_last_token(family, tmp_path):
    """64 tokens are four full blocks: all come back, and one row is still computed."""
    for world in (
        World(family("llama"), host_blocks=100),
        World(family("llama"), disk=tmp_path),
    ):
        with world:
            world.ask(1)
            for other in (6, 10):
                world.ask(other)
            if world.disk is not None:
                world.drain()
            assert world.ask(1) == 63


def test_a_preempted_sequence_finds_its_blocks_again(family):
    """What it had computed went to memory when its room was taken by one that goes first."""
    one = family("llama")
    with World(one, host_blocks=100, blocks=9) as world:
        low = world.submit(2, priority=1)
        got: dict[int, list[int]] = {low: []}
        while not got[low]:
            got[low] += [token for output in world.step() for token in output.token_ids]
        high = world.submit(6)
        got[high] = []
        while world.engine.load().running or world.engine.load().waiting:
            for output in world.step():
                got[output.key] += output.token_ids
        assert got == {low: one.expected[2], high: one.expected[6]}
        assert world.engine.load().preemptions > 0
        assert world.swap.counts.host_hits > 0


def test_a_long_run_is_filled_over_several_steps_while_others_answer(family):
    """With time for one block a step, an answer that runs gets a token in each of these steps."""
    one = family("llama")
    with World(one, host_blocks=100, copy_s_max=ONE_BLOCK_S) as world:
        world.ask(2)
        for other in (6, 10):
            world.ask(other)
        running = world.submit(5, 12)
        got: dict[int, list[int]] = {running: []}
        while not got[running]:
            got[running] += [token for output in world.step() for token in output.token_ids]
        back = world.submit(2, 1)
        got[back] = []
        steps = 0
        while not got[back]:
            for output in world.step():
                got[output.key] += output.token_ids
                found = output.cached_tokens
            steps += 1
        assert steps > 3
        assert len(got[running]) == 1 + steps
        assert got == {running: one.expected[5][: 1 + steps], back: one.expected[2][:1]}
        assert found == (HEAD + MIDDLE + END) // 16 * 16
        world.engine.cancel([running])
        world.step()


@pytest.fixture(scope="module")
def int8_family(family, tmp_path_factory):
    """A model with int8 keys and values, and what its own engine says with room for everything."""
    folder = write_model(tmp_path_factory.mktemp("int8"), *FAMILIES["llama"])
    model, _ = load_model(folder, kv_tokens=1024, kv="int8")
    tokenizer = Tokenizer.load(folder)
    prompts = family("llama").prompts
    engine = Engine(model, tokenizer, emit=lambda _: None)
    expected = []
    for prompt in prompts:
        sampling = Sampling(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        engine.submit([Order(prompt, sampling)])
        engine.take_orders(wait=False)
        tokens: list[int] = []
        while len(tokens) < ANSWER:
            tokens += [token for output in engine.step() for token in output.token_ids]
        expected.append(tokens)
    return Family(model, tokenizer, prompts, expected)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_int8_blocks_come_back_as_they_were(int8_family, tmp_path, where):
    """A quarter of the bytes and the same way; what the tokens were rounded to does not change."""
    disk = tmp_path if where == "disk" else None
    with World(int8_family, host_blocks=0 if disk else 100, disk=disk) as world:
        for prompt in (2, 6, 10, 3, 1, 2, 7, 11):
            world.ask(prompt)
            if disk is not None:
                world.drain()
        counts = world.swap.counts
        assert (counts.lower_hits if disk else counts.host_hits) > 5


def test_loading_is_declined_where_computing_is_faster(family):
    """A machine that computes for nothing loads nothing, but for the answer it is all the same."""
    free = StepCosts([1, 512], [1e-12, 1e-12])
    with World(family("llama"), host_blocks=100, costs=free) as world:
        for prompt in (2, 6, 10, 2):
            world.ask(prompt)
        assert world.swap.counts.host_hits == 0
        assert world.swap.counts.declined > 0


def test_two_that_want_the_same_blocks_stage_them_once(family, tmp_path):
    with World(family("llama"), disk=tmp_path, blocks=30) as world:
        world.ask(0)
        for other in (4, 8, 6, 10):
            world.ask(other)
        world.drain()
        assert world.disk is not None
        before = world.disk.counts.loaded
        one = family("llama")
        got = play(world, [Arrival(prompt, 0, 4, None) for prompt in (2, 3)])
        assert got == [one.expected[2][:4], one.expected[3][:4]]
        assert world.disk.counts.loaded - before <= (HEAD + MIDDLE) // 16


def files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"*/*/{name}"))


@pytest.mark.parametrize("fault", ["changed", "cut", "removed", "index"])
def test_no_wrong_token_comes_from_a_damaged_disk(family, tmp_path, fault):
    """Blocks are changed, cut off or removed under the running engine: all is computed again."""
    with World(family("llama"), disk=tmp_path) as world:
        for prompt in (2, 6, 10):
            world.ask(prompt)
        world.drain()
        for blocks in files(tmp_path, "blocks"):
            size = blocks.stat().st_size
            if fault == "changed":
                blocks.write_bytes(random.Random(1).randbytes(size))
            elif fault == "cut":
                os.truncate(blocks, size // 3)
            elif fault == "removed":
                for file in blocks.parent.iterdir():
                    file.unlink()
                blocks.parent.rmdir()
            else:
                files(tmp_path, "index")[0].write_bytes(os.urandom(1000))
        for prompt in (2, 6, 10, 3, 7):
            world.ask(prompt)
        if fault in ("changed", "cut"):
            assert world.disk is not None
            assert world.disk.counts.corrupt > 0


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_a_disk_that_takes_nothing_changes_no_answer(family, tmp_path, fault):
    """The tier is off, everything is computed, and memory above it works on."""
    one = family("llama")
    folder = tmp_path / "kv"
    if fault == "full":
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        layout, _ = layout_of(IDENTITY, one.model.block_bytes)
        (folder / layout / "0").mkdir(parents=True)
        (folder / layout / "0" / "blocks").symlink_to("/dev/full")
    else:
        folder.write_text("not a folder")
    with World(one, disk=folder, host_blocks=3) as world:
        for prompt in (2, 6, 10, 2, 3):
            world.ask(prompt)
        assert world.disk is not None
        assert not world.disk.counts.on
        assert world.swap.counts.lower_hits == 0


def test_a_restart_finds_the_disk_again_and_another_model_does_not(family, tmp_path):
    """All that the pool held, too. The keys of other weights would be wrong answers: not found."""
    with World(family("llama"), disk=tmp_path) as world:
        for prompt in (2, 6, 10):
            world.ask(prompt)
    with World(family("llama"), disk=tmp_path) as world:
        for prompt in (2, 6, 10):
            assert world.ask(prompt) == (HEAD + MIDDLE + END) // 16 * 16
        assert world.swap.counts.lower_hits > 0
    with World(family("gemma3"), disk=tmp_path) as world:
        assert world.ask(2) == 0


def test_a_killed_process_leaves_whole_beginnings(family, tmp_path):
    """What all prompts begin with never leaves the pool, but without it the rest is of no use."""
    with World(family("llama"), disk=tmp_path) as world:
        for prompt in (2, 6, 10):
            world.ask(prompt)
        world.swap.tiers.close()  # without a farewell to the pool
        world.swap.tiers.lower = None
    with World(family("llama"), disk=tmp_path) as world:
        assert world.ask(2) >= HEAD // 16 * 16 + 16


def test_a_disk_tier_without_room_for_this_models_blocks_is_refused(family, tmp_path):
    """At the start, with the field that is to be changed."""
    wanted = policy.Tiers.model_construct(
        host_bytes=0, disk=policy.DiskTier.model_construct(path=str(tmp_path), max_bytes=10_000)
    )
    with pytest.raises(ModelRefused, match="max_bytes: 10000 bytes hold fewer"):
        open_swap(family("llama").model, wanted, "tiny")


def test_values_that_went_wrong_do_not_come_back(family):
    """What is distrusted in the pool is forgotten below it, too."""
    with World(family("llama"), host_blocks=100) as world:
        world.ask(2)
        for other in (6, 10):
            world.ask(other)
        held = world.memory.counts.blocks
        assert held > 0
        world.engine.forget_cached()
        assert world.ask(2) == 0
        assert world.memory.counts.forgotten >= held
