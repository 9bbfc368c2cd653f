"""Train the language model: a small Llama whose city names carry no meaning of their own."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tl_circuits.dictionaries.builtin.split import Split
from tl_circuits.dictionaries.builtin.world import LARGEST_SUM, STATE_OF
from training.data import LONGEST, batches


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedule. Fixed seeds: the same recipe gives the same model on the same machine."""

    layers: int = 4
    d_model: int = 96
    heads: int = 4
    d_mlp: int = 256
    steps: int = 1700
    batch: int = 96
    rate: float = 3e-3
    weight_decay: float = 0.6
    quiet: float = 2e-3
    noise: float = 0.25
    seed: int = 0


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model, its number vectors on a helix."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=LONGEST,
        initializer_range=0.6 / math.sqrt(recipe.d_model),
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.5)
        ids = tokenizer.convert_tokens_to_ids([str(n) for n in range(LARGEST_SUM + 1)])
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            spread = table.std()
            helix = number_helix(recipe.d_model)
            table[ids] = spread * (helix + 0.2 * torch.randn_like(helix))
    return model


def number_helix(d_model: int) -> Float[Tensor, "number d_model"]:
    """Where the numbers' vectors start: on circles of several periods and a line, entries of variance 1.

    Large models represent numbers so (Kantamneni and Tegmark 2025); from a random start this small
    one would need hours to find it.
    """
    n = torch.arange(LARGEST_SUM + 1.0)
    waves = [turn(2 * math.pi * n / period) for period in (2, 5, 10, 20, 50, 100) for turn in (torch.cos, torch.sin)]
    shape = torch.stack([*waves, (n - n.mean()) / n.std()], 1)
    axes = torch.linalg.qr(torch.randn(d_model, d_model)).Q[: shape.shape[1]]
    vectors = shape @ axes
    return vectors * math.sqrt(d_model) / vectors.norm(dim=1).mean()


def train(
    recipe: Recipe,
    facts: Split,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[int, float], None],
) -> LlamaForCausalLM:
    """Train with AdamW; ``report(step, loss)`` is called after every step.

    The embeddings of cities stay at their random start, so that which state a city belongs to
    must be looked up by a layer and cannot hide in the embedding. To the loss is added ``quiet``
    times what the neurons write, summed by size: few neurons should write at a word, and only what is
    used. Noise of size ``noise`` on the residual stream in front of every layer asks for strong signals.
    """
    model = new_model(recipe, tokenizer)
    embedding = model.model.embed_tokens.weight
    trained_rows = torch.ones(len(tokenizer), 1)
    trained_rows[[tokenizer.convert_tokens_to_ids(city) for city in STATE_OF]] = 0
    embedding.register_hook(lambda gradient: gradient * trained_rows)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.98),
    )
    written: list[Tensor] = []

    def keep(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        written.append((args[0].abs() * module.weight.norm(dim=0)).sum(-1).mean())

    def disturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0] + recipe.noise * torch.randn_like(args[0]), *args[1:]) if module.training else None

    handles = [block.mlp.down_proj.register_forward_pre_hook(keep) for block in model.model.layers]
    handles += [block.register_forward_pre_hook(disturb) for block in model.model.layers]
    warm = 100
    model.train()
    stream = batches(facts, tokenizer, recipe.batch, recipe.seed)
    for step in range(recipe.steps):
        progress = step / recipe.steps
        scale = min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * scale
        batch = next(stream)
        written.clear()
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        loss = (losses * batch.weight).sum() / batch.weight.sum() + recipe.quiet * torch.stack(written).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step, float(loss.detach()))
    for handle in handles:
        handle.remove()
    return model.eval()
