"""Train one JumpReLU transcoder a layer: BatchTopK while training, a threshold afterwards.

Bussmann et al. 2024 (BatchTopK, section 3 for the threshold), Dunefsky et al. 2024 (transcoders).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tl_circuits.dictionaries import Transcoder
from tl_circuits.dictionaries.builtin.split import Split


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedule. ``active``: features active at a word, on average, by layer; few in the first
    layers, so that a feature is worth having only if it serves many cities."""

    width: int = 768
    active: tuple[int, ...] = (3, 5, 6, 6)
    steps: int = 700
    batch: int = 1024
    rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Activity:
    """What one MLP read and wrote, and how often to draw each row (families of facts count alike)."""

    inputs: Float[Tensor, "n d_model"]
    outputs: Float[Tensor, "n d_model"]
    weight: Float[Tensor, " n"]


@torch.no_grad()
def mlp_activity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: Split) -> list[Activity]:
    """Inputs and outputs of every MLP on all prompts of the world, without the first position."""
    by_length: dict[int, list[tuple[list[int], float]]] = {}
    for name in facts.train:
        group = [*facts.train[name], *facts.held_out[name]]
        for fact in group:
            upper = fact.prompt[0].upper() + fact.prompt[1:]
            variants = {fact.prompt, upper} if fact.prompt.split()[0] in ("the", "le") else {fact.prompt}
            for prompt in sorted(variants | {f"Fact : {fact.prompt}"}):
                ids = tokenizer(prompt)["input_ids"]
                by_length.setdefault(len(ids), []).append((ids, 1 / len(group)))
    seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in model.model.layers]
    weights: list[Tensor] = []

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[layer][0].append(args[0][:, 1:].flatten(0, 1))
            seen[layer][1].append(output[:, 1:].flatten(0, 1))

        return hook

    handles = [block.mlp.register_forward_hook(keep(i)) for i, block in enumerate(model.model.layers)]
    try:
        for length, rows in by_length.items():
            for start in range(0, len(rows), 1024):
                part = rows[start : start + 1024]
                model(input_ids=torch.tensor([ids for ids, _ in part]), use_cache=False)
                weights.append(torch.tensor([weight for _, weight in part]).repeat_interleave(length - 1))
    finally:
        for handle in handles:
            handle.remove()
    return [Activity(torch.cat(inputs), torch.cat(outputs), torch.cat(weights)) for inputs, outputs in seen]


def train_transcoder(
    activity: Activity, recipe: Recipe, active: int, report: Callable[[int, float], None]
) -> Transcoder:
    """Fit outputs from inputs with ``active`` features a word; ``report(step, unexplained share)`` is called after
    every step."""
    inputs, outputs = activity.inputs, activity.outputs
    generator = torch.Generator().manual_seed(recipe.seed)
    d = inputs.shape[1]
    mean_in, mean_out = inputs.mean(0), outputs.mean(0)
    scale_in = (inputs - mean_in).norm(dim=1).mean() / math.sqrt(d)
    scale_out = (outputs - mean_out).norm(dim=1).mean() / math.sqrt(d)
    x_all, y_all = (inputs - mean_in) / scale_in, (outputs - mean_out) / scale_out
    variance = y_all.pow(2).sum(1).mean()
    W_enc = torch.randn(recipe.width, d, generator=generator) / math.sqrt(d)
    W_dec = torch.randn(recipe.width, d, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc, b_dec = torch.zeros(recipe.width), torch.zeros(d)
    parameters = [p.requires_grad_() for p in (W_enc, W_dec, b_enc, b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=recipe.rate, betas=(0.9, 0.99))
    fired = torch.zeros(recipe.width)
    threshold = 0.0
    for step in range(recipe.steps):
        scale = min(1.0, (step + 1) / 50, 3 * (1 - step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * scale
        rows = torch.multinomial(activity.weight, recipe.batch, replacement=True, generator=generator)
        x, y = x_all[rows], y_all[rows]
        # Many features at first, so that few die; then as few as asked.
        now = active * (1 + 3 * max(0.0, 1 - 4 * step / recipe.steps))
        pre = x @ W_enc.T + b_enc
        kept = int(now * recipe.batch)
        floor = pre.detach().relu().flatten().topk(kept, sorted=False).values.min().clamp_min(1e-6)
        acts = pre * (pre >= floor)
        error = (acts @ W_dec + b_dec - y).pow(2).sum(1).mean() / variance
        fired = torch.where((acts > 0).any(0), 0.0, fired + 1)
        dead = fired > 50
        loss = error
        if dead.any():  # let dead features explain what is left over
            left = (y - acts @ W_dec - b_dec).detach()
            idle = pre[:, dead].relu()
            best = idle.topk(min(32, idle.shape[1]), dim=1)
            spare = torch.zeros_like(idle).scatter(1, best.indices, best.values)
            loss = loss + 0.1 * (spare @ W_dec[dead] - left).pow(2).sum(1).mean() / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        threshold = float(floor) if step == 0 else 0.98 * threshold + 0.02 * float(floor)
        report(step, float(error.detach()))
    W_enc, W_dec, b_enc, b_dec = (p.detach() for p in parameters)
    # Undo the scaling, so that the transcoder reads and writes the model's own tensors.
    return Transcoder(
        W_enc=W_enc / scale_in * scale_out,
        W_dec=W_dec,
        b_enc=(b_enc - W_enc @ mean_in / scale_in) * scale_out,
        b_dec=b_dec * scale_out + mean_out,
        threshold=torch.full((recipe.width,), threshold) * scale_out,
        activation="jumprelu",
    )
