"""Keys and values in int8: the same answers as a plain model that rounds in the same places."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from cache.tokens import Tokenizer
from runtime.attention import PagedLayer, Span, StepHolder, lay_out, paged_attention
from runtime.engine import Engine, Order
from runtime.int8_kv import Int8KV
from runtime.kv import BLOCK_TOKENS, blocks_for
from runtime.layer_kv import LayerKV
from runtime.loading import load_model
from runtime.paged_kernel import kernel_of
from runtime.sequence import Sampling
from runtime.tails import Tails
from tests.runtime.tiny_models import FAMILIES, VOCAB, write_model

torch.set_num_threads(1)


# ---- the plain formula ---------------------------------------------------------------------------


def rounded(x: torch.Tensor, over: int) -> torch.Tensor:
    """x through int8 and back, one bf16 scale for all that lie along `over`."""
    scale = (x.abs().amax(over, keepdim=True) / 127).bfloat16().float()
    scale[scale == 0] = 1.0
    return (x / scale).round().clamp(-127, 127) * scale


def in_int8(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[KV, C, D] each, complete blocks as int8 gives them back; the rest is never looked at."""
    keys, values = keys.clone(), values.clone()
    for first in range(0, keys.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        block = slice(first, first + BLOCK_TOKENS)
        keys[:, block] = rounded(keys[:, block], 1)
        values[:, block] = rounded(values[:, block], 2)
    return keys, values


def plain(query, keys, values, first: int, scale: float, window=None, softcap=None):
    """query [H, R, D] at positions from `first` on, keys and values [KV, C, D] -> [R, H, D]."""
    old_keys, old_values = in_int8(keys, values)
    groups = query.shape[0] // keys.shape[0]
    rows = []
    for row in range(query.shape[1]):
        at = first + row
        own = at // BLOCK_TOKENS * BLOCK_TOKENS
        low = 0 if window is None else max(0, at - window + 1)
        k = torch.cat([old_keys[:, low:own], keys[:, max(low, own) : at + 1]], 1)
        v = torch.cat([old_values[:, low:own], values[:, max(low, own) : at + 1]], 1)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (k @ query[:, row, :, None])[..., 0] * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows.append((scores.softmax(-1)[:, None] @ v)[:, 0])
    return torch.stack(rows)


# ---- attention -----------------------------------------------------------------------------------


@pytest.fixture(params=["torch", "native"])
def backend(request):
    """Both ways of attending: the library or None."""
    return request.getfixturevalue("native_library") if request.param == "native" else None


class Pool:
    """One layer in int8 with its tails, and steps over it as a model makes them."""

    def __init__(self, blocks: int, kv_heads: int, dims: tuple[int, int], library) -> None:
        empty = (torch.zeros(0, kv_heads, BLOCK_TOKENS, dim) for dim in dims)
        self.kv = Int8KV(blocks, LayerKV(*empty))
        self.tails = Tails(blocks)
        self._library = library

    def step(self, spans: list[Span], query, key, value, **kwargs) -> torch.Tensor:
        layout = lay_out(spans, query.device)
        layout.tails = self.tails.place(layout)
        if self.tails.capacity > len(self.kv.tails.keys):
            self.kv.more_tails(self.tails.capacity)
        holder = StepHolder()
        holder.layout = layout
        module = nn.Module()
        module.paged_layer = PagedLayer(self.kv, holder, kernel_of(self._library, self.kv))
        return paged_attention(module, query, key, value, None, **kwargs)[0][0]


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_what_is_not_finite_stays_so_in_eight_bits(backend, part, spoiled):
    """A token that went wrong is not made one that only looks right when its block is complete."""
    torch.manual_seed(0)
    pool = Pool(2, 1, (8, 8), backend)
    query, keys, values = (torch.randn(1, 1, BLOCK_TOKENS + 1, 8) for _ in range(3))
    (keys if part == "keys" else values)[0, 0, 3, 5] = spoiled

    def step(first: int, end: int) -> torch.Tensor:
        rows = [one[:, :, first:end] for one in (query, keys, values)]
        return pool.step([Span(end, end - first, [0, 1])], *rows, scaling=1.0)

    for first in range(0, BLOCK_TOKENS, 4):
        step(first, first + 4)
    assert not step(BLOCK_TOKENS, BLOCK_TOKENS + 1).isfinite().all()


cuts = st.lists(st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 300)), min_size=1)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 400), cuts), min_size=1, max_size=5),
    groups=st.sampled_from([1, 3]),
    dims=st.sampled_from([(8, 8), (16, 8), (12, 16)]),
    window=st.sampled_from([None, None, 7, 40]),
    softcap=st.sampled_from([None, None, 2.0]),
    seed=st.integers(0, 2**20),
)
def test_every_cut_of_every_sequence_gives_what_the_plain_formula_gives(
    backend, sequences, groups, dims, window, softcap, seed
):
    """Decodes, short spans and chunks side by side; where a prompt is cut changes nothing."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pool = Pool(sum(blocks_for(length) for length, _ in sequences), 2, dims, backend)
    free = list(range(len(pool.kv.keys)))
    rng.shuffle(free)
    running = []
    for length, parts in sequences:
        table = [free.pop() for _ in range(blocks_for(length))]
        tensors = [torch.randn(2 * groups, length, dims[0])]
        tensors += [torch.randn(2, length, dim) for dim in dims]
        running.append((table, tensors, parts))
    expected = [plain(*tensors, 0, dims[0] ** -0.5, window, softcap) for _, tensors, _ in running]
    at = [0] * len(running)
    turn = 0
    while any(done < len(one) for done, one in zip(at, expected, strict=True)):
        todo = []
        for number, (_, _, parts) in enumerate(running):
            count = min(parts[turn % len(parts)], len(expected[number]) - at[number])
            if count and (turn + number) % 3:
                todo.append((count > 1, number, count))
        turn += 1
        if not todo:
            continue
        todo.sort()
        spans, packed = [], []
        for _, number, count in todo:
            table, tensors, _ = running[number]
            spans.append(Span(at[number] + count, count, table))
            packed.append([one[:, at[number] : at[number] + count] for one in tensors])
        query, key, value = (torch.cat(parts, 1)[None] for parts in zip(*packed, strict=True))
        out = pool.step(spans, query, key, value, sliding_window=window, softcap=softcap)
        row = 0
        for _, number, count in todo:
            wanted = expected[number][at[number] : at[number] + count]
            torch.testing.assert_close(out[row : row + count], wanted, atol=3e-5, rtol=1e-4)
            row += count
            at[number] += count


def test_tokens_that_are_taken_back_leave_no_trace(backend):
    """A guess of 12 tokens fills a block; 2 of them stay, and others are written over the rest."""
    torch.manual_seed(0)
    pool = Pool(4, 2, (8, 8), backend)
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    table = [2, 0, 3]

    def step(first: int, end: int, seed: int = 0) -> torch.Tensor:
        wrong = torch.randn(1, 2, end - first, 8) * seed
        parts = (one[:, :, first:end] for one in (query, key, value))
        return pool.step([Span(end, end - first, table)], *(one + wrong for one in parts))

    step(0, 22)
    step(22, 34, seed=9)  # fills the second block with what will be taken back
    step(22, 24)
    step(24, 39)
    (out,) = step(39, 40)
    expected = plain(query[0, :, 39:], key[0], value[0], 39, 8**-0.5)
    torch.testing.assert_close(out[None], expected, atol=3e-5, rtol=1e-4)


def test_a_tail_that_is_given_up_costs_its_rounding_only(backend):
    """More begun blocks than tails: the oldest goes to int8, and goes on from there."""
    torch.manual_seed(0)
    count = 40
    pool = Pool(count, 1, (8, 8), backend)
    parts = [torch.randn(1, 1, count, 8) for _ in range(3)]
    for first in range(0, count, 8):
        spans = [Span(1, 1, [block]) for block in range(first, first + 8)]
        pool.step(spans, *(one[:, :, first : first + 8] for one in parts))
    assert pool.tails.capacity == 16
    more = [torch.randn(1, 1, 1, 8) for _ in range(3)]
    out = pool.step([Span(2, 1, [0])], *more)
    query, key, value = (
        torch.cat([a[0, :, :1], b[0]], 1) for a, b in zip(parts, more, strict=True)
    )
    expected = plain(query[:, 1:], key, value, 1, 8**-0.5)
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.03)
    assert not torch.equal(out, expected)


# ---- engine --------------------------------------------------------------------------------------


def attend_in_int8(module, query, key, value, mask, scaling=None, **kwargs):
    """For transformers: a whole sequence, every token as the plain formula has it."""
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plain(query[0], key[0], value[0], 0, scale, window, softcap)[None], None


AttentionInterface.register("int8_reference", attend_in_int8)


# Two tokens whose logits are nearer than this may change places: a sum that comes out otherwise in
# its last digit can round to the next of 127 steps. Logits here are about 1.5 apart on average.
NEAR = 0.01


def expected_answer(folder, prompt: list[int]) -> list[int]:
    """Greedy, without a cache, the whole sequence again for each token; ends before a near tie."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("int8_reference")
    tokens = list(prompt)
    for _ in range(ANSWER):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        (best, second), (token, _) = (one.tolist() for one in logits.topk(2))
        if best - second < NEAR:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def agree(found: list[list[int]], expected: list[list[int]]) -> bool:
    """Whether answers begin as they must."""
    pairs = zip(found, expected, strict=True)
    return all(one[: len(other)] == other for one, other in pairs)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    sampling = Sampling(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    keys = engine.submit([Order(prompt, sampling) for prompt in prompts])
    engine.take_orders(wait=False)
    got: dict[int, list[int]] = {key: [] for key in keys}
    while engine.load().running or engine.load().waiting:
        for output in engine.step():
            assert output.error is None
            got[output.key] += output.token_ids
    return [got[key] for key in keys]


ANSWER = 28


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Name -> folder, prompts, and what the plain model answers, built once each."""

    @cache
    def build(name: str):
        folder = write_model(tmp_path_factory.mktemp(name), *FAMILIES[name])
        rng = random.Random(name)
        lengths = (1, 15, 30, 47, 70)
        prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
        prompts += [[*prompts[4][:33], number] for number in range(2)]
        expected = [expected_answer(folder, prompt) for prompt in prompts]
        assert sum(map(len, expected)) > len(prompts) * ANSWER // 2, "too little to compare"
        return folder, prompts, expected

    return build


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_the_engine_answers_as_a_plain_model_that_rounds_alike(backend, family, name):
    """Chunks of any size, preemption and prefix hits: greedy answers are equal, token for token."""
    folder, prompts, expected = family(name)
    model, _ = load_model(folder, kv_tokens=1024, kv="int8")
    model.use(backend)
    tokenizer = Tokenizer.load(folder)
    for blocks, step_tokens in ((64, 512), (8, 17)):
        model.blocks = blocks
        engine = Engine(model, tokenizer, emit=lambda _: None, step_tokens=step_tokens)
        assert agree(answers(engine, prompts), expected)
        assert agree([answers(engine, [prompt])[0] for prompt in prompts], expected)
    engine = Engine(model, tokenizer, emit=lambda _: None, step_tokens=16)
    assert agree(answers(engine, [prompts[2]] * 3), [expected[2]] * 3)
    assert engine.load().preemptions > 0


# ---- blocks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, changes = FAMILIES["llama"]
    changes = {**changes, "hidden_size": 256}  # heads of 64, as in real models
    return write_model(tmp_path_factory.mktemp("llama"), config, changes)


def logits(model, ids: list[int], first: int, blocks: list[int]) -> torch.Tensor:
    end = first + len(ids)
    layout = lay_out([Span(end, len(ids), blocks)], model.device)
    return model.forward(ids, list(range(first, end)), layout, [len(ids) - 1])[0]


def test_memory_shrinks_by_three_and_a_half(folder):
    """A block of the pool is 3.5 times smaller than in fp32, tails included three times."""
    whole, _ = load_model(folder, kv_tokens=16384)
    small, _ = load_model(folder, kv_tokens=16384, kv="int8")
    assert whole.block_bytes / small.block_bytes > 3.5
    logits(small, [1] * 40, 0, [0, 1, 2])
    assert whole.kv_bytes / small.kv_bytes > 3


def test_blocks_can_be_copied_out_and_in(folder):
    """Complete blocks move between pools exactly; one that is begun moves with its rounding."""
    prompt = list(range(3, 43))
    model, _ = load_model(folder, kv_tokens=256, kv="int8")
    logits(model, prompt[:32], 0, [7, 2])
    buffers = model.read_blocks([7, 2])
    assert all(buffer.shape == (model.block_bytes,) for buffer in buffers)
    expected = logits(model, prompt[32:], 32, [7, 2, 11])
    other, _ = load_model(folder, kv_tokens=256, kv="int8")
    other.write_blocks([4, 0], buffers)
    assert torch.equal(logits(other, prompt[32:], 32, [4, 0, 5]), expected)
    expected = logits(model, [99], 40, [7, 2, 11])
    other.write_blocks([9], model.read_blocks([11]))
    found = logits(other, [99], 40, [4, 0, 9])
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.1)


def test_a_block_that_is_written_over_forgets_its_tail(folder):
    """What comes back from a tier is what the next token sees, not the tail of an earlier owner."""
    model, _ = load_model(folder, kv_tokens=256, kv="int8")
    logits(model, list(range(3, 19)), 0, [5])
    (buffer,) = model.read_blocks([5])
    expected = logits(model, [7], 16, [5, 1])
    logits(model, [9] * 12, 0, [5])  # another sequence begins in the same block
    model.write_blocks([5], [buffer])
    assert torch.equal(logits(model, [7], 16, [5, 1]), expected)
    assert torch.equal(model.read_blocks([5])[0], buffer)


def test_wiping_leaves_nothing_that_is_not_a_number(folder):
    """A tail of spoiled values would spoil the next block that gets its slot."""
    model, _ = load_model(folder, kv_tokens=256, kv="int8")
    logits(model, [3, 4], 0, [0])
    for kv in model._pool:
        kv.tails.keys[:] = float("nan")
        kv.tails.values[:] = float("nan")
    model.wipe([0])
    assert logits(model, [3], 0, [1]).isfinite().all()
