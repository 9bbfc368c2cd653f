"""Names of published sets: references to the hub, as circuit-tracer writes them, and short names."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qs

from tl_circuits.dictionaries.prompt_rules import published_rule
from tl_circuits.dictionaries.repository import inside
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import PromptRule

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<folder>[^@?]+))?(?:@(?P<revision>[^@?]+)|\?(?P<query>.*))?")


@dataclass(frozen=True)
class Reference:
    """A place on the hub: a repository, a revision, and a folder or file in it ('' for the whole repository)."""

    repo_id: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        return self.repo_id + (f"/{self.path}" if self.path else "") + (f"@{self.revision}" if self.revision else "")


def parse_reference(text: str) -> Reference:
    """Parse ``org/repo[/folder][@revision]`` or ``hf://org/repo/path[?revision=r]``; else DictionaryError."""
    match = _REFERENCE.fullmatch(text.removeprefix("hf://").rstrip("/"))
    if match is None:
        raise DictionaryError(f"{text!r} is not a hub reference: expected org/repo[/folder][@revision].")
    revision = match["revision"] or parse_qs(match["query"] or "").get("revision", [None])[0]
    path = match["folder"] or ""
    return Reference(match["repo"], revision, inside(path, text) if path else "")


@dataclass(frozen=True)
class ShortName:
    """A short name for a published set, with its place on the hub and its model."""

    name: str
    reference: str
    model: str
    description: str

    @property
    def prompt_rule(self) -> PromptRule:
        """The set's prompt rule: which special token it expects, and which first positions it leaves out."""
        return published_rule(self.model)


def _gemma_3(size: str, kind: str, model: str) -> ShortName:
    reference = f"mwhanna/gemma-scope-2-{size}-{kind}/transcoder_all/width_16k_l0_small_affine"
    return ShortName(model.removeprefix("google/"), reference, model, "Gemma Scope 2, 16k, low L0, affine skip")


def _gemma_3_clt(size: str, kind: str, model: str) -> ShortName:
    reference = f"google/gemma-scope-2-{size}-{kind}/clt/width_262k_l0_medium_affine"
    name = f"{model.removeprefix('google/')}-clt"
    return ShortName(name, reference, model, "Gemma Scope 2, cross-layer, 262k features in all, affine skip")


def _qwen3(size: str, suffix: str) -> ShortName:
    return ShortName(f"qwen3-{size}", f"mwhanna/qwen3-{size}-transcoders{suffix}", f"Qwen/Qwen3-{size.upper()}", "ReLU")


_GEMMA = "mwhanna/gemma-scope-transcoders"
_LLAMA = "mntss/transcoder-Llama-3.2-1B"
SHORT_NAMES = {
    short.name: short
    for short in (
        ShortName("gemma", _GEMMA, "google/gemma-2-2b", "Gemma Scope, 16k, JumpReLU"),
        ShortName("gemma-2-2b", _GEMMA, "google/gemma-2-2b", "Gemma Scope, 16k, JumpReLU"),
        ShortName("gemma-2-2b-clt", "mntss/clt-gemma-2-2b-426k", "google/gemma-2-2b", "cross-layer, 426k features"),
        ShortName("llama", _LLAMA, "meta-llama/Llama-3.2-1B", "131k, ReLU, skip"),
        ShortName("llama-3.2-1b", _LLAMA, "meta-llama/Llama-3.2-1B", "131k, ReLU, skip"),
        ShortName(
            "llama-3.2-1b-clt", "mntss/clt-llama-3.2-1b-524k", "meta-llama/Llama-3.2-1B", "cross-layer, 524k features"
        ),
        ShortName(
            "llama-3.1-8b-instruct",
            "facebook/crv-8b-instruct-transcoders",
            "meta-llama/Llama-3.1-8B-Instruct",
            "131k, TopK",
        ),
        ShortName(
            "gpt2-arena", "callummcdougall/arena-demos-transcoder", "gpt2", "layers 0 to 8, 24k, ReLU; ARENA's course"
        ),
        ShortName(
            "smollm2-135m",
            "EleutherAI/skip-transcoder-SmolLM2-135M-128x",
            "HuggingFaceTB/SmolLM2-135M",
            "74k, TopK, skip",
        ),
        ShortName(
            "qwen3-0.6b-clt", "bluelightai/clt-qwen3-0.6b-base-20k", "Qwen/Qwen3-0.6B-Base", "cross-layer, 20k a layer"
        ),
        ShortName(
            "qwen3-1.7b-clt", "bluelightai/clt-qwen3-1.7b-base-20k", "Qwen/Qwen3-1.7B-Base", "cross-layer, 20k a layer"
        ),
        _qwen3("0.6b", "-lowl0"),
        _qwen3("1.7b", "-lowl0"),
        _qwen3("4b", ""),
        _qwen3("8b", ""),
        _qwen3("14b", "-lowl0"),
        _gemma_3("270m", "pt", "google/gemma-3-270m"),
        _gemma_3("270m", "it", "google/gemma-3-270m-it"),
        _gemma_3_clt("270m", "pt", "google/gemma-3-270m"),
        _gemma_3_clt("1b", "pt", "google/gemma-3-1b-pt"),
        _gemma_3_clt("1b", "it", "google/gemma-3-1b-it"),
        _gemma_3("1b", "pt", "google/gemma-3-1b-pt"),
        _gemma_3("1b", "it", "google/gemma-3-1b-it"),
        _gemma_3("4b", "pt", "google/gemma-3-4b-pt"),
        _gemma_3("4b", "it", "google/gemma-3-4b-it"),
        _gemma_3("12b", "pt", "google/gemma-3-12b-pt"),
        _gemma_3("12b", "it", "google/gemma-3-12b-it"),
        _gemma_3("27b", "pt", "google/gemma-3-27b-pt"),
        _gemma_3("27b", "it", "google/gemma-3-27b-it"),
    )
}
