"""Random autoencoders at any site, and the plain Hugging Face model with everything held and sites replaced."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

import tl_circuits as tlc
from tests import plain
from tests.tiny import prompt
from tl_circuits.hooks import record, width_of

SITES = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")  # all but hook_resid_mid


def autoencoders(model, sites, activation="jumprelu", normalize="none", width=40, seed=1, k=5, tokens=None):
    """Random autoencoders, ``{layer: site}``; encoders are scaled to the site, so that a few features are active."""
    generator = torch.Generator().manual_seed(seed)
    hooks = [f"blocks.{layer}.{site}" for layer, site in sites.items()]
    with tlc.attach(model, tlc.mlp_neurons(model)):
        seen = record(model, prompt() if tokens is None else tokens, -1, hooks).sites
    made = {}
    for layer, site in sites.items():
        d = width_of(model, layer, site)
        W_enc, W_dec = (torch.randn(width, d, generator=generator) / d**0.5 for _ in range(2))
        b_enc, b_dec = 0.1 * torch.randn(width, generator=generator) - 0.3, 0.1 * torch.randn(d, generator=generator)
        scale = float(seen[f"blocks.{layer}.{site}"][1:].float().square().mean().sqrt()) if normalize == "none" else 1.0
        made[layer] = tlc.Transcoder(
            W_enc / scale,
            W_dec,
            b_enc,
            b_dec,
            activation=activation,
            input_hook=site,
            output_hook=site,
            normalize=normalize,
            threshold=torch.full((width,), 0.3) if activation == "jumprelu" else None,
            k=k if activation == "topk" else None,
        )
    return tlc.load_dictionary(made, layers=list(made))


def at(site, n_layers):
    """The same site in every layer."""
    return dict.fromkeys(range(n_layers), site)


def several(model, *sets, **options):
    """Random autoencoders at several sites of a layer: one ``{layer: site}`` for each set, or a site, for every
    layer."""
    n = int(model.cfg.n_layers)
    made = [at(one, n) if isinstance(one, str) else one for one in sets]
    return tlc.load_dictionary(
        [autoencoders(model, one, seed=seed, **options) for seed, one in enumerate(made, start=1)]
    )


def each_of(dictionary):
    """Every autoencoder with its layer, by the layer; by layer and short name of the site where layers have several."""
    if not hasattr(dictionary, "owned"):
        return {layer: (layer, dictionary[layer]) for layer in dictionary.layers}
    names = [(layer, part[layer].input_hook.replace("hook_", "")) for layer, part in dictionary.owned]
    return {name: (layer, part[layer]) for name, (layer, part) in zip(names, dictionary.owned, strict=True)}


def as_relu(dictionary):
    return tlc.load_dictionary(
        {layer: replace(dictionary[layer], activation="relu", threshold=None) for layer in dictionary.layers},
        layers=list(dictionary.layers),
    )


class HeldMLPs:
    """MLPs of a plain model with each activation's ratio held: half of the credit to each factor of a gated neuron."""

    def __init__(self, model, skipped):
        self._model, self._skipped = model, skipped

    @contextmanager
    def __call__(self, layers):
        with ExitStack() as stack:
            for layer in layers:
                mlp = plain.mlp_of(plain.layers_of(self._model)[layer])
                stack.callback(mlp.register_forward_hook(self._held).remove)
            yield

    def _held(self, mlp, args, output):
        x = args[0]
        if hasattr(mlp, "gate_proj"):
            g, u = mlp.gate_proj(x), mlp.up_proj(x)
            r = (mlp.act_fn(g) / g).detach()
            hidden = 0.5 * r * (u.detach() * g + g.detach() * u)
            made = mlp.down_proj(hidden)
        else:
            g = mlp.c_fc(x)
            made = mlp.c_proj((mlp.act(g) / g).detach() * g)
        keep = torch.ones(x.shape[1], 1)
        keep[list(self._skipped)] = 0.0
        return output.detach() + (made - made.detach()) * keep


def plain_effects(model, dictionary, tokens, targets, skipped=(0,)):
    """Effects, by automatic differentiation of the plain model, of all sources on centred logits and on features.

    ``targets``: ``("logit", token)`` or ``(layer, position, feature)``. Returns for each target a dictionary of effects
    by ``("token", position)``, ``(layer, position, feature)`` and ``("error", layer, position)``, and its value. Where
    layers have several autoencoders, ``(layer, site)`` stands for the layer.
    """
    blocks, leaves, reads, handles = plain.layers_of(model), {}, {}, ExitStack()
    own = each_of(dictionary)

    def first(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        leaves["tokens"] = x.detach().clone().requires_grad_()
        return (
            ((leaves["tokens"], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaves["tokens"]})
        )

    def replaced(layer, x):
        reads[layer] = x
        leaves[layer] = x.detach().clone().requires_grad_()
        return leaves[layer]

    def before(layer):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            y = replaced(layer, x)
            return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": y})

        return hook

    def after(layer):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (replaced(layer, output[0]), *output[1:])
            return replaced(layer, output)

        return hook

    held = HeldMLPs(model, skipped)
    with handles, plain.Held(), torch.enable_grad(), held(range(len(blocks))):
        handles.callback(blocks[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for name, (layer, transcoder) in own.items():
            block = blocks[layer]
            attention = getattr(block, "self_attn", None) or block.attn
            output = getattr(attention, "o_proj", None) or attention.c_proj
            handle = {
                "hook_resid_pre": lambda b=block, i=name: b.register_forward_pre_hook(before(i), with_kwargs=True),
                "hook_resid_post": lambda b=block, i=name: b.register_forward_hook(after(i)),
                "hook_mlp_out": lambda b=block, i=name: plain.mlp_of(b).register_forward_hook(after(i)),
                "hook_attn_out": lambda o=output, i=name: o.register_forward_hook(after(i)),
                "attn.hook_z": lambda o=output, i=name: o.register_forward_pre_hook(before(i), with_kwargs=True),
            }[transcoder.input_hook]()
            handles.callback(handle.remove)
        logits = model(tokens[None], use_cache=False).logits[0, -1].float()
    found = []
    for target in targets:
        if target[0] == "logit":
            value = logits[target[1]] - logits.mean()
        else:
            name, position, feature = target
            t, x = own[name][1], reads[name][0, position].float()
            value = normalised(t, x) @ t.W_enc[feature] + t.b_enc[feature]
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        found.append((_effects(own, leaves, reads, grads, skipped), float(value.detach())))
    return found


def normalised(t, x):
    """What an autoencoder's encoder reads, the factor held."""
    if t.normalize == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.detach().std(-1, keepdim=True) + 1e-5)
    if t.normalize == "constant_norm_rescale":
        return x * (x.shape[-1] ** 0.5 / x.detach().norm(dim=-1, keepdim=True))
    return x


def acts_of(t, x):
    pre = normalised(t, x) @ t.W_enc.T + t.b_enc
    if t.activation == "topk":
        kept = torch.zeros_like(pre).scatter(-1, pre.topk(t.k, dim=-1).indices, 1.0)
        return F.relu(pre) * kept
    return F.relu(pre) * (pre > t.threshold) if t.activation == "jumprelu" else F.relu(pre)


def _effects(own, leaves, reads, grads, skipped):
    effects = {}
    for name, grad in zip(leaves, grads, strict=True):
        if grad is None:
            continue
        g, x = grad[0].float(), leaves[name][0].detach().float()
        for position in range(len(g)):
            if name == "tokens":
                effects["token", position] = float(g[position] @ x[position])
                continue
            if position in skipped:
                continue
            t, here = own[name][1], x[position]
            acts = acts_of(t, here)
            size = {"none": 1.0, "layer_norm": here.std(), "constant_norm_rescale": here.norm() / len(here) ** 0.5}[
                t.normalize
            ]
            mean = here.mean() if t.normalize == "layer_norm" else 0.0
            for feature in acts.nonzero()[:, 0].tolist():
                effects[name, position, feature] = float(g[position] @ t.W_dec[feature] * acts[feature] * size)
            effects["error", name, position] = float(g[position] @ (here - (acts @ t.W_dec + t.b_dec) * size - mean))
    return effects
