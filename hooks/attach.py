"""Put a dictionary's features on a model as HookPoints, and take them off again.

While attached, every output site ``S`` (such as ``blocks.3.hook_mlp_out``) carries the six points that SAELens puts on
an attached transcoder: ``S.hook_sae_input``, ``S.hook_sae_acts_pre``, ``S.hook_sae_acts_post``, ``S.hook_sae_recons``,
``S.hook_sae_error`` and ``S.hook_sae_output``. They are computed only if they carry hooks: otherwise the model does the
same work as before and gives the same bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import local
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .any_site import flat, mlp_output, passing_points, require_effective
from .errors import ArchitectureError, AttachError, DictionaryError, HookFiringError, TLCircuitsError
from .holding import Holds
from .identity import Sample, model_sample
from .inner_norms import add_inner_norm_points
from .mlp_points import add_mlp_points
from .numbers import whole
from .owned import is_ours, others_hooks, put_lasting_hook, register_point
from .places import by_place, place_number, places, sites_of
from .prompt import PromptRule
from .proof import OPTIONS, probe_tokens, prove
from .restore import restore
from .sites import Model, registry, resolve, unembed_weights, weights_state
from .takeover import lift
from .turn import in_turn, turn

POINTS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)

PASSED = "MLPs without a dictionary passed by their ratios"
"""The name in a :data:`Sample` that tells graphs traced with such MLPs from those where each is an error node."""


@runtime_checkable
class Attachable(Protocol):
    """The part of a dictionary's interface that attaching needs; tl_circuits.dictionaries.base has the whole."""

    prompt_rule: PromptRule
    """Which special token is put before a text, and which first positions have no features."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers that have features, ascending."""

    def input_hook(self, layer: int) -> str:
        """Full name of the hook whose tensor layer ``layer``'s encoder reads."""

    def output_hook(self, layer: int) -> str:
        """Full name of the hook whose tensor is replaced at layer ``layer``."""

    def writers(self, layer: int) -> Sequence[int]:
        """The layers whose features write to layer ``layer``'s output."""

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
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
    """A model with a dictionary attached; :func:`tl_circuits.attach` returns it, and most functions take it.

    Detach it when done: leave the ``with`` statement, or call :meth:`detach`.

    Attributes:
        model: the TransformerLens model.
        dictionary: the dictionary that is attached to it.

    Examples:
        >>> print(replacement)
        Replacement(TranscoderSet('tiny-facts', layers 0..3), attached, layers [0, 1, 2, 3])
        hook points of layer 0: blocks.0.hook_mlp_out. + hook_sae_input, ...
        >>> replacement.site(2)  # its hook points begin with this
        'blocks.2.hook_mlp_out'
        >>> name = f"{replacement.site(2)}.hook_sae_acts_post"
        >>> _, cache = replacement.model.run_with_cache(prompt, names_filter=name)
        >>> (cache[name][0] > 0).sum(-1).tolist()  # active features of layer 2 at each token
        [66, 0, 0, 0, 0, 0, 0, 1, 18]
    """

    def __init__(self, model: Model, dictionary: Any, attached: "dict[int, AttachedLayer]"):
        self.model = model
        self.dictionary = dictionary
        self._attached = attached  # by number of the place
        self._remembered: dict[tuple[Any, ...], Any] = {}

    def remembered(self, what: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """The result of ``find()``, called once and remembered until the model's options or weights change.

        Args:
            what: what is found, as a key.
            find: finds it.

        Returns:
            What ``find`` returned.
        """
        key = (*what, *(bool(getattr(self.model.cfg, option, False)) for option in OPTIONS), weights_state(self.model))
        if key not in self._remembered:
            self._remembered[key] = find()
        return self._remembered[key]

    @in_turn
    def holds(self, tokens: Int[Tensor, " pos"] | None) -> Holds:
        """How attention patterns and norm denominators can be held on this model.

        This is found out by experiment on the first prompt, and remembered (see :mod:`tl_circuits.hooks.proof`). If you
        have put hooks of your own on the model, it is found out on each prompt, and on the whole of it.

        Args:
            tokens: the prompt ``[pos]`` to experiment on; None for any.

        Returns:
            The norms that can be held, and which of them and of the patterns need more than their own hook for it.
            :func:`tl_circuits.hooks.hold_hooks` takes it.

        Raises:
            ArchitectureError: something cannot be held; the message names it.
        """
        layers = range(int(self.model.cfg.n_layers))
        outputs = {layer: mlp_output(self.dictionary, layer) for layer in layers}
        placed = by_place(self.dictionary)
        inputs = [placed.input_hook(place) for place in placed.layers]
        inputs += passing_points(self.model, self.dictionary, layers)[::2]
        any_tokens = probe_tokens(self.model) if tokens is None else tokens
        others = others_hooks(self.model)  # these may name positions, and be anything but affine

        def find() -> Holds:
            self.dictionary.check(self.model)  # weights may have been folded since it was attached
            holds = prove(self.model, any_tokens, outputs, inputs, whole=bool(others))
            require_effective(self.model, any_tokens, self.dictionary)
            return holds

        if not others:
            return self.remembered(("holds",), find)
        with blaming(others):
            if tokens is None:  # whatever was found on a prompt with these hooks
                return self.remembered(("holds on any", *others.items()), find)
            found = self.remembered(("holds", *others.items(), *tokens.tolist()), find)
            return self.remembered(("holds on any", *others.items()), lambda: found)

    @property
    def attached(self) -> bool:
        """Whether the dictionary is still on the model; False after :meth:`detach` and ``tlc.detach(model)``."""
        mine = self._attached[min(self._attached)].points[POINTS[0]]
        # All points are taken off together. Names are not asked: `enable_compatibility_mode` may have given others.
        return any(point is mine for point in registry(self.model).values())

    @property
    def mean_unembedding(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
        """The mean logit over the vocabulary as vector and bias, in float32.

        It is not remembered: a single row of ``W_U`` that was written to through ``.data`` leaves no other trace.
        """
        unembed = unembed_weights(self.model)
        return unembed.W_U.mean(1, dtype=torch.float32) * unembed.scale, unembed.b_U.float().mean() * unembed.scale

    @property
    def sample(self) -> Sample:
        """A few numbers from the weights of model and dictionary, by which graphs made with them are recognised.

        They are read each time, as weights may be edited while attached.
        """
        own = getattr(self.dictionary, "sample", None)
        passed: Sample = ((PASSED, ()),) if getattr(self.dictionary, "mlps", "error") == "ratio" else ()
        return model_sample(self.model) + (() if own is None else own()) + passed

    def site(self, layer: int, site: str | None = None) -> str:
        """The hook name ``S`` of a layer's output site; its points are ``S.hook_sae_acts_post`` and so on.

        Args:
            layer: the layer.
            site: which one, such as ``"resid_post"``, if the layer has several dictionaries.

        Returns:
            The name, such as ``blocks.2.hook_mlp_out``.

        Raises:
            DictionaryError: if the layer has no dictionary there, or several and ``site`` is missing; it lists those
                there are.
        """
        layer = whole(layer, "a layer", DictionaryError)
        if layer not in self.dictionary.layers:
            raise DictionaryError(
                f"layer {layer} has no dictionary; the attached ones are {sorted(self.dictionary.layers)}."
            )
        return self._attached[place_number(self.dictionary, layer, site)].site

    def require_attached(self) -> None:
        """Make sure that the dictionary is still on the model.

        Raises:
            AttachError: if it was detached.
        """
        if not self.attached:
            raise AttachError("this replacement was detached; call tlc.attach(model, ...) again.")

    def detach(self) -> None:
        """Take the dictionary off: remove all its HookPoints and hooks. Calling it again does nothing."""
        if self.attached:
            restore(self.model)

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        layers = sorted(self.dictionary.layers)
        head = f"Replacement({self.dictionary!r}, {state}, layers {layers})"
        if not self.attached or not layers:
            return head
        first = self._attached[min(self._attached)].site
        points = ", ".join(POINTS)
        return (
            f"{head}\nhook points of layer {layers[0]}: {first}. + {points}; of other layers: replacement.site(layer)"
        )


@contextmanager
def blaming(others: Mapping[str, Any]) -> Iterator[None]:
    """Say in an error that the model carries hooks of others, if it does, which may be the reason."""
    if not others:
        yield
        return
    names = ", ".join([*others][:3]) + (f" and {len(others) - 3} more points" if len(others) > 3 else "")
    try:
        yield
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{error} The model carries hooks that are not of this package, on {names}, which may be the reason: try "
            "without them (model.reset_hooks())."
        ) from error
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, TLCircuitsError):
            raise
        raise ArchitectureError(
            "a test run of three copies of the prompt failed, with hooks on the model that are not of this package "
            f"({names}): {type(error).__name__}: {error}. Write them so that they work on a batch of several rows, or "
            "take them off (model.reset_hooks())."
        ) from error


def output_site(replacement: Replacement, place: int) -> str:
    """The hook at which a place's dictionary is edited and held; of a layer without one, that of its MLP's output."""
    dictionary = by_place(replacement.dictionary)
    if place in dictionary.layers:
        return dictionary.output_hook(place)
    return f"blocks.{places(dictionary, int(replacement.model.cfg.n_layers))[place].layer}.hook_mlp_out"


class AttachedLayer:
    """One dictionary's six HookPoints, and the two hooks on the model that run them (``on_input`` and ``on_output``).

    ``layer`` is the number of the dictionary's place: its layer, unless some layer has several dictionaries.
    """

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
        """Remember the encoder's input until the output site fires, if anything will need it."""
        if self._run.needs_encoding(self.layer):
            self._run.inputs[self.layer] = flat(output)

    def on_output(self, output: Tensor, hook: HookPoint) -> Tensor | None:
        """Run the six points, and return the MLP's output plus what their hooks changed.

        If no hook listens, nothing is computed and the output is left alone.
        """
        run, layer = self._run, self.layer
        if run.needs_encoding(layer):
            if layer not in run.inputs:
                raise HookFiringError(
                    f"{self._dictionary.input_hook(layer)!r} did not fire before {self.site!r}, so the dictionary "
                    "there has no input. Check that the model runs that hook."
                )
            # The input may have been seen before it was moved to this layer's device.
            run.inputs[layer] = run.inputs[layer].to(output.device)
            self._encode()
        if not run.needs_decoding(layer):
            return None
        x, shape, output = run.inputs[layer], output.shape, flat(output)
        dictionary = self._dictionary
        writers = dictionary.writers(layer)
        clean = dictionary.decode(layer, {w: run.clean[w] for w in writers}, x)
        changed = any(run.edited[w] is not run.clean[w] for w in writers)
        recons = dictionary.decode(layer, {w: run.edited[w] for w in writers}, x) if changed else clean
        recons = self._fire("hook_sae_recons", recons)
        error = output.detach() - clean.detach().to(output.dtype)
        edited_error = self._fire("hook_sae_error", error)
        # Not recons + error: without edits both differences are exactly zero, and the sum is `output` bit for bit.
        result = output.detach() + (recons - clean.detach()).to(output.dtype) + (edited_error - error)
        return self.points["hook_sae_output"](result).reshape(shape)

    def _encode(self) -> None:
        run, dictionary = self._run, self._dictionary
        x = run.inputs[self.layer]
        fed = self._fire("hook_sae_input", x)
        pre = dictionary.pre_activations(self.layer, fed)
        seen = self._fire("hook_sae_acts_pre", pre)
        post = dictionary.activate(self.layer, seen, fed)
        edited = self._fire("hook_sae_acts_post", post)
        # The clean activations, for the difference that edits make. If no hook ran before, they are the same tensor.
        if fed is x and seen is pre:
            clean = post
        else:
            clean = dictionary.activate(self.layer, dictionary.pre_activations(self.layer, x), x)
        run.clean[self.layer], run.edited[self.layer] = clean, edited

    def _fire(self, name: str, tensor: Tensor) -> Tensor:
        """Run a point's hooks, on a copy: a hook may edit in place, and the unedited tensor is still needed."""
        point = self.points[name]
        return point(tensor.clone() if point._forward_hooks else tensor)


class _Run(local):
    """What must be remembered during a forward pass, from a layer's input until all layers it writes to have run.

    Each thread has its own, as several may run the model at once.
    """

    def __init__(self, dictionary: Attachable, layers: dict[int, AttachedLayer]) -> None:
        self.layers = layers
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


def attach_dictionary(model: Model, dictionary: Any, take_over: bool = False) -> Replacement:
    """Add a dictionary's HookPoints to a model. If it fails half-way, everything is removed again.

    Args:
        model: the model.
        dictionary: the dictionary.
        take_over: take off what SAELens attached, until detaching, instead of refusing it.

    Raises:
        AttachError: the model already carries a dictionary.
        UnknownHookError: the dictionary names a hook that the model does not have.
        DictionaryError: ``dictionary.check(model)`` finds that it does not fit.
    """
    begun = False
    try:
        with turn(model):
            _refuse_second(model, take_over)
            begun = True
            if take_over:
                lift(model)
            return _attach(model, dictionary)
    except BaseException:  # Ctrl-C included: a model is never half attached
        if begun:
            restore(model)
        raise


def _attach(model: Model, dictionary: Any) -> Replacement:
    for layer in range(int(model.cfg.n_layers)):
        add_mlp_points(model, layer)
    add_inner_norm_points(model)
    dictionary.check(model)
    attached: dict[int, AttachedLayer] = {}
    placed = by_place(dictionary)
    run = _Run(placed, attached)
    for place in placed.layers:
        attached[place] = _attach_layer(model, placed, place, run)
    # Whatever an earlier pass left behind, such as one that raised, is dropped when the next one begins.
    first = resolve(model, placed.input_hook(placed.layers[0]))
    if len(sites_of(dictionary, dictionary.layers[0])) > 1:  # in parallel blocks, an MLP may be read before attention
        first = resolve(model, f"blocks.{dictionary.layers[0]}.hook_resid_pre")
    put_lasting_hook(first, lambda tensor, hook: run.forget(), first=True)
    return Replacement(model, dictionary, attached)


def _attach_layer(model: Model, dictionary: Any, layer: int, run: _Run) -> AttachedLayer:
    site = dictionary.output_hook(layer)
    owner = resolve(model, site)
    points = {name: register_point(model, f"{site}.{name}", owner, name) for name in POINTS}
    attached = AttachedLayer(dictionary, layer, points, run)
    put_lasting_hook(resolve(model, dictionary.input_hook(layer)), attached.on_input)
    put_lasting_hook(owner, attached.on_output)
    return attached


def _refuse_second(model: Model, take_over: bool) -> None:
    ours = sorted(name for name, point in registry(model).items() if is_ours(point))
    if ours:
        raise AttachError(
            f"the model already carries a dictionary ({len(ours)} hook points, first {ours[0]!r}). Call "
            "replacement.detach() or tlc.detach(model) first."
        )
    theirs = sorted(name for name in model.hook_dict if name.endswith(POINTS[-1]))
    if theirs and not take_over:
        undo = " (or take it off with model.reset_saes())" if hasattr(model, "reset_saes") else ""
        raise AttachError(
            f"the model already carries a dictionary of SAELens ({len(theirs)} layers, first {theirs[0]!r}). Call "
            f"tlc.attach(model) without transcoders to take it over{undo}."
        )
