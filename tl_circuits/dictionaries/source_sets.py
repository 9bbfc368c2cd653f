"""Find where a dictionary's features are on Neuronpedia, by the dictionary's name."""

import importlib.util
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

# Dictionaries by circuit-tracer's names, which SAELens' registry does not list.
_ALSO = {
    "gemma": "gemma-2-2b/gemmascope-transcoder-16k",
    "mwhanna/gemma-scope-transcoders": "gemma-2-2b/gemmascope-transcoder-16k",
}

LAYERS_OF_MODEL = {
    "gemma-2-2b": 26,
    "gemma-2-2b-it": 26,
    "gemma-2-9b": 42,
    "gemma-2-9b-it": 42,
    "gemma-2-27b": 46,
    "gemma-3-270m": 18,
    "gemma-3-270m-it": 18,
    "gemma-3-1b": 26,
    "gemma-3-1b-it": 26,
    "gemma-3-4b": 34,
    "gemma-3-4b-it": 34,
    "gemma-3-12b": 48,
    "gemma-3-12b-it": 48,
    "gemma-3-27b": 62,
    "gemma-3-27b-it": 62,
    "gpt2-small": 12,
    "llama3.1-8b": 32,
    "llama3.1-8b-it": 32,
    "llama3.2-1b": 16,
    "llama-3.2-1b": 16,
    "qwen3-0.6b": 28,
    "qwen3-1.7b": 28,
    "qwen3-4b": 36,
    "qwen3-8b": 36,
    "qwen3-14b": 40,
    "jackl-circuits-runs-1-4-sofa-v3_0": 18,
}
"""Numbers of layers of models on Neuronpedia, whose addresses do not say it. Neuronpedia may have more models."""


@dataclass(frozen=True)
class SourceSet:
    """A model and a set of features, by Neuronpedia's names."""

    model: str
    name: str

    def source(self, layer: int) -> str:
        """The source that holds one layer's features."""
        return f"{layer}-{self.name}"


def model_id(model: str) -> str:
    """Neuronpedia's way to write a model's name: ``google/gemma-2-2b`` is ``gemma-2-2b``."""
    return model.rstrip("/").split("/")[-1].lower()


@lru_cache(maxsize=64)
def known_source_set(dictionary: str) -> SourceSet | None:
    """Where the features of a dictionary are, according to SAELens' registry; None if it does not say.

    ``dictionary`` is a SAELens release or a hub repository; ``hf://``, ``//folder`` and ``@revision`` are ignored. If a
    repository has several source sets, the one that covers most layers is returned. Of a release of autoencoders,
    ``//pattern`` names the ids that were opened, with stars in place of layers.
    """
    name = dictionary.removeprefix("hf://")
    repository, _, ids = name.partition("//")
    if ids and repository in _releases():
        return _source_set_of(_releases()[repository], ids)
    repository = re.split(r"//|@", name)[0]
    if repository in _ALSO:
        return _source_set(_ALSO[repository])
    found: Counter[str] = Counter()
    for release, text in _releases().items():
        if release == name or re.search(rf"^  repo_id: {re.escape(repository)}$", text, re.MULTILINE):
            found.update(re.findall(r"^\s+(?:- )?neuronpedia: (\S+)/\d+-(\S+)$", text, re.MULTILINE))
    return SourceSet(*found.most_common(1)[0][0]) if found else None


def _source_set_of(release: str, ids: str) -> SourceSet | None:
    """The source set of those ids in a release's part of the registry that fit a pattern, or are listed.

    None if they are in several sets: a source's name is then not the same for all layers. Also if a page has another
    layer's number than the id: gpt2-small-res-jb calls the stream behind layer 11 layer 12, and layer 11 there is
    another dictionary.
    """
    found = set()
    for entry in re.split(r"^\s*- (?=id: )", release, flags=re.MULTILINE)[1:]:
        one = re.search(r"^id: (\S+)", entry)
        page = re.search(r"^\s*neuronpedia: (\S+)/(\d+)-(\S+)$", entry, re.MULTILINE)
        if one and page and any(fnmatchcase(one[1], wanted) for wanted in ids.split(", ")):
            layer = re.search(r"(?:blocks\.|layers?[_.])(\d+)", one[1])
            if layer is not None and int(layer[1]) != int(page[2]):
                return None
            found.add(SourceSet(page[1], page[3]))
    return found.pop() if len(found) == 1 else None


def _source_set(text: str) -> SourceSet:
    return SourceSet(*text.split("/"))


@lru_cache(maxsize=1)
def _releases() -> dict[str, str]:
    """Each release's part of SAELens' registry, as text: importing sae_lens or parsing all of it takes seconds."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        return {}
    path = Path(spec.origin).parent / "pretrained_saes.yaml"
    if not path.is_file():
        return {}
    parts = re.split(r"^([\w.-]+):[ ]*\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
