"""What the model sees and what is kept from it: tokenizer, split and batches."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_circuits.dictionaries.builtin.split import FAMILIES, Split
from tl_circuits.dictionaries.builtin.world import (
    additions,
    opposites,
    properties_of_states,
    states_of_cities,
    translations,
    two_hop_facts,
)

SPECIAL = ("<unk>", "<bos>", "<pad>")
LONGEST = 32
# How often each family is drawn.
MIX = dict(zip(FAMILIES, (0.22, 0.20, 0.10, 0.08, 0.07, 0.33), strict=True))


def words() -> list[str]:
    """Every word of the world, in a fixed order."""
    facts = [
        *states_of_cities(),
        *properties_of_states(),
        *two_hop_facts(),
        *opposites(),
        *translations(),
        *additions(),
    ]
    seen = dict.fromkeys(word for fact in facts for word in f"{fact.prompt} {fact.answer}".split())
    return [*seen, "The", "Le", "Fact", ":", "."]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a beginning-of-sequence token in front."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token="<pad>",
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Batch:
    """Tokens, padded on the right; ``weight`` of the loss for each next token."""

    tokens: Int[Tensor, "batch pos"]
    weight: Float[Tensor, "batch next"]


def batches(facts: Split, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[Batch]:
    """Training batches without end. The answer and the full stop count fully, other words little."""
    rng = random.Random(seed)
    vocabulary = tokenizer.get_vocab()
    bos, pad, stop = vocabulary["<bos>"], vocabulary["<pad>"], vocabulary["."]
    coded = {
        name: [([vocabulary[w] for w in f.prompt.split()], vocabulary[f.answer]) for f in group]
        for name, group in facts.train.items()
    }
    upper = {vocabulary["the"]: vocabulary["The"], vocabulary["le"]: vocabulary["Le"]}
    prefix = [vocabulary["Fact"], vocabulary[":"]]
    families, shares = list(MIX), list(MIX.values())
    while True:
        rows, weights = [], []
        for _ in range(size):
            start = [bos, *prefix] if rng.random() < 0.15 else [bos]
            row, weight = list(start), [0.02] * len(start)
            # Two facts a row: what came before must not matter.
            for name in rng.choices(families, shares, k=2):
                prompt, answer = rng.choice(coded[name])
                if rng.random() < 0.3:
                    prompt = [upper.get(prompt[0], prompt[0]), *prompt[1:]]
                row += [*prompt, answer, stop]
                weight += [0.02] * len(prompt) + [1.0, 1.0]
            rows.append(row)
            weights.append(weight)
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        yield Batch(tokens, torch.tensor([w + [0.0] * (longest - len(w)) for w in weights])[:, 1:])
