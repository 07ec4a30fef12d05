"""OpenVINO GenAI's continuous batching pipeline. The format names a GGUF type, or exact: fp32.

The model comes as GGUF and is kept beside it as OpenVINO's own files after the first load.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from benchmarks.lab.peers.talk import Answers, Guess, Tokens, guessing, serve

_CACHE_GIB = 1
_LONGEST_MATCH = 5
_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


class OpenVino:
    """A pipeline compiled for a number of threads; another number compiles it again."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        form, self._guess = guessing(form)
        kind = "f16" if form == "exact" else form
        self._folder = _own_files(Path(folder), kind)
        if self._guess and self._guess.proposer == "draft":
            self._draft = _own_files(Path(folder).with_name("draft"), kind)
        self._properties: dict[str, Any] = dict(_EXACT) if form == "exact" else {}
        self._threads = 0
        self._request = 0
        self._open(threads)
        self.facts: dict[str, Any] = {"version": genai.get_version()}

    def _open(self, threads: int) -> None:
        if threads == self._threads:
            return
        self._pipeline: Any = None
        config = genai.SchedulerConfig()
        config.cache_size = _CACHE_GIB
        config.enable_prefix_caching = self._guess is None
        properties = self._properties | {"INFERENCE_NUM_THREADS": threads}
        guesses: dict[str, Any] = {}
        if self._guess and self._guess.proposer == "draft":
            guesses["draft_model"] = genai.draft_model(str(self._draft), "CPU", **properties)
        elif self._guess and self._guess.proposer == "ngram":
            guesses["prompt_lookup"] = True
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(self._folder), config, "CPU", properties | guesses
        )
        self._threads = threads

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        self._open(threads)
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        if self._guess:
            return self._one_by_one(prompts, config, self._guess)
        waiting = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            waiting.append(self._pipeline.add_request(self._request, ids, config))
            self._request += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        answers = [list(one.read_all()[0].generated_ids) for one in waiting]
        assert all(len(answer) == new for answer in answers), "a request stopped early"
        return Answers(answers)

    def _one_by_one(self, prompts: Tokens, config: Any, guess: Guess) -> Answers:
        """By `generate`, which tells what became of guesses."""
        if guess.proposer != "none":
            config.num_assistant_tokens = guess.count
        if guess.proposer == "ngram":
            config.max_ngram_size = _LONGEST_MATCH
        answers, counts = [], {"drafted": 0.0, "accepted": 0.0, "passes": 0.0}
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            result = self._pipeline.generate([ids], [config])[0]
            answers.append(list(result.m_generation_ids[0]))
            if (metrics := result.extended_perf_metrics) is not None:
                counts["drafted"] += metrics.get_num_draft_tokens()
                counts["accepted"] += metrics.get_num_accepted_tokens()
                target = metrics.main_model_metrics.raw_metrics
                counts["passes"] += len(target.m_durations)
        return Answers(answers, counts if counts["drafted"] else {})


def _own_files(folder: Path, kind: str) -> Path:
    """OpenVINO's files, written by a first load of the GGUF file."""
    own = folder / f"openvino-{kind}"
    if not own.exists():
        half = own.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        (half / "model.gguf").symlink_to(folder / f"model-{kind}.gguf")
        genai.LLMPipeline(str(half / "model.gguf"), "CPU", enable_save_ov_model=True)
        half.rename(own)
    return own


if __name__ == "__main__":
    serve(OpenVino)
