"""The plain Hugging Face model with attention patterns and norm denominators held, no line of the package in it.

Works on PyTorch's functions, not on modules' names: softmaxes over keys, reciprocal roots and the two norm
functions are held, whoever calls them.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax}
_POWER = {torch.pow, torch.Tensor.pow, torch.Tensor.__pow__}
_ROOT = {torch.rsqrt, torch.Tensor.rsqrt, torch.sqrt, torch.Tensor.sqrt}


class Held(TorchFunctionMode):
    """Patterns and denominators as constants: those of this run, or, given ``values``, those of another."""

    def __init__(self, values=None):
        super().__init__()
        self.values, self._replay = [], None if values is None else iter(values)

    def _constant(self, value):
        value = value.detach() if self._replay is None else next(self._replay)
        self.values.append(value)
        return value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            out = func(*args, **kwargs)
            attends = out.ndim == 4 or (out.ndim == 3 and out.shape[-1] == out.shape[-2])  # a router's does not
            return self._constant(out) if attends else out
        if func in _ROOT or (func in _POWER and isinstance(args[1], float) and args[1] < 0):
            return self._constant(func(*args, **kwargs))
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is getattr(F, "rms_norm", None):
            return self._rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_norm(self, x, shape, weight=None, bias=None, eps=1e-5):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / self._constant((centred.square().mean(-1, keepdim=True) + eps).sqrt())
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def _rms_norm(self, x, shape, weight=None, eps=None):
        y = x / self._constant((x.square().mean(-1, keepdim=True) + (eps or torch.finfo(x.dtype).eps)).sqrt())
        return y if weight is None else y * weight


def layers_of(model):
    base = model.base_model
    base = getattr(base, "language_model", getattr(base, "model", base))
    for name in ("layers", "h", "blocks", "decoder"):
        found = getattr(base, name, None)
        if found is not None:
            return found.layers if name == "decoder" else found
    raise ValueError(f"no layers in {type(base).__name__}")


def mlp_of(block):
    """The module whose output is the MLP's and nothing else's."""
    if getattr(block, "enable_moe_block", False):  # Gemma 4 norms the sum of its MLP and its experts
        return block.post_feedforward_layernorm
    for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2"):
        found = getattr(block, name, None)
        if found is not None:
            inner = {"BloomMLP": "dense_4h_to_h", "MptMLP": "down_proj"}.get(type(found).__name__)
            return getattr(found, inner) if inner else found
    raise ValueError(f"no MLP in {type(block).__name__}")


def logits_of(model, tokens, position=-1):
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0, position].float()


def effects(model, tokens, targets, position=-1):
    """Direct effects on centred logits (before any soft cap) of tokens ``[target, pos]`` and MLPs
    ``[target, layer, pos]``."""
    leaves, handles = {}, []

    def leaf(name, x):
        leaves[name] = x.detach().clone().requires_grad_()
        return leaves[name].clone()  # some blocks add in place

    def before(module, args, kwargs):
        if args:
            return (leaf("tokens", args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf("tokens", kwargs["hidden_states"])}

    def after(layer):
        def hook(module, args, out):
            return (leaf(layer, out[0]), *out[1:]) if isinstance(out, tuple) else leaf(layer, out)

        return hook

    blocks = layers_of(model)
    handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    handles += [mlp_of(block).register_forward_hook(after(i)) for i, block in enumerate(blocks)]
    cap = getattr(model.config, "final_logit_softcapping", None)
    try:
        if cap:
            model.config.final_logit_softcapping = None
        with Held(), torch.enable_grad():
            logits = model(tokens[None], use_cache=False).logits[0, position].float()
        logits = logits - logits.mean()
        names = ["tokens", *range(len(blocks))]
        rows = []
        for target in targets:
            grads = torch.autograd.grad(
                logits[target], [leaves[n] for n in names], retain_graph=True, allow_unused=True
            )
            rows.append(
                torch.stack(
                    [
                        torch.zeros(len(tokens)) if g is None else (g * leaves[n]).reshape(len(tokens), -1).sum(-1)
                        for g, n in zip(grads, names, strict=True)
                    ]
                )
            )
    finally:
        for handle in handles:
            handle.remove()
        if cap:
            model.config.final_logit_softcapping = cap
    rows = torch.stack(rows).detach()
    return rows[:, 0], rows[:, 1:], logits.detach()


def edited_token(model, tokens, position, factor, freeze="attention"):
    """All logits when what one token puts on the residual stream is multiplied, the rest held as ``freeze`` says."""

    def before(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, position] *= factor
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def run(held=None):
        with torch.no_grad(), held or nullcontext():
            return model(tokens[None], use_cache=False).logits[0].float()

    with constant_mlps(model, run) if freeze == "all" else nullcontext():
        clean = Held()
        run(clean)
        handle = layers_of(model)[0].register_forward_pre_hook(before, with_kwargs=True)
        try:
            return run(None if freeze == "none" else Held(clean.values))
        finally:
            handle.remove()


@contextmanager
def constant_mlps(model, run):
    """MLPs that give what they give in a first run, and compute nothing."""
    mlps, outputs = [mlp_of(block) for block in layers_of(model)], {}

    def keep(module, args, out):
        outputs[module] = out

    handles = [mlp.register_forward_hook(keep) for mlp in mlps]
    run()
    for handle in handles:
        handle.remove()
    for mlp in mlps:
        mlp.forward = lambda *args, mlp=mlp, **kwargs: outputs[mlp]
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward
