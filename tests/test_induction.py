"""Induction on a real model: heads that look behind the earlier mention of the last word."""

import re
from pathlib import Path

import pytest

import tl_circuits as tlc
from tests.tiny import transcoders
from tl_circuits.attention.qk import score_attribution
from tl_circuits.attention.retrace import retrace

PROMPT = "Today Vernon Dursley met his wife. In the evening Vernon"
FIRST, KEY, LAST = 2, 3, 13  # " Vernon", " D" right after it, " Vernon" again


def test_heads_that_look_behind_the_first_mention_do_so_for_what_stood_there_before(smollm2):
    with tlc.attach(smollm2, transcoders(smollm2, width=32)) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=5, progress=False)
        assert graph.info.tokens[FIRST] == graph.info.tokens[LAST] == " Vernon"
        local = retrace(replacement, graph)
        looking = [
            (layer, head)
            for layer in range(10, 30)  # past the layers that look at names whatever came before
            for head in range(9)
            if float(local.recording.patterns[layer].dense()[head, LAST, KEY]) > 0.4
        ]
        assert len(looking) >= 3
        for layer, head in looking:
            qk = score_attribution(local, graph, layer, head, LAST, KEY, top=5)
            assert qk.total == pytest.approx(qk.score, rel=1e-4)
            matched = qk.by_position.loc[LAST, FIRST]
            assert matched == qk.by_position.to_numpy().max() and matched > 0.8 * qk.score


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d+\.\d+", text)]


def test_the_walk_through_of_the_documentation_says_what_the_model_does(smollm2):
    page = (Path(__file__).parents[1] / "docs/attention.md").read_text()
    walk = page.split("## Induction", 1)[1].split("\n## ", 1)[0]
    rows = {
        row.split("|")[1].strip(): numbers(row.replace("**", "")) for row in walk.splitlines() if row.startswith("|")
    }
    with tlc.attach(smollm2, tlc.mlp_neurons(smollm2)) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=5, progress=False)
        qk = tlc.qk_attribution(replacement, graph, layer=17, head=4, query=-1, key=KEY)
        edits = [tlc.PatternEdit(17, head, -1, KEY, value=0.0) for head in (3, 4, 5)] + [
            tlc.PatternEdit(18, 6, -1, KEY, value=0.0)
        ]
        top = tlc.intervene(replacement, PROMPT, edits, freeze="attention").top(3).set_index("token")
    assert re.search(r"qk.score, qk.total +# (\S+), (\S+)", walk).groups() == (f"{qk.score:.3f}", f"{qk.total:.3f}")
    shown = qk.by_position.loc[[LAST, "bias"], [0, 1, FIRST, KEY, "bias"]]
    assert [rows["Vernon (13)"], rows["bias"]] == [pytest.approx(row, abs=0.011) for row in shown.to_numpy().tolist()]
    others = qk.by_position.drop([LAST, "bias"]).to_numpy().sum()
    assert float(re.search(r"query side add up to (-?\d+\.\d+)\.", walk)[1]) == pytest.approx(others, abs=0.011)
    for side, frame in (("key", qk.by_key), ("query", qk.by_query)):
        largest = frame[frame.kind == "feature"].iloc[0]
        name, weight = re.search(rf"`qk.by_{side}`:\s+`(\S+)`[^,]*, \+(\d\.\d+)", walk).groups()
        assert (name, float(weight)) == (largest.source, pytest.approx(largest.weight, abs=0.011))
    for token, row in top.iterrows():
        assert rows[f"`{token}`"] == pytest.approx([100 * row.before, 100 * row.after], abs=0.11)
