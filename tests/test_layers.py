"""The architecture, held: who may import whom, one importer for each heavy dependency, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package -> what of ours it may import. `runtime.wire` is the only door into the runtime.
MAY_IMPORT = {
    "cache": set(),
    "command": {"policies", "runtime.wire"},
    "fleet": {"command", "policies", "runtime.wire"},
    "evals": {"cache", "policies", "runtime.wire", "telemetry"},
    "gateway": {"cache", "policies", "runtime.wire", "telemetry"},
    "pocket": set(),
    "policies": {"cache"},
    "runtime": {"cache", "policies", "spec_decode", "telemetry"},
    "spec_decode": set(),
    "telemetry": set(),
}  # fmt: skip
MODULES = {"headgate": {"command", "evals", "policies"}}
PACKAGED = (
    "cache", "command", "evals", "fleet", "gateway", "policies", "runtime", "spec_decode",
    "telemetry",
)  # fmt: skip

# heavy dependency -> its only importers
IMPORTERS = {
    "llguidance": {"runtime/grammar.py", "runtime/lark.py"},
    "hiredis": {"cache/redis_lane.py"},
    "ray": {"fleet/ray_cluster.py"},
    "ruamel": {"policies/yaml_tree.py"},
    "tokenizers": {"cache/tokens.py"},
    "jinja2": {"cache/sandbox.py", "cache/template.py", "cache/tokens.py"},
}
TORCH_FREE = ("cache", "command", "evals", "fleet", "gateway", "policies", "telemetry")
HEAVY = ("torch", "transformers")
VAGUE = {"utils", "util", "common", "core", "base", "misc", "helpers", "helper"}
FILE_LINES = 300
FUNCTION_LINES = 60
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".sh", ".cfg", ""}


def sources(*packages: str) -> Iterator[tuple[str, Path, ast.Module]]:
    """Package, file and tree of every module that exists; packages to come are no mistake."""
    for package in packages:
        single = ROOT / f"{package}.py"
        for file in [single] if single.exists() else sorted((ROOT / package).rglob("*.py")):
            yield package, file, ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            base = package + ("." + module if module else "") if node.level else module
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def at(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_every_package_imports_only_what_the_house_allows() -> None:
    ours = {*MAY_IMPORT, *MODULES}
    wrong = []
    for package, allowed in {**MAY_IMPORT, **MODULES}.items():
        for _, file, tree in sources(package):
            for line, name in imports(tree, package):
                top = name.partition(".")[0]
                if top not in ours or top == package:
                    continue
                if not any(name == door or name.startswith(f"{door}.") for door in allowed):
                    wrong.append(f"{at(file, line)}  {package} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_each_heavy_dependency_has_one_importer() -> None:
    wrong = []
    for _, file, tree in sources(*PACKAGED, "headgate"):
        name_of_file = str(file.relative_to(ROOT))
        for line, name in imports(tree, ""):
            top = name.partition(".")[0]
            if top in IMPORTERS and name_of_file not in IMPORTERS[top]:
                wrong.append(f"{at(file, line)}  {top} is imported only by {IMPORTERS[top]}")
    assert not wrong, "\n".join(wrong)


def test_attributes_of_the_genai_conventions_stand_behind_one_mapping() -> None:
    """What writes spans and what reads them know no name of theirs by themselves."""
    docs = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = []
    for _, file, tree in sources(*PACKAGED, "headgate", "benchmarks"):
        texts = {id(one.body[0]) for one in ast.walk(tree) if isinstance(one, docs) and one.body}
        said = {
            id(one.value)
            for one in ast.walk(tree)
            if isinstance(one, ast.Expr) and id(one) in texts
        }
        wrong += [
            f"{at(file, node.lineno)}  {node.value!r}: name it in telemetry/genai.py"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and "gen_ai." in node.value and id(node) not in said
            and file != ROOT / "telemetry" / "genai.py"
        ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_what_serves_without_a_model_never_names_torch() -> None:
    wrong = [
        f"{at(file, line)}  imports {name}"
        for _, file, tree in sources(*TORCH_FREE, "headgate")
        for line, name in imports(tree, "")
        if name.partition(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_what_serves_without_a_model_loads_no_model_library() -> None:
    """Every module of gateway, policies and command, headgate and the wire, in one new process."""
    names = ["headgate", "runtime.wire"]
    for package, file, _ in sources("gateway", "policies", "command"):
        stem = file.relative_to(ROOT).with_suffix("").parts
        if stem[-1] != "__main__":
            names.append(".".join(stem).removesuffix(".__init__"))
        assert package == stem[0]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_next_to_nothing() -> None:
    """`headgate --help` is typed by people who wait for it."""
    program = (
        "import sys, headgate\n"
        "try: headgate.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'aiohttp', 'pydantic', 'asyncio', 'ruamel'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_no_init_under_tests_and_no_vague_names() -> None:
    """An `__init__.py` there would shadow the packages; a vague name takes anything in."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
    vague = [
        str(file.relative_to(ROOT))
        for _, file, _ in sources(*PACKAGED, "pocket", "benchmarks", "tests")
        if file.stem in VAGUE
    ]
    assert not vague


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def test_nothing_grows_to_twice_its_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    """300 lines a file and 60 a function are told; twice as much fails."""
    told, wrong = [], []
    for _, file, tree in sources(*PACKAGED, "pocket", "headgate"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            told.append(f"{at(file, 1)}  {lines} lines")
        if lines > 2 * FILE_LINES:
            wrong.append(told[-1])
        for function, length in functions(tree):
            if length > FUNCTION_LINES:
                told.append(f"{at(file, function.lineno)}  {function.name}: {length} lines")
            if length > 2 * FUNCTION_LINES:
                wrong.append(told[-1])
    with capsys.disabled():
        if told:
            print("\nover a soft ceiling:\n  " + "\n  ".join(told))
    assert not wrong, "\n".join(wrong)


def tracked() -> list[Path]:
    """Files that git knows; without git, those of the packages."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return [file for _, file, _ in sources(*PACKAGED, "pocket", "tests")]
    return [ROOT / name for name in listed.split("\0") if name]


def test_no_file_knows_the_machine_that_it_was_written_on() -> None:
    """A path of a workshop in a file is of no use to anyone else."""
    workshop = "/" + "work" + "/"
    wrong = []
    for file in tracked():
        if file.suffix not in TEXT or not file.is_file() or file.stat().st_size > 2**21:
            continue
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
            if workshop in line:
                wrong.append(at(file, number))
    assert not wrong, "\n".join(wrong)
