"""Reference solution of assignment 4."""


def predicted(graph, source):
    row = graph.edges[graph.edges.source == source]
    return dict(zip(row.target, (-row.weight).tolist(), strict=True))


def measured(replacement, graph, source, freeze):
    edits = tlc.edits_of(graph, [source])
    result = tlc.intervene(replacement, graph.info.prompt, edits, freeze=freeze)
    change = (result.logits - result.baseline_logits)[-1]
    target = graph.nodes.set_index("id").feature["logit:0"]
    return float(change[target] - change.mean())


def agreement(predicted, measured):
    return {
        "correlation": float(torch.corrcoef(torch.stack([predicted, measured]))[0, 1]),
        "explained_variance": float(1 - ((measured - predicted) ** 2).sum() / (measured**2).sum()),
        "sign_agreement": float((predicted.sign() == measured.sign()).float().mean()),
    }


def error_share(graph):
    influence = graph.nodes.groupby("kind").influence.sum()
    return float(influence["error"] / (influence["error"] + influence["embedding"]))


def shown(full, pruned, target):
    kept, all_of_it = (edges[edges.target == target].weight.abs().sum() for edges in (pruned, full))
    return float(kept / all_of_it)


def worst_targets(effects, k):
    gap = (effects.measured - effects.predicted) ** 2
    return gap.groupby(effects.target).sum().sort_values(ascending=False).index[:k].tolist()
