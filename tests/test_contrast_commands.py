"""`tl-circuits trace --against` and `tl-circuits circuit`, run as a person would."""

import io
import json

import pandas as pd
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.test_contrast import OTHERS, PROMPT
from tl_circuits.cli.against import expanded, read_against
from tl_circuits.cli.circuit import _show, half_line
from tl_circuits.cli.main import app

FACTS = ["--model", "tiny-facts", "--transcoders", "tiny-facts"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_braces_name_several_prompts_and_a_file_one_a_line(tmp_path):
    assert expanded("{a,b} and {c,d}") == ["a and c", "a and d", "b and c", "b and d"]
    assert expanded("a {b} c") == ["a {b} c"]
    (tmp_path / "others.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_against(["others.txt", "three", "one"]) == ["one", "two", "three"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_against(["empty.txt"])


def test_trace_against_other_prompts_asks_why_this_and_not_that(tmp_path):
    against = "the capital of the state containing {Oakland,Miami} is"
    done = run(
        "trace", PROMPT, *FACTS, "--against", against, "--max-nodes", 100, "--out", "why", "--heads", "--ablations"
    )
    assert done.exit_code == 0, done.output
    assert "Why “Austin”, and not what the other 2 prompts give?" in done.output
    graph = tlc.load_graph("why.graph.safetensors")
    assert graph.info.compared_with == tuple(OTHERS)
    assert "and not what the other 2 prompts give?" in (tmp_path / "why.html").read_text()


def test_trace_against_a_saved_baseline(tmp_path):
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        tlc.make_baseline(replacement, OTHERS, progress=False).save("usual.safetensors")
    done = run("trace", PROMPT, *FACTS, "--against", "usual.safetensors", "--max-nodes", 50, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["compared_with"] == ["2 texts, 16 tokens"]


def test_circuit_measures_a_family_and_judges_it_on_other_prompts(tmp_path):
    rows = [(PROMPT, "Austin"), (OTHERS[0], "Sacramento"), (OTHERS[1], "Tallahassee")]
    (tmp_path / "family.csv").write_text("prompt,answer\n" + "".join(f"{p},{a}\n" for p, a in rows))
    done = run("circuit", "family.csv", *FACTS, "--size", 29, "--max-nodes", 200, "--out", "found", "--json")
    assert done.exit_code == 0, done.output
    curve = {(row["chosen"], row["nodes"]): row for row in json.loads(done.stdout)["curve"]}
    assert curve["circuit", 29]["F"] > 0.6 > curve["random", 29]["F"]
    assert (tmp_path / "found.csv").is_file() and (tmp_path / "found.svg").is_file()
    held = [(PROMPT.replace("Dallas", "Houston"), "Austin"), (OTHERS[0].replace("Oakland", "Fresno"), "Sacramento")]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in held))
    done = run("circuit", "family.csv", *FACTS, "--size", 29, "--max-nodes", 200, "--held-out", "held.jsonl")
    assert done.exit_code == 0 and "of the answer is carried by" in done.output, done.output


def test_what_half_of_the_answer_needs_is_said_only_as_far_as_it_was_tried():
    def line(*found):
        return half_line(pd.DataFrame(found, columns=["nodes", "F"]), 1000)

    assert (
        line((0, 0.0), (10, 0.6), (1000, 1.0))
        == "Half of the answer is carried by 10 of 1,000 nodes a prompt (1.0%), or by fewer."
    )
    assert (
        line((0, 0.0), (10, 0.3), (1000, 1.0))
        == "Half of the answer is carried by more than 10 of 1,000 nodes a prompt (1.0%)."
    )
    assert line((0, 0.0), (10, 0.3)) == ""


def test_what_the_nodes_do_not_carry_is_said():
    """As of skip transcoders, whose skip connections are no nodes."""
    curve = pd.DataFrame({"chosen": "circuit", "nodes": [0, 10], "F": [0.0, 1.0], "C": [1.0, 0.0]})

    def shown(metric):
        console = Console(record=True, width=200, file=io.StringIO())
        _show(tlc.CircuitQuality(curve, metric=metric, n_nodes=10, ablate="mean"), console)
        return console.export_text()

    assert "Replacing every node removes 23% of the metric" in shown((9.10, 7.00)) and "7.00 of 9.10 is left" in shown(
        (9.10, 7.00)
    )
    assert "Replacing every node removes" not in shown((9.10, 0.02))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "prompt\nx\n", "needs prompt and answer"),
        ("b.csv", "prompt,answer\nx,y\n", "at least 2 prompts"),
        ("c.jsonl", "{", "is not a table"),
    ],
)
def test_a_file_that_is_no_family_is_refused_in_words(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    done = run("circuit", name, *FACTS)
    assert done.exit_code == 1 and says in done.output


def test_contrast_graphs_recur_and_are_not_averaged_with_whole_ones():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        family = [PROMPT, *OTHERS]
        graphs = [
            tlc.attribute(replacement, text, baseline=[t for t in family if t != text], max_nodes=60, progress=False)
            for text in family
        ]
        plain = tlc.attribute(replacement, PROMPT, max_nodes=20, progress=False)
    found = tlc.aggregate(graphs, min_share=0.3)
    graph = found.graph(0.3)
    assert graph.completeness_error() < 1e-4 and len(graph.info.compared_with) == 3
    ids = dict(zip(graph.node_ids, graph.nodes.total_effect, strict=True))
    one = next(n for n in graphs[0].node_ids if n.startswith("L3/") and "F" in n and f"{n.split('@')[0]}@8" in ids)
    mean = sum(dict(zip(g.node_ids, g.nodes.total_effect, strict=True)).get(one, 0.0) for g in graphs) / 3
    assert ids[one] == pytest.approx(mean, abs=1e-5)
    assert torch.isfinite(graph._nodes.baseline).all() and "total_effect" in found.features
    with pytest.raises(ValueError, match="cannot be averaged"):
        tlc.aggregate([*graphs, plain])
