"""Read circuit-tracer's ``.pt`` files without running anything in them."""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.prompt_rules import left_out_by_circuit_tracer
from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import GraphInfo, Nodes
from tl_circuits.graph.scores import Edges
from tl_circuits.support.reading import quoted


class _LogitTarget(NamedTuple):
    """Stands in for circuit-tracer's class: a token's text and vocabulary index."""

    token_str: str
    vocab_idx: int


class _Config:
    """Stands in for the model configurations of circuit-tracer and TransformerLens: attributes only."""


_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_LogitTarget, "circuit_tracer.attribution.targets.LogitTarget"),
    (_Config, "circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig"),
    (_Config, "transformer_lens.HookedTransformerConfig.HookedTransformerConfig"),
    (_Config, "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig"),
    (_Config, "transformer_lens.config.hooked_transformer_config.HookedTransformerConfig"),
]
_NEEDED = (
    "input_string", "adjacency_matrix", "cfg", "active_features", "logit_probabilities", "input_tokens",
    "selected_features", "activation_values",
)  # fmt: skip


def read_pt(path: Path) -> AttributionGraph:
    """The graph that circuit-tracer's ``Graph.to_pt`` wrote. The adjacency matrix is taken as it is.

    Raises:
        GraphFileError: if the file holds anything but tensors, plain values and two known classes, such as code to run
            (it names what it found), or if it is damaged.
    """
    _refuse_packed(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise GraphFileError(
            f"{path} holds more than a circuit-tracer graph: {_first_line(error)} Nothing of it was run. If you trust "
            "the file, open it with circuit-tracer and export JSON."
        ) from error
    except Exception as error:  # torch lets through whatever a damaged pickle raises
        raise GraphFileError(f"{path} is not a whole torch file ({_first_line(error)}). Was it cut off?") from error
    missing = [key for key in _NEEDED if not isinstance(content, dict) or key not in content]
    if missing:
        raise GraphFileError(f"{path} is a torch file, but not a circuit-tracer graph: it has no {missing[0]!r}.")
    _refuse_expanded(content, path)
    try:  # a tensor may have been saved with the wish for gradients, which frames do not read
        return _build({name: value.detach() if isinstance(value, Tensor) else value for name, value in content.items()})
    except GraphFileError:
        raise
    except Exception as error:  # any part of the pickle may be missing or of another type
        raise GraphFileError(f"{path} is a damaged circuit-tracer graph: {_first_line(error)}.") from error


def _refuse_packed(path: Path) -> None:
    """Raise GraphFileError for a zip file with packed members: torch stores them as they are."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = [
            m.filename
            for m in archive.infolist()
            if m.compress_type != zipfile.ZIP_STORED or m.file_size > m.compress_size
        ]
    if packed:
        raise GraphFileError(
            f"{path} holds the packed part {quoted(packed[0])}, which torch never writes. It is not unpacked."
        )


def _refuse_expanded(content: dict[str, Any], path: Path) -> None:
    """Raise GraphFileError for a tensor that claims more numbers than the file holds for it."""
    for name, value in content.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise GraphFileError(
                f"{path}: {quoted(name)} claims the shape {tuple(value.shape)}, more than the file holds."
            )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "global" in line.lower()] or str(error).splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _build(content: dict[str, Any]) -> AttributionGraph:
    cfg, adjacency = content["cfg"], content["adjacency_matrix"].float()
    n_layers = int(cfg.n_layers)
    tokens = [int(t) for t in torch.as_tensor(content["input_tokens"]).flatten()]
    targets = _targets(content)
    selected = content["selected_features"].long()
    features = content["active_features"][selected].long()
    activation = content["activation_values"][selected].float()
    n_pos, n_logits = len(tokens), len(targets)
    counts = [len(features), n_layers * n_pos, n_pos, n_logits]
    if tuple(adjacency.shape) != (sum(counts), sum(counts)):
        raise ValueError(f"its matrix is {tuple(adjacency.shape)}, expected {sum(counts)} rows and columns")
    texts = _texts(str(getattr(cfg, "tokenizer_name", "") or ""), tokens)
    scan = content.get("scan")
    vocab = [t.vocab_idx if t.vocab_idx < int(content.get("vocab_size") or 10**9) else -1 for t in targets]
    info = GraphInfo(
        prompt=str(content["input_string"]),
        token_ids=tuple(tokens),
        tokens=tuple(texts),
        target_names=tuple(t.token_str or f"#{t.vocab_idx}" for t in targets),
        target_probabilities=tuple(content["logit_probabilities"].tolist()),
        model=str(getattr(cfg, "model_name", "unknown")),
        dictionary=scan if isinstance(scan, str) else "transcoders",
        n_layers=n_layers,
        exact=False,
        engine="circuit-tracer",
        max_nodes=len(features),
        n_active=len(content["active_features"]),
        version="",
        skip_positions=left_out_by_circuit_tracer(str(getattr(cfg, "model_name", "")), tokens),
    )
    nodes = _nodes(counts, features, activation, tokens, vocab, content["logit_probabilities"].float(), n_layers)
    target, source = adjacency.nonzero(as_tuple=True)
    source_file: dict[str, Any] = {"metadata": {"scan": scan}} if isinstance(scan, str) else {}
    if isinstance(scan, list):
        source_file = {"metadata": {"transcoder_list": [str(s) for s in scan]}}
    return AttributionGraph(info, nodes, Edges(source, target, adjacency[target, source]), source_file=source_file)


def _targets(content: dict[str, Any]) -> list[_LogitTarget]:
    """The outputs. Older files give only vocabulary ids."""
    found = content.get("logit_targets", content.get("logit_tokens"))
    if isinstance(found, Tensor):
        return [_LogitTarget("", int(i)) for i in found.tolist()]
    if found is None:
        raise ValueError("it has neither logit_targets nor logit_tokens")
    return [_LogitTarget(str(t.token_str), int(t.vocab_idx)) for t in found]


def _nodes(
    counts: list[int],
    features: Tensor,
    activation: Float[Tensor, " n"],
    tokens: list[int],
    vocab: list[int],
    probabilities: Float[Tensor, " target"],
    n_layers: int,
) -> Nodes:
    n_pos, total = len(tokens), sum(counts)
    kind = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    every = torch.arange(n_pos)
    minus, last = torch.full((counts[1],), -1), torch.full((counts[3],), n_pos - 1)
    columns = {name: torch.zeros(total) for name in ("activation", "bias", "residue", "residue_mass", "weight")}
    columns["activation"][: counts[0]] = activation
    columns["weight"][total - counts[3] :] = probabilities
    columns |= {
        "kind": kind,
        "layer": torch.cat([
            features[:, 0], torch.arange(n_layers).repeat_interleave(n_pos), torch.full((n_pos,), -1),
            torch.full((counts[3],), n_layers),
        ]),
        "position": torch.cat([features[:, 1], every.repeat(n_layers), every, last]),
        "feature": torch.cat([features[:, 2], minus, torch.tensor(tokens), torch.tensor(vocab, dtype=torch.long)]),
        "value": torch.full((total,), float("nan")),
    }  # fmt: skip
    return Nodes(**columns)


# A name on the hub: "org/name" or "name". Anything else, such as a path, would open what the file's author chose.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _texts(tokenizer_name: str, tokens: list[int]) -> list[str]:
    """The tokens' texts if their tokenizer is in the hub's cache, else ``#id``; the file does not hold them.

    The name stands in the file, so it may only name a repository: no folder of this machine is opened, and no code of
    the repository is run.
    """
    if not _HUB_NAME.fullmatch(tokenizer_name) or Path(tokenizer_name).exists():
        return [f"#{t}" for t in tokens]
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, local_files_only=True, trust_remote_code=False)
        return [str(tokenizer.decode([t])) for t in tokens]
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        return [f"#{t}" for t in tokens]
