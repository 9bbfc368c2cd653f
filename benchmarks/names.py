"""Do features' names tell where they fire? A detection score on text that the names were not made from.

    python -m benchmarks.names               # SmolLM2's neurons and tiny-facts' transcoders
    python -m benchmarks.names tiny-facts    # one of them

Names are made from every second passage of the text that comes with the package. In the other passages, each feature
has places where it fires most (the five strongest pieces of text) and where it does not (twenty pieces drawn from those
where it stays below half of the fifth). A name asks for tokens; a piece's score is how well its best place fits them: 1
for the tokens themselves, else the largest cosine of their embeddings. The detection score is the chance that a piece
where the feature fires scores above one where it does not: 1 is perfect, 0.5 is guessing. For
comparison, each feature is also scored by the name of another feature of the same graph, and by two tokens at random.
"""

import json
import random
import sys
from collections import defaultdict

import torch

import tl_circuits as tlc
from tl_circuits.feature_labels.example_text import shipped_passages, world_passages
from tl_circuits.feature_labels.firing import Pieces, cut, where_features_fire
from tl_circuits.feature_labels.firing_names import place_of
from tl_circuits.feature_labels.naming import SHARP, FiringReader
from tl_circuits.feature_labels.token_space import TokenSpace, plain
from tl_circuits.feature_labels.vocabulary import active_side, vocabulary_products
from tl_circuits.feature_labels.weight_names import sharpest, usual_products, weight_names
from tl_circuits.hooks import collect_sites, embed_weights, flat, token_text

POSITIVE, NEGATIVE, FEATURES = 5, 20, 100
PROMPTS = {
    "smollm2-135m": ("The capital of France is", "The opposite of small is"),
    "tiny-facts": ("the capital of the state containing Dallas is", "the opposite of hot is", "36 + 22 ="),
}
TOKENS = {"smollm2-135m": 30_000, "tiny-facts": 12_000}


def measure(name):
    """Detection scores by where the name comes from: lists of numbers, one for each feature."""
    model = tlc.load_model(name, device="cpu")
    dictionary = tlc.load_transcoders(name) if name == "tiny-facts" else tlc.mlp_neurons(model)
    passages = world_passages() if name == "tiny-facts" else shipped_passages()
    scores, draw = defaultdict(list), random.Random(0)
    with tlc.attach(model, dictionary) as replacement:
        pieces = cut(replacement, passages, TOKENS[name])
        seen, held_out = (Pieces(pieces.ids[start::2], pieces.first) for start in (0, 1))
        usual = usual_products(replacement)
        for prompt in PROMPTS[name]:
            graph = tlc.attribute(replacement, prompt, max_nodes=500, progress=False)
            ranked = [
                i for i in torch.argsort(graph.influence, descending=True).tolist() if graph.is_kind("feature")[i]
            ][:FEATURES]
            rules = {kind: {} for kind in ("examples", "weights", "name")}
            where = {
                i: (int(graph._nodes.layer[i]), int(graph._nodes.feature[i]), float(active_side(graph, [i])[0]))
                for i in ranked
            }
            asked = defaultdict(set)
            for layer, feature, _ in where.values():
                asked[layer].add(feature)
            firing = where_features_fire(
                replacement, seen, {layer: torch.tensor(sorted(fs)) for layer, fs in asked.items()}
            )
            reader = FiringReader(model, firing, graph.info.token_ids)
            verbs = {}
            for i, (layer, feature, side) in where.items():
                by_text = reader.examples(layer, feature, int(side < 0), place_of(graph, i)).name
                with torch.no_grad():
                    effect, like = vocabulary_products(
                        replacement, torch.tensor([layer]), torch.tensor([feature]), torch.tensor([side])
                    )
                by_weights = sharpest(weight_names(model, usual, effect, like)[0])
                if by_text is not None and by_text.sharpness >= SHARP:
                    rules["examples"][i] = by_text.rule
                if by_weights is not None:
                    rules["weights"][i] = {0: by_weights.tokens}
                    verbs[i] = by_weights.text.split()[0]
                first = by_text is not None and by_text.sharpness >= max(
                    SHARP, by_weights.sharpness if by_weights else 0
                )
                if first or by_weights is not None:
                    rules["name"][i] = by_text.rule if first else rules["weights"][i]
            strongest = best_in_pieces(replacement, held_out, where)
            named = {t for by in rules.values() for rule in by.values() for tokens in rule.values() for t in tokens}
            ids = sorted({i for piece in held_out.ids for i in piece} | named)
            space = TokenSpace(
                held_out.ids, embed_weights(model), {i: token_text(model, i) for i in ids}, sorted(named)
            )
            for kind, found in rules.items():
                for i, rule in found.items():
                    sample = chosen(strongest[i], draw)
                    if sample is None:
                        continue
                    score = detection(space, held_out, rule, *sample)
                    scores[kind].append(score)
                    if kind == "weights":
                        scores[f"weights, {verbs[i]}"].append(score)
                    if kind == "name":
                        other = draw.choice([r for j, r in found.items() if where[j][:2] != where[i][:2]])
                        scores["another feature's name"].append(detection(space, held_out, other, *sample))
                        scores["two tokens at random"].append(
                            detection(space, held_out, {0: tuple(draw.sample(ids, 2))}, *sample)
                        )
    return scores


def best_in_pieces(replacement, pieces, where):
    """By node, the strongest activation on its side in each piece."""
    dictionary, found = replacement.dictionary, {i: [] for i in where}
    hooks = {layer: dictionary.input_hook(layer) for layer, _, _ in where.values()}
    with torch.no_grad():
        for ids in pieces.ids:
            tokens = torch.tensor([[*pieces.first, *ids]])
            sites = collect_sites(replacement.model, tokens, list(dict.fromkeys(hooks.values())))
            acts = {}
            for layer, hook in hooks.items():
                x = flat(sites[hook])[0, max(1, len(pieces.first)) :]
                acts[layer] = dictionary.activate(layer, dictionary.pre_activations(layer, x), x)
            for i, (layer, feature, side) in where.items():
                values = acts[layer][:, feature] * side
                found[i].append(float(values.max()) if len(values) else 0.0)
    return found


def chosen(strongest, draw):
    """The numbers of pieces where a feature fires and where it does not; None if it fires in too few or too many."""
    order = sorted(range(len(strongest)), key=lambda p: -strongest[p])
    least = strongest[order[POSITIVE - 1]]
    silent = [p for p in order if strongest[p] < 0.5 * least]
    return (order[:POSITIVE], draw.sample(silent, NEGATIVE)) if least > 0 and len(silent) >= NEGATIVE else None


def detection(space, pieces, rule, firing, silent):
    """The chance that a piece where the feature fires scores above one where it does not; ties count half."""
    one, other = ([fit(space, pieces.ids[p], rule) for p in numbers] for numbers in (firing, silent))
    return sum((a > b) + 0.5 * (a == b) for a in one for b in other) / (len(one) * len(other))


def fit(space, ids, rule):
    """How well the best place of a piece fits a rule, averaged over the tokens that it asks for."""
    if not rule:
        return 0.0  # every piece has a start
    return max(
        sum(match(space, ids[at + offset], tokens) for offset, tokens in rule.items() if at + offset >= 0) / len(rule)
        for at in range(len(ids))
    )


def match(space, token, asked):
    """1 for one of the tokens asked for, else the largest cosine with them, at least 0."""
    if plain(space.text(token)) in {plain(space.text(t)) for t in asked}:
        return 1.0
    return max(0.0, float(space.alike([token, *asked])[0, 1:].max()))


def main():
    for name in sys.argv[1:] or PROMPTS:
        scores = measure(name)
        table = {
            kind: {"features": len(values), "detection": round(sum(values) / len(values), 3)}
            for kind, values in sorted(scores.items())
        }
        sys.stdout.write(json.dumps({"model": name, "scores": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
