"""Slow, obvious versions of what the package computes fast."""

import torch

import tl_circuits as tlc
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.hooks import added_hooks, bos_positions, by_place, clean_run, resolve, to_tokens
from tl_circuits.hooks.record import Listener, norm_names
from tl_circuits.interventions.intervene import edited_batches


def held_names(replacement):
    """The hooks whose tensors a frozen run keeps as they are."""
    model = replacement.model
    return [f"{n}.hook_scale" for n in norm_names(model)] + [
        f"blocks.{i}.attn.hook_pattern" for i in range(int(model.cfg.n_layers))
    ]


def clean_values(replacement, tokens):
    """What :func:`frozen_run` holds, from a run with nothing held."""
    dictionary = replacement.dictionary
    reads = [dictionary.input_hook(layer) for layer in dictionary.layers]
    with (
        torch.no_grad(),
        Listener(
            replacement.model, dict.fromkeys([*held_names(replacement), *mlp_sites(replacement), *reads])
        ) as clean,
    ):
        replacement.model(tokens[None])
    return clean.seen


def frozen_run(replacement, tokens, clean, changes, wanted, skipped=()):
    """One forward pass with patterns, denominators and MLP outputs held at their ``clean`` values.

    ``changes`` maps hook names to tensors added there. A skip connection, being linear, moves with
    its input (except at ``skipped`` positions). No gradient is involved anywhere.
    """
    model, dictionary = replacement.model, replacement.dictionary
    layers = range(int(model.cfg.n_layers))
    sites = dict(zip(mlp_sites(replacement), layers, strict=True))
    reads = {layer: dictionary.input_hook(layer) for layer in dictionary.layers}
    with torch.no_grad():
        inputs = {}

        def keep(layer):
            return lambda t, hook: inputs.__setitem__(layer, t)

        def write(site, layer):
            def hook_function(t, hook):
                out = clean[site] + changes.get(site, 0.0)
                skip = dictionary.skip(layer) if layer in reads else None
                if skip is None:
                    return out
                through = (inputs[layer] - clean[reads[layer]]) @ skip.T
                through[:, list(skipped)] = 0.0
                return out + through

            return hook_function

        hooks = [(name, lambda t, hook, v=clean[name]: v) for name in held_names(replacement)]
        if "blocks.0.hook_resid_pre" in changes:
            hooks.append(("blocks.0.hook_resid_pre", lambda t, hook: t + changes["blocks.0.hook_resid_pre"]))
        hooks += [(read, keep(layer)) for layer, read in reads.items()]
        hooks += [(site, write(site, layer)) for site, layer in sites.items()]
        with added_hooks(model, hooks), Listener(model, wanted) as listener:
            logits = model(tokens[None])
    return {name: tensor[0] for name, tensor in listener.seen.items()}, logits[0]


def mlp_sites(replacement):
    """The output site of every layer's MLP, dictionary or not."""
    dictionary = replacement.dictionary
    return [
        dictionary.output_hook(i) if i in dictionary.layers else f"blocks.{i}.hook_mlp_out"
        for i in range(int(replacement.model.cfg.n_layers))
    ]


def source_vector(replacement, graph, index, clean):
    """The hook a node writes to and what it adds there, ``[1, pos, d]``."""
    dictionary, nodes = replacement.dictionary, graph._nodes
    kind, layer, position = int(nodes.kind[index]), int(nodes.layer[index]), int(nodes.position[index])
    site = "blocks.0.hook_resid_pre" if kind == 2 else mlp_sites(replacement)[layer]
    change = torch.zeros_like(clean[site])[None]
    if kind == 2:
        change[0, position] = clean[site][position]
    elif kind == 0:
        row = dictionary.decoder_vectors(layer, nodes.feature[index : index + 1].to(change.device), layer)[0]
        change[0, position] = row * nodes.activation[index]
    elif layer in dictionary.layers:
        x = clean[dictionary.input_hook(layer)]
        acts = dictionary.activate(layer, dictionary.pre_activations(layer, x), x)
        change[0, position] = (clean[site] - dictionary.decode(layer, {layer: acts}, x))[position]
    else:
        change[0, position] = clean[site][position]
    return site, change


def measured_columns(replacement, graph, indices):
    """What adding one node's contribution, all else frozen, does: tensors before, and after for each of ``indices``."""
    model, dictionary = replacement.model, replacement.dictionary
    tokens = to_tokens(model, list(graph.info.token_ids))
    reads = [dictionary.input_hook(layer) for layer in dictionary.layers]
    wanted = list(
        dict.fromkeys([*reads, *mlp_sites(replacement), "blocks.0.hook_resid_pre", "ln_final.hook_normalized"])
    )
    for name in wanted:
        resolve(model, name)
    skipped, held = bos_positions(model, tokens), clean_values(replacement, tokens)
    before, _ = frozen_run(replacement, tokens, held, {}, wanted, skipped)
    changes = (source_vector(replacement, graph, index, before) for index in indices)
    return before, [
        frozen_run(replacement, tokens, held, {site: change}, wanted, skipped)[0] for site, change in changes
    ]


def measured_effects(replacement, graph, nodes, factor=0.0):
    """What removing each node does to every node with a row, all else held: ``[node, target]``."""
    model, dictionary = replacement.model, replacement.dictionary
    tokens = to_tokens(model, list(graph.info.token_ids))
    sets = [tuple(tlc.edits_of(graph, [node], factor)) for node in nodes]
    clean = clean_run(replacement, tokens, bos_positions(model, tokens))
    at, position, feature = node_places(dictionary, graph), graph._nodes.position, graph._nodes.feature
    placed = by_place(dictionary)
    rows = graph.is_kind("feature").nonzero()[:, 0].tolist()
    effects = torch.zeros(len(nodes), len(graph))
    W_U = model.W_U.detach()
    mean = W_U.mean(1, dtype=torch.float32)
    done = 0
    for finals, seen, part in edited_batches(replacement, tokens, sets, clean, "all", (), list(placed.layers)):
        here = slice(done, done + len(part))
        for target in rows:
            name = placed.input_hook(int(at[target]))
            x = clean.seen[name][0, position[target]]
            vector, _ = placed.read_vectors(int(at[target]), feature[target : target + 1].to(x.device), x[None])
            effects[here, target] = (seen[name][:, position[target]] - x).float() @ vector[0]
        moved = (finals - clean.final)[:, -1]
        for target in graph.is_kind("logit").nonzero()[:, 0].tolist():
            vector = W_U[:, int(feature[target])].float() - mean
            effects[here, target] = moved @ vector
        done += len(part)
    return effects


def removal_gap(replacement, graph):
    """How far removing any one node is from minus its edges, over each target's largest edge, and how many nodes.

    At the beginning-of-sequence token a graph has no error terms: there the MLPs are constants.
    """
    constant = graph.is_kind("error") & (graph._nodes.position == 0)
    sources = (~graph.is_kind("logit") & ~constant).nonzero()[:, 0].tolist()
    effects = measured_effects(replacement, graph, sources)
    adjacency = graph.adjacency()
    gap = (effects + adjacency[:, sources].T).abs() / adjacency.abs().amax(1).clamp_min(1e-6)
    return float(gap.max()), len(sources)


def influence_by_passes(edges, shares, weights):
    """``w (A + A² + …)`` term by term: one pass over all edges for each length of path."""
    current = weights.double()
    total = torch.zeros_like(current)
    for _ in range(len(weights)):
        current = torch.zeros_like(current).index_add_(0, edges.source, current[edges.target] * shares)
        total = total + current
    return total


def reference_scores(adjacency, weights, is_error, is_token):
    """Replacement and completeness from dense matrices, by the definitions."""
    n = adjacency.shape[0]
    shares = adjacency.double().abs()
    shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-10)
    reach = weights.double() @ (torch.linalg.inv(torch.eye(n, dtype=torch.float64) - shares) - torch.eye(n))
    token, error = reach[is_token].sum(), reach[is_error].sum()
    explained = 1 - shares[:, is_error].sum(1)
    output = reach + weights
    return float(token / (token + error)), float((explained * output).sum() / output.sum())


def reference_prune(adjacency, weights, n_features, n_always, node_threshold, edge_threshold):
    """Node and edge masks, dense and step by step."""

    def reach_of(matrix):
        shares = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp_min(1e-10)
        total, current = torch.zeros_like(weights), weights
        for _ in range(len(weights)):
            current = current @ shares
            total = total + current
        return shares, total

    def threshold(values, share):
        ordered = values.sort(descending=True).values
        index = int((ordered.cumsum(0) / ordered.sum() < share).sum())
        return ordered[min(index, len(ordered) - 1)]

    n = len(weights)
    _, reach = reach_of(adjacency)
    nodes = reach >= threshold(reach, node_threshold)
    nodes[n - n_always :] = True
    kept = adjacency * nodes[:, None] * nodes[None]
    shares, reach = reach_of(kept)
    scores = shares * (reach + weights)[:, None]
    edges = (scores >= threshold(scores.flatten(), edge_threshold)) & (kept != 0)
    for _ in range(n):
        nodes[: n - n_always] &= edges[:, : n - n_always].any(0)
        nodes[:n_features] &= edges[:n_features].any(1)
        edges &= nodes[:, None] & nodes[None]
    return nodes, edges
