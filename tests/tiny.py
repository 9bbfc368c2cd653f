"""Small random models of every architecture, and random dictionaries for them."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import tl_circuits as tlc
from tests.accelerator import DEVICE, home_of

VOCAB = 101
_GROUPED = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
_GEMMA = _GROUPED | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, num_hidden_layers=4)
CONFIGS = {
    "llama": LlamaConfig(**_GROUPED),
    "gemma3": Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma2": Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=10.0),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "neox": GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
}
ARCHITECTURES = tuple(CONFIGS)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCAB - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def checkpoint(config, folder: str, seed: int = 0) -> str:
    """A random model of ``config`` as a Hugging Face folder; every parameter is away from its default."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def tiny_folder(architecture: str) -> str:
    return checkpoint(CONFIGS[architecture], tempfile.mkdtemp(prefix=f"tiny-{architecture}-"))


def run_async(coroutine):
    """The result of a coroutine, run in a thread of its own: the browser's tests keep a loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@cache
def tiny_bridge(architecture: str, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> TransformerBridge:
    return TransformerBridge.boot_transformers(tiny_folder(architecture), device=device, dtype=dtype).eval()


def own_bridge(architecture: str) -> TransformerBridge:
    """A bridge that no other test has, for fixtures that stay attached while other tests run: their order may
    change."""
    return tiny_bridge.__wrapped__(architecture)


def prompt(length: int = 9, seed: int = 3) -> torch.Tensor:
    tokens = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    tokens[0] = 1  # the beginning-of-sequence token
    return tokens


def transcoders(
    model,
    activation: str = "jumprelu",
    skip: bool = False,
    layers=None,
    input_hook: str = "mlp.hook_in",
    output_hook: str = "hook_mlp_out",
    width: int = 40,
    seed: int = 1,
) -> tlc.TranscoderSet:
    """Random transcoders with a few active features a position."""
    d = int(model.cfg.d_model)
    generator, home = torch.Generator().manual_seed(seed), home_of(model)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(home)

    return tlc.load_transcoders(
        {
            layer: tlc.Transcoder(
                W_enc=random(width, d) / d**0.5,
                W_dec=random(width, d) / d**0.5,
                b_enc=0.1 * random(width) - 0.3,
                b_dec=0.1 * random(d),
                W_skip=0.1 * random(d, d) if skip else None,
                threshold=torch.full((width,), 0.3, device=home) if activation == "jumprelu" else None,
                activation=activation,
                k=5 if activation == "topk" else None,
                input_hook=input_hook,
                output_hook=output_hook,
            )
            for layer in (range(int(model.cfg.n_layers)) if layers is None else layers)
        },
        layers=layers,
    )


def cross_layer(model, seed: int = 2, slots: int | None = None, **kwargs) -> tlc.CrossLayerTranscoders:
    """A random cross-layer transcoder: each feature writes to its own layer and those after it."""
    encoders = transcoders(model, seed=seed, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    last, d = encoders.layers[-1], int(model.cfg.d_model)
    decoders = {
        layer: torch.randn(encoders.width(layer), min(slots or 99, last - layer + 1), d, generator=generator).to(
            home_of(model)
        )
        / d**0.5
        for layer in encoders.layers
    }
    return tlc.CrossLayerTranscoders({layer: encoders[layer] for layer in encoders.layers}, decoders)


def hook_state(model) -> dict[str, tuple[int, int]]:
    """Every hook name with how many hooks it carries, to compare before and after."""
    return {name: (len(p._forward_hooks), len(p._backward_hooks)) for name, p in model.hook_dict.items()}


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """``folder`` as the working directory (contextlib.chdir is of Python 3.11)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None):
    """``tl-circuits ...`` within this process, in the folder ``cwd``: its exit_code, stdout and stderr.

    A process of its own takes ten seconds to import torch and TransformerLens; tests/test_cli.py has those.
    """
    from typer.testing import CliRunner

    from tl_circuits.cli.main import app as program

    with _working_in(cwd) if cwd else nullcontext():
        return CliRunner(env={"COLUMNS": "140"} | (env or {})).invoke(program, [str(a) for a in arguments])
