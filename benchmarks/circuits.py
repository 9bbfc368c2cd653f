"""How much of an answer do chosen nodes carry? F and C over families of prompts, by how the nodes were chosen.

``python -m benchmarks.circuits [--model NAME] [--family NAME] [--nodes N] [--transcoders SOURCE]`` prints a table
for each, through the model's neurons or through transcoders: graphs against the other prompts of the family, graphs
without a baseline by total effect and by influence, and the other ways of choosing that
:func:`tl_circuits.circuit_quality` compares with. The metric is the answer's logit minus the mean of the others'.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import tl_circuits as tlc

FAMILIES = {
    "capital": (
        "The capital of {} is",
        "France Paris,Germany Berlin,Italy Rome,Russia Moscow,Japan Tokyo,China Beijing,England London,Greece "
        "Athens,Austria Vienna,Cuba Havana,Ireland Dublin,Poland Warsaw,Norway Oslo,Sweden Stockholm,Portugal "
        "Lisbon,Hungary Budapest",
    ),
    "language": (
        "The official language of {} is",
        "France French,Germany German,Italy Italian,Russia Russian,Japan Japanese,China Chinese,Greece Greek,Poland "
        "Polish,Portugal Portuguese,Spain Spanish,Sweden Swedish,Turkey Turkish,Hungary Hungarian,Denmark Danish",
    ),
}
GRAPHS = {
    "total effect, against the others": {"baseline": True, "select": "total_effect"},
    "influence, against the others": {"baseline": True, "select": "influence"},
    "total effect, no baseline": {"select": "total_effect"},
    "influence, no baseline": {"select": "influence"},
}


@dataclass(frozen=True)
class Family:
    """Prompts of one length, and an answer of one token for each."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def family(model: Any, name: str) -> Family:
    """The family, without prompts of another length than most and answers of several tokens."""
    template, pairs = FAMILIES[name]
    rows = [(template.format(what), f" {answer}") for what, answer in (pair.split(" ") for pair in pairs.split(","))]
    rows = [row for row in rows if len(model.tokenizer(row[1], add_special_tokens=False)["input_ids"]) == 1]
    lengths = [model.to_tokens(prompt).shape[1] for prompt, _ in rows]
    usual = max(set(lengths), key=lengths.count)
    prompts, answers = zip(*(row for row, length in zip(rows, lengths, strict=True) if length == usual), strict=True)
    return Family(prompts, answers)


def measure(replacement: Any, own: Family, nodes: int, kinds: list[str]) -> list[tuple[str, float, float, float]]:
    """Rows: how the nodes were chosen, F, C, seconds of processor time a prompt."""
    rows = []
    for name in kinds:
        options, began, graphs = GRAPHS[name], time.process_time(), []
        for prompt, answer in zip(own.prompts, own.answers, strict=True):
            other = [a for a in dict.fromkeys(own.answers) if a != answer]
            chosen = {"select": options["select"]}
            if "baseline" in options:
                chosen["baseline"] = [p for p in own.prompts if p != prompt]
            graphs.append(
                tlc.attribute(
                    replacement, prompt, tlc.LogitDifference(answer, other), max_nodes=nodes, progress=False, **chosen
                )
            )
        seconds = (time.process_time() - began) / len(graphs)
        first = not rows
        found = tlc.circuit_quality(
            replacement,
            graphs,
            own.prompts,
            own.answers,
            sizes=[nodes],
            others=first,
            random_sets=int(first),
            progress=False,
        )
        for row in found.curve[found.curve.nodes == nodes].itertuples():
            own_row = row.chosen == "circuit"
            rows.append((name if own_row else row.chosen, row.F, row.C, seconds if own_row else float("nan")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", help="smollm2-135m, gemma-3-270m, ...")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES))
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--transcoders", help="a set for the one --model, in place of its neurons")
    parser.add_argument(
        "--usual", action="store_true", help="only the usual graph: by total effect, against the others"
    )
    asked = parser.parse_args()
    for name in asked.model or ("smollm2-135m", "gemma-3-270m"):
        model = tlc.load_model(name, device="cpu")
        with tlc.attach(
            model, tlc.load_transcoders(asked.transcoders) if asked.transcoders else tlc.mlp_neurons(model)
        ) as replacement:
            for called in asked.family or FAMILIES:
                own = family(model, called)
                print(f"{name}, {called}: {len(own.prompts)} prompts, {asked.nodes} nodes a prompt", flush=True)
                for chosen, f, c, seconds in measure(
                    replacement, own, asked.nodes, list(GRAPHS)[:1] if asked.usual else list(GRAPHS)
                ):
                    print(f"  {chosen:34} F {f:5.2f}  C {c:5.2f}  {seconds:6.1f} s a prompt", flush=True)


if __name__ == "__main__":
    main()
