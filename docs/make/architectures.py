"""Writes docs/architectures.md: every architecture that can be made small, against the plain Hugging Face model.

    python -m docs.make.architectures [NAME ...]

With TransformerLens 4 installed it writes docs/architectures-VERSION.md instead. Takes a few minutes on
two cores. Exits with 1 if any result is wrong; an exception that is not ours ends it.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tests import zoo  # noqa: E402  after the environment that transformers reads
from tests.against_plain import ENGINES, WITHIN, Compared, compare  # noqa: E402

LENS = version("transformer_lens")
PAGE = Path(__file__).parents[1] / ("architectures.md" if LENS.startswith("3.") else f"architectures-{LENS}.md")
HEAD = """# Architectures with TransformerLens {lens}

Which architectures are explained rightly, measured. Each line is a small random checkpoint, written by Hugging Face's own classes
and opened by TransformerLens (transformers {transformers}). The reference is the plain Hugging Face model with attention
patterns and norm denominators held, differentiated by PyTorch; it shares no code with this package. *Effects*: direct effects of every
token and every MLP on three logits, largest difference over the largest effect, for the closed form (`linear`) and the reference engine
(`autograd`). *Held*: all logits after a token counts half, patterns and denominators held, against the same run replayed on the
plain model. Everything is either below {within:.0e} or refused with the reason in the last column.

`python -m docs.make.architectures` writes this page again. With `engine="auto"` the closed form is taken where it is known, else autograd.

{right} right, {refused} refused, {unopened} that TransformerLens cannot open or run.

| architecture | model class | linear | autograd | held | refused, because |
|---|---|---|---|---|---|
"""


def main(names: list[str]) -> int:
    rows, right, refused, unopened, wrong = [], 0, 0, 0, []
    for name in names or sorted(zoo.ARCHITECTURES):
        found = compare(zoo.folder(name))
        numbers = [*found.effects.values(), *([] if found.held is None else [found.held])]
        if any(not number < WITHIN for number in numbers):
            wrong.append(name)
        unopened += bool(found.unopened)
        right += bool(found.effects)
        refused += not found.effects and not found.unopened
        rows.append(_row(name, found))
        sys.stderr.write(rows[-1] + "\n")
    if not names:
        facts = {"lens": LENS, "transformers": version("transformers"), "within": WITHIN}
        head = HEAD.format(right=right, refused=refused, unopened=unopened, **facts)
        PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    if wrong:
        sys.stderr.write(f"wrong: {', '.join(wrong)}\n")
    return 1 if wrong else 0


def _row(name: str, found: Compared) -> str:
    kind = zoo.ARCHITECTURES[name]()[0].__name__
    effects = [f"{found.effects[engine]:.0e}" if engine in found.effects else "" for engine in ENGINES]
    held = "" if found.held is None else f"{found.held:.0e}"
    reason = found.unopened and f"not opened by TransformerLens: {found.unopened}"
    if not reason and found.refused:
        reason = found.refused.get("autograd") or f"closed form: {next(iter(found.refused.values()))}"
    return f"| {name} | {kind} | {effects[0]} | {effects[1]} | {held} | {_short(reason)} |"


def _short(reason: str) -> str:
    """The first sentence, without what would break the table."""
    first = reason.replace("|", "/").replace("\n", " ").split(". ")[0]
    return first if len(first) <= 200 else first[:197] + "..."


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
