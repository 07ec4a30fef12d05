"""Runs a chat template as the untrusted program that it is. The sole importer of jinja2.

Knows the dialect of jinja2 that model folders are written in (that of transformers 5.23,
`_compile_jinja_template`) and the bounds of a run; knows no messages and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

RENDERED_CHARS_MAX = 8_000_000
STEPS_MAX = 300_000  # loop rounds and calls of one run; the slowest take some 5 us each
PRODUCT_MAX = 1_000_000  # elements of a repeated string or list, or bits of a product


class TemplateProblem(Exception):
    """Whatever can go wrong with a chat template."""


class TemplateBroken(TemplateProblem):
    """The template does not compile: the model folder is at fault."""


class TemplateRefusal(TemplateProblem):
    """The template does not take this conversation; the message is the template's own sentence."""


class TemplateFailure(TemplateRefusal):
    """The template broke off on this conversation: an undefined name, a wrong type, a bound."""


class Program:
    """One template, compiled once; run it from any thread.

    Bounded: attribute access (jinja2's immutable sandbox, and no underscore names on namespaces),
    `range` (jinja2's MAX_RANGE, 100,000), loop rounds plus calls (STEPS_MAX), products and powers
    (PRODUCT_MAX), recursion, written text (RENDERED_CHARS_MAX). No template can load another.
    Not bounded, since jinja2 has no place to stand: the memory of one single value, such as a
    string that doubles itself with `~` in every round, or a filter with a huge width.
    """

    __slots__ = ("_template", "literals")

    def __init__(self, source: str) -> None:
        """Raises TemplateBroken with the line when the source does not compile."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            texts = [node.data for node in tree.find_all(nodes.TemplateData)]
            constants = [node.value for node in tree.find_all(nodes.Const)]
            self._template = environment.from_string(_count_loops(tree))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateBroken(
                f"the chat template does not compile, line {error.lineno}: {error.message}"
            ) from None
        except (RecursionError, OverflowError) as error:
            raise TemplateBroken(f"the chat template does not compile: {error}") from None
        # What the template itself can write, apart from what it glues together.
        self.literals = "\0".join(texts + [text for text in constants if isinstance(text, str)])

    def run(self, names: Mapping[str, Any]) -> str:
        """What the template writes. Raises TemplateRefusal, TemplateFailure."""
        budget = _BUDGET.set(_Budget(STEPS_MAX))
        pieces, chars = [], 0
        try:
            for piece in self._template.generate(names):
                chars += len(piece)
                if chars > RENDERED_CHARS_MAX:
                    raise _Bound(f"wrote more than {RENDERED_CHARS_MAX} characters")
                pieces.append(piece)
        except _Raised as error:
            raise TemplateRefusal(str(error)) from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            what = str(error) if isinstance(error, _Bound) else f"{type(error).__name__}: {error}"
            raise TemplateFailure(
                f"the chat template failed on these messages{_line_of(error)}: {what}"
            ) from None
        finally:
            _BUDGET.reset(budget)
        return "".join(pieces)


class _Raised(jinja2.TemplateError):
    """The template called raise_exception."""


class _Bound(jinja2.TemplateRuntimeError):
    """The template went over one of the bounds above."""


class _Budget:
    __slots__ = ("steps",)

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _Bound(f"took more than {STEPS_MAX} loop rounds and calls")


_BUDGET: ContextVar[_Budget] = ContextVar("steps left in this rendering")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes through here, macros and recursive loops too."""
        _BUDGET.get().spend(1)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _bits(left) * abs(right) > PRODUCT_MAX:
            raise _Bound(f"raised to a power of more than {PRODUCT_MAX} bits")
        if operator == "*" and _bits(left) + _bits(right) > PRODUCT_MAX:
            raise _Bound(f"made a product of more than {PRODUCT_MAX} bits")
        if operator == "*" and _elements(left, right) > PRODUCT_MAX:
            raise _Bound(f"repeated something to more than {PRODUCT_MAX} elements")
        return super().call_binop(context, operator, left, right)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _elements(left: Any, right: Any) -> int:
    """Elements of `left * right` where one of them is a text or a list, else 0."""
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int):
            return len(many) * times
    return 0


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, with no type behind it to climb."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(...)` for templates; a name with an underscore in front could reach the type."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        names = dict(*args, **kwargs)
        for name in names:
            _refuse_underscore(name)
        super().__init__(names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r}: no underscore in front, please")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks training text: without effect here."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads a class attribute of this name

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _LoopCounter(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  # the visitor's naming rule
        self.generic_visit(node)
        node.iter = nodes.Filter(
            node.iter, "_count_rounds", [], [], None, None,
            lineno=node.lineno, environment=node.environment,
        )  # fmt: skip  # one node a line reads worse
        return node


def _count_loops(tree: nodes.Template) -> nodes.Template:
    _LoopCounter().visit(tree)
    return tree


@jinja2.pass_context
def _count_rounds(_: Context, items: Any) -> Any:
    """Pays for a loop before it runs; takes the context so that jinja2 never folds the call."""
    try:
        rounds = len(items)
    except TypeError:
        items = list(items)
        rounds = len(items)
    _BUDGET.get().spend(rounds)
    return items


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    del environment.globals["lipsum"]  # writes text of any length, and no chat template has it
    environment.globals.update(raise_exception=_raise, dict=_Dict(), namespace=_Namespace)
    environment.filters.update(tojson=_to_json, _count_rounds=_count_rounds)
    return environment


def _raise(message: object) -> None:
    raise _Raised(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _line_of(error: BaseException) -> str:
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line} of it" if line else ""
