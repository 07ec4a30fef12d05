"""What tests look for is installed by CI, or CONTRIBUTING says that they skip without."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def looked_for(function: str) -> Iterator[tuple[str, str]]:
    """File and what it asks `function` for, by a literal or by a name of a tuple of literals."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tuples = {
            target.id: [one.value for one in node.value.elts if isinstance(one, ast.Constant)]
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) == function and node.args:
                asked = node.args[0]
                if isinstance(asked, ast.Constant):
                    yield file.name, str(asked.value)
            for loop in getattr(node, "generators", ()):
                if _calls(node, function) and isinstance(loop.iter, ast.Name):
                    yield from ((file.name, str(one)) for one in tuples.get(loop.iter.id, ()))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _calls(node: ast.AST, function: str) -> bool:
    return any(isinstance(one, ast.Call) and _name(one.func) == function for one in ast.walk(node))


def test_programs_that_tests_look_for_are_installed_by_ci_or_told() -> None:
    """The bug: promtool was looked for, and no run of CI had it; nobody was told."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    installed = set(re.findall(r"([\w+-]+)=[\w+-]+", script))
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    asked = set(looked_for("which"))
    assert {"promtool", "haproxy", "kubectl"} <= {program for _, program in asked}
    silent = [
        f"{file}: {program}"
        for file, program in sorted(asked)
        if program not in installed and not re.search(rf"\b{re.escape(program)}\b", told)
    ]
    assert not silent, f"add to .ci/run, or to the table of CONTRIBUTING.md: {silent}"


def test_packages_that_tests_look_for_are_installed_or_told() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("-", "_")
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file, package in {*looked_for("importorskip"), *looked_for("find_spec")}:
        assert re.search(rf"^{package.lower()}==", pinned, re.M) or package in told, (file, package)
