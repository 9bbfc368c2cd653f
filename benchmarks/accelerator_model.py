"""A random model of Gemma-2's architecture and random transcoders, made from seeds directly on the device.

Both programs make them in their own process and compare check sums, so nothing large is written to disk.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # with Gemma's ids
FINAL_NORM = 2.0  # added to the final norm's gain of 1: logits spread enough that some tokens are likelier than others


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of its transcoders; ``active`` is about how many features are active at a position."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    window: int
    width: int
    active: int

    @property
    def d_value(self) -> int:
        """Head widths, summed over query and value heads."""
        return (self.n_heads + self.n_kv) * self.d_head

    @property
    def threshold(self) -> float:
        """The pre-activation above which a feature is active: pre-activations are about normally distributed."""
        return NormalDist().inv_cdf(1 - self.active / self.width)


SHAPES = {
    "gemma-2-2b": Shape(
        n_layers=26,
        d_model=2304,
        n_heads=8,
        n_kv=4,
        d_head=256,
        d_mlp=9216,
        d_vocab=256_000,
        n_ctx=8192,
        window=4096,
        width=16_384,
        active=60,
    ),
    "tiny": Shape(
        n_layers=4,
        d_model=64,
        n_heads=4,
        n_kv=2,
        d_head=16,
        d_mlp=96,
        d_vocab=500,
        n_ctx=256,
        window=128,
        width=400,
        active=20,
    ),
}


def seeded(name: str, tensor: Tensor, std: float, mean: float = 0.0) -> Tensor:
    """Fill a tensor with normally distributed numbers that depend on its name, shape, dtype and device only."""
    generator = torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        return tensor.normal_(mean, std, generator=generator)


def network(shape: Shape, dtype: torch.dtype, device: str) -> Gemma2ForCausalLM:
    """The model, as Hugging Face's library has it."""
    config = Gemma2Config(
        num_hidden_layers=shape.n_layers,
        hidden_size=shape.d_model,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv,
        head_dim=shape.d_head,
        intermediate_size=shape.d_mlp,
        vocab_size=shape.d_vocab,
        max_position_embeddings=shape.n_ctx,
        sliding_window=shape.window,
        query_pre_attn_scalar=shape.d_head,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config.architectures = ["Gemma2ForCausalLM"]
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Gemma2ForCausalLM(config).eval()
        if model.config._attn_implementation != "eager":
            raise RuntimeError(f"the attention is {model.config._attn_implementation}, not eager")
    finally:
        torch.set_default_dtype(before)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied, as Gemma's are, in every version of the library
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            seeded(name, parameter, 0.1, FINAL_NORM if name == "model.norm.weight" else 0.0)
        else:
            seeded(name, parameter, shape.d_model**-0.5)
        parameter.requires_grad_(False)
        if parameter.dtype != dtype or parameter.device.type != torch.device(device).type:
            raise RuntimeError(f"{name} is {parameter.dtype} on {parameter.device}, not {dtype} on {device}")
    return model


def transcoder(shape: Shape, layer: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The tensors of one layer's JumpReLU transcoder, whose output is about as large as the MLP's."""
    W_enc, W_dec = (torch.empty(shape.width, shape.d_model, dtype=dtype, device=device) for _ in range(2))
    seeded(f"W_enc.{layer}", W_enc, shape.d_model**-0.5)
    seeded(f"W_dec.{layer}", W_dec, 1 / (shape.active**0.5 * shape.threshold))
    zeros = torch.zeros(shape.width, dtype=dtype, device=device)
    return {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_enc": zeros,
        "b_dec": zeros[: shape.d_model].clone(),
        "threshold": torch.full_like(zeros, shape.threshold),
    }


def prompt(shape: Shape, length: int) -> Tensor:
    """Random token ids after the beginning-of-sequence token; a shorter prompt is the beginning of a longer one."""
    tokens = torch.randint(len(SPECIAL), shape.d_vocab, (shape.n_ctx,), generator=torch.Generator().manual_seed(0))
    tokens[0] = 2
    return tokens[:length].clone()


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One word a token. Both programs want a tokenizer even for token ids."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), shape.d_vocab))]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def checksum(tensors: Iterable[Tensor]) -> int:
    """The sum of the tensors' bits, read as whole numbers: the same in whatever order it is added up."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        total += sum(int(part.sum(dtype=torch.int64)) for part in bits.flatten().split(2**27))
    return total
