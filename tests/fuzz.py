"""Damaged files of every format we read: each is opened, or refused with an error of ours, in a few seconds.

    python -m tests.fuzz --cases 4000 --seed 7      # by hand; the suite runs a few hundred (test_fuzz.py)

A case is a whole file, a seed and a mutation: bytes changed, cut or repeated, or a value of its JSON replaced by an odd
one. What opens is then used: drawn, saved, exported. The same seed gives the same case.
"""

import argparse
import gzip
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tl_circuits as tlc
from tests import published
from tests.tiny import prompt, tiny_bridge
from tl_circuits.attribution.text_baseline import Baseline
from tl_circuits.errors import TLCircuitsError
from tl_circuits.feature_labels.feature_files import FeatureFiles, write_index, write_layer
from tl_circuits.view.page_data import page_data

DATA = Path(__file__).parent / "data"
SLOWEST = 10.0  # seconds of this process, so that others on the machine do not count
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1e999, float("nan"), 10**30, 0.5, "", "x", "\ud800", "1e999", [], {}, [[]], {"a": 1}, [None],
    ["x", 1], "x" * 3000, "../x", "2020-13-45", -(2**63), [[1, 2], [3, 4]],
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A whole file of one format: which file of its folder is changed, and what opens and uses the folder."""

    name: str
    folder: Path
    file: str
    use: Callable[[Path], object]


def samples(home: Path) -> list[Sample]:
    """A small whole file of each format, under ``home``."""
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.label_features(replacement, tlc.attribute(replacement, prompt(5), max_nodes=12, progress=False))
        baseline = tlc.make_baseline(replacement, [prompt(6), prompt(7)], progress=False)
    graph = graph.group("a", graph.node_ids[:2]).pin(graph.node_ids[2])
    folders = {name: home / name for name in ("ours", "json", "gz", "theirs", "pt", "notes", "baseline", "features")}
    for folder in folders.values():
        folder.mkdir()
    graph.with_notes(tlc.Notes()).save(folders["ours"] / "a.graph.safetensors")
    exported = graph.to_neuronpedia(folders["json"] / "a.json", slug="a")
    (folders["gz"] / "a.json.gz").write_bytes(gzip.compress(exported.read_bytes(), mtime=0))
    shutil.copy(DATA / "circuit_tracer.pt", folders["pt"] / "a.pt")
    shutil.copy(DATA / "circuit_tracer.json", folders["theirs"] / "a.json")
    graph.save(folders["notes"] / "a.graph.safetensors")
    baseline.save(folders["baseline"] / "a.safetensors")
    record = {
        "top_logits": ["a"],
        "bottom_logits": ["b"],
        "examples_quantiles": [{"examples": [{"tokens": ["a"], "tokens_acts_list": [1.0]}]}],
    }
    write_index(folders["features"], {0: write_layer(folders["features"], 0, [record, None, record])})
    made = [
        Sample("graph", folders["ours"], "a.graph.safetensors", lambda f: _use_graph(f / "a.graph.safetensors")),
        Sample("json", folders["json"], "a.json", lambda f: _use_graph(f / "a.json")),
        Sample("their json", folders["theirs"], "a.json", lambda f: _use_graph(f / "a.json")),
        Sample("json.gz", folders["gz"], "a.json.gz", lambda f: _use_graph(f / "a.json.gz")),
        Sample("pt", folders["pt"], "a.pt", lambda f: _use_graph(f / "a.pt")),
        Sample(
            "notes", folders["notes"], "a.graph.safetensors.notes.json", lambda f: _use_graph(f / "a.graph.safetensors")
        ),
        Sample("baseline", folders["baseline"], "a.safetensors", lambda f: Baseline.load(f / "a.safetensors")),
        *(
            Sample(f"features {file}", folders["features"], file, _use_features)
            for file in ("index.json.gz", "layer_0.bin")
        ),
    ]
    layers = published.random_layers(2)
    for write, files in (
        (published.circuit_tracer, ("layer_1.safetensors", "config.yaml")),
        (published.gemma_scope, ("layer_1/width_16k/average_l0_71/params.npz",)),
        (published.gemma_scope_2, ("transcoder_all/layer_1_width_16k_l0_small/config.json",)),
        (published.saelens, ("layer_1/cfg.json",)),
        (published.four_bit, ("layer_01.four_bit.safetensors", "config.json")),
    ):
        folder = home / write.__name__
        write(folder, layers)
        made += [Sample(f"{write.__name__} {Path(file).name}", folder, file, _use_dictionary) for file in files]
    return made


def _use_graph(path: Path) -> None:
    graph = tlc.load_graph(path)
    _ = graph.nodes, graph.edges, graph.scores(), repr(graph), graph.words, graph.fingerprint
    json.dumps(page_data(graph)).encode()
    graph.save(path.with_name("again.graph.safetensors"), overwrite=True)
    graph.to_neuronpedia(path.with_name("again.json"), slug="again", overwrite=True)


def _use_features(folder: Path) -> None:
    files = FeatureFiles(folder)
    for layer in files.layers:
        for feature in range(3):
            files.label(layer, feature)


def _use_dictionary(folder: Path) -> None:
    found = tlc.load_transcoders(folder, residency="cpu", progress=False)
    for layer in found.layers:
        found.active(layer, torch.ones(1, 4))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with one to three things changed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = _structured(data, rng) if rng.random() < 0.6 else _bytes(data, rng)
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\x00"
    at, kind = rng.randrange(len(data)), rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at + 4 :]
    if kind == 3:
        return data[:at] + data[max(0, at - rng.randrange(1, 200)) :]
    return (
        data[:at]
        + rng.choice((b"\xff\xfe", b"\x00" * 8, b"[" * 2000, b"9" * 5000, b'"', b"&a [*a]", b"2020-01-01"))
        + data[at:]
    )


def _structured(data: bytes, rng: random.Random) -> bytes:
    """JSON, gzipped JSON, or the JSON in a safetensors file's header, with one value changed; else bytes."""
    if data[:2] == b"\x1f\x8b":
        try:
            return gzip.compress(_structured(gzip.decompress(data), rng), mtime=0)
        except (OSError, EOFError, ValueError, zlib.error):
            return _bytes(data, rng)
    try:
        if data[:1] == b"{":
            return json.dumps(_changed(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        if data[8:9] == b"{":
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            name = next(iter(header.get("__metadata__", {})), None)
            if name is not None and rng.random() < 0.8:
                header["__metadata__"][name] = json.dumps(_changed(json.loads(header["__metadata__"][name]), rng))
            elif rng.random() < 0.5:
                tensor = rng.choice([key for key in header if key != "__metadata__"])
                header[tensor]["dtype"] = rng.choice(["F32", "I32", "I64", "F64", "BF16", "U8", "BOOL"])
            else:  # other numbers in the tensors
                body = bytearray(data)
                at = rng.randrange(8 + length, len(body) - 4)
                body[at : at + 4] = rng.choice(
                    (struct.pack("<f", float("nan")), struct.pack("<i", -5), struct.pack("<i", 2**31 - 1))
                )
                return bytes(body)
            said = json.dumps(header).encode()
            said += b" " * (-len(said) % 8)
            return struct.pack("<Q", len(said)) + said + data[8 + length :]
    except (ValueError, KeyError, TypeError, IndexError, struct.error, RecursionError, AttributeError):
        pass
    return _bytes(data, rng)


def _changed(content: Any, rng: random.Random) -> Any:
    """Parsed JSON with one value, anywhere, replaced by an odd one, removed or given twice."""
    places = list(_places(content, 0))
    if not places:
        return rng.choice(ODD)
    # Few values stand near the top and many below, so half of the changes are among the upper ones.
    depth = rng.randrange(max(d for _, _, d in places) + 1)
    holder, key, _ = rng.choice([p for p in places if p[2] == depth])
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = rng.choice(ODD)
    return content


def _places(content: Any, depth: int) -> Iterator[tuple[Any, Any, int]]:
    keys = (
        list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    )
    for key in keys:
        yield content, key, depth
        if depth < 8:
            yield from _places(content[key], depth + 1)


def run(home: Path, seeds: Iterable[int], report: Callable[[str], None], of: Mapping[int, str] | None = None) -> int:
    """Run a case for each seed; returns how many went wrong, and reports each of them.

    ``of``: the sample's name for some seeds; the others' samples take turns.
    """
    files, wrong = samples(home), 0
    whole = {sample.name: (sample.folder / sample.file).read_bytes() for sample in files}
    for sample in files:  # a whole file opens, or the mutations would test nothing
        sample.use(sample.folder)
    for seed in seeds:
        name = (of or {}).get(seed, files[seed % len(files)].name)
        sample, rng = next(sample for sample in files if sample.name == name), random.Random(seed)
        path = sample.folder / sample.file
        path.write_bytes(mutated(whole[sample.name], rng))
        began = time.process_time()
        try:
            sample.use(sample.folder)
        except TLCircuitsError:
            pass
        except Exception as error:  # noqa: BLE001  (what is looked for)
            wrong += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "tl_circuits" in f.filename][-1]
            report(
                f"seed {seed} ({sample.name}): {type(error).__name__}: {str(error)[:200]} at "
                f"{place.filename}:{place.lineno}, from {ours.filename}:{ours.lineno}"
            )
        if time.process_time() - began > SLOWEST:
            wrong += 1
            report(f"seed {seed} ({sample.name}) took {time.process_time() - began:.0f} s")
        path.write_bytes(whole[sample.name])
    return wrong


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--cases", type=int, default=4000)
    asked.add_argument("--seed", type=int, default=0, help="the first seed")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(
            Path(folder), range(given.seed, given.seed + given.cases), lambda line: sys.stderr.write(line + "\n")
        )
    raise SystemExit(f"{found} of {given.cases} went wrong" if found else 0)
