"""From an edge to its heads to what made them look: data, figure and command line."""

import json

import pytest

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import command, own_bridge, prompt, tiny_folder, transcoders
from tl_circuits.attention.stories import edge_stories, qk_tracing_results, story_data, strongest_edges, word_stories
from tl_circuits.cli.heads import loading_rows
from tl_circuits.errors import TargetError


@pytest.fixture(scope="module")
def told():
    model = own_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        edges = strongest_edges(graph, 3)
        yield replacement, graph, edge_stories(replacement, graph, edges, heads=2)


def test_the_strongest_edges_go_into_the_answers_from_other_positions_largest_influence_first(told):
    _, graph, _ = told
    nodes = graph.nodes.set_index("id")
    edges = graph.edges.assign(amount=graph.edges.weight.abs())
    flow = edges.amount / edges.groupby("target").amount.transform("sum") * nodes.influence[edges.target].to_numpy()
    moved = nodes.position[edges.source].to_numpy() != nodes.position[edges.target].to_numpy()
    kept = moved & ~nodes.position[edges.source].isin(graph.skipped_positions()).to_numpy()
    answers = kept & (nodes.kind[edges.target] == "logit").to_numpy()
    wanted = edges[answers].assign(flow=flow[answers]).sort_values("flow", ascending=False, kind="stable").head(8)
    assert strongest_edges(graph, 8) == list(zip(wanted.source, wanted.target, strict=True))


def test_a_story_goes_from_the_edge_to_its_heads_to_their_scores(told):
    replacement, graph, stories = told
    assert len(stories) == 3
    for story in stories:
        data = json.loads(json.dumps(story_data(graph, story)))
        listed = sum(h["loading"] for h in data["heads"]) + sum(v for _, v in data["chains"])
        everything = data["residual"] + data["rest"] + data["other_heads"] + listed
        assert everything == pytest.approx(data["weight"], rel=1e-4)
        explained = [head for head in data["heads"] if "pairs" in head]
        assert len(explained) == 2 and explained == data["heads"][:2]
        for head, qk in zip(explained, story.scores, strict=True):
            assert (head["layer"], head["head"], head["score"]) == (qk.layer, qk.head, qk.score)
            assert data["source"].endswith(f"@{head['key']}") and 10 >= len(head["pairs"]) > 0
            again = tlc.qk_attribution(replacement, graph, qk.layer, qk.head, qk.query, qk.key)
            assert again.total == pytest.approx(qk.total, rel=1e-6)
        assert all(name in graph.node_ids for name in data["labels"])


def test_neuronpedias_structure_names_only_what_the_caller_can_name(told):
    _, graph, stories = told
    known = {name: f"np-{i}" for i, name in enumerate(graph.node_ids)}
    found = qk_tracing_results(story_data(graph, stories[0])["heads"], known.get, top=5)
    assert set(found) == {"pair_wise_contributors", "top_q_marginal_contributors", "top_k_marginal_contributors"}
    ids = set(known.values())
    pairs = found["pair_wise_contributors"]
    assert pairs and all(len(row) == 3 and row[0] in ids and row[1] in ids for row in pairs)
    for side in ("top_q_marginal_contributors", "top_k_marginal_contributors"):
        assert 0 < len(found[side]) <= 5 and all(len(row) == 2 and row[0] in ids for row in found[side])
        assert [abs(w) for _, w in found[side]] == sorted((abs(w) for _, w in found[side]), reverse=True)
    json.dumps(found)


def test_pairs_of_several_heads_are_summed_and_a_head_told_twice_counts_once():
    def head(number, weight):
        return {
            "layer": 1,
            "head": number,
            "key": 2,
            "pairs": [["a", "b", weight]],
            "by_query": [["a", weight]],
            "by_key": [["b", weight]],
        }

    found = qk_tracing_results([head(0, 1.0), head(3, 0.5), head(0, 1.0)], lambda name: name)
    assert found["pair_wise_contributors"] == [["a", "b", 1.5]]
    assert found["top_q_marginal_contributors"] == [["a", 1.5]] and found["top_k_marginal_contributors"] == [["b", 1.5]]


def test_the_graph_keeps_its_stories_and_says_how_far_it_is(told, tmp_path, capsys):
    replacement, graph, stories = told
    kept = tlc.explain_heads(replacement, graph, 2, heads=2, progress=True)
    shown = capsys.readouterr().err
    assert "which heads" in shown and "why heads look" in shown and "2/2" in shown
    assert [(s["source"], s["target"]) for s in kept.head_stories] == strongest_edges(graph, 2)
    assert kept.head_stories[0]["heads"] == story_data(graph, stories[0])["heads"]
    more = tlc.explain_heads(replacement, kept, [(stories[2].source, stories[2].target)], heads=0)
    assert len(more.head_stories) == 3 and more.head_stories[:2] == kept.head_stories
    assert more.head_stories[2]["heads"] and not any("pairs" in head for head in more.head_stories[2]["heads"])
    assert tlc.load_graph(kept.save(tmp_path / "a.graph.safetensors")).head_stories == kept.head_stories
    small = kept.prune(node_threshold=0.4)
    left = set(zip(small.edges.source, small.edges.target, strict=True))
    assert all(((s["source"], s["target"]) in left) == (s in small.head_stories) for s in kept.head_stories)
    tlc.box_ablations(replacement, graph, progress=True)
    assert "intervening" in capsys.readouterr().err


def test_the_next_best_position_is_compared_with(told):
    replacement, graph, stories = told
    assert [len(story.scores) for story in stories] == [2, 2, 2]
    for story in stories:
        for qk, weight, (instead, other) in zip(story.scores, story.attention, story.instead, strict=True):
            assert 1 >= weight > 0 and other > 0 and instead.baseline_key not in (qk.key, 0)
            beside = tlc.qk_attribution(replacement, graph, qk.layer, qk.head, qk.query, instead.baseline_key)
            assert instead.score == pytest.approx(qk.score - beside.score, abs=1e-4)
            # Softmax: equal scores up to the difference mean weights in its exponential's ratio (no soft cap here).
            assert weight / other == pytest.approx(2.718281828**instead.score, rel=1e-2)


def test_an_edge_that_is_not_there_has_no_story(told):
    replacement, graph, _ = told
    with pytest.raises(TargetError, match="no edge from token@8 to L0/"):
        target = graph.nodes.query("kind == 'feature' and layer == 0 and position < 8").id.iloc[0]
        edge_stories(replacement, graph, [("token@8", target)])


def test_a_score_can_be_seen_in_a_notebook(told, tmp_path):
    qk = told[2][0].scores[0]
    assert qk.plot(tmp_path / "score.svg").read_text().startswith("<?xml")
    assert qk.terms.query_source.iloc[0] in qk._repr_html_() and "score" in qk.title


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    done = command(
        "trace",
        "w1 w2 w3",
        "--model",
        tiny_folder("gemma3"),
        "--max-nodes",
        40,
        "--out",
        "answer",
        "--heads",
        cwd=folder,
    )
    return folder, done


def test_trace_can_say_which_heads_carried_the_strongest_edges(traced):
    _, done = traced
    assert done.exit_code == 0, done.stderr
    assert (
        done.stdout.count("direct effect ") == 3 and "part of the score" in done.stdout and "looks from" in done.stdout
    )


def test_heads_explains_one_edge(traced):
    folder, _ = traced
    graph = tlc.load_graph(folder / "answer.graph.safetensors")
    source, target = strongest_edges(graph, 1)[0]
    done = command(
        "heads",
        "answer.graph.safetensors",
        f"{source} > {target}",
        "--model",
        tiny_folder("gemma3"),
        "--json",
        cwd=folder,
    )
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["source"], facts["target"]) == (source, target) and len(facts["heads"]) > 3
    assert sum("pairs" in head for head in facts["heads"]) == 3


def test_rows_of_the_table_sum_to_the_edge_however_many_are_left_out(told):
    _, graph, stories = told
    for story in stories:
        for top in (2, 4, 10, 100):
            facts = json.loads(json.dumps(story_data(graph, story, top=top)))
            # as versions before wrote it
            earlier = {key: value for key, value in facts.items() if key != "other_heads"}
            for told_of in (facts, earlier):
                rows = loading_rows(told_of)
                left_out = len(facts["heads"]) > 5 or (top < 5 and facts["other_heads"] != 0)
                assert rows[-1][0] == "other chains" and (not left_out or "other heads" in dict(rows))
                assert facts["residual"] + sum(value for _, value in rows) == pytest.approx(facts["weight"], rel=1e-4)


def test_rows_of_a_model_with_more_heads_than_are_listed_sum_to_the_edge():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        graph = tlc.attribute(replacement, "the capital of the state containing Dallas is", progress=False)
        stories = edge_stories(replacement, graph, strongest_edges(graph, 5), heads=0)
    assert len(stories) == 5
    for story in stories:
        facts = story_data(graph, story)
        assert sum(loading != 0 for loading in story.paths.heads.values()) > len(facts["heads"]) == 10
        rows = loading_rows(facts)
        assert facts["residual"] + sum(value for _, value in rows) == pytest.approx(facts["weight"], rel=1e-6)
        named = (
            facts["residual"]
            + facts["rest"]
            + sum(h["loading"] for h in facts["heads"])
            + sum(v for _, v in facts["chains"])
        )
        assert (
            named + facts["other_heads"] == pytest.approx(facts["weight"], rel=1e-6) != pytest.approx(named, rel=1e-6)
        )


def test_heads_takes_model_and_transcoders_that_the_graph_names(tmp_path):
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        tlc.attribute(replacement, "Dallas is in", progress=False).save(tmp_path / "a.graph.safetensors")
    done = command("heads", tmp_path / "a.graph.safetensors", "token@1 > logit:0")
    assert done.exit_code == 0 and "token@1 “Dallas” → logit:0" in done.stdout
    wrong = [("token@9 > logit:0", "has no node 'token@9'"), ("logit:0 > token@1", "no edge from logit:0 to token@1")]
    for edge, words in wrong:
        done = command("heads", tmp_path / "a.graph.safetensors", edge)
        assert done.exit_code == 1 and words in done.stderr.splitlines()[-1]


def test_an_edge_that_cannot_be_read_is_one_clear_line(tmp_path):
    done = command("heads", "answer.graph.safetensors", "token@1", cwd=tmp_path)
    assert done.exit_code == 1 and "SOURCE > TARGET" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_word_is_explained_with_all_that_stands_there(told):
    replacement, graph, _ = told
    edges, position = graph._edges, graph._nodes.position
    target = graph.node_ids.index("logit:0")
    words = sorted(set(position[edges.source[edges.target == target]].tolist()) - {int(position[target])})[:3]
    for word, story in zip(words, word_stories(replacement, graph, words, heads=1), strict=True):
        here = (edges.target == target) & (position[edges.source] == word)
        assert story.source == f"@{word}" and story.weight == pytest.approx(float(edges.weight[here].sum()), rel=1e-5)
        parts = story.paths
        whole = parts.residual + sum(parts.heads.values()) + sum(value for _, value in parts.chains) + parts.rest
        assert whole == pytest.approx(story.weight, rel=1e-4, abs=1e-6)
    with pytest.raises(TargetError, match="no edge leads from position 99"):
        word_stories(replacement, graph, [99])


def test_the_edges_explained_lead_into_the_answer_and_never_from_the_start(told):
    replacement, graph, _ = told
    skipped = graph.skipped_positions()
    for source, target in strongest_edges(graph, 20):
        assert target.startswith("logit:") and int(source.rpartition("@")[2]) not in skipped
