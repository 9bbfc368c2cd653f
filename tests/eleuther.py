"""Sets of EleutherAI's sparsify and clt-training: their files, and what their own code computes, written out again.

The formulas follow sparsify's ``SparseCoder`` before and after February 2025 and clt-training's ``SparseCoder``,
``MidDecoder`` and ``CrossLayerRunner``. Nothing here calls the package.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

OLD = {
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 3,
    "multi_topk": False,
    "skip_connection": True,
}
CLT = {
    "dtype": "none",
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 3,
    "skip_connection": False,
    "transcode": True,
    "tp_output": True,
    "n_targets": 0,
    "n_sources": 0,
    "normalize_io": False,
    "divide_cross_layer": False,
    "train_post_encoder": True,
    "post_encoder_scale": False,
    "per_source_tied": False,
    "secondary_target_tied": False,
    "coalesce_topk": "none",
    "topk_coalesced": False,
    "use_fp8": False,
}


def write(folder: Path, hookpoint: str, tensors, config):
    """One hookpoint's folder: ``cfg.json`` and ``sae.safetensors``."""
    here = folder / hookpoint
    here.mkdir(parents=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, here / "sae.safetensors")
    width, d_in = tensors["encoder.weight"].shape
    (here / "cfg.json").write_text(json.dumps(config | {"num_latents": width, "d_in": d_in}))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(width=9, d=6, seed=0, skip=False):
    """The tensors of an older file."""
    made = {
        "encoder.weight": normal(width, d, seed=seed),
        "encoder.bias": normal(width, seed=seed + 1),
        "W_dec": normal(width, d, seed=seed + 2),
        "b_dec": normal(d, seed=seed + 3),
    }
    return made | ({"W_skip": normal(d, d, seed=seed + 4)} if skip else {})


def top_k(pre, k):
    """ReLU, then the k largest of each row; the others are zero."""
    values, indices = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def old_forward(t, x, k):
    """sparsify before February 2025: the decoder bias is subtracted from what is encoded, not from what is skipped."""
    acts = top_k((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], k)
    return acts, acts @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T


class Coder:
    """One layer of clt-training: its configuration and tensors, encoded and decoded as its own code does."""

    def __init__(self, config, tensors):
        self.config, self.tensors = CLT | config, tensors

    def normalised(self, x):
        return x * (x.shape[-1] ** 0.5 / self.tensors["in_norm"]) if self.config["normalize_io"] else x

    def denormalised(self, y):
        return y * (self.tensors["out_norm"] / y.shape[-1] ** 0.5) if self.config["normalize_io"] else y

    def encode(self, x):
        return top_k(
            self.normalised(x) @ self.tensors["encoder.weight"].T + self.tensors["encoder.bias"], self.config["k"]
        )

    def used(self, acts, at=None):
        """What is decoded: the post-encoder bias on active features, times the scale."""
        ending = "" if at is None else f"s.{at}"
        post = self.tensors.get(f"post_enc{ending}", torch.zeros(acts.shape[-1]))
        acts = acts + post * (acts > 0)
        return acts * self.tensors[f"post_enc_scale{ending}"] if self.config["post_encoder_scale"] else acts

    def decode(self, used, x, name="W_dec", at=None):
        """Decoder, bias and skip of one target, before the output is scaled back."""

        def pick(tensor):
            return self.tensors.get(f"{tensor}s.{at}", self.tensors.get(tensor))

        skip = pick("W_skip")
        out = used @ self.tensors[name] + pick("b_dec")
        return out if skip is None else out + self.normalised(x) @ skip.T

    def alone(self, x):
        """The output of a layer that is not part of a cross-layer set."""
        return self.denormalised(self.decode(self.used(self.encode(x)), x))


def cross_layer(coders, inputs):
    """The outputs of all layers, as the runner collects them layer by layer."""
    running, outputs = {}, []
    for layer, (coder, x) in enumerate(zip(coders, inputs, strict=True)):
        running[layer] = [coder, x, coder.encode(x), 0]
        kind = coder.config["coalesce_topk"]
        used = {s: c.used(acts, at) for s, (c, _, acts, at) in running.items()}
        if kind == "none":
            others = torch.zeros_like(x)
            divide_by = max(1, len(running) - 1) if coder.config["divide_cross_layer"] else 1
            for s, (c, x_s, _, at) in running.items():
                if s != layer:
                    name = "W_dec" if c.config["per_source_tied"] else f"W_decs.{at}"
                    others = others + c.decode(used[s], x_s, name, at)
            own = "W_dec" if coder.config["per_source_tied"] else "W_decs.0"
            out = coder.decode(used[layer], x, own, 0) + others / divide_by
        else:
            width = len(coder.tensors["encoder.bias"])
            rows = [
                coder.tensors["W_dec"][(i if kind == "per-layer" else 0) * width :][:width] for i in range(len(running))
            ]
            out = sum(used[s] @ W for s, W in zip(running, rows, strict=True)) + coder.tensors["b_dec"]
            if "W_skip" in coder.tensors:
                out = out + coder.normalised(x) @ coder.tensors["W_skip"].T
        outputs.append(coder.denormalised(out))
        for entry in running.values():
            entry[3] += 1
        running = {s: entry for s, entry in running.items() if entry[3] < entry[0].config["n_targets"]}
    return outputs
