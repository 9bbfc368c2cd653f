"""Small random checkpoints of many architectures, as Hugging Face folders."""

import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers as T

import tl_circuits

VOCAB = 320
_TOKENIZER = Path(tl_circuits.__file__).parent / "builtin" / "tiny_facts"
_IDS = dict(bos_token_id=1, eos_token_id=2)
_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    **_IDS,
)
_MHA = _BASE | {"num_key_value_heads": 4}
_GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128, **_IDS)
_OPT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    **_IDS,
)
_NEOX = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    **_IDS,
)
_FALCON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **_IDS)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
_ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1)
_GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
_GEMMA4 = dict(
    head_dim=8,
    global_head_dim=8,
    sliding_window=4,
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=VOCAB,
)

# name: (model, config, arguments)
ARCHITECTURES = {
    "afmoe": lambda: (
        T.AfmoeForCausalLM,
        T.AfmoeConfig(**_BASE, head_dim=8, **_MOE, num_dense_layers=1, sliding_window=4),
    ),
    "apertus": lambda: (T.ApertusForCausalLM, T.ApertusConfig(**_BASE)),
    "arcee": lambda: (T.ArceeForCausalLM, T.ArceeConfig(**_BASE)),
    "bamba": lambda: (
        T.BambaForCausalLM,
        T.BambaConfig(
            **_BASE, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
        ),
    ),
    "bertlm": lambda: (
        T.BertLMHeadModel,
        T.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            is_decoder=True,
        ),
    ),
    "bitnet": lambda: (T.BitNetForCausalLM, T.BitNetConfig(**_BASE)),
    "bloom": lambda: (
        T.BloomForCausalLM,
        T.BloomConfig(
            vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
    ),
    "codegen": lambda: (
        T.CodeGenForCausalLM,
        T.CodeGenConfig(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            rotary_dim=4,
            n_positions=128,
            n_ctx=128,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "cohere": lambda: (T.CohereForCausalLM, T.CohereConfig(**_BASE, logit_scale=0.25)),
    "cohere2": lambda: (T.Cohere2ForCausalLM, T.Cohere2Config(**_BASE, logit_scale=0.25, sliding_window=4)),
    "deepseek2": lambda: (
        T.DeepseekV2ForCausalLM,
        T.DeepseekV2Config(
            **_MHA,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            **_LATENT,
        ),
    ),
    "deepseek3": lambda: (
        T.DeepseekV3ForCausalLM,
        T.DeepseekV3Config(**_MHA, **_ROUTED, first_k_dense_replace=1, **_LATENT, rope_scaling=None),
    ),
    "deepseek4": lambda: (T.DeepseekV4ForCausalLM, T.DeepseekV4Config(**_BASE)),
    "ernie45": lambda: (T.Ernie4_5ForCausalLM, T.Ernie4_5Config(**_BASE)),
    "ernie45moe": lambda: (
        T.Ernie4_5_MoeForCausalLM,
        T.Ernie4_5_MoeConfig(**_BASE, moe_num_experts=4, moe_k=2, moe_intermediate_size=24),
    ),
    "exaone4": lambda: (T.Exaone4ForCausalLM, T.Exaone4Config(**_BASE, sliding_window=4)),
    "falcon": lambda: (
        T.FalconForCausalLM,
        T.FalconConfig(
            **_FALCON, alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False
        ),
    ),
    "falconalibi": lambda: (
        T.FalconForCausalLM,
        T.FalconConfig(
            **_FALCON, alibi=True, parallel_attn=False, multi_query=False, new_decoder_architecture=False, bias=True
        ),
    ),
    "falconh1": lambda: (
        T.FalconH1ForCausalLM,
        T.FalconH1Config(**_BASE, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    ),
    "falconnew": lambda: (
        T.FalconForCausalLM,
        T.FalconConfig(**_FALCON, num_kv_heads=2, alibi=False, new_decoder_architecture=True, bias=False),
    ),
    "falconseq": lambda: (
        T.FalconForCausalLM,
        T.FalconConfig(
            **_FALCON, alibi=False, parallel_attn=False, multi_query=False, new_decoder_architecture=False, bias=True
        ),
    ),
    "flexolmo": lambda: (T.FlexOlmoForCausalLM, T.FlexOlmoConfig(**_BASE, num_experts=4, num_experts_per_tok=2)),
    "gemma": lambda: (T.GemmaForCausalLM, T.GemmaConfig(**_BASE, head_dim=8)),
    "gemma2": lambda: (T.Gemma2ForCausalLM, T.Gemma2Config(**_BASE, **_GEMMA)),
    "gemma3": lambda: (T.Gemma3ForCausalLM, T.Gemma3TextConfig(**_BASE, **_GEMMA)),
    "gemma3mm": lambda: (
        T.Gemma3ForConditionalGeneration,
        T.Gemma3Config(
            text_config=T.Gemma3TextConfig(**_BASE, **_GEMMA).to_dict(),
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            mm_tokens_per_image=4,
            boi_token_index=250,
            eoi_token_index=251,
            image_token_index=252,
        ),
    ),
    "gemma4": lambda: (T.Gemma4ForCausalLM, T.Gemma4TextConfig(**_BASE, **_GEMMA4)),
    "gemma4moe": lambda: (
        T.Gemma4ForCausalLM,
        T.Gemma4TextConfig(
            **_BASE, **_GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24
        ),
    ),
    "gemma4perlayer": lambda: (
        T.Gemma4ForCausalLM,
        T.Gemma4TextConfig(**_BASE, **_GEMMA4 | {"hidden_size_per_layer_input": 8}),
    ),
    "glm": lambda: (T.GlmForCausalLM, T.GlmConfig(**_BASE, head_dim=8)),
    "glm4": lambda: (T.Glm4ForCausalLM, T.Glm4Config(**_BASE, head_dim=8)),
    "glm4moe": lambda: (T.Glm4MoeForCausalLM, T.Glm4MoeConfig(**_BASE, head_dim=8, **_ROUTED, first_k_dense_replace=1)),
    "glm4moelite": lambda: (T.Glm4MoeLiteForCausalLM, T.Glm4MoeLiteConfig(**_MHA, **_ROUTED, **_LATENT)),
    "glmdsa": lambda: (T.GlmMoeDsaForCausalLM, T.GlmMoeDsaConfig(**_MHA, **_ROUTED, **_LATENT)),
    "gpt2": lambda: (T.GPT2LMHeadModel, T.GPT2Config(**_GPT)),
    "gpt2scaled": lambda: (T.GPT2LMHeadModel, T.GPT2Config(**_GPT, scale_attn_by_inverse_layer_idx=True)),
    "gptbigcode": lambda: (T.GPTBigCodeForCausalLM, T.GPTBigCodeConfig(**_GPT)),
    "gptj": lambda: (
        T.GPTJForCausalLM,
        T.GPTJConfig(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            rotary_dim=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gptneo": lambda: (
        T.GPTNeoForCausalLM,
        T.GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            max_position_embeddings=128,
            window_size=4,
            attention_types=[[["global", "local"], 2]],
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gptoss": lambda: (
        T.GptOssForCausalLM,
        T.GptOssConfig(
            **_BASE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, rope_scaling=None
        ),
    ),
    "gptossfull": lambda: (
        T.GptOssForCausalLM,
        T.GptOssConfig(
            **_BASE,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            layer_types=["full_attention"] * 3,
        ),
    ),
    "granite": lambda: (
        T.GraniteForCausalLM,
        T.GraniteConfig(
            **_BASE, residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=2.0, attention_multiplier=0.2
        ),
    ),
    "granitehybrid": lambda: (
        T.GraniteMoeHybridForCausalLM,
        T.GraniteMoeHybridConfig(
            **_BASE,
            layer_types=["attention"] * 3,
            shared_intermediate_size=48,
            num_local_experts=0,
            num_experts_per_tok=0,
            mamba_n_heads=8,
            mamba_d_head=8,
        ),
    ),
    "granitemoe": lambda: (
        T.GraniteMoeForCausalLM,
        T.GraniteMoeConfig(
            **_BASE,
            num_local_experts=4,
            num_experts_per_tok=2,
            residual_multiplier=0.5,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            attention_multiplier=0.2,
        ),
    ),
    "hrmtext": lambda: (T.HrmTextForCausalLM, T.HrmTextConfig(**_BASE)),
    "hunyuan": lambda: (T.HunYuanDenseV1ForCausalLM, T.HunYuanDenseV1Config(**_BASE, head_dim=8)),
    "jais2": lambda: (T.Jais2ForCausalLM, T.Jais2Config(**_MHA)),
    "jamba": lambda: (
        T.JambaForCausalLM,
        T.JambaConfig(
            **_BASE,
            attn_layer_period=2,
            attn_layer_offset=0,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_d_state=8,
        ),
    ),
    "jetmoe": lambda: (
        T.JetMoeForCausalLM,
        T.JetMoeConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "laguna": lambda: (T.LagunaForCausalLM, T.LagunaConfig(**_BASE, head_dim=8, **_MOE)),
    "lfm2": lambda: (
        T.Lfm2ForCausalLM,
        T.Lfm2Config(**_BASE, layer_types=["full_attention", "conv", "full_attention"], block_multiple_of=8),
    ),
    "lfm2attn": lambda: (
        T.Lfm2ForCausalLM,
        T.Lfm2Config(**_BASE, layer_types=["full_attention"] * 3, block_multiple_of=8),
    ),
    "llama": lambda: (T.LlamaForCausalLM, T.LlamaConfig(**_BASE)),
    "llama3rope": lambda: (
        T.LlamaForCausalLM,
        T.LlamaConfig(
            **_BASE,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "llama4": lambda: (
        T.Llama4ForCausalLM,
        T.Llama4TextConfig(
            **_BASE,
            intermediate_size_mlp=48,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            no_rope_layers=[1, 0, 1],
            attention_chunk_size=16,
        ),
    ),
    "llamabias": lambda: (
        T.LlamaForCausalLM,
        T.LlamaConfig(**_BASE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "mamba": lambda: (
        T.MambaForCausalLM,
        T.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8),
    ),
    "minimaxm2": lambda: (
        T.MiniMaxM2ForCausalLM,
        T.MiniMaxM2Config(**_BASE, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    ),
    "ministral3": lambda: (T.Ministral3ForCausalLM, T.Ministral3Config(**_BASE, head_dim=8)),
    "mistral": lambda: (T.MistralForCausalLM, T.MistralConfig(**_BASE, sliding_window=4)),
    "mistral4d": lambda: (T.MistralForCausalLM, T.MistralConfig(**_BASE, head_dim=16, sliding_window=None)),
    "mixtral": lambda: (T.MixtralForCausalLM, T.MixtralConfig(**_BASE, num_local_experts=4, num_experts_per_tok=2)),
    "modernbertdecoder": lambda: (
        T.ModernBertDecoderForCausalLM,
        T.ModernBertDecoderConfig(**_NEOX, local_attention=4, pad_token_id=0, cls_token_id=1, sep_token_id=2),
    ),
    "mpt": lambda: (
        T.MptForCausalLM,
        T.MptConfig(
            d_model=32,
            n_heads=4,
            n_layers=3,
            max_seq_len=128,
            vocab_size=VOCAB,
            expansion_ratio=2,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "nanochat": lambda: (T.NanoChatForCausalLM, T.NanoChatConfig(**_MHA)),
    "nemotron": lambda: (T.NemotronForCausalLM, T.NemotronConfig(**_BASE)),
    "nemotronh": lambda: (
        T.NemotronHForCausalLM,
        T.NemotronHConfig(
            **_BASE,
            head_dim=8,
            layers_block_type=["attention", "mlp", "mamba"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
        ),
    ),
    "neox": lambda: (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**_NEOX)),
    "neoxseq": lambda: (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**_NEOX, use_parallel_residual=False)),
    "olmo": lambda: (T.OlmoForCausalLM, T.OlmoConfig(**_BASE)),
    "olmo2": lambda: (T.Olmo2ForCausalLM, T.Olmo2Config(**_BASE)),
    "olmo3": lambda: (T.Olmo3ForCausalLM, T.Olmo3Config(**_BASE)),
    "olmoclip": lambda: (T.OlmoForCausalLM, T.OlmoConfig(**_BASE, clip_qkv=0.5)),
    "olmoe": lambda: (T.OlmoeForCausalLM, T.OlmoeConfig(**_BASE, num_experts=4, num_experts_per_tok=2)),
    "olmohybrid": lambda: (
        T.OlmoHybridForCausalLM,
        T.OlmoHybridConfig(**_BASE, layer_types=["linear_attention", "full_attention", "full_attention"]),
    ),
    "openaigpt": lambda: (
        T.OpenAIGPTLMHeadModel,
        T.OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    ),
    "opt": lambda: (T.OPTForCausalLM, T.OPTConfig(**_OPT, word_embed_proj_dim=32)),
    "optpost": lambda: (T.OPTForCausalLM, T.OPTConfig(**_OPT, word_embed_proj_dim=32, do_layer_norm_before=False)),
    "optproj": lambda: (T.OPTForCausalLM, T.OPTConfig(**_OPT, word_embed_proj_dim=16)),
    "phi": lambda: (T.PhiForCausalLM, T.PhiConfig(**{**_BASE, "num_key_value_heads": 4})),
    "phi3": lambda: (T.Phi3ForCausalLM, T.Phi3Config(**_BASE)),
    "phi3long": lambda: (
        T.Phi3ForCausalLM,
        T.Phi3Config(
            **_BASE,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        ),
    ),
    "phiqk": lambda: (T.PhiForCausalLM, T.PhiConfig(**_MHA, qk_layernorm=True)),
    "qwen2": lambda: (T.Qwen2ForCausalLM, T.Qwen2Config(**_BASE)),
    "qwen2moe": lambda: (
        T.Qwen2MoeForCausalLM,
        T.Qwen2MoeConfig(**_BASE, **_MOE, shared_expert_intermediate_size=24, decoder_sparse_step=1),
    ),
    "qwen2slide": lambda: (
        T.Qwen2ForCausalLM,
        T.Qwen2Config(**_BASE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": lambda: (T.Qwen3ForCausalLM, T.Qwen3Config(**_BASE, head_dim=16)),
    "qwen3_5": lambda: (
        T.Qwen3_5ForCausalLM,
        T.Qwen3_5TextConfig(
            **_BASE,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention", "full_attention"],
        ),
    ),
    "qwen3moe": lambda: (
        T.Qwen3MoeForCausalLM,
        T.Qwen3MoeConfig(**_BASE, head_dim=8, **_MOE, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    "qwen3next": lambda: (
        T.Qwen3NextForCausalLM,
        T.Qwen3NextConfig(
            **_BASE,
            head_dim=8,
            **_MOE,
            shared_expert_intermediate_size=24,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
        ),
    ),
    "recurrentgemma": lambda: (
        T.RecurrentGemmaForCausalLM,
        T.RecurrentGemmaConfig(
            **{k: v for k, v in _BASE.items() if k != "max_position_embeddings"},
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "attention"],
        ),
    ),
    "rwkv": lambda: (
        T.RwkvForCausalLM,
        T.RwkvConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, context_length=64, bos_token_id=1, eos_token_id=2
        ),
    ),
    "seedoss": lambda: (T.SeedOssForCausalLM, T.SeedOssConfig(**_BASE, head_dim=8)),
    "smollm3": lambda: (T.SmolLM3ForCausalLM, T.SmolLM3Config(**_BASE)),
    "stablelm": lambda: (T.StableLmForCausalLM, T.StableLmConfig(**_BASE)),
    "stablelmpar": lambda: (T.StableLmForCausalLM, T.StableLmConfig(**_BASE, use_parallel_residual=True)),
    "stablelmqk": lambda: (T.StableLmForCausalLM, T.StableLmConfig(**_BASE, qk_layernorm=True)),
    "starcoder2": lambda: (T.Starcoder2ForCausalLM, T.Starcoder2Config(**_BASE, sliding_window=4)),
    "vaultgemma": lambda: (T.VaultGemmaForCausalLM, T.VaultGemmaConfig(**_MHA, **_GEMMA)),
    "xglm": lambda: (
        T.XGLMForCausalLM,
        T.XGLMConfig(
            vocab_size=VOCAB,
            d_model=32,
            ffn_dim=48,
            num_layers=3,
            attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "youtu": lambda: (T.YoutuForCausalLM, T.YoutuConfig(**_MHA, **_LATENT)),
    "zamba2": lambda: (
        T.Zamba2ForCausalLM,
        T.Zamba2Config(
            **_BASE, layers_block_type=["mamba", "hybrid", "mamba"], mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=8
        ),
    ),
}


@cache
def folder(name: str) -> str:
    """A checkpoint of architecture ``name``, every parameter away from its default."""
    model_class, config = ARCHITECTURES[name]()
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                embeds = "embed" in parameter_name or "wte" in parameter_name
                parameter.copy_(noise * (0.7 if embeds else 0.8 / max(1, parameter.shape[-1]) ** 0.5))
            elif any(part in parameter_name.lower() for part in ("norm", "ln_", "router.scale")):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.1 * noise)
    where = tempfile.mkdtemp(prefix=f"zoo-{name}-")
    model.save_pretrained(where)
    T.AutoTokenizer.from_pretrained(_TOKENIZER).save_pretrained(where)
    return where
