"""Write down what was measured: docs/tiny-facts.md."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tl_circuits.dictionaries.builtin.split import FAMILIES
from tl_circuits.dictionaries.builtin.state_features import PURITY
from training.measure import MiddleStep

QUESTIONS = {
    "two-hop": "`the capital of the state containing Dallas is` Austin",
    "city": "`the state containing Dallas is`, `the name of the state containing Dallas is`, `Dallas is in` Texas (one hop)",
    "state": "`the bird of Texas is` mockingbird, `the state whose capital is Austin is` Texas (one hop)",
    "opposite": "`the opposite of small is` big, `le contraire de petit est` grand",
    "translation": "`small in French is` petit, `petit en anglais est` small",
    "addition": "`36 + 59 =` 95",
}


@dataclass(frozen=True)
class Findings:
    """Everything on the card. ``middle_step`` is of capitals, ``control`` of abbreviations; ``known``, ``held_out``: family to (number of facts, accuracy)."""

    known: dict[str, tuple[int, float]]
    held_out: dict[str, tuple[int, float]]
    strangers: tuple[int, float]
    transcoders: pd.DataFrame
    middle_step: MiddleStep
    control: MiddleStep
    megabytes: float
    size: str


def write_card(findings: Findings, path: Path) -> None:
    """Write the card as Markdown."""
    f, step = findings, findings.middle_step
    families = "\n".join(
        f"| {QUESTIONS[name]} | {f.known[name][0]} | {f.known[name][1]:.1%} | "
        + (f"{f.held_out[name][0]} | {f.held_out[name][1]:.1%} |" if f.held_out[name][0] else "0 | |")
        for name in FAMILIES
    )
    layers = "\n".join(
        f"| {int(r['layer'])} | {int(r['features'])} | {r['L0']:.1f} | {r['explained variance']:.1%} | "
        f"{r['loss replaced']:.3f} | {r['loss removed']:.3f} | {r['loss recovered']:.1%} |"
        for _, r in f.transcoders.iterrows()
    )
    clean = float(f.transcoders["loss"].iloc[0])
    path.write_text(
        f"""# tiny-facts

A language model of a small world, with transcoders, inside the package ({f.megabytes:.1f} MB, no network):

```python
import tl_circuits as tlc

model = tlc.load_model("tiny-facts")
with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
    graph = tlc.attribute(replacement, "the capital of the state containing Dallas is", progress=False)
```

`tl-circuits demo` tells its story. {f.size} One word is one token. Written by `make tiny-facts`
(seeded, about ten minutes of one core), which trains the model and its transcoders and measures all numbers below on the
files as the package opens them.

## What it knows

Accuracy: the share of facts whose answer is the likeliest next word, for facts it was trained on and facts kept from it
(`tl_circuits.dictionaries.builtin.split`).

| question | trained | accuracy | kept back | accuracy |
|---|---|---|---|---|
{families}

Kept back are: for half of the cities one of the three phrasings; of the two-hop questions, all about one city of every
state, nearly half of those about capitals and a quarter of the others; a sixth of the French opposites; a tenth of the sums.
On cities that no two-hop question was ever asked about ({f.strangers[0]} questions) accuracy is {f.strangers[1]:.1%}.

The world is small and so is the model: it knows nothing else, and unknown words are read as `<unk>`. Embeddings of cities
stay at their random start, so which state a city lies in must be looked up by a layer; number embeddings start on a helix.

## Its transcoders

JumpReLU, trained as BatchTopK, one a layer, reading `mlp.hook_in` and writing `hook_mlp_out`. Loss is the cross entropy on
the answers of facts kept back: {clean:.3f} for the model itself, `replaced` with one layer's MLP output replaced by its
reconstruction, `removed` with that output removed; `recovered` is the share of the difference that the transcoder saves.

| layer | features | L0 | explained variance | replaced | removed | recovered |
|---|---|---|---|---|---|---|
{layers}

## The middle step, by experiment

Asked for `the capital of the state containing Dallas is`, does it go through Texas? A feature *stands for a state* if,
whichever of the five properties is asked about, it is active on at least one of the state's seven cities, and at least
{PURITY:.0%} of its activation over all cities is on that state's (chance: 3 %; `tl_circuits.dictionaries.builtin.state_features`). A state
has {step.features_a_state:.0f} such features, {step.shared_a_state:.0f} of them *shared* by two or more of its cities, counting the city's
position and the last one. On the {step.prompts} questions about capitals that were kept from training:

| | share |
|---|---|
| a shared feature of the state is in the pruned graph, with edges leading to it from the city and from it to the answer | {step.found:.1%} |
| without the state's features, the answer is no longer the likeliest word | {step.removed:.1%} |
| with another state's features in their place (drawn at random, at their mean activation), the likeliest word is the other state's capital | {step.swapped:.1%} |
| the same swap in the {f.control.prompts} questions about abbreviations: the likeliest word is the other state's abbreviation | {f.control.swapped:.1%} |

The last row says that the state was swapped, not the answer. Nothing is held in the last three rows (`freeze="none"`). Why shared features alone would not do for a swap: the first
layer writes the state from the city with features that serve one to three cities each; the second cleans it up with features
that most of a state's cities share. Taking features out without a substitute leaves the answer standing more often, because
what the transcoders miss still points to the state.
"""
    )
