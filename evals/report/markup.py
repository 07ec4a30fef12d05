"""HTML and SVG that are escaped by construction: text becomes markup only through `tag`.

Knows no page. Answers of models come through here; `visible` shows what would act unseen.
"""

from __future__ import annotations

import html
import re

# Elements without content, as HTML has them.
_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "wbr"})
# Controls, marks that turn the direction of text, characters of no width, lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Node = Markup | str | int | float | None


def visible(text: str) -> str:
    """Text in which what is not seen is: escape sequences, turned directions, tags of no width."""
    return _UNSEEN.sub(_picture, text.replace("\r\n", "\n"))


def _picture(match: re.Match[str]) -> str:
    return f"[U+{ord(match[0]):04X}]"


def tag(name: str, /, *content: Node, **attributes: str | float | bool | None) -> Markup:
    """`<name attribute="...">content</name>`. Attributes: `class_`, `data_x`; None and False are
    left out, True has no value."""
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    if name in _VOID:
        return Markup(opened)
    return Markup(f"{opened}{join(*content)}</{name}>")


def join(*content: Node) -> Markup:
    """Content after content, what is no markup escaped."""
    return Markup("".join(_escaped(one) for one in content if one is not None))


def _escaped(node: Node) -> str:
    if isinstance(node, Markup):
        return str(node)
    return html.escape(visible(node), quote=False) if isinstance(node, str) else f"{node:g}"


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    # `viewBox` is case-sensitive and has no dash; `stroke_width` and `aria_label` have one.
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = visible(value) if isinstance(value, str) else f"{value:.6g}"
    return f' {name}="{html.escape(text)}"'
