"""Transcoders for SmolLM2-135M from text that needs no model hub: ``python -m training.smollm2_features --out FOLDER``.

Gathers English text from Debian packages (:mod:`training.feature_text`) and samples of the model itself, sets whole
documents aside for measuring, mixes pieces of 256 tokens over all sources, and trains all 30 layers, one by one and
then together. Each part is written once, below ``--text``; a second call goes on where the first stopped. With a GPU it
takes minutes, without one days.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_circuits.dictionaries.training.samples import write_samples, written
from tl_circuits.dictionaries.training.train import train_transcoders
from tl_circuits.hooks import special_token
from tl_circuits.models import PACKAGED, open_packaged
from tl_circuits.support.files import atomic_file
from training.feature_text import SOURCES, digest, documents, fetched

logger = logging.getLogger(__name__)
MODEL = "smollm2-135m"
CONTEXT = 256
HELD_OUT = 3  # documents of a hundred
FEATURES = 1984
"""Features of a layer: as many as 40 MB hold with four bits a number."""


def main() -> None:
    """Gather, sample, mix, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the transcoders")
    parser.add_argument(
        "--text",
        type=Path,
        default=Path(tempfile.gettempdir(), "smollm2-features-text"),
        help="folder for text and token ids",
    )
    parser.add_argument("--tokens", type=int, default=8_000_000, help="tokens to train each layer on")
    parser.add_argument("--together", type=int, default=6_000_000, help="tokens to train all layers together on")
    parser.add_argument(
        "--further", type=int, default=3_400_000, help="tokens to train all layers together on, truer to each MLP"
    )
    parser.add_argument("--samples", type=int, default=2_621_440, help="tokens that the model writes itself")
    parser.add_argument("--at-once", type=int, default=96, help="pieces that the model writes at a time: 2048 on a GPU")
    parser.add_argument("--batch", type=int, default=16, help="pieces in a step")
    parser.add_argument("--k", type=int, default=64, help="active features a token")
    parser.add_argument("--only", choices=("text", "samples", "mix"), help="stop after this part")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_float32_matmul_precision("high")  # on a GPU: factors of ten bits, sums of float32
    args.text.mkdir(parents=True, exist_ok=True)
    gather(args.text)
    if args.only == "text":
        return
    if not (args.text / "mixed.npy").exists():
        if args.only != "mix":  # what was sampled so far is enough then
            sample(args.text / "samples.npy", args.samples // CONTEXT, args.at_once)
        if args.only == "samples":
            return
        mix(args.text)
    if args.only == "mix":
        return
    text = {"held_out": args.text / "held_out.npy", "context": CONTEXT, "batch_size": args.batch}
    sizes = {"features": FEATURES, "k": args.k, "four_bits": True, "resume": args.out.exists()}
    train_transcoders(
        MODEL,
        [args.text / "mixed.npy"],
        args.out,
        tokens=args.tokens,
        together=args.together,
        local=0.1,
        lr=3e-3,
        **text,
        **sizes,
    )
    further = args.out.with_name(f"{args.out.name}-further")
    train_transcoders(
        MODEL,
        [args.text / "mixed.npy"],
        further,
        begin_with=args.out.with_name(f"{args.out.name}.four_bits"),
        tokens=0,
        together=args.further,
        local=0.4,
        lr=2e-3,
        seed=1,
        **text,
        **sizes | {"resume": further.exists()},
    )


def gather(folder: Path) -> None:
    """Write ``text.npy`` and ``held_out.npy``, int32 pieces of 256 tokens, and ``sources.json`` with licences and
    checksums."""
    if (folder / "sources.json").exists():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(open_packaged(PACKAGED[MODEL])))
    first = special_token(tokenizer)
    packages = fetched(folder / "packages")
    table, kept, held = [], [], []
    for source in SOURCES:
        unpacked, sha256 = packages[source.package]
        sums = {name: _Pieces(first, tokenizer.eos_token_id) for name in ("train", "held out")}
        for text in documents(source, unpacked):
            sums["held out" if int(digest(text)[:8], 16) % 100 < HELD_OUT else "train"].add(tokenizer, text)
            if sums["train"].tokens >= source.most:
                break
        kept += sums["train"].pieces
        held += sums["held out"].pieces
        table.append(
            {"package": source.package, "licence": source.licence, "sha256": sha256}
            | {f"tokens, {name}": len(found.pieces) * (CONTEXT - 1) for name, found in sums.items()}
        )
        logger.info("%s", table[-1])
    for name, pieces in (("text", kept), ("held_out", held)):
        # Mixed over sources, because the first pieces of those held out are measured while training goes on.
        _write(folder / f"{name}.npy", np.random.default_rng(1).permutation(np.array(pieces, dtype=np.int32)))
    (folder / "sources.json").write_text(json.dumps(table, indent=1))
    logger.info("%d tokens of text, %d held out", len(kept) * (CONTEXT - 1), len(held) * (CONTEXT - 1))


class _Pieces:
    """Documents of one source one after the other, an end-of-text token behind each, cut into pieces."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end, self.rest, self.pieces = first, end, [], []

    @property
    def tokens(self) -> int:
        return len(self.pieces) * (CONTEXT - 1)

    def add(self, tokenizer: Any, text: str) -> None:
        self.rest += [*tokenizer(text[:200_000], add_special_tokens=False, verbose=False)["input_ids"], self.end]
        while len(self.rest) >= CONTEXT - 1:
            self.pieces.append([self.first, *self.rest[: CONTEXT - 1]])
            self.rest = self.rest[CONTEXT - 1 :]


def sample(path: Path, count: int, at_once: int) -> None:
    """The model's own text, as int32 pieces of 256 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(open_packaged(PACKAGED[MODEL]))
    first = special_token(AutoTokenizer.from_pretrained(source))
    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    for done in write_samples(network, first, count, CONTEXT, path, batch_size=at_once, seed=0):
        logger.info("%d of %d pieces sampled", done, count)


def mix(folder: Path) -> None:
    """Write ``mixed.npy``: text and samples in random order, without those samples that are not written yet."""
    text = np.load(folder / "text.npy")
    own = written(folder / "samples.npy") if (folder / "samples.npy").exists() else text[:0]
    both = np.concatenate([text, own])
    _write(folder / "mixed.npy", np.random.default_rng(0).permutation(both, axis=0))
    logger.info("%d pieces of text, %d of the model's own", len(text), len(own))


def _write(path: Path, pieces: np.ndarray) -> None:
    with atomic_file(path, overwrite=True) as file:
        np.save(file, pieces)


if __name__ == "__main__":
    main()
