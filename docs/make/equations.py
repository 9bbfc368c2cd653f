"""Turns TeX into MathML while the site is built, so that pages need no script and no network for it."""

import html
import re

from latex2mathml.converter import convert

_TEX = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    return _TEX.sub(_mathml, content)


def _mathml(found: re.Match) -> str:
    inline, block = found.group(2), found.group(3)
    tex = html.unescape(inline if block is None else block).strip()
    return convert(tex, display="inline" if block is None else "block")
