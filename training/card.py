"""Write down what was measured: docs/tiny-facts.md."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tl_circuits.dictionaries.builtin.split import FAMILIES
from tl_circuits.dictionaries.builtin.state_features import PURITY
from training.measure import MiddleStep

QUESTIONS = {
    "two-hop": "`the capital of the state containing Dallas is` Austin",
    "city": (
        "`the state containing Dallas is`, `the name of the state containing Dallas is`, `Dallas is in` Texas (one hop)"
    ),
    "state": "`the bird of Texas is` mockingbird, `the state whose capital is Austin is` Texas (one hop)",
    "opposite": "`the opposite of small is` big, `le contraire de petit est` grand",
    "translation": "`small in French is` petit, `petit en anglais est` small",
    "addition": "`36 + 59 =` 95",
}


@dataclass(frozen=True)
class Findings:
    """Everything on the card. ``middle_step`` is of capitals, ``control`` of abbreviations; ``known``, ``held_out``:
    family to (number of facts, accuracy)."""

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

`tl-circuits demo` tells its story. {f.size}
One word is one token.

`make tiny-facts` writes this page. It trains the model and its transcoders (seeded;
[how long it takes](benchmarks.md#training-transcoders)) and measures all numbers below on the files as the package opens them.

## What it knows

Accuracy is the share of facts whose answer is the likeliest next word. It is given for the facts the model was trained
on, and for facts that were kept back from training (`tl_circuits.dictionaries.builtin.split`).

| question | trained | accuracy | kept back | accuracy |
|---|---|---|---|---|
{families}

These were kept back: for half of the cities, one of the three phrasings; of the two-hop questions, all those about one
city of every state, nearly half of those about capitals and a quarter of the others; a sixth of the French opposites; a
tenth of the sums. On cities that no two-hop question was ever asked about ({f.strangers[0]} questions) accuracy is {f.strangers[1]:.1%}.

The model knows nothing else, and it reads unknown words as `<unk>`. Embeddings of cities stay at their random start, so
a layer must look up which state a city lies in. Number embeddings start on a helix.

## Its transcoders

There is one JumpReLU transcoder for each layer, trained as BatchTopK. It reads `mlp.hook_in` and writes `hook_mlp_out`.
The loss is the cross entropy on the answers of facts kept back; the unchanged model has {clean:.3f}. `replaced`: the loss with this
layer's MLP output replaced by its reconstruction. `removed`: with it set to zero. `recovered`: how much of the loss that the
removal adds is saved by the reconstruction, (removed − replaced) / (removed − {clean:.3f}).

| layer | features | L0 | explained variance | replaced | removed | recovered |
|---|---|---|---|---|---|---|
{layers}

## The middle step, by experiment

When asked for `the capital of the state containing Dallas is`, does the model go through Texas? A feature *stands for a
state* if, whichever of the five properties is asked about, it is active on at least one of the state's seven cities,
and at least {PURITY:.0%} of its activation over all cities is on that state's (chance: 3 %;
`tl_circuits.dictionaries.builtin.state_features`). A state has {step.features_a_state:.0f} such features, {step.shared_a_state:.0f} of them *shared* by two or more of
its cities, counting the city's position and the last one. On the {step.prompts} questions about capitals that were kept from
training:

| | share |
|---|---|
| a shared feature of the state is in the pruned graph, with edges leading to it from the city and from it to the answer | {step.found:.1%} |
| without the state's features, the answer is no longer the likeliest word | {step.removed:.1%} |
| with another state's features in their place (drawn at random, at their mean activation), the likeliest word is the other state's capital | {step.swapped:.1%} |
| the same swap in the {f.control.prompts} questions about abbreviations: the likeliest word is the other state's abbreviation | {f.control.swapped:.1%} |

The last row shows that the swap changed the state and not just the answer. In the last three rows nothing is held
(`freeze="none"`).

Shared features alone would not be enough for a swap: the first layer writes the state from the city with features that
serve one to three cities each, and the second layer cleans it up with features that most of a state's cities share. If
features are taken out without a substitute, the answer more often stays the same, because what the transcoders miss
still points to the state.
"""
    )
