"""Small transcoders written to disk exactly as each published layout has them."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

BASICS = ("W_enc", "W_dec", "b_enc", "b_dec")


def random_layers(n_layers=12, width=7, d=4, dtype=torch.float32, seed=0, decoders=False):
    """Canonical tensors a layer: W_enc [feature, d], W_dec [feature, d] (or [feature, slot, d]), skip [d_out, d_in]."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return [
        {
            "W_enc": random(width, d),
            "W_dec": random(width, n_layers - i, d) if decoders else random(width, d),
            "b_enc": random(width),
            "b_dec": random(d),
            "threshold": random(width).abs(),
            "W_skip": random(d, d),
        }
        for i in range(n_layers)
    ]


def _save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def gemma_scope(folder: Path, layers, l0=lambda i: 70 + i):
    """google/gemma-scope-2b-pt-transcoders."""
    for i, t in enumerate(layers):
        path = folder / f"layer_{i}/width_16k/average_l0_{l0(i)}/params.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            W_enc=t["W_enc"].T.numpy(),
            W_dec=t["W_dec"].numpy(),
            b_enc=t["b_enc"].numpy(),
            b_dec=t["b_dec"].numpy(),
            threshold=t["threshold"].numpy(),
        )


def gemma_scope_2(folder: Path, layers, affine=False, l0="small"):
    """google/gemma-scope-2-1b-pt and its sizes, folder transcoder_all."""
    suffix = "_affine" if affine else ""
    for i, t in enumerate(layers):
        here = folder / f"transcoder_all/layer_{i}_width_16k_l0_{l0}{suffix}"
        tensors = {"w_enc": t["W_enc"].T, "w_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        tensors["threshold"] = t["threshold"]
        if affine:
            tensors["affine_skip_connection"] = t["W_skip"].T
        _save(here / "params.safetensors", tensors)
        config = {
            "hf_hook_point_in": f"model.layers.{i}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{i}.post_feedforward_layernorm.output",
            "width": len(t["b_enc"]),
            "model_name": "google/gemma-3-1b-pt",
            "architecture": "jump_relu",
            "l0": 20,
            "affine_connection": affine,
            "type": "transcoder",
        }
        (here / "config.json").write_text(json.dumps(config))


def gemma_scope_2_clt(folder: Path, layers, affine=False):
    """The cross-layer folder of google/gemma-scope-2-1b-pt: absolute target layers, zeros before the own one."""
    for i, t in enumerate(layers):
        width, _, d = t["W_dec"].shape
        absolute = torch.cat([torch.full((width, i, d), 9.0), t["W_dec"]], dim=1)
        tensors = {"w_enc": t["W_enc"].T, "w_dec": absolute, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        tensors["threshold"] = t["threshold"]
        if affine:
            tensors["affine_skip_connection"] = t["W_skip"].T
        _save(folder / f"clt/width_262k_l0_medium{'_affine' if affine else ''}/params_layer_{i}.safetensors", tensors)


def config_yaml(folder: Path, **fields):
    """circuit-tracer's config over all layers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))


def circuit_tracer(
    folder: Path,
    layers,
    skip=False,
    threshold=False,
    k=None,
    flipped=False,
    hooks=("hook_resid_mid", "hook_mlp_out"),
    model="meta-llama/Llama-3.2-1B",
    **config,
):
    """mntss/transcoder-Llama-3.2-1B, mwhanna/qwen3-4b-transcoders and circuit-tracer's own cache."""
    for i, t in enumerate(layers):
        tensors = {name: t[name] for name in BASICS}
        if flipped:
            tensors["W_dec"] = t["W_dec"].T
        if skip:
            tensors["W_skip"] = t["W_skip"]
        if threshold:
            tensors["activation_function.threshold"] = t["threshold"]
        if k:
            tensors["k"] = torch.tensor(k)
        _save(folder / f"layer_{i}.safetensors", tensors)
    config_yaml(
        folder,
        model_name=model,
        model_kind="transcoder_set",
        feature_input_hook=hooks[0],
        feature_output_hook=hooks[1],
        **config,
    )


def circuit_tracer_clt(
    folder: Path, layers, threshold=True, skip=None, read="hook_resid_mid", model="meta-llama/Llama-3.2-1B"
):
    """mntss/clt-llama-3.2-1b-524k; ``skip``: "with the encoder" or in a file "of its own", as [d_in, d_out]."""
    for i, t in enumerate(layers):
        tensors = {f"{name}_{i}": t[name] for name in ("W_enc", "b_enc", "b_dec")}
        if threshold:
            tensors[f"threshold_{i}"] = t["threshold"]
        if skip == "with the encoder":
            tensors[f"W_skip_{i}"] = t["W_skip"].T
        elif skip == "of its own":
            _save(folder / f"W_skip_{i}.safetensors", {f"W_skip_{i}": t["W_skip"].T})
        _save(folder / f"W_enc_{i}.safetensors", tensors)
        _save(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": t["W_dec"]})
    config_yaml(
        folder,
        model_name=model,
        model_kind="cross_layer_transcoder",
        feature_input_hook=read,
        feature_output_hook="hook_mlp_out",
    )


def saelens(folder: Path, layers, architecture="transcoder"):
    """A folder a layer, as SAELens' save_model writes it."""
    for i, t in enumerate(layers):
        tensors = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        if "jumprelu" in architecture:
            tensors["threshold"] = t["threshold"]
        if "skip" in architecture:
            tensors["W_skip"] = t["W_skip"]
        here = folder / f"layer_{i}"
        _save(here / "sae_weights.safetensors", tensors)
        width, d = t["W_enc"].shape
        config = {
            "architecture": architecture,
            "d_in": d,
            "d_out": d,
            "d_sae": width,
            "dtype": "float32",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "metadata": {
                "hook_name": f"blocks.{i}.ln2.hook_normalized",
                "hook_name_out": f"blocks.{i}.hook_mlp_out",
                "model_name": "gemma-2-2b",
                "sae_lens_version": "6.54.12",
            },
        }
        (here / "cfg.json").write_text(json.dumps(config))


def arena(folder: Path, layers, unfolded=()):
    """callummcdougall/arena-demos-transcoder, with the config of its layer 8; ``unfolded``: layers that are there
    twice."""
    for i, t in enumerate(layers):
        width, d = t["W_enc"].shape
        config = {
            "architecture": "standard",
            "d_in": d,
            "d_sae": width,
            "dtype": "float32",
            "device": "cuda",
            "model_name": "gpt2-small",
            "hook_name": f"blocks.{i}.ln2.hook_normalized",
            "hook_layer": i,
            "hook_head_index": None,
            "activation_fn_str": "relu",
            "activation_fn_kwargs": {},
            "apply_b_dec_to_input": False,
            "finetuning_scaling_factor": False,
            "sae_lens_training_version": None,
            "prepend_bos": True,
            "dataset_path": "Skylion007/openwebtext",
            "dataset_trust_remote_code": True,
            "context_size": 128,
            "normalize_activations": False,
            "neuronpedia_id": None,
            "model_from_pretrained_kwargs": {},
        }
        tensors = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        folders = {f"gpt2-small-layer-{i}-mlp-transcoder-folded-b_dec_out": (config, tensors)}
        if i in unfolded:
            apart = config | {"apply_b_dec_to_input": True, "use_b_dec_out": True}
            folders[f"gpt2-small-layer-{i}-mlp-transcoder"] = (apart, tensors | {"b_dec_out": t["b_dec"].clone()})
        for name, (written, weights) in folders.items():
            _save(folder / name / "sae_weights.safetensors", weights)
            (folder / name / "cfg.json").write_text(json.dumps(written))


def sparsify(folder: Path, layers, k, skip=False, num_latents=None):
    """EleutherAI/skip-transcoder-Llama-3.2-1B-131k: a folder a hookpoint."""
    for i, t in enumerate(layers):
        tensors = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
        if skip:
            tensors["W_skip"] = t["W_skip"]
        here = folder / f"layers.{i}.mlp"
        _save(here / "sae.safetensors", tensors)
        width, d = t["W_enc"].shape
        config = {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": width if num_latents is None else num_latents,
            "k": k,
            "multi_topk": False,
            "skip_connection": skip,
            "transcode": True,
            "d_in": d,
        }
        (here / "cfg.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M"}))


def llamascopium(folder: Path, layers, act_fn="jumprelu", norms=None, decoder_norm=False, **config):
    """OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B: a folder a layer. ``norms``: average norms in and out."""
    for i, t in enumerate(layers):
        tensors = {"W_E": t["W_enc"].T, "W_D": t["W_dec"], "b_E": t["b_enc"], "b_D": t["b_dec"]}
        hooks = f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out"
        if act_fn == "jumprelu":
            tensors["activation_function.log_jumprelu_threshold"] = t["threshold"].log()
        for hook, norm in zip(hooks, norms or (), strict=False):
            tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
        here = folder / f"transcoder/8x/k64/layer{i}_transcoder_8x_k64"
        _save(here / "sae_weights.safetensors", tensors)
        width, d = t["W_enc"].shape
        fields = {
            "sae_type": "sae",
            "d_model": d,
            "expansion_factor": width / d,
            "use_decoder_bias": True,
            "act_fn": act_fn,
            "norm_activation": "dataset-wise" if norms else "inference",
            "sparsity_include_decoder_norm": decoder_norm,
            "top_k": 1,
            "hook_point_in": hooks[0],
            "hook_point_out": hooks[1],
            "use_glu_encoder": False,
        }
        (here / "config.json").write_text(json.dumps(fields | config))


def four_bit_matrix(name, matrix):
    """A matrix as its three tensors with four bits a number, and the numbers that these stand for, one after the other.

    Up to sixteen different numbers are kept as they are. More are rounded to sixteen even steps up to a row's largest
    number.
    """
    rows, columns = matrix.shape
    levels = sorted({float(v) for v in matrix.flatten()})
    scales = [1.0] * rows
    if len(levels) > 16:
        levels, scales = [(i - 8) / 8 for i in range(16)], [float(row.abs().max()) for row in matrix.half()]
    levels += [levels[-1]] * (16 - len(levels))
    codes, stands = torch.zeros(rows, (columns + 1) // 2, dtype=torch.uint8), torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            code = min(range(16), key=lambda i: abs(levels[i] * scales[r] - float(matrix[r, c])))
            codes[r, c // 2] += code * (16 if c % 2 else 1)
            stands[r, c] = levels[code] * scales[r]
    parts = {"codes": codes, "scale": torch.tensor(scales).half(), "levels": torch.tensor(levels)}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}, stands


def four_bit(
    folder: Path, layers, hooks=("mlp.hook_in", "mlp.hook_out"), activation="relu", k=None, skip=False, **config
):
    """tl_circuits' own sets with four bits a number; returns the layers that they stand for."""
    stand = []
    for i, t in enumerate(layers):
        tensors, stands = {"b_enc": t["b_enc"], "b_dec": t["b_dec"]}, dict(t)
        if activation == "jumprelu":
            tensors["threshold"] = t["threshold"]
        for name in ("W_enc", "W_dec", *(["W_skip"] if skip else [])):
            parts, stands[name] = four_bit_matrix(name, t[name])
            tensors |= parts
        _save(folder / f"layer_{i:02d}.four_bit.safetensors", tensors)
        stand.append(stands)
    fields = {
        "format": "tl_circuits four bits",
        "version": 1,
        "model": "smollm2-135m",
        "input_hook": hooks[0],
        "output_hook": hooks[1],
        "activation": activation,
        "k": k,
        "clamp": True,
        "skip": skip,
        "d_in": layers[0]["W_enc"].shape[1],
        "d_out": layers[0]["W_dec"].shape[1],
        "features": len(layers[0]["b_enc"]),
        "layers": list(range(len(layers))),
        "licence": "Apache-2.0",
        "training_tokens": 1000,
        "description": None,
    }
    (folder / "config.json").write_text(json.dumps(fields | config))
    return stand


def hub_cache(cache: Path, repo: str, write, revision="main"):
    """A repository in the hub library's cache, as if downloaded; ``write(folder)`` lays its files out."""
    root = cache / ("models--" + repo.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    write(snapshot)
    return snapshot
