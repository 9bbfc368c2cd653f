"""What a notebook's cells print and show, and whether two runs of it say the same."""

import re
from itertools import zip_longest

ROUNDING = 1.5  # units of the last printed place
WIDGET = "application/vnd.jupyter.widget-view+json"  # the bars of other libraries
RELATIVE = 0.02  # other versions of the libraries may round sums differently


def shown(cell):
    """The text of a code cell's outputs, as a reader sees it; ``[picture]`` for pictures, nothing for stderr and
    progress bars."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts += [output.text] if output.name == "stdout" else []
        elif output.output_type == "error":
            texts.append(f"{output.ename}: {output.evalue}")
        elif WIDGET in output.data:
            continue
        elif "image/png" in output.data:
            texts.append("[picture]")
        elif "text/html" in output.data:
            texts.append(re.sub(r"<style.*?</style>|<[^>]+>", " ", output.data["text/html"], flags=re.S))
        else:
            texts.append(output.data.get("text/plain", ""))
    return " ".join(texts)


def difference(committed, fresh):
    """The first words that differ, or None. Numbers may differ by rounding; whole numbers and names may not."""
    for old, new in zip_longest(committed.split(), fresh.split(), fillvalue="(nothing)"):
        if old != new and not _close(old, new):
            return f"committed {old!r}, now {new!r}"
    return None


def _close(old, new):
    numbers = [re.fullmatch(r"[(+\[]*(-?\d+(?:\.(\d+))?(e-?\d+)?)(%?)[)\],;:.]*", word) for word in (old, new)]
    if not all(numbers):
        return False
    (a, places, power, percent), (b, *_) = (n.groups() for n in numbers)
    if places is None and power is None and not percent:
        return abs(float(a) - float(b)) <= RELATIVE * abs(float(a))  # counts above 50 may be one off
    if power is not None:
        return float(b) <= 10 * float(a)  # sizes of rounding errors
    return abs(float(a) - float(b)) <= max(RELATIVE * abs(float(a)), ROUNDING * 10.0 ** -len(places or ""))
