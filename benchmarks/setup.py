"""One model, one set of random dictionaries and one text, shared by us and by circuit-tracer."""

import argparse
from pathlib import Path

WIDTH, ACTIVE, MARGIN = 16_384, 60, 1e-4
TEXT = """Interpretability asks why a model said what it said. A person reads the answer, then the
question, then the answer again, and still does not know which of the words before it mattered. """


def write_dictionaries(folder: Path) -> None:
    """Random JumpReLU transcoders for Gemma-3-270m with about 60 active features a position.

    Encoder rows whose pre-activation comes near its threshold on the text are moved away from it,
    so that rounding cannot switch a feature on in one program and off in the other.
    """
    import torch
    from safetensors.torch import save_file

    import tl_circuits as tlc

    model = tlc.load_model("gemma-3-270m", device="cpu")
    tokens = model.to_tokens(TEXT * 200)[0][:4096]
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    generator = torch.Generator().manual_seed(0)
    names = [f"blocks.{layer}.{hook}" for layer in range(18) for hook in ("mlp.hook_in", "hook_mlp_out")]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None, :256], names_filter=lambda name: name in names)
    for layer in range(18):
        x, y = (cache[f"blocks.{layer}.{hook}"][0, 1:] for hook in ("mlp.hook_in", "hook_mlp_out"))
        W_enc = torch.randn(WIDTH, 640, generator=generator) / 640**0.5
        pre = x @ W_enc.T
        threshold = float(pre.flatten().sort().values[-ACTIVE * len(x)])
        near = ((pre - threshold).abs() < MARGIN * threshold).any(0)
        W_enc[near] = 0.0
        scale = float(y.norm(dim=-1).mean()) / (ACTIVE**0.5 * threshold)
        W_dec = torch.randn(WIDTH, 640, generator=generator) / 640**0.5 * scale
        tensors = {"W_enc": W_enc, "W_dec": W_dec, "threshold": torch.full((WIDTH,), threshold)}
        save_file(tensors, folder / f"layer_{layer}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    write_dictionaries(parser.parse_args().folder)
