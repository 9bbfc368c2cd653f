"""Assignment 1: read activations, compute features, ablate one, all by hook."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_circuits.course.questions import Asking, Lab, Part, Question, close, tensor
from tl_circuits.hooks import Ablate
from tl_circuits.interventions.intervene import intervene


def activations_at(student: Asking, lab: Lab) -> Iterator[Part]:
    for prompt, name in (("Houston is in", "blocks.1.hook_resid_pre"), ("23 + 45 =", "blocks.3.mlp.hook_in")):
        want = lab.cache(prompt)[name][0]
        got = tensor(student(lab.model, prompt, name), want.shape, "pos d_model")
        yield Part(
            2, close(got, want), f"wrong values at `{name}`: is it that hook point's tensor, on the prompt given?"
        )


def _stream(lab: Lab, layer: int) -> Tensor:
    return lab.cache("the bird of Texas is")[f"blocks.{layer}.mlp.hook_in"][0]


def pre_activations(student: Asking, lab: Lab) -> Iterator[Part]:
    x = _stream(lab, 1)
    ours = lab.ours.dictionary[1]
    bare = replace(ours, b_enc=torch.zeros_like(ours.b_enc))
    handed_out = (lab.transcoder(1, without="b_enc"), lab.transcoder(1))
    hints = (
        "wrong values: each feature's encoder vector is a row of `W_enc`.",
        "wrong once there is a bias: add `b_enc`.",
    )
    for transcoder, given, hint in zip((bare, ours), handed_out, hints, strict=True):
        want = x @ transcoder.W_enc.T + transcoder.b_enc
        got = tensor(student(given, x), want.shape, "pos feature")
        yield Part(2, close(got, want), hint)


def feature_activations(student: Asking, lab: Lab) -> Iterator[Part]:
    transcoder = lab.ours.dictionary[0]
    x = _stream(lab, 0)
    pre = x @ transcoder.W_enc.T + transcoder.b_enc
    want = transcoder.activate(pre)
    got = tensor(student(lab.transcoder(0), x), want.shape, "pos feature")
    on = want > 0
    yield Part(2, close(got[on], want[on]), "a feature above its threshold keeps its whole pre-activation.")
    yield Part(
        2, not bool(got[~on].any()), "a feature at or below its threshold is 0, even if its pre-activation is positive."
    )


def reconstruction_error(student: Asking, lab: Lab) -> Iterator[Part]:
    prompt = "the opposite of hot is"
    for layer, with_bias in ((2, False), (1, True)):
        ours = lab.ours.dictionary[layer]
        transcoder = ours if with_bias else replace(ours, b_dec=torch.zeros_like(ours.b_dec))
        cache = lab.cache(prompt)
        x, out = cache[f"blocks.{layer}.mlp.hook_in"][0], cache[f"blocks.{layer}.hook_mlp_out"][0]
        want = (
            out - transcoder.activate(x @ transcoder.W_enc.T + transcoder.b_enc) @ transcoder.W_dec - transcoder.b_dec
        )
        given = lab.transcoder(layer, without="" if with_bias else "b_dec")
        got = tensor(student(lab.model, given, layer, prompt), want.shape, "pos d_model")
        hint = "wrong values: the error is the MLP's output minus the sum of activation times row of `W_dec`."
        if close(got, -want):
            hint = "the sign is wrong: the error is what must be added to the reconstruction."
        elif with_bias and close(got, want + transcoder.b_dec):
            hint = "`b_dec` is part of the reconstruction."
        yield Part(2, close(got, want), hint)


def ablate(student: Asking, lab: Lab) -> Iterator[Part]:
    layer, prompt = 0, "the capital of the state containing Houston is"
    acts = lab.cache(prompt)[f"blocks.{layer}.hook_mlp_out.hook_sae_acts_post"][0].clone()
    acts[0] = 0.0  # do not ask about the beginning of the sequence
    count = (acts > 0).sum(0)
    once = int(acts.sum(0).where(count == 1, torch.zeros(())).argmax())
    often = int(acts.sum(0).where(count > 1, torch.zeros(())).argmax())
    wrong = "wrong logits: subtract activation times row of `W_dec` from `hook_mlp_out`, and let the model run on."
    for points, feature in ((2, once), (1, often)):
        position = int(acts[:, feature].nonzero()[0])
        want = _ablated(lab, prompt, layer, position, feature)
        got = tensor(student(lab.model, lab.transcoder(layer), layer, prompt, position, feature), want.shape, "d_vocab")
        elsewhere = any(close(got, _ablated(lab, prompt, layer, where, feature)) for where in (None, slice(1, None)))
        hint = "wrong where the feature is active at several positions: ablate it only at the one asked for."
        yield Part(points, close(got, want), hint if elsewhere else wrong)
    yield Part(1, student.hooks_left == 0, "a hook stayed on the model: use `run_with_hooks`, or `reset_hooks` after.")


def _ablated(lab: Lab, prompt: str, layer: int, where: Any, feature: int) -> Tensor:
    return intervene(lab.ours, prompt, Ablate(layer, where, feature), freeze="none", layers=()).last_logits


# What the first three functions have to do. They stand in for a student's own that never return.


def _activations_at(model: Any, prompt: str, name: str) -> Tensor:
    return model.run_with_cache(prompt, names_filter=name)[1][name][0]


def _pre_activations(transcoder: Any, x: Tensor) -> Tensor:
    return x @ transcoder.W_enc.T + transcoder.b_enc


def _feature_activations(transcoder: Any, x: Tensor) -> Tensor:
    return transcoder.activate(_pre_activations(transcoder, x))


QUESTIONS = (
    Question("activations_at", "read what a hook point carries", 4, activations_at, _activations_at),
    Question("pre_activations", "compute features' pre-activations", 4, pre_activations, _pre_activations),
    Question("feature_activations", "apply the JumpReLU", 4, feature_activations, _feature_activations),
    Question("reconstruction_error", "find what the features do not rebuild", 4, reconstruction_error),
    Question("ablate", "take one feature out by hook", 4, ablate),
)
