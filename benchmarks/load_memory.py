"""What an opened set costs in memory and time: Gemma-2-2b-shaped per-layer transcoders, and a Llama-3.2-1B-shaped CLT.

    python -m benchmarks.load_memory gemma FOLDER     # 3.9 GB of random weights are written there, once
    python -m benchmarks.load_memory clt FOLDER       # 20 GB, and a random model of Llama-3.2-1B's shape

Resident memory is the process's RSS (anonymous memory plus the pages of mapped files that are in use),
the largest seen by a thread that looks every 5 ms, less what it was before the set was opened.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

import tl_circuits as tlc

D_GEMMA, LAYERS_GEMMA, WIDTH_GEMMA = 2304, 26, 16384
D_LLAMA, LAYERS_LLAMA, WIDTH_LLAMA = 2048, 16, 32768
ACTIVE = 60  # features a position, about


class Watch:
    """Largest RSS while the ``with`` is open, in bytes."""

    def __enter__(self):
        self._process, self._stop = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()
        self.after = self._process.memory_info().rss


def _encoder(width, d, seed):
    """An encoder, and the bias that lets about ACTIVE of its features be active on standard normal input."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(width, d, generator=generator, dtype=torch.float32).div_(d**0.5).bfloat16()
    level = float(torch.special.ndtri(torch.tensor(1 - ACTIVE / width, dtype=torch.float64)))
    return weights, torch.full((width,), -level, dtype=torch.bfloat16)


def write_gemma(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(LAYERS_GEMMA):
        path = folder / f"layer_{i}.safetensors"
        if not path.exists():
            W_enc, b_enc = _encoder(WIDTH_GEMMA, D_GEMMA, i)
            save_file(
                {"W_enc": W_enc, "W_dec": W_enc.flip(0).clone(), "b_enc": b_enc, "b_dec": torch.zeros(D_GEMMA)}, path
            )
    (folder / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )


def gemma(folder):
    """Set-up to the first active features of ten tokens from disk, then both residencies, later prompts."""
    write_gemma(folder)
    prompts = [torch.randn(10, D_GEMMA, generator=torch.Generator().manual_seed(s)) for s in range(6)]

    def encode(dictionary, x):
        return sum(dictionary.active(layer, x).feature.numel() for layer in dictionary.layers)

    report = {}
    for residency in ("disk", "cpu"):
        with Watch() as watch:
            started = time.perf_counter()
            dictionary = tlc.load_transcoders(folder, residency=residency)
            count = encode(dictionary, prompts[0])
            first = time.perf_counter() - started
        later = []
        for x in prompts[1:]:
            started = time.perf_counter()
            encode(dictionary, x)
            later.append(time.perf_counter() - started)
        report[residency] = {
            "peak_gb": (watch.peak - watch.before) / 1e9,
            "settled_gb": (watch.after - watch.before) / 1e9,
            "first_s": first,
            "second_s": later[0],
            "later_s": min(later[1:]),
            "active": count,
        }
        del dictionary
    report["second_over_resident"] = report["disk"]["second_s"] / report["cpu"]["second_s"]
    return report


def write_clt(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(LAYERS_LLAMA):
        W_enc, b_enc = _encoder(WIDTH_LLAMA, D_LLAMA, i)
        save_file(
            {
                f"W_enc_{i}": W_enc,
                f"b_enc_{i}": torch.zeros_like(b_enc),
                f"threshold_{i}": -b_enc,
                f"b_dec_{i}": torch.zeros(D_LLAMA, dtype=torch.bfloat16),
            },
            folder / f"W_enc_{i}.safetensors",
        )
        path = folder / f"W_dec_{i}.safetensors"
        if not path.exists():
            slots = torch.empty(WIDTH_LLAMA, LAYERS_LLAMA - i, D_LLAMA, dtype=torch.bfloat16)
            for j in range(LAYERS_LLAMA - i):
                slots[:, j] = 0.02 * W_enc.roll(j, 0)
            save_file({f"W_dec_{i}": slots}, path)
    (folder / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )


def clt(folder):
    """One prompt traced, model included: a random model of Llama-3.2-1B's shape in bfloat16."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, LlamaConfig

    checkpoint = folder / "model"
    write_clt(folder)
    if not checkpoint.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=D_LLAMA,
            intermediate_size=8192,
            num_hidden_layers=LAYERS_LLAMA,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(checkpoint)
        from tests.tiny import tokenizer

        tokenizer().save_pretrained(checkpoint)
    with Watch() as watch:
        started = time.perf_counter()
        model = TransformerBridge.boot_transformers(str(checkpoint), device="cpu", dtype=torch.bfloat16).eval()
        opened = time.perf_counter() - started
        dictionary = tlc.load_transcoders(folder, residency="disk")
        model_gb = psutil.Process().memory_info().rss / 1e9
        with tlc.attach(model, dictionary) as replacement:
            started = time.perf_counter()
            graph = tlc.attribute(replacement, torch.arange(1, 11), max_nodes=200, progress=False)
            traced = time.perf_counter() - started
    return {
        "peak_rss_gb": watch.peak / 1e9,
        "rss_with_model_gb": model_gb,
        "model_s": opened,
        "trace_s": traced,
        "active": graph.info.n_active,
        "nodes": int(graph.is_kind("feature").sum()),
        "sums_check": graph.completeness_error(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gemma", "clt"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({"gemma": gemma, "clt": clt}[arguments.what](arguments.folder)) + "\n")
