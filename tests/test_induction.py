"""Induction on a real model: heads that look behind the earlier mention of the last word."""

import pytest

import tl_circuits as tlc
from tests.tiny import transcoders
from tl_circuits.attribution.qk import score_attribution
from tl_circuits.attribution.retrace import retrace

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
