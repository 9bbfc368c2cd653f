"""The floors of the package import downwards only, and nothing imports itself over others (docs/contributing.md)."""

from docs.make.house import FLOORS, circles, imports, upward
from tl_circuits.support.outputs import output, output_names


def test_no_modules_import_each_other_in_a_circle():
    assert circles(imports()) == []


def test_no_module_imports_from_a_floor_above_its_own():
    assert upward(imports()) == []


def test_every_module_stands_on_a_floor():
    rooms = {room for floor in FLOORS for room in floor}
    assert {module.partition(".")[0] for module in imports()} == rooms


def test_a_circle_and_an_import_upwards_are_seen():
    made = {"graph.a": {"graph.b"}, "graph.b": {"graph.c"}, "graph.c": {"graph.a", "view.page"}, "view.page": set()}
    assert circles(made) == [["graph.a", "graph.b", "graph.c"]]
    assert upward(made) == [("graph.c", "view.page")]


def test_rooms_of_one_floor_do_not_import_each_other_both_ways():
    assert upward({"attention.qk": set(), "interventions.faithfulness": {"attention.qk"}}) == []
    both = {
        "attention.qk": {"interventions.intervene"},
        "interventions.faithfulness": {"attention.qk"},
        "interventions.intervene": set(),
    }
    assert upward(both) == [("attention.qk", "interventions.intervene"), ("interventions.faithfulness", "attention.qk")]


def test_every_output_is_a_function():
    assert all(callable(output(name)) for name in output_names())
    assert {"html", "figure", "neuronpedia", "upload"} <= set(output_names())
