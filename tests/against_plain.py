"""A bridged model held against the plain Hugging Face model, architecture by architecture."""

from dataclasses import dataclass, field

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tests import plain
from tests.accelerator import DEVICE
from tests.tiny import transcoders
from tl_circuits.errors import TLCircuitsError

TOKENS = torch.tensor([1, 17, 33, 90, 210, 45, 7])
TARGETS = [5, 100, 200]
ENGINES = ("linear", "autograd")
WHERE, FACTOR = 2, 0.5  # the token whose removal by half is measured with all held
WITHIN = 1e-3


@dataclass(frozen=True)
class Compared:
    """How far effects (by engine) and a held intervention are from the plain model's, relative to the largest; or why
    not.

    ``unopened``: TransformerLens cannot open or run the model at all.
    """

    effects: dict[str, float] = field(default_factory=dict)
    held: float | None = None
    refused: dict[str, str] = field(default_factory=dict)
    unopened: str = ""


def compare(folder: str) -> Compared:
    """Graphs by both engines and one held intervention, against the plain model."""
    try:
        model = TransformerBridge.boot_transformers(folder, device=DEVICE, dtype=torch.float32).eval()
        with torch.no_grad():
            model(TOKENS[None])
    # not ours: nothing of ours ran
    except (AttributeError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return Compared(unopened=f"{type(error).__name__}: {error}".splitlines()[0])
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    effects, refused, held = {}, {}, None
    for engine in ENGINES:
        try:
            effects[engine] = effect_error(model, reference, engine)
        except TLCircuitsError as error:
            refused[engine] = str(error)
    try:
        held = held_error(model, reference)
    except TLCircuitsError as error:
        refused["held"] = str(error)
    return Compared(effects, held, refused)


def effect_error(model, reference, engine: str) -> float:
    """Of tokens' and MLPs' direct effects on three centred logits; an MLP's is that of its features and its error."""
    set_ = transcoders(model)
    set_ = tlc.load_transcoders({i: without_bias(set_[i]) for i in set_.layers}, layers=set_.layers)
    with tlc.attach(model, set_) as replacement:
        graph = tlc.attribute(
            replacement, TOKENS, targets=TARGETS, engine=engine, skip_positions=[], max_nodes=2000, progress=False
        )
    tokens, mlps, _ = plain.effects(reference, TOKENS, TARGETS)
    nodes, rows = graph.nodes, graph.adjacency()
    worst = 0.0
    for i, target in enumerate(TARGETS):
        row = rows[int((nodes.kind.eq("logit") & nodes.feature.eq(target)).to_numpy().argmax())]
        of_tokens, of_mlps = torch.zeros_like(tokens[i]), torch.zeros_like(mlps[i])
        for j, (kind, layer, position) in enumerate(zip(nodes.kind, nodes.layer, nodes.position, strict=True)):
            if kind == "embedding":
                of_tokens[position] += row[j]
            elif kind != "logit":
                of_mlps[layer, position] += row[j]
        worst = max(worst, relative(of_tokens, tokens[i]), relative(of_mlps, mlps[i]))
    return worst


def without_bias(transcoder: tlc.Transcoder) -> tlc.Transcoder:
    """The same with ``b_dec`` zero, so that features and error make the whole output."""
    from dataclasses import replace

    return replace(transcoder, b_dec=torch.zeros_like(transcoder.b_dec))


def held_error(model, reference) -> float:
    """Of all logits when a token counts half, patterns and denominators held, relative to the largest change."""
    with tlc.attach(model, transcoders(model)) as replacement:
        ours = tlc.intervene(replacement, TOKENS, tlc.TokenEdit(WHERE, FACTOR), freeze="attention").logits
    with torch.no_grad():
        before = reference(TOKENS[None], use_cache=False).logits[0].float()
    theirs = plain.edited_token(reference, TOKENS, WHERE, FACTOR)
    return float((ours - theirs).abs().max() / (theirs - before).abs().max())


def relative(ours, theirs) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def loss_with_mlps_replaced(network, ids, found=None):
    """The plain model's loss with every MLP but that of position 0 replaced by an opened set; without one, as it is."""

    def replaced(layer):
        def hook(module, args, output):
            x = args[0][:, 1:]
            made = found.decode(layer, {layer: found.activate(layer, found.pre_activations(layer, x), x)}, x)
            return torch.cat([output[:, :1], made], dim=1)

        return hook

    layers = () if found is None else enumerate(network.model.layers)
    handles = [block.mlp.register_forward_hook(replaced(layer)) for layer, block in layers]
    with torch.no_grad():
        loss = float(network(input_ids=ids, labels=ids).loss)
    for handle in handles:
        handle.remove()
    return loss
