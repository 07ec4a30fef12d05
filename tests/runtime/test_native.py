"""Compiled code is made once, kept, and never needed."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from cache.tokens import Tokenizer
from runtime import native
from runtime.engine import Engine, Order
from runtime.loading import load_model
from runtime.model import Model
from runtime.sequence import Sampling
from tests.runtime.tiny_models import FAMILIES, VOCAB, write_model

torch.set_num_threads(1)
SOURCE = 'extern "C" int answer() { return 42; }\n'


def source_in(folder, text: str = SOURCE):
    path = folder / "answer.cpp"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("native_library")
def test_a_library_is_compiled_once_and_found_again(tmp_path):
    """The second start of a worker compiles nothing; another source is another library."""
    source, kept = source_in(tmp_path), tmp_path / "cache"
    assert native.load(source, kept).answer() == 42
    (library,) = kept.iterdir()
    made = library.stat().st_mtime_ns
    assert native.load(source, kept).answer() == 42
    assert [one.stat().st_mtime_ns for one in kept.iterdir()] == [made]
    assert native.load(source_in(tmp_path, SOURCE.replace("42", "43")), kept).answer() == 43


@pytest.mark.usefixtures("native_library")
def test_code_that_does_not_compile_is_told_in_one_line(tmp_path, caplog):
    """The line has the compiler's own words; nothing half made is left."""
    assert native.load(source_in(tmp_path, "nonsense"), tmp_path / "cache") is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "answer.cpp is not used" in record.getMessage()
    assert "error" in record.getMessage()
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_there_is_no_library_and_one_line_says_so(tmp_path, caplog, monkeypatch):
    """A slim image has no g++, and serves."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native.load(source_in(tmp_path), tmp_path / "cache") is None
    (record,) = caplog.records
    assert "no C++ compiler" in record.getMessage()


def test_a_cache_that_cannot_be_written_costs_speed_only(tmp_path, caplog):
    """A read-only home is not a reason to stop."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert native.load(source_in(tmp_path), tmp_path / "cache") is None
    assert len(caplog.records) == 1


def greedy(model: Model, folder) -> list[list[int]]:
    """Answers to five prompts of unlike lengths that run together."""
    rng = random.Random(0)
    orders = [
        Order(
            [rng.randrange(VOCAB) for _ in range(length)],
            Sampling(temperature=0, max_tokens=40, ignore_eos=True),
        )
        for length in (1, 9, 33, 70, 130)
    ]
    engine = Engine(model, Tokenizer.load(folder), emit=lambda _: None, step_tokens=48)
    keys = engine.submit(orders)
    engine.take_orders(wait=False)
    answers: dict[int, list[int]] = {key: [] for key in keys}
    while engine.load().running or engine.load().waiting:
        for output in engine.step():
            assert output.error is None
            answers[output.key] += output.token_ids
    return [answers[key] for key in keys]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3", "deepseek_v3"])
def test_the_kernel_gives_the_same_greedy_answers(native_library, tmp_path, name):
    """Chunks, decodes, windows and soft caps, with torch alone and with the compiled kernel."""
    folder = write_model(tmp_path / name, *FAMILIES[name])
    model, _ = load_model(folder, kv_tokens=1024)
    expected = greedy(model, folder)
    model.use(native_library)
    layers = [one for one in model.module.modules() if hasattr(one, "paged_layer")]
    assert all(layer.paged_layer.kernel is not None for layer in layers)
    assert greedy(model, folder) == expected
