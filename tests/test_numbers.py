"""Numbers from frames, NumPy and torch do wherever whole numbers do."""

import numpy as np
import pytest
import torch

import tl_circuits as tlc
from tests.tiny import own_bridge, prompt, transcoders
from tl_circuits.errors import ArgumentError, EditError, TargetError
from tl_circuits.hooks import real, whole, wholes

KINDS = {
    "numpy": np.int64,
    "small numpy": np.int16,
    "tensor": torch.tensor,
    "small tensor": lambda n: torch.tensor(n, dtype=torch.int32),
    "numpy without dimension": np.array,
    "float of a frame": np.float64,
    "tensor of a float": lambda n: torch.tensor(float(n)),
}


@pytest.fixture(scope="module")
def traced():
    model = own_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_number_of_any_kind_is_one(kind):
    made = whole(KINDS[kind](3))
    assert made == 3 and type(made) is int
    assert type(real(KINDS[kind](3))) is float


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(True),
        torch.tensor(True),
        1.5,
        np.float32(1.5),
        torch.tensor(1.5),
        "3",
        None,
        [3],
        np.array([3]),
        torch.tensor([3]),
        float("nan"),
        float("inf"),
        1j,
        object(),
    ],
)
def test_what_is_no_whole_number_is_refused_in_one_sentence(value):
    with pytest.raises(ArgumentError, match="must be a whole number, got") as error:
        whole(value)
    assert len(str(error.value)) < 100
    with pytest.raises(TargetError, match="the position must be a whole number"):
        whole(value, "the position", TargetError)


def test_lists_of_any_kind_are_tuples_of_ints():
    for values in (
        [1, 2],
        (np.int64(1), 2),
        range(1, 3),
        np.array([1, 2]),
        torch.tensor([1, 2]),
        [torch.tensor(1), 2.0],
    ):
        assert wholes(values) == (1, 2) and all(type(v) is int for v in wholes(values))
    for values in ("12", {1: 2}, 3, np.array([[1]]), [1, True]):
        with pytest.raises(ArgumentError):
            wholes(values)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_numbers_of_any_kind_are_the_same_edits(traced, kind):
    replacement, _ = traced
    n = KINDS[kind]
    made = [
        tlc.Set(n(1), n(2), n(5), value=n(4)),
        tlc.Scale(n(0), slice(n(2), n(4)), [n(3), n(6)], factor=n(2)),
        tlc.ErrorEdit(n(2), [n(1), n(-1)], n(0)),
        tlc.TokenEdit(n(3), n(0)),
        tlc.PatternEdit(n(1), n(0), n(4), n(2), n(1)),
    ]
    plain = [
        tlc.Set(1, 2, 5, value=4.0),
        tlc.Scale(0, slice(2, 4), (3, 6), factor=2.0),
        tlc.ErrorEdit(2, (1, -1), 0.0),
        tlc.TokenEdit(3, 0.0),
        tlc.PatternEdit(1, 0, 4, 2, 1.0),
    ]
    assert made == plain and repr(made) == repr(plain)
    runs = [tlc.intervene(replacement, prompt(), edits) for edits in (made, plain)]
    assert runs[0].logits.equal(runs[1].logits) and runs[0].kl() > 0


def test_several_positions_and_features_come_as_arrays_columns_and_tensors(traced):
    replacement, graph = traced
    some = graph.nodes[(graph.nodes.kind == "feature") & (graph.nodes.layer == 1)].drop_duplicates("feature")
    expected = tlc.intervene(replacement, prompt(), tlc.Ablate(1, (2, 3), tuple(some.feature.tolist()))).logits
    for features in (some.feature, some.feature.to_numpy(), torch.tensor(some.feature.to_numpy())):
        for places in (np.array([2, 3]), torch.tensor([2, 3]), [np.int64(2), torch.tensor(3)]):
            assert tlc.intervene(replacement, prompt(), tlc.Ablate(1, places, features)).logits.equal(expected)


@pytest.mark.parametrize(
    "edit",
    [
        tlc.Ablate(True, 1, 2),
        tlc.Ablate(1, True, 2),
        tlc.Ablate(1, 1, True),
        tlc.Ablate(1.5, 1, 2),
        tlc.Ablate(1, 1.5, 2),
        tlc.Ablate(1, 1, 2.5),
        tlc.Ablate("1", 1, 2),
        tlc.Ablate(1, "1", 2),
        tlc.Ablate(1, 1, "F2"),
        tlc.Ablate(1, 1, None),
        tlc.Ablate(1, [1, 1.5], 2),
        tlc.Ablate(1, slice(0.5, 2), 2),
        tlc.Ablate(None, 1, 2),
        tlc.Set(1, 1, 2, value=True),
        tlc.Set(1, 1, 2, value="x"),
        tlc.Set(1, 1, 2, value=torch.ones(2)),
        tlc.PatternEdit(1, 0.5, 3, 1, 0.0),
        tlc.PatternEdit(True, 0, 3, 1, 0.0),
        tlc.ScoreEdit(1, 0, [3], 1, 0.0),
    ],
)
def test_edits_of_what_is_no_number_are_refused_by_the_run(traced, edit):
    with pytest.raises(EditError):
        tlc.intervene(traced[0], prompt(), edit)


def test_rows_of_a_frame_serve_without_int(traced):
    replacement, graph = traced
    row = graph.nodes[(graph.nodes.kind == "feature") & (graph.nodes.layer == 2)].iloc[0]
    upcast = graph.nodes.loc[row.name, ["layer", "position", "feature", "activation"]].astype(float)
    assert type(row.layer) is not int
    target = tlc.FeatureTarget(row.layer, row.position, row.feature)
    assert target == tlc.FeatureTarget(upcast.layer, upcast.position, upcast.feature)
    assert (
        tlc.attribute(replacement, prompt(), target, max_nodes=np.int64(20), progress=False).completeness_error() < 1e-4
    )
    runs = [
        tlc.intervene(replacement, prompt(), tlc.Scale(r.layer, r.position, r.feature, factor=r.activation)).logits
        for r in (row, upcast, graph.nodes.loc[[row.name]].itertuples().__next__())
    ]
    assert runs[0].equal(runs[1]) and runs[0].equal(runs[2])
    logits = graph.nodes[graph.nodes.kind == "logit"]
    by_frame = tlc.attribute(
        replacement, prompt(), logits.feature, position=logits.position.iloc[0], max_nodes=20, progress=False
    )
    assert by_frame.info.target_names == graph.info.target_names
    for one in (logits.feature.iloc[1], torch.tensor(logits.feature.iloc[1]), [logits.feature.iloc[1]]):
        assert (
            tlc.attribute(replacement, prompt(), one, max_nodes=5, progress=False).info.target_names
            == graph.info.target_names[1:2]
        )
    difference = tlc.LogitDifference(logits.feature.iloc[0], torch.tensor(logits.feature.iloc[1]))
    assert type(difference.positive) is int and type(difference.negative) is int
    result = tlc.intervene(replacement, prompt(), [], layers=graph.nodes.layer[graph.nodes.kind == "feature"].unique())
    assert set(result.activations.layer) == {0, 1, 2}
    assert (
        result.logit_difference(difference.positive, logits.feature.iloc[1])[0]
        == result.logit_difference(*logits.feature.tolist()[:2])[0]
    )
    assert len(result.top(np.int64(3)))


def test_nodes_are_named_by_rows_indices_and_columns(traced):
    replacement, graph = traced
    features = graph.nodes[graph.nodes.kind == "feature"]
    assert (
        tlc.edits_of(graph, features.index[:3])
        == tlc.edits_of(graph, features.id.head(3))
        == tlc.edits_of(graph, [0, np.int64(1), torch.tensor(2)])
    )
    assert tlc.edits_of(graph, features.id.iloc[0]) == tlc.edits_of(graph, np.int64(0)) == tlc.edits_of(graph, [0])
    labelled = tlc.label_features(replacement, graph, features.index[:2])
    assert set(labelled.labels) == {0, 1}
    edge = graph.edges[graph.edges.target == "logit:0"].iloc[-1]
    source, target = (graph.node_numbers[end] for end in (edge.source, edge.target))
    by_id, by_number = (
        tlc.head_loadings(replacement, graph, edge.source, edge.target),
        tlc.head_loadings(replacement, graph, np.int64(source), torch.tensor(target)),
    )
    assert by_id.equals(by_number)
    head = by_id[by_id.kind == "head"].iloc[0]
    qk = tlc.qk_attribution(
        replacement, graph, head.layer, head["head"], torch.tensor(-1), np.int64(1), top=np.int64(3)
    )
    assert (qk.layer, qk.head) == (head.layer, head["head"]) and type(qk.layer) is int
    told = tlc.explain_heads(replacement, graph, graph.edges.tail(1)[["source", "target"]].to_numpy().tolist())
    assert len(told.head_stories) == 1
    report = tlc.faithfulness(
        replacement, graph, np.int64(0), groups={"two": features.id.head(2), "one": torch.tensor([0])}, freezes=["all"]
    )
    assert set(report.effects.source) == {"two", "one"}
    assert (
        len(
            tlc.feature_patching(
                replacement, prompt(), prompt(seed=4), lambda logits: logits[5], layers=np.array([1]), limit=np.int64(2)
            )
        )
        == 2
    )
    assert tlc.generate(replacement, prompt(), max_new_tokens=np.int64(1))
