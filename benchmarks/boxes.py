"""Does removing an automatic box do what the graph says, and better so than for random boxes of the same sizes?

``python -m benchmarks.boxes`` prints, for SmolLM2 (neurons) and Gemma-3-270m (neurons), over several prompts: the
correlation of predicted and measured changes of the targets' logits, attention and norms held, and the lump error.
"""

from typing import Any

import numpy as np
import torch

import tl_circuits as tlc
from tl_circuits.faithfulness_report import FaithfulnessReport, faithfulness

PROMPTS = (
    "The capital of France is",
    "The opposite of small is",
    "Fact: the capital of the state containing Dallas is",
    "January, February, March,",
    "The Eiffel Tower is in the city of",
)
MODELS = ("smollm2-135m", "gemma-3-270m")
FEATURES, DRAWS = 400, 5


def random_boxes(graph: Any, groups: Any, seed: int) -> dict[str, tuple[str, ...]]:
    """Boxes of the same sizes, their members drawn from the same features: only who goes with whom is random."""
    members = [i for _, ids in groups for i in ids]
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    return {label: tuple(members[order.pop()] for _ in ids) for label, ids in groups}


def correlation(report: FaithfulnessReport, draw: int) -> float:
    """Of predicted and measured changes of the logits, over the boxes of one draw whose run stayed finite.

    With norm denominators held, removing a massive activation can make the model overflow.
    """
    rows = report.effects[report.effects.target.str.startswith("logit") & report.effects.source.str.startswith(f"{draw} ")]
    rows = rows[np.isfinite(rows.measured)]
    return float(np.corrcoef(rows.predicted, rows.measured)[0, 1])


def main() -> None:
    for name in MODELS:
        model = tlc.load_model(name, device="cpu")
        rows, lumps = [], []
        with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
            for prompt in PROMPTS:
                graph = tlc.attribute(replacement, prompt, max_nodes=FEATURES, progress=False)
                found = graph.supernodes()
                lumps.append(found.lump_error)
                sets = [dict(found.groups), *(random_boxes(graph, found.groups, seed) for seed in range(DRAWS))]
                every = {f"{draw} {label}": ids for draw, groups in enumerate(sets) for label, ids in groups.items()}
                report = faithfulness(replacement, graph, 0, groups=every, freezes=("attention",))
                own, *drawn = (correlation(report, draw) for draw in range(len(sets)))
                rows.append((own, float(np.mean(drawn)), _same_sign(graph, found.groups)))
                print(f"{name}: {prompt!r}: {len(found.groups)} boxes, lump error {found.lump_error:.3f}, correlation {own:.3f}, "
                      f"random boxes {np.mean(drawn):.3f} ({min(drawn):.3f} to {max(drawn):.3f})", flush=True)  # fmt: skip
        means = np.mean(rows, axis=0)
        print(f"{name}: mean lump error {np.mean(lumps):.3f}, largest {max(lumps):.3f}; mean correlation {means[0]:.3f} against "
              f"{means[1]:.3f} for random boxes; {means[2]:.0%} of the members act on the first target with their box's sign")  # fmt: skip


def _same_sign(graph: Any, groups: Any) -> float:
    """The influence-weighted share of members whose predicted effect on the first target has the box's sign."""
    from tl_circuits.faithfulness_report import predicted_effects

    index = {name: i for i, name in enumerate(graph.node_ids)}
    target = int(graph._nodes.weight.argmax())
    same, whole = 0.0, 0.0
    for _, ids in groups:
        change = predicted_effects(graph, [[index[i]] for i in ids], direct=False)[:, target]
        weight = graph.influence[[index[i] for i in ids]]
        same += float(weight[change.sign() == change.sum().sign()].sum())
        whole += float(weight.sum())
    return same / whole


if __name__ == "__main__":
    main()
