"""The course: right answers get all points, typical mistakes lose what they should, nothing a notebook does is
fatal."""

import json
import os
import sys

import pytest
import torch

from tests.course_notebooks import filled, graded, hand_in, solution
from tests.tiny import command
from tl_circuits.course.assignments import ASSIGNMENTS, find_assignment, open_submission, start
from tl_circuits.course.deadline import Deadline
from tl_circuits.course.ended import in_words
from tl_circuits.course.questions import Part, Question, open_lab, tensor
from tl_circuits.course.report import check
from tl_circuits.course.student_code import run_cells
from tl_circuits.errors import CourseError, OutputError

ON_TINY_FACTS = [a for a in ASSIGNMENTS if a.model == "tiny-facts"]  # tests/test_course_fact_neurons.py has the fifth


def run_notebook(notebook):
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # the notebooks switch gradients off
        return run_cells(list(enumerate(cells, 1)), lambda number: None)


@pytest.fixture(scope="module")
def starters():
    """What each starter defines, and the failures of its cells."""
    return {a.number: run_notebook(filled(a, {})) for a in ON_TINY_FACTS}


def points(assignment, namespace, lab=None):
    return graded(assignment.questions, namespace, lab)


@pytest.mark.parametrize("assignment", ON_TINY_FACTS, ids=lambda a: a.name)
def test_the_reference_solution_scores_full_marks_and_its_notebook_runs(assignment):
    namespace, failures = run_notebook(filled(assignment, solution(assignment)))
    assert not failures
    marks = points(assignment, namespace)
    assert {name: m.earned for name, m in marks.items()} == {q.function: q.points for q in assignment.questions}
    assert sum(m.points for m in marks.values()) == 20 and not any(m.remarks for m in marks.values())


@pytest.mark.parametrize("assignment", ON_TINY_FACTS, ids=lambda a: a.name)
def test_a_starter_scores_zero_and_is_not_called_a_crash(assignment, starters):
    namespace, failures = starters[assignment.number]
    text = "".join("".join(cell["source"]) for cell in filled(assignment, {})["cells"])
    assert all(f"def {q.function}(" in text for q in assignment.questions)
    marks = points(assignment, namespace).values()
    assert all(m.earned == 0 and m.remarks == ("not written yet.",) for m in marks)
    assert failures and all(f.unwritten or f.follows for f in failures)


MISTAKES = {
    "batch axis kept": (
        1,
        [("activations_at", "cache[name][0]", "cache[name]", "shape (1, 4, 96)")],
        {"activations_at": 4, "reconstruction_error": 4, "ablate": 4},
    ),
    "encoder bias forgotten": (
        1,
        [("pre_activations", " + transcoder.b_enc", "", "add `b_enc`")],
        {"pre_activations": 2, "feature_activations": 4, "reconstruction_error": 4, "ablate": 3},
    ),
    "ReLU for JumpReLU": (
        1,
        [("feature_activations", "(pre > transcoder.threshold) & ", "", "even if its pre-activation is positive")],
        {"feature_activations": 2, "reconstruction_error": 4},
    ),
    "decoder bias forgotten, ablated everywhere": (
        1,
        [
            ("reconstruction_error", " + transcoder.b_dec", "", "`b_dec` is part"),
            (
                "ablate",
                "output[:, position] -= written",
                "output -= feature_activations(transcoder, x)[:, [feature]] * transcoder.W_dec[feature]",
                "only at the one asked for",
            ),
        ],
        {"reconstruction_error": 2, "ablate": 1},
    ),
    "hook left behind": (
        1,
        [
            (
                "ablate",
                'model.run_with_hooks(prompt, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", without)])',
                '(model.reset_hooks(), model.add_hook(f"blocks.{layer}.hook_mlp_out", without), model(prompt))[2]',
                "a hook stayed",
            )
        ],
        {"ablate": 1},
    ),
    "norm's weight forgotten": (
        2,
        [("read_direction", " * model.blocks[layer].ln2.weight", "", "weight of `ln2` is missing")],
        {"read_direction": 4, "trace": 2},
    ),
    "last position's scale, stream forgotten, output for error": (
        2,
        [
            ("read_direction", "[0, position]", "[0, -1]", "not the last"),
            ("through_attention", "gradient + at_input", "at_input", "residual stream is missing"),
            ("effects_on", "error[position] @", "output[position] @", "errors:"),
        ],
        {"read_direction": 2, "through_attention": 2, "effects_on": 2, "trace": 2},
    ),
    "pattern turned round": (
        2,
        [("through_attention", "hqk,qd->hkd", "hkq,qd->hkd", "back to keys")],
        {"through_attention": 4, "trace": 2},
    ),
    "mean for sum, direct neighbours, contradicting edits, trivial experiments": (
        3,
        [
            ("state_features", "own.sum(0)\n", "own.mean(0)\n", "a quarter"),
            ("between", "while frontier:", "for _ in range(1):", "any number of steps"),
            ("swap_edits", " if where not in new", "", "must not be ablated too"),
            ("share_swapped", "!= word", "!= ''", "prove nothing"),
        ],
        {"state_features": 2, "between": 2, "swap_edits": 2, "share_swapped": 2},
    ),
    "sign, mean logit, centred variance, cancelling edges, largest for sum": (
        4,
        [
            ("predicted", "(-row.weight)", "row.weight", "the sign"),
            ("measured", " - change.mean()", "", "subtract the mean"),
            ("agreement", "(measured**2)", "((measured - measured.mean())**2)", "no mean taken off"),
            ("shown", ".abs()", "", "absolute values"),
            ("worst_targets", ".sum()", ".max()", "several sources"),
        ],
        {"predicted": 1, "measured": 3, "agreement": 2, "shown": 2, "worst_targets": 2},
    ),
    "freeze not passed on": (
        4,
        [("measured", "freeze=freeze", "freeze='attention'", "pass `freeze` on")],
        {"measured": 4},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_typical_mistakes_lose_their_points_and_get_hints(name, starters):
    number, mistakes, lost = MISTAKES[name]
    assignment = ASSIGNMENTS[number - 1]
    functions = solution(assignment)
    for function, right, wrong, _ in mistakes:
        assert right in functions[function]
        functions[function] = functions[function].replace(right, wrong)
    namespace = dict(starters[number][0])
    exec("\n\n".join(functions.values()), namespace)
    marks = points(assignment, namespace)
    assert {f: m.points - m.earned for f, m in marks.items() if m.earned < m.points} == lost
    for function, _, _, hint in mistakes:
        assert hint in " ".join(marks[function].remarks)


@pytest.fixture(scope="module")
def lab():
    return open_lab()


def answers(lab, *returned):
    """A question that asks for a tensor of three, and then for one of two."""

    def both(student, lab):
        yield Part(1, bool(tensor(student(3), (3,), "pos").sum() == 3), "a hint")
        yield Part(1, bool(tensor(student(2), (2,), "pos").sum() == 2), "another")

    return graded([Question("f", "a task", 2, both)], dict(zip(["f"], returned, strict=False)), lab)["f"]


@pytest.mark.parametrize(
    ("function", "earned", "remark"),
    [
        (lambda n: torch.ones(n), 2, ""),
        (lambda n: torch.zeros(n) + (n == 3), 1, "another"),
        (lambda n: torch.ones(3), 1, "it returned shape (3,); expected (2,), that is [pos]."),
        (lambda n: None, 0, "it returned None (is a `return` missing?); expected a tensor [pos]."),
        (lambda n: [1.0], 0, "it returned a list; expected a tensor [pos]."),
        (lambda n: torch.ones(n) / 0, 0, "not finite (NaN or infinity)"),
        (lambda: torch.ones(3), 0, "it raised TypeError"),
        (lambda n: sys.exit(), 0, "it raised SystemExit"),
        (lambda n: torch.ones(n) if n == 3 else 1 / 0, 1, "it raised ZeroDivisionError: division by zero."),
        (7, 0, "`f` is int, not a function."),
    ],
)
def test_wrong_types_shapes_and_crashes_are_said_in_words_and_earlier_parts_count(function, earned, remark, lab):
    given = answers(lab, function)
    assert given.earned == earned and remark in " ".join(given.remarks)


def test_a_function_that_is_not_there_is_named(lab):
    assert answers(lab).remarks == ("the notebook defines no function `f`.",)


def test_crashes_name_cell_and_line_and_later_cells_still_run():
    cells = [
        "import sys\n%pip install x\n!ls",
        "a = 1\nb = [][0]",
        "def f(:",
        "sys.exit(3)",
        "def g():\n    return 1 / 0\n\ng()",
        "%%bash\nls",
        "c = a",
    ]
    seen = []
    namespace, failures = run_cells(list(enumerate(cells, 1)), seen.append)
    assert namespace["c"] == 1 and seen == list(range(1, 8))
    first, second, third, fourth = (f.text for f in failures)
    assert first == "IndexError: list index out of range (code cell 2, line 2: `b = [][0]`)"
    assert "SyntaxError" in second and "code cell 3, line 1" in second
    assert "SystemExit: 3 (code cell 4" in third and "(code cell 5, line 2: `return 1 / 0`)" in fourth


def test_a_cell_that_loops_is_stopped_and_the_rest_goes_on():
    cells = [
        "def f(n):\n    while True:\n        try:\n            n += 1\n        except Exception:\n            pass",
        "f(1)",
        "b = 2",
    ]
    namespace, failures = run_cells(list(enumerate(cells, 1)), lambda number: None, Deadline.after(1.0))
    assert namespace["b"] == 2
    (failure,) = failures
    assert "StillRunning: stopped after 0.5 s (code cell 1, line " in failure.text and not failure.unwritten


def test_a_function_that_loops_is_stopped_and_other_questions_are_checked(lab):
    def f(n):
        while True:
            pass

    def check_it(student, lab):
        yield Part(1, student(3) == 4, "a hint")

    questions = [Question(name, "a task", 1, check_it) for name in ("f", "g")]
    given = graded(questions, {"f": f, "g": lambda n: n + 1}, lab, Deadline.after(1.0))
    assert (given["f"].earned, given["g"].earned) == (0, 1) and "StillRunning" in given["f"].remarks[0]


@pytest.mark.parametrize(
    ("number", "loops", "right"),
    [
        (0, "pre_activations", ("feature_activations", "reconstruction_error", "ablate")),
        (0, "activations_at", ("reconstruction_error",)),
        (1, "through_attention", ("trace",)),
        (1, "effects_on", ("trace",)),
    ],
)
def test_a_function_that_loops_costs_no_points_of_those_that_call_it(number, loops, right, starters, lab):
    assignment = ASSIGNMENTS[number]
    namespace = dict(starters[assignment.number][0])
    exec("\n\n".join(solution(assignment).values()), namespace)
    exec(f"def {loops}(*_):\n    while True:\n        pass", namespace)
    asked = [q for q in assignment.questions if q.function in (loops, *right)]
    marks = graded(asked, namespace, lab, first=0.5)
    assert marks[loops].earned == 0 and "StillRunning" in marks[loops].remarks[0]
    assert all(marks[name].earned == marks[name].points for name in right)


def test_what_is_done_to_a_transcoder_reaches_no_other_question(starters, lab):
    functions = solution(ASSIGNMENTS[0])
    functions["pre_activations"] = (
        "def pre_activations(transcoder, x):\n    transcoder.W_enc.zero_()\n    return x @ transcoder.W_enc.T"
    )
    functions["feature_activations"] = functions["feature_activations"].replace(
        "pre_activations(transcoder, x)", "x @ transcoder.W_enc.T + transcoder.b_enc"
    )
    namespace = dict(starters[1][0])
    exec("\n\n".join(functions.values()), namespace)
    marks = points(ASSIGNMENTS[0], namespace, lab)
    assert {f: m.earned for f, m in marks.items() if m.earned < m.points} == {"pre_activations": 0}


def test_a_wrong_activation_function_is_not_called_an_ablation_at_all_positions(starters, lab):
    functions = solution(ASSIGNMENTS[0])
    functions["feature_activations"] = functions["feature_activations"].replace(
        "pre > transcoder.threshold", "pre > 4.0"
    )
    namespace = dict(starters[1][0])
    exec("\n\n".join(functions.values()), namespace)
    given = points(ASSIGNMENTS[0], namespace, lab)["ablate"]
    assert given.earned < given.points and not any("only at the one asked for" in remark for remark in given.remarks)


def test_only_the_first_of_cells_that_fail_for_one_reason_is_reported():
    cells = [
        "raise NotImplementedError('write me')\nx = 1",
        "y = x + 1",
        "y",
        "z",
        "z",
        "def f(\n    return 1",
        "f()",
        "1 / 0",
    ]
    _, failures = run_cells(list(enumerate(cells, 1)), lambda number: None)
    reported = [f.text for f in failures if not f.unwritten and not f.follows]
    assert [text.split(":")[0] for text in reported] == ["NameError", "SyntaxError", "ZeroDivisionError"]
    assert "'z'" in reported[0] and "code cell 4" in reported[0]


def test_what_a_library_has_not_implemented_is_no_unwritten_function():
    library = "import torch\ntorch.empty(2, device='meta').to('cpu')"
    _, (theirs, own) = run_cells([(1, library), (2, "raise NotImplementedError('write me')")], lambda number: None)
    assert theirs.text.startswith("NotImplementedError: ") and not theirs.unwritten and own.unwritten


def test_how_a_process_ended_is_said_in_words():
    assert in_words(-9) == "was ended by the system (SIGKILL, perhaps because memory ran out)"
    assert in_words(9) == "ended its process (exit code 9)"


def program(*arguments):
    return command("course", *arguments)


def test_start_and_check_in_a_process_of_its_own_whatever_the_notebook_does(tmp_path):
    made = program("start", "1", tmp_path / "mine")
    assert made.exit_code == 0 and os.listdir(tmp_path / "mine") == ["hooks_and_features.ipynb"]
    notebook = filled(ASSIGNMENTS[0], solution(ASSIGNMENTS[0]))
    # instead of the checker's cell
    notebook["cells"][-1]["source"] = "import tl_circuits.course.report as r\nr.check('.')"
    extra = [
        "print('x' * 100_000)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')",
        "input()",
        "boom = 1 / 0",
    ]
    notebook["cells"] += [{"cell_type": "code", "source": source} for source in extra]
    (tmp_path / "mine" / "hooks_and_features.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "mine" / "torch.py").write_text("raise RuntimeError('taken for torch')")
    done = program("check", tmp_path / "mine", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["earned"] == facts["points"] == 20
    itself, network, asked, crash = facts["remarks"]
    assert "cannot grade itself" in itself and "no network" in network and "EOFError" in asked
    assert (
        "ZeroDivisionError" in crash
        and "line 1: `boom = 1 / 0`" in crash
        and "Traceback" not in done.stdout + done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start", "6", "new"], "there is no assignment '6'; there are: 1 Hooks"),
        (["start", "1", ""], "exists already"),
        (["check", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_requests_are_one_clear_line(arguments, words, tmp_path):
    done = program(*arguments[:-1], tmp_path / arguments[-1])
    assert done.exit_code == 1 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_list_names_all_five():
    assert len(ASSIGNMENTS) == 5
    told = program("list").stdout
    assert all(f"{a.number}  {a.title}" in told for a in ASSIGNMENTS)


def test_notebooks_are_found_by_name_or_by_what_they_say_and_refused_in_words(tmp_path):
    folder = hand_in(ASSIGNMENTS[1], {}, tmp_path / "two")
    path = (folder / ASSIGNMENTS[1].starter.name).rename(folder / "Anna.ipynb")
    assert open_submission(folder).assignment == ASSIGNMENTS[1] == find_assignment("2")
    path.write_text(json.dumps({"cells": []}))
    with pytest.raises(CourseError, match="Rename it to its original name"):
        open_submission(path)
    for text, words in (("{", "is not a notebook"), ("[]", "of format 4"), ('{"cells": [1]}', "of format 4")):
        path.write_text(text)
        with pytest.raises(CourseError, match=words):
            open_submission(folder)
    (folder / "other.ipynb").write_text("{}")
    with pytest.raises(CourseError, match="several notebooks"):
        open_submission(folder)
    with pytest.raises(CourseError, match="no notebook"):
        open_submission(tmp_path)
    with pytest.raises(CourseError, match="more than 0"):
        check(folder, time_limit=0.0)
    with pytest.raises(OutputError, match="exists already"):
        start(ASSIGNMENTS[0], folder)
