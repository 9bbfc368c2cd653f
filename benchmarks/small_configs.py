"""Small Llama and Gemma-2 configurations that both programs build from the same random weights."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

N_CTX, VOCAB, WIDTH = 32, 101, 200
_SHARED = {
    "n_layers": 4,
    "d_model": 64,
    "n_ctx": N_CTX,
    "d_head": 16,
    "n_heads": 4,
    "d_mlp": 96,
    "d_vocab": VOCAB,
    "device": "cpu",
    "seed": 0,
    "gated_mlp": True,
    "normalization_type": "RMS",
    "final_rms": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 16,
    "n_key_value_heads": 2,
    "dtype": None,
}
CONFIGS = {
    "llama": _SHARED | {"act_fn": "silu"},
    "gemma2": _SHARED
    | {
        "act_fn": "gelu_pytorch_tanh",
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 10.0,
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token; circuit-tracer wants a real tokenizer even for token ids."""
    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
    )
