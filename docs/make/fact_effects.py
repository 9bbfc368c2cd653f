"""Traces the effects that assignment 5 of the course hands out: ``python -m docs.make.fact_effects``, about two
minutes.

For each prompt of a family, the thousand neurons of SmolLM2-135M with the largest total effect in a graph against the
family's other prompts. The target is the answer's logit minus the mean logit of the others.
"""

import torch
from safetensors.torch import save_file
from torch import Tensor

import tl_circuits as tlc
from tl_circuits.course.families import CAPITALS, LANGUAGES, RECORDED, Family
from tl_circuits.course.handouts import with_neurons
from tl_circuits.hooks import Replacement

NODES = 1000


def traced(replacement: Replacement, family: Family, which: int, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Neurons ``[row, 3]`` (layer, neuron, position) and their effects ``[row]`` on one of the family's traced
    prompts."""
    prompts, answers = family.prompts(family.traced), [answer for _, answer in family.traced]
    others = [other for i, other in enumerate(answers) if i != which]
    target = tlc.LogitDifference(answers[which], others)
    baseline = [prompt for i, prompt in enumerate(prompts) if i != which]
    graph = tlc.attribute(replacement, prompts[which], target, baseline=baseline, max_nodes=nodes, progress=False)
    neurons = graph.nodes[graph.nodes.kind == "feature"]
    where = torch.tensor(neurons[["layer", "feature", "position"]].to_numpy().copy(), dtype=torch.int16)
    return where, torch.tensor(neurons.total_effect.to_numpy().copy(), dtype=torch.float32)


if __name__ == "__main__":
    opened, tensors = with_neurons("smollm2-135m"), {}
    for one in (CAPITALS, LANGUAGES):
        tables = [traced(opened, one, i) for i in range(len(one.traced))]
        tensors[f"{one.name}.neuron"] = torch.stack([neuron for neuron, _ in tables])
        tensors[f"{one.name}.effect"] = torch.stack([effect for _, effect in tables])
    RECORDED.parent.mkdir(exist_ok=True)
    save_file(tensors, RECORDED)
