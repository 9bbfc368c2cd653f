"""Does removing an automatic box do what is predicted, and better so than for random boxes of the same sizes?

``python -m benchmarks.boxes`` prints, for SmolLM2 and Gemma-3-270m (neurons), the correlation of predicted and
measured changes of the targets' logits over the boxes of a prompt, mean over prompts.

With ``--contrast`` the graphs are of prompts of a family against its other prompts, and removing a feature sets it to
its mean over them.

Boxes: ``automatic``; ``shuffled``, the same features in boxes of the same sizes, only who goes with whom is
random; ``any``, random features of the graph. Predicted: by the ``graph``, along its signed paths, or to ``first
order``, by the slopes of all neurons, in the graph or not. Measured with attention and norms held, or with nothing.
Boxes whose held run diverges are counted and left out everywhere.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tl_circuits as tlc
from benchmarks.circuits import FAMILIES, family
from tl_circuits.dictionaries.neurons import Neurons
from tl_circuits.hooks import CleanRun, Replacement, bos_positions, clean_run, edit_hooks, make_plan, run_edited
from tl_circuits.interventions.faithfulness import _logit_changes, predicted_effects
from tl_circuits.interventions.intervene import TOKENS_AT_ONCE, edited_batches, edits_of

PROMPTS = (
    "The capital of France is",
    "The opposite of small is",
    "Fact: the capital of the state containing Dallas is",
    "January, February, March,",
    "The Eiffel Tower is in the city of",
)
MODELS = ("smollm2-135m", "gemma-3-270m")
FEATURES, DRAWS = 400, 3
OF_EACH = 4  # prompts of each family
FURTHEST = 100.0  # a logit that a held run moves further than this, or to NaN, says that the run diverged
Boxes = list[list[int]]


def random_boxes(features: list[int], sizes: list[int], seed: int) -> Boxes:
    """Boxes of these sizes, their members drawn from ``features``."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[features[order.pop()] for _ in range(size)] for size in sizes]


def measured(
    replacement: Replacement, graph: Any, tokens: Tensor, clean: CleanRun, boxes: Boxes, freeze: str
) -> Tensor:
    """How removing each box moves each target's logit: ``[box, logit]``."""
    logits = graph.is_kind("logit").nonzero()[:, 0]
    sets = [tuple(edits_of(graph, box)) for box in boxes]
    runs = edited_batches(replacement, tokens, sets, clean, freeze, (), ())
    return torch.cat([_logit_changes(replacement, graph, logits, finals - clean.final) for finals, _, _ in runs])


def first_order(
    replacement: Replacement, neurons: Neurons, graph: Any, tokens: Tensor, clean: CleanRun, boxes: Boxes
) -> Tensor:
    """The same with attention and norms held and every gated neuron outside the box on its tangent:
    ``[box, logit]``."""
    logits, n = graph.is_kind("logit").nonzero()[:, 0], len(tokens)
    slopes = {layer: _slopes(neurons, layer, clean) for layer in neurons.layers}
    changes = []
    for start in range(0, len(boxes), max(1, TOKENS_AT_ONCE // n)):
        part = boxes[start : start + max(1, TOKENS_AT_ONCE // n)]
        empty = make_plan(replacement.model, neurons, [[] for _ in part], n, n)
        hooks = edit_hooks(replacement, empty, clean, "attention")
        for layer in neurons.layers:
            hooks += _on_tangent(neurons, layer, clean, slopes[layer], _cells(graph, layer, part))
        finals, _ = run_edited(replacement, tokens.expand(len(part), n), hooks)
        changes.append(_logit_changes(replacement, graph, logits, finals - clean.final))
    return torch.cat(changes)


def _slopes(neurons: Neurons, layer: int, clean: CleanRun) -> tuple[Tensor, Tensor, Tensor]:
    """At the prompt: the activations, and their slopes in the gate and in the other factor."""
    weights, x = neurons._at[layer], clean.seen[neurons.input_hook(layer)][0].float()
    gate = neurons.pre_activations(layer, x).requires_grad_()
    with torch.enable_grad():
        act = neurons._act(gate)
        slope = torch.autograd.grad(act.sum(), gate)[0]
    act, up = act.detach(), x @ weights.W_in.float() + weights.b_in.float()
    return act * up, slope * up, act


def _cells(graph: Any, layer: int, boxes: Boxes) -> tuple[Tensor, Tensor, Tensor]:
    """Box, position and feature of every member of one layer."""
    nodes = graph._nodes
    cells = [
        (row, int(nodes.position[i]), int(nodes.feature[i]))
        for row, box in enumerate(boxes)
        for i in box
        if int(nodes.layer[i]) == layer
    ]
    return torch.tensor(cells, dtype=torch.long).reshape(-1, 3).unbind(1)


def _on_tangent(neurons: Neurons, layer: int, clean: CleanRun, slopes: Any, cells: Any) -> list[Any]:
    weights, (value, by_gate, by_up), seen = neurons._at[layer], slopes, {}
    name, site = neurons.input_hook(layer), neurons.output_hook(layer)

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[layer] = tensor

    def write(tensor: Tensor, hook: Any) -> Tensor:
        moved = seen[layer].float() - clean.seen[name].float()
        change = by_gate * (moved @ weights.W_gate.float()) + by_up * (moved @ weights.W_in.float())
        change[:, list(clean.skipped)] = 0
        change[cells] = -value[cells[1], cells[2]]
        return (clean.seen[site].float() + change @ weights.W_out.float()).to(tensor.dtype)

    return [(name, keep), (site, write)]


def correlation(predicted: Tensor, found: Tensor) -> float:
    """Over all boxes and targets of one draw."""
    return float(np.corrcoef(predicted.flatten().numpy(), found.flatten().numpy())[0, 1])


def graphs(replacement: Replacement, contrast: bool) -> Iterator[Any]:
    """One graph a prompt; with ``contrast``, the first prompts of each family against its other prompts."""
    if not contrast:
        for prompt in PROMPTS:
            yield tlc.attribute(replacement, prompt, max_nodes=FEATURES, progress=False)
        return
    for name in FAMILIES:
        own = family(replacement.model, name)
        for prompt in own.prompts[:OF_EACH]:
            others = [other for other in own.prompts if other != prompt]
            yield tlc.attribute(replacement, prompt, baseline=others, max_nodes=FEATURES, progress=False)


def measure(replacement: Replacement, neurons: Neurons, graph: Any) -> tuple[dict[tuple[str, str, str], float], str]:
    """Correlations by (boxes, predicted, measured), and a line on the boxes."""
    tokens = torch.tensor(graph.prompt_tokens())
    clean = clean_run(replacement, tokens, bos_positions(replacement.model, tokens))
    found, index = graph.supernodes(), {name: i for i, name in enumerate(graph.node_ids)}
    own = [[index[i] for i in ids] for _, ids in found.groups]
    sizes, members = [len(box) for box in own], [i for box in own for i in box]
    features = graph.is_kind("feature").nonzero()[:, 0].tolist()
    draws = [("automatic", own)]
    draws += [("shuffled", random_boxes(members, sizes, seed)) for seed in range(DRAWS)]
    draws += [("any", random_boxes(features, sizes, 100 + seed)) for seed in range(DRAWS)]
    logits, rows = graph.is_kind("logit"), {}
    for kind, boxes in draws:
        held = measured(replacement, graph, tokens, clean, boxes, "attention")
        kept = (held.abs() <= FURTHEST).all(1)  # False for NaN
        predictions = {"graph": predicted_effects(graph, boxes, direct=False)[:, logits]}
        if not graph.info.compared_with:
            predictions["first order"] = first_order(replacement, neurons, graph, tokens, clean, boxes)
        outcomes = {"held": held, "free": measured(replacement, graph, tokens, clean, boxes, "none")}
        rows.setdefault((kind, "diverged", ""), []).append(float((~kept).float().mean()))
        for by, predicted in predictions.items():
            for how, outcome in outcomes.items():
                rows.setdefault((kind, by, how), []).append(correlation(predicted[kept], outcome[kept]))
    line = (
        f"{len(own)} boxes, lump error {found.lump_error:.3f}, coverage {graph.coverage:.2f}, members of their box's "
        f"sign {_same_sign(graph, own):.0%}"
    )
    return {key: float(np.mean(values)) for key, values in rows.items()}, line


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured removals of boxes.")
    parser.add_argument("--contrast", action="store_true")
    parser.add_argument("--model", action="append")
    asked = parser.parse_args()
    for name in asked.model or MODELS:
        model = tlc.load_model(name, device="cpu")
        neurons, tables = tlc.mlp_neurons(model), []
        with tlc.attach(model, neurons) as replacement:
            for graph in graphs(replacement, asked.contrast):
                table, line = measure(replacement, neurons, graph)
                tables.append(table)
                print(f"{name}: {graph.info.prompt!r}: {line}", flush=True)
        for key in tables[0]:
            print(f"{name}: {', '.join(filter(None, key))}: {np.mean([table[key] for table in tables]):.2f}")


def _same_sign(graph: Any, boxes: Boxes) -> float:
    """The influence-weighted share of members whose predicted effect on the first target has the box's sign."""
    target = int(graph._nodes.weight.argmax())
    same, whole = 0.0, 0.0
    for box in boxes:
        change = predicted_effects(graph, [[i] for i in box], direct=False)[:, target]
        weight = graph.influence[box]
        same += float(weight[change.sign() == change.sum().sign()].sum())
        whole += float(weight.sum())
    return same / whole


if __name__ == "__main__":
    main()
