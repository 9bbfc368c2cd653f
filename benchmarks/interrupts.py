"""Ctrl-C at every line that attaching, tracing, editing and detaching execute: what stays on the model.

``python -m benchmarks.interrupts`` interrupts each operation at each executed line of this package (the first and the
last time that it runs, and ``--more`` times at random), once by raising KeyboardInterrupt there and then and once by
SIGINT. After each, every hook, attribute, parameter and table of the model is compared with what it was, and the logits
bit by bit.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

import tl_circuits as tlc
from tests.interrupting import Operation, chosen, try_all
from tests.sites import autoencoders
from tests.tiny import VOCAB, prompt, tiny_bridge, tiny_folder, transcoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--more", type=int, default=0, help="further interrupts of each line, at random")
    parser.add_argument("--only", default="", help="run the operations whose names contain this")
    parser.add_argument("--share", type=float, default=1.0, help="the share of the lines that is tried")
    parser.add_argument(
        "--again", action="store_true", help="try a line in every operation that runs it, not only in the first"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the models are so small that threads only wait for each other
    total = leaks = not_begun = 0
    tried: set[tuple[str, str, int]] = set()
    for operation in operations():
        if arguments.only not in operation.name:
            continue
        start, lines = time.perf_counter(), operation.lines()
        kind = operation.name.split(",")[0]
        numbers = [
            n
            for n in chosen(lines, 2 + arguments.more, arguments.share)
            if arguments.again or (kind, *lines[n]) not in tried
        ]
        tried.update((kind, *line) for line in lines)
        for by_signal in (False, True):
            trials = try_all(operation, numbers, by_signal)
            left = [trial for trial in trials if trial.left and not trial.whole]
            total, leaks = total + len(trials), leaks + len(left)
            not_begun += sum(trial.whole for trial in trials)
            print(
                f"{operation.name}, {'SIGINT' if by_signal else 'raised'}: {len(trials)} interrupts at "
                f"{len(set(lines))} lines, {len(left)} left something, {sum(trial.whole for trial in trials)} came "
                f"before detaching began, {sum(not trial.mended for trial in trials)} not mended by detach; "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
            for trial in trials:
                if trial.left:
                    print(
                        "  ",
                        *trial.line,
                        trial.left[:6],
                        "whole" if trial.whole else "",
                        "" if trial.mended else "NOT MENDED",
                        flush=True,
                    )
    print(f"{total} interrupts: {leaks} left something, {not_begun} came before detaching began")


def operations() -> Iterator[Operation]:
    """Every kind of change, on every kind of model."""
    for kind, model in models():
        reads = "ln2.hook_normalized" if kind == "HookedTransformer" else "mlp.hook_in"
        dictionary = transcoders(model, input_hook=reads)
        yield Operation(f"{kind}, attach and detach", model, lambda m, d=dictionary: tlc.attach(m, d).detach())
        yield Operation(f"{kind}, attach in a with statement", model, lambda m, d=dictionary: _within(m, d))
        sites = autoencoders(model, {0: "hook_resid_pre", 1: "attn.hook_z", 2: "hook_mlp_out"})
        for name, used in (("transcoders", dictionary), ("autoencoders", sites)):
            for engine in ("linear", "autograd"):
                yield Operation(
                    f"{kind}, {name}, attribute {engine}", model, lambda r, e=engine: _attribute(r, e), used
                )
            edit = tlc.Scale(1, 4, 0, factor=3.0)
            for freeze in ("all", "attention", "none"):
                yield Operation(
                    f"{kind}, {name}, intervene {freeze}", model, lambda r, f=freeze, e=edit: _intervene(r, e, f), used
                )
            with tlc.attach(model, used) as replacement:
                graph = _attribute(replacement, "linear")
            yield Operation(f"{kind}, {name}, faithfulness", model, lambda r, g=graph: _faithfulness(r, g), used)
            yield Operation(
                f"{kind}, {name}, generate",
                model,
                lambda r, e=edit: tlc.generate(r, prompt(), e, max_new_tokens=2),
                used,
            )
    hooked = tiny_bridge("gemma3")  # a hook of others on attention, so that it is run once more without it
    hooked.add_hook("blocks.0.attn.hook_pattern", lambda pattern, hook: None)
    yield Operation(
        "bridge with a user's hook, attribute", hooked, lambda r: _attribute(r, "linear"), transcoders(hooked)
    )
    carrying = saelens_model()
    yield Operation("SAELens, take over and give back", carrying, lambda m: tlc.attach(m).detach())


def models() -> Iterator[tuple[str, Any]]:
    """Small models, each used once before so that whatever TransformerLens remembers is remembered."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # not in transformer_lens 4

    yield "bridge", tiny_bridge("gemma3")
    config = HookedTransformerConfig(
        n_layers=3,
        d_model=32,
        n_ctx=32,
        d_head=8,
        n_heads=4,
        d_mlp=48,
        d_vocab=VOCAB,
        device="cpu",
        seed=0,
        act_fn="gelu_new",
    )
    yield "HookedTransformer", HookedTransformer(config).eval()


def saelens_model() -> Any:
    """A SAETransformerBridge with SAELens' own attachments on every layer."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    from tests.test_saelens import saelens_transcoder

    model = SAETransformerBridge.boot_transformers(tiny_folder("gemma3"), device="cpu")
    for layer in range(int(model.cfg.n_layers)):
        model.add_sae(saelens_transcoder("SkipTranscoder", layer))
    return model


def _within(model: Any, dictionary: Any) -> None:
    with tlc.attach(model, dictionary):
        pass


def _attribute(replacement: Any, engine: Any) -> Any:
    replacement._remembered.clear()  # so that the proof runs each time
    return tlc.attribute(replacement, prompt(), max_nodes=20, engine=engine, progress=False)


def _intervene(replacement: Any, edit: Any, freeze: str) -> None:
    replacement._remembered.clear()
    tlc.intervene(replacement, prompt(), edit, freeze=freeze)


def _faithfulness(replacement: Any, graph: Any) -> None:
    tlc.faithfulness(replacement, graph, n=3, progress=False)


if __name__ == "__main__":
    main()
