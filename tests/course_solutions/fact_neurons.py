"""Reference solution of assignment 5."""


def effects(graph):
    rows = graph.nodes[graph.nodes.kind == "feature"]
    return {(row.layer, row.feature, row.position): row.total_effect for row in rows.itertuples()}


def carriers(tables, n):
    total = {}
    for table in tables:
        for neuron, effect in table.items():
            total[neuron] = total.get(neuron, 0.0) + effect
    return sorted(total, key=total.get, reverse=True)[:n]


def removed(replacement, prompts, answers, sets):
    usual, ids = means(replacement, prompts), [replacement.model.to_single_token(answer) for answer in answers]
    edits = [
        [tlc.Set(at, where, neuron, value=float(usual[at][where, neuron])) for at, neuron, where in one] for one in sets
    ]
    fallen = torch.zeros(len(sets), len(prompts))
    for i, prompt in enumerate(prompts):
        for j, run in enumerate(tlc.intervene_many(replacement, prompt, edits, freeze="none")):
            fallen[j, i] = lead(run.baseline_logits[-1], ids, i) - lead(run.last_logits, ids, i)
    return fallen


def fires_on(replacement, texts, layer, neuron, k, sign):
    point, found = f"{replacement.site(layer)}.hook_sae_acts_post", []
    for text in texts:
        _, cache = replacement.model.run_with_cache(text, names_filter=point)
        acts = sign * cache[point][0, :, neuron]
        where = 1 + int(acts[1:].argmax())
        found.append((float(acts[where]), replacement.model.to_str_tokens(text)[where]))
    return [token for _, token in sorted(found, reverse=True)[:k]]


def controls(neurons, width, count, seed):
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(count):
        one = []
        for layer, _, position in neurons:
            taken = {*neurons, *one}
            others = [i for i in range(width) if (layer, i, position) not in taken]
            one.append((layer, others[int(torch.randint(len(others), (1,), generator=generator))], position))
        sets.append(one)
    return sets


def how_sure(found, random):
    n, b = len(random), sum(value >= found for value in random)
    share, z = b / n, 1.96
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return {"share": share, "p": (1 + b) / (1 + n), "interval": (low, high)}
