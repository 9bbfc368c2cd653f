"""Reference solution of assignment 3."""


def city_activations(replacement, layer, cities, position):
    name = f"blocks.{layer}.hook_mlp_out.hook_sae_acts_post"
    prompts = [f"the capital of the state containing {city} is" for city in cities]
    with torch.no_grad():
        _, cache = replacement.model.run_with_cache(prompts, names_filter=name)
    return cache[name][:, position]


def state_features(own, others, at_least):
    often = (own > 0).sum(0) >= at_least
    mass = own.sum(0)
    pure = mass >= 0.25 * (mass + others.sum(0))
    return (often & pure).nonzero()[:, 0].tolist()


def between(edges, start, end):
    def reached(first, step_from, step_to):
        seen, frontier = set(), {first}
        while frontier:
            frontier = set(edges[edges[step_from].isin(frontier)][step_to]) - seen
            seen |= frontier
        return seen

    return (reached(start, "source", "target") & reached(end, "target", "source")) - {start, end}


def swap_edits(old, new):
    edits = [tlc.Ablate(*where) for where in old if where not in new]
    return edits + [tlc.Set(*where, value=value) for where, value in new.items()]


def share_swapped(replacement, experiments):
    hits = []
    for prompt, edits, word in experiments:
        result = tlc.intervene(replacement, prompt, edits, freeze="none")
        if said(replacement, result.baseline_logits[-1]) != word:
            hits.append(said(replacement, result.last_logits) == word)
    return sum(hits) / len(hits)
