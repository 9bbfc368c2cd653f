"""Register a dictionary's layers as HookPoints on a model, and take them off again.

While attached, every output site ``S`` (such as ``blocks.3.hook_mlp_out``) carries the six points
that SAELens puts on an attached transcoder: ``S.hook_sae_input``, ``S.hook_sae_acts_pre``,
``S.hook_sae_acts_post``, ``S.hook_sae_recons``, ``S.hook_sae_error`` and ``S.hook_sae_output``.
They are computed only when somebody listens: an attached model without hooks on them does the
same work, and gives the same bits, as the bare model.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import AttachError, DictionaryError, HookFiringError
from .holding import Holds
from .identity import Sample, model_sample
from .inner_norms import inner_norm_points
from .numbers import whole
from .prompt import PromptRule
from .proof import OPTIONS, probe_tokens, prove
from .sites import Model, mlp_points, put_lasting_hook, register_point, resolve, unembed_weights, weights_state

POINTS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)


@runtime_checkable
class Attachable(Protocol):
    """What a dictionary must offer to be attached (tl_circuits.dictionaries gives the rest)."""

    prompt_rule: PromptRule
    """What stands before a text, and which first positions have no features."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers it reads, ascending."""

    def input_hook(self, layer: int) -> str:
        """Full name of the hook whose tensor layer ``layer``'s encoder reads."""

    def output_hook(self, layer: int) -> str:
        """Full name of the hook whose tensor is replaced at layer ``layer``."""

    def writers(self, layer: int) -> Sequence[int]:
        """The layers whose features write to layer ``layer``'s output."""

    def pre_activations(
        self, layer: int, x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        """Pre-activations of all features of a layer."""

    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        """Activations of all features of a layer, from their pre-activations."""

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction at layer ``layer`` from the activations of its writers."""


class Replacement:
    """A model with a dictionary attached. Use as a context manager, or call :meth:`detach`."""

    def __init__(self, model: Model, dictionary: Any, undo: ExitStack, layers: "dict[int, AttachedLayer]"):
        self.model = model
        self.dictionary = dictionary
        self._layers = layers
        self._undo: ExitStack | None = undo
        self._remembered: dict[tuple[Any, ...], Any] = {}

    def remembered(self, what: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """What ``find`` found out about the model, asked once while attached, its options and its weights stay."""
        key = (*what, *(bool(getattr(self.model.cfg, option, False)) for option in OPTIONS), weights_state(self.model))
        if key not in self._remembered:
            self._remembered[key] = find()
        return self._remembered[key]

    def holds(self, tokens: Int[Tensor, " pos"] | None) -> Holds:
        """How this model's patterns and denominators are held; proved on its first prompt and remembered.

        Raises ArchitectureError naming what cannot be held (see :func:`tl_circuits.hooks.proof.prove`).
        """
        layers = range(int(self.model.cfg.n_layers))
        outputs = {layer: output_site(self, layer) for layer in layers}
        inputs = [self.dictionary.input_hook(layer) for layer in self.dictionary.layers]
        any_tokens = probe_tokens(self.model) if tokens is None else tokens

        def find() -> Holds:
            self.dictionary.check(self.model)  # weights may have been folded since it was attached
            return prove(self.model, any_tokens, outputs, inputs)

        return self.remembered(("holds",), find)

    @property
    def attached(self) -> bool:
        """False once :meth:`detach` has run."""
        return self._undo is not None

    @property
    def mean_unembedding(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
        """The mean logit over the vocabulary as a vector and a bias, float32; read once, ``W_U`` is a large matrix."""

        def find() -> tuple[Tensor, Tensor]:
            unembed = unembed_weights(self.model)
            return unembed.W_U.mean(1, dtype=torch.float32) * unembed.scale, unembed.b_U.float().mean() * unembed.scale

        return self.remembered(("mean unembedding",), find)

    @cached_property
    def sample(self) -> Sample:
        """A few numbers out of the weights of model and dictionary, by which both are known again; read once."""
        own = getattr(self.dictionary, "sample", None)
        return model_sample(self.model) + (() if own is None else own())

    def site(self, layer: int) -> str:
        """The name ``S`` of a layer's output site; ``S.hook_sae_acts_post`` and others hang on it."""
        layer = whole(layer, "a layer", DictionaryError)
        if layer not in self._layers:
            raise DictionaryError(
                f"layer {layer} has no dictionary; the attached ones are {sorted(self._layers)}."
            )
        return self._layers[layer].site

    def require_attached(self) -> None:
        """Raise AttachError once detached."""
        if self._undo is None:
            raise AttachError("this replacement was detached; call tlc.attach(model, ...) again.")

    def also_undo(self, undo: ExitStack) -> None:
        """Close ``undo`` after our own things are off the model."""
        self.require_attached()
        both = ExitStack()
        both.push(undo)
        both.push(self._undo)
        self._undo = both

    def detach(self) -> None:
        """Take every HookPoint and hook of ours off the model. Calling it again does nothing."""
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"Replacement({self.dictionary!r}, {state}, layers {sorted(self._layers)})"


def output_site(replacement: Replacement, layer: int) -> str:
    """Where a layer's MLP output is held or edited, with a dictionary or without."""
    dictionary = replacement.dictionary
    return dictionary.output_hook(layer) if layer in dictionary.layers else f"blocks.{layer}.hook_mlp_out"


class AttachedLayer:
    """The six HookPoints of one layer and the two raw hooks that feed them."""

    def __init__(self, dictionary: Attachable, layer: int, points: dict[str, HookPoint], run: "_Run"):
        self.layer = layer
        self.site = dictionary.output_hook(layer)
        self.points = points
        self._dictionary = dictionary
        self._run = run

    def listened(self) -> bool:
        """Whether any of the six points carries a hook."""
        return any(p._forward_hooks or p._backward_hooks or p._forward_pre_hooks for p in self.points.values())

    def on_input(self, output: Tensor, hook: HookPoint) -> None:
        """Keep the encoder's input until the output site fires, if it will be needed."""
        if self._run.needs_encoding(self.layer):
            self._run.inputs[self.layer] = output

    def on_output(self, output: Tensor, hook: HookPoint) -> Tensor | None:
        """Encode, decode and put back ``output`` plus whatever the hooks changed."""
        run, layer = self._run, self.layer
        if run.needs_encoding(layer):
            if layer not in run.inputs:
                raise HookFiringError(
                    f"{self._dictionary.input_hook(layer)!r} did not fire before {self.site!r}, so layer "
                    f"{layer}'s dictionary has no input. Check that the model runs that hook."
                )
            run.inputs[layer] = run.inputs[layer].to(output.device)  # seen before it was brought to the layer's
            self._encode()
        if not run.needs_decoding(layer):
            return None
        x = run.inputs[layer]
        dictionary = self._dictionary
        writers = dictionary.writers(layer)
        clean = dictionary.decode(layer, {w: run.clean[w] for w in writers}, x)
        changed = any(run.edited[w] is not run.clean[w] for w in writers)
        recons = dictionary.decode(layer, {w: run.edited[w] for w in writers}, x) if changed else clean
        recons = self._fire("hook_sae_recons", recons)
        error = output.detach() - clean.detach().to(output.dtype)
        edited_error = self._fire("hook_sae_error", error)
        # Written as a change of `output`, so that without edits the sum is `output` bit for bit.
        result = output.detach() + (recons - clean.detach()).to(output.dtype) + (edited_error - error)
        return self.points["hook_sae_output"](result)

    def _encode(self) -> None:
        run, dictionary = self._run, self._dictionary
        x = run.inputs[self.layer]
        fed = self._fire("hook_sae_input", x)
        pre = dictionary.pre_activations(self.layer, fed)
        seen = self._fire("hook_sae_acts_pre", pre)
        post = dictionary.activate(self.layer, seen, fed)
        edited = self._fire("hook_sae_acts_post", post)
        if fed is x and seen is pre:
            clean = post
        else:
            clean = dictionary.activate(self.layer, dictionary.pre_activations(self.layer, x), x)
        run.clean[self.layer], run.edited[self.layer] = clean, edited

    def _fire(self, name: str, tensor: Tensor) -> Tensor:
        """Run a point's hooks; on a copy, because hooks may edit in place and the clean value stays."""
        point = self.points[name]
        return point(tensor.clone() if point._forward_hooks else tensor)


class _Run:
    """What one forward pass carries from a layer's input to the output sites it writes to."""

    def __init__(self, dictionary: Attachable) -> None:
        self.layers: dict[int, AttachedLayer] = {}
        self.inputs: dict[int, Tensor] = {}
        self.clean: dict[int, Tensor] = {}
        self.edited: dict[int, Tensor] = {}
        self._writers = {layer: tuple(dictionary.writers(layer)) for layer in dictionary.layers}
        self._readers = {
            layer: [t for t, writers in self._writers.items() if layer in writers] for layer in self._writers
        }

    def needs_decoding(self, layer: int) -> bool:
        own = self.layers[layer].listened()
        return own or any(self.layers[w].listened() for w in self._writers[layer])

    def needs_encoding(self, layer: int) -> bool:
        return any(self.needs_decoding(t) for t in self._readers[layer])

    def forget(self) -> None:
        self.inputs.clear()
        self.clean.clear()
        self.edited.clear()


def attach(model: Model, dictionary: Any) -> Replacement:
    """Register ``dictionary``'s HookPoints on ``model``; nothing stays behind if this fails half-way.

    Raises AttachError when the model already carries an attachment, UnknownHookError when a hook
    the dictionary names does not exist, and whatever ``dictionary.check(model)`` finds wrong.
    """
    _refuse_second(model)
    with ExitStack() as undo:
        for layer in range(int(model.cfg.n_layers)):
            undo.enter_context(mlp_points(model, layer))
        undo.enter_context(inner_norm_points(model))
        dictionary.check(model)
        run = _Run(dictionary)
        undo.callback(run.forget)
        for layer in dictionary.layers:
            run.layers[layer] = _attach_layer(model, dictionary, layer, run, undo)
        first = resolve(model, dictionary.input_hook(dictionary.layers[0]))
        undo.callback(put_lasting_hook(first, lambda tensor, hook: run.forget(), first=True))
        return Replacement(model, dictionary, undo.pop_all(), run.layers)
    raise AssertionError("unreachable")


def _attach_layer(model: Model, dictionary: Any, layer: int, run: _Run, undo: ExitStack) -> AttachedLayer:
    site = dictionary.output_hook(layer)
    owner = resolve(model, site)
    for name in POINTS:
        undo.callback(register_point(model, f"{site}.{name}", owner, name))
    attached = AttachedLayer(dictionary, layer, {name: owner._modules[name] for name in POINTS}, run)
    source = resolve(model, dictionary.input_hook(layer))
    undo.callback(put_lasting_hook(source, attached.on_input))
    undo.callback(put_lasting_hook(owner, attached.on_output))
    return attached


def _refuse_second(model: Model) -> None:
    taken = sorted(name for name in model.hook_dict if name.endswith(POINTS[-1]))
    if taken:
        raise AttachError(
            f"the model already carries a dictionary ({len(taken)} layers, first {taken[0]!r}). "
            "Call replacement.detach() first (or model.reset_saes() for one that SAELens attached)."
        )
