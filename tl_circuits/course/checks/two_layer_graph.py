"""Assignment 2: the direct effects on features of layer 1, from scratch, compared with `attribute`."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution import FeatureTarget, attribute
from tl_circuits.course.questions import Asking, Lab, Part, Question, close, effects, near, number, same_effects, tensor
from tl_circuits.graph.graph import AttributionGraph

PROMPTS = ("the capital of the state containing Houston is", "Seattle is in")
KINDS = {
    "token": "tokens: what they write is `hook_embed`; it is read at the layer's input, also at position 0.",
    "F": "features: activation times (row of `W_dec` · gradient), active ones only, without position 0.",
    "error": "errors: (MLP output minus reconstruction) · gradient, without position 0.",
}


def _strongest(lab: Lab, prompt: str, layer: int, position: int) -> int:
    return int(lab.cache(prompt)[f"blocks.{layer}.hook_mlp_out.hook_sae_acts_post"][0, position].argmax())


def _direction(
    model: Any, cache: Any, transcoder: Any, layer: int, position: int, feature: int
) -> Float[Tensor, " d_model"]:
    gain = model.blocks[layer].ln2.weight.detach()
    return transcoder.W_enc[feature] * gain / cache[f"blocks.{layer}.ln2.hook_scale"][0, position]


def _through(
    model: Any, cache: Any, layer: int, gradient: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "pos d_model"]:
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
    values = torch.einsum("hqk,qd,hed->khe", pattern, gradient, model.W_O[layer].detach())
    read = torch.einsum("khe,hde->kd", values, model.W_V[layer].detach())
    scale = cache[f"blocks.{layer}.ln1.hook_scale"][0]
    return gradient + read * model.blocks[layer].ln1.weight.detach() / scale


def _gradients(lab: Lab, cache: Any, position: int, feature: int) -> tuple[Tensor, Tensor]:
    """Gradient of a layer-1 feature at layer 0's MLP output, and at the embedding."""
    at_read = torch.zeros_like(cache["hook_embed"][0])
    model = lab.ours.model
    at_read[position] = _direction(model, cache, lab.ours.dictionary[1], 1, position, feature)
    at_mlp_out = _through(model, cache, 1, at_read)
    return at_mlp_out, _through(model, cache, 0, at_mlp_out)


def _traced(lab: Lab, prompt: str, position: int, feature: int) -> tuple[AttributionGraph, str, dict[str, float]]:
    graph = attribute(lab.ours, prompt, FeatureTarget(1, position, feature), progress=False)
    name = f"L1/F{feature}@{position}"
    row = graph.edges[graph.edges.target == name]
    return graph, name, dict(zip(row.source, row.weight.tolist(), strict=True))


def read_direction(student: Asking, lab: Lab) -> Iterator[Part]:
    cases = (
        (0, -1, "wrong values: encoder vector, times the weight of `ln2`, over the scale of `ln2` there."),
        (1, -2, "wrong at a position that is not the last: take the scale at the position given."),
    )
    for layer, from_end, hint in cases:
        prompt = PROMPTS[0]
        cache = lab.cache(prompt)
        position = cache["hook_embed"].shape[1] + from_end
        feature = _strongest(lab, prompt, layer, position)
        want = _direction(lab.ours.model, cache, lab.ours.dictionary[layer], layer, position, feature)
        answer = student(lab.model, lab.recorded(cache), lab.transcoder(layer), layer, position, feature)
        got = tensor(answer, want.shape, "d_model")
        if close(got, want / lab.ours.model.blocks[layer].ln2.weight.detach()):
            hint = "the weight of `ln2` is missing: the encoder reads `mlp.hook_in`, behind it."
        yield Part(2, close(got, want), hint)


def through_attention(student: Asking, lab: Lab) -> Iterator[Part]:
    cache, layer = lab.cache(PROMPTS[0]), 1
    gradient = torch.randn(cache["hook_embed"][0].shape, generator=torch.Generator().manual_seed(1))
    want = _through(lab.ours.model, cache, layer, gradient)
    got = tensor(student(lab.model, lab.recorded(cache), layer, gradient), want.shape, "pos d_model")
    right = close(got, want) or close(got, want - gradient)
    yield Part(
        4,
        right,
        "the attention's part is wrong: from queries back to keys, W_O, then W_V, then `ln1`'s weight over its scale.",
    )
    shut = dict(cache.items())
    shut[f"blocks.{layer}.attn.hook_pattern"] = torch.zeros_like(shut[f"blocks.{layer}.attn.hook_pattern"])
    got = tensor(student(lab.model, lab.recorded(shut), layer, gradient), want.shape, "pos d_model")
    yield Part(
        2, close(got, gradient), "the residual stream is missing: what does not go through attention passes unchanged."
    )


def effects_on(student: Asking, lab: Lab) -> Iterator[Part]:
    prompt = PROMPTS[0]
    cache = lab.cache(prompt)
    position = cache["hook_embed"].shape[1] - 2
    feature = _strongest(lab, prompt, 1, position)
    _, _, want = _traced(lab, prompt, position, feature)
    gradients = _gradients(lab, cache, position, feature)
    got = effects(student(lab.recorded(cache), lab.transcoder(0), *gradients))
    for kind, hint in KINDS.items():
        yield Part(2, same_effects(_of(kind, got), _of(kind, want)), hint)


def _of(kind: str, row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.split("/")[-1].startswith(kind)}


def row_bias(student: Asking, lab: Lab) -> Iterator[Part]:
    prompt = PROMPTS[0]
    cache = lab.cache(prompt)
    position = cache["hook_embed"].shape[1] - 1
    feature = _strongest(lab, prompt, 1, position)
    graph, name, _ = _traced(lab, prompt, position, feature)
    at_mlp_out, _ = _gradients(lab, cache, position, feature)
    got = number(student(lab.recorded(cache), lab.transcoders, feature, at_mlp_out))
    want = float(graph.nodes.set_index("id").bias[name])
    yield Part(
        2,
        near(got, want),
        "wrong: `b_enc` of the target, `b_dec` · gradient at each position but 0, the whole MLP output · gradient at "
        "0.",
    )


def trace(student: Asking, lab: Lab) -> Iterator[Part]:
    prompt = PROMPTS[1]
    position = 1
    feature = _strongest(lab, prompt, 1, position)
    _, _, want = _traced(lab, prompt, position, feature)
    got = effects(student(lab.model, lab.transcoders, prompt, position, feature))
    yield Part(
        2, same_effects(got, want), "the row differs from `tlc.attribute`'s: compare them node by node in the notebook."
    )


def _effects_on(cache: Any, transcoder: Any, at_mlp_out: Tensor, at_embedding: Tensor) -> dict[str, float]:
    """What `effects_on` has to do. It stands in for a student's own that never returns."""
    embedding, out = cache["hook_embed"][0], cache["blocks.0.hook_mlp_out"][0]
    acts = transcoder.activate(cache["blocks.0.mlp.hook_in"][0] @ transcoder.W_enc.T + transcoder.b_enc)
    errors = ((out - acts @ transcoder.W_dec - transcoder.b_dec) * at_mlp_out).sum(1).tolist()
    features = acts * (at_mlp_out @ transcoder.W_dec.T)
    row = {f"token@{i}": value for i, value in enumerate((embedding * at_embedding).sum(1).tolist())}
    row |= {f"L0/error@{i}": value for i, value in enumerate(errors) if i}
    return row | {f"L0/F{f}@{i}": float(features[i, f]) for i, f in acts.nonzero().tolist() if i}


QUESTIONS = (
    Question("read_direction", "the direction a feature reads, at the residual stream", 4, read_direction, _direction),
    Question("through_attention", "carry a gradient back through frozen attention", 6, through_attention, _through),
    Question("effects_on", "direct effects of tokens, features and errors", 6, effects_on, _effects_on),
    Question("row_bias", "what no node stands for", 2, row_bias),
    Question("trace", "the whole row, as `tlc.attribute` has it", 2, trace),
)
