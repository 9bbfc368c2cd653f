"""Examples in docstrings: everything in the reference has one, and all of them run and print what they say."""

import doctest
import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import tl_circuits as tlc
from tests.tiny import hook_state
from tl_circuits import hooks

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "the capital of the state containing Dallas is"

# Names of the reference that cannot have an example, and why.
WITHOUT_EXAMPLE = {
    "tl_circuits.AttributionGraph.upload": "needs an account at Neuronpedia",
}

# Names of the reference that still need an example. Write one, then take the name out; never add a name.
STILL_WITHOUT_EXAMPLE = set()


def look_up(name):
    """The class or function of a dotted name; all but its last part is a module."""
    module, _, last = name.rpartition(".")
    home = f"tl_circuits.{tlc._HOMES[last]}" if module == "tl_circuits" else module
    return getattr(import_module(home), last)


def in_reference():
    """Every name of the reference but the errors (each says when it is raised), and every method of
    AttributionGraph."""
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs/reference").glob("*.md")))
    found = {name: look_up(name) for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    found = {name: it for name, it in found.items() if not (inspect.isclass(it) and issubclass(it, Exception))}
    for name, method in vars(tlc.AttributionGraph).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            found[f"tl_circuits.AttributionGraph.{name}"] = getattr(tlc.AttributionGraph, name)
    return found


def modules():
    """Every module of the package; ``tl_circuits.hooks`` lies in a folder of its own."""
    for package in (tlc, hooks):
        yield from pkgutil.walk_packages(package.__path__, f"{package.__name__}.")


def examples():
    """Every docstring of the package with an example in it, in the order of their names.

    Examples of what is not in the reference are for those who read the code: they know the names of their module.
    """
    finder, public = doctest.DocTestFinder(), list(in_reference().values())
    found = {}
    for module in modules():
        source = Path(module.module_finder.find_spec(module.name).origin)
        if source.suffix != ".py" or ">>>" not in source.read_text():
            continue
        for name, thing in vars(import_module(module.name)).items():
            if (inspect.isroutine(thing) or inspect.isclass(thing)) and thing.__module__ == module.name:
                known = {} if thing in public else vars(import_module(module.name))
                made = finder.find(thing, f"{module.name}.{name}", module=False, globs=dict(known))
                found |= {example.name: example for example in made if example.examples}
    return [found[name] for name in sorted(found)]


@pytest.fixture(scope="module")
def start():
    """The names that examples start from, as docs/reference/index.md lists them; ``folder`` is each example's own."""
    model, transcoders = tlc.load_model("tiny-facts"), tlc.load_transcoders("tiny-facts")
    with tlc.attach(model, transcoders) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=60)
        yield {
            "tlc": tlc,
            "model": model,
            "transcoders": transcoders,
            "replacement": replacement,
            "prompt": PROMPT,
            "graph": graph,
        }


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name.removeprefix("tl_circuits."))
def test_every_example_prints_what_its_docstring_says(example, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, report = hook_state(start["model"]), []
    example.globs = {**start, "folder": tmp_path, **example.globs}
    failed = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=report.append).failed
    assert not failed, "".join(report)
    assert hook_state(start["model"]) == before, "the example leaves hooks on the shared model"


def test_everything_in_the_reference_has_an_example():
    missing = {name for name, thing in in_reference().items() if ">>>" not in (inspect.getdoc(thing) or "")}
    assert missing == set(WITHOUT_EXAMPLE) | STILL_WITHOUT_EXAMPLE


def test_the_front_page_of_the_reference_lists_what_examples_start_from(start):
    page = (ROOT / "docs/reference/index.md").read_text()
    sentence = next(part for part in page.split("\n\n") if part.startswith("Examples start from"))
    assert set(re.findall(r"`(\w+)`", sentence)) == {*start, "folder"}
