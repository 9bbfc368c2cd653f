"""Makes the roles of docstrings, such as ``:func:`attribute` ``, links into the reference."""

import re

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>(?:~)?([\w.]+)</code>")


def on_page_content(content: str, **_) -> str:
    return _ROLE.sub(_link, content)


def _link(found: re.Match) -> str:
    name = found.group(1)
    short = name.removeprefix("tl_circuits.")
    # Names without a place in the reference stay plain code.
    return f'<autoref identifier="tl_circuits.{short}" optional><code>{short}</code></autoref>'
