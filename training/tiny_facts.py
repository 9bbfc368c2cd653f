"""Make the built-in model: `python -m training.tiny_facts` trains it, measures it and writes its card."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import tl_circuits as tlc
from tl_circuits.dictionaries.builtin.files import open_transcoders, store_transcoders
from tl_circuits.dictionaries.builtin.split import split
from tl_circuits.models import BUILTIN_FOLDER
from training import language_model, measure, transcoders
from training.card import Findings, write_card
from training.data import make_tokenizer

logger = logging.getLogger("training")
CARD = Path(__file__).parent.parent / "docs" / "tiny-facts.md"


def main() -> None:
    """Train, store, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILTIN_FOLDER, help="folder of the model and its transcoders")
    parser.add_argument("--card", type=Path, default=CARD)
    parser.add_argument("--measure", action="store_true", help="write the card of the files that are there")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not given.measure:
        make(given.out, language_model.Recipe(), transcoders.Recipe())
    logger.info("measuring")
    write_card(_findings(given.out), given.card)


def make(out: Path, recipe: language_model.Recipe, dictionary: transcoders.Recipe) -> None:
    """Train model and transcoders and write their files to ``out``."""
    facts, tokenizer = split(), make_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    trained = language_model.train(recipe, facts, tokenizer, _reporter("language model"))
    trained.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Transcoders are fitted to the weights as they are stored.
    stored = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    fitted = {
        layer: transcoders.train_transcoder(activity, dictionary, active, _reporter(f"transcoder {layer}"))
        for layer, (activity, active) in enumerate(
            zip(transcoders.mlp_activity(stored, tokenizer, facts), dictionary.active, strict=True)
        )
    }
    store_transcoders(fitted, out / "transcoders.safetensors")
    for path in out.iterdir():
        path.chmod(0o644)


def _reporter(what: str) -> Callable[[int, float], None]:
    def report(step: int, value: float) -> None:
        if (step + 1) % 250 == 0:
            logger.info("%s: step %d, loss %.4f", what, step + 1, value)

    return report


def _findings(folder: Path) -> Findings:
    facts = split()
    model = tlc.load_model(str(folder))
    kept_back = [fact for group in facts.held_out.values() for fact in group]
    capitals, abbreviations = (
        [fact for fact in facts.held_out["two-hop"] if f" {name} " in fact.prompt]
        for name in ("capital", "abbreviation")
    )
    cfg = model.cfg
    with tlc.attach(model, open_transcoders(folder / "transcoders.safetensors")) as replacement:
        table = measure.transcoder_table(replacement, kept_back)
        middle = measure.middle_step(replacement, capitals)
        control = measure.middle_step(replacement, abbreviations)
    return Findings(
        known={name: (len(group), measure.accuracy(model, group)) for name, group in facts.train.items()},
        held_out={name: (len(group), measure.accuracy(model, group)) for name, group in facts.held_out.items()},
        strangers=(len(facts.strangers), measure.accuracy(model, facts.strangers)),
        transcoders=table,
        middle_step=middle,
        control=control,
        megabytes=sum(p.stat().st_size for p in folder.iterdir()) / 1e6,
        size=f"Llama architecture: {cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads, "
        f"d_mlp {cfg.d_mlp}, {cfg.d_vocab} words.",
    )


if __name__ == "__main__":
    main()
