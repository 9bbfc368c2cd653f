"""The notebooks run as they are, in a kernel, and still say what their committed outputs say."""

import base64
import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import need
from tests.notebook_outputs import difference, shown

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
KernelManager = pytest.importorskip("jupyter_client").KernelManager

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NAMES = ("quickstart", "two_hop", "interventions", "multilingual", "addition", "attention", "why_this")
ON_SMOLLM2 = ("quickstart", "attention", "why_this")
MAX_BYTES = 400_000


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def kernel():
    """One process for all notebooks: importing torch and TransformerLens takes longer than most of them."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # the offline way
    yield manager
    manager.shutdown_kernel(now=True)


def run(notebook, kernel):
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=600)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()


def as_new(folder):
    """A cell after which the kernel knows no name, works in ``folder`` and computes gradients, as one just started."""
    return f"""
import os, sys
if "torch" in sys.modules:
    sys.modules["torch"].set_grad_enabled(True)
os.chdir({str(folder)!r})
get_ipython().reset(new_session=True)
"""


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs_and_says_what_is_committed(name, kernel, tmp_path):
    if name in ON_SMOLLM2:
        from tl_circuits.models import PACKAGED

        model = PACKAGED["smollm2-135m"]
        need(model.installed or model.folder.is_dir(), model.command)
    committed, fresh = read(name), read(name)
    run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(as_new(tmp_path))]), kernel)
    run(fresh, kernel)
    for number, (old, new) in enumerate(zip(committed.cells, fresh.cells, strict=True)):
        if old.cell_type == "code":
            differs = difference(shown(old), shown(new))
            assert differs is None, (
                f"cell {number} of {name}.ipynb: {differs}. Is the notebook to be run and committed again?"
            )
    assert not list(tmp_path.iterdir())


def test_a_notebook_finds_no_name_that_another_left(kernel, tmp_path):
    cells = [[as_new(tmp_path), "left = 1"], [as_new(tmp_path), "assert 'left' not in globals()"]]
    for sources in cells:
        run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), kernel)


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_starts_with_a_badge_and_an_install_and_ends_with_what_could_fool_you(name):
    from docs.make.address import BADGE, BY_HAND

    notebook = read(name)
    nbformat.validate(notebook)
    first, install, *_, last = notebook.cells
    # A badge opens this notebook; without an address of the project there is a line in its place, not a badge to a
    # front page.
    assert (f"{BADGE}(https://colab.research.google.com/github/" in first.source) != (BY_HAND in first.source)
    assert (
        install.cell_type == "code" and 'find_spec("tl_circuits") is None' in install.source and install.outputs == []
    )
    assert "## What could fool you" in last.source
    assert 8 <= len(notebook.cells) <= 15
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_and_have_pictures(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)
    pictures = [o.data["image/png"] for o in outputs if o.output_type != "stream" and "image/png" in o.data]
    assert len(pictures) >= 2 and all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert "/tmp" not in json.dumps(outputs) and "/home" not in json.dumps(outputs)


def test_notebooks_carry_the_projects_address_and_no_other():
    from docs.make.address import ROOT, address, notebooks, with_address

    paths = notebooks()
    assert len(paths) == 12
    for path in paths:
        text, place = path.read_text(), path.relative_to(ROOT).as_posix()
        assert with_address(text, place, address()) == text, "make address"
        assert "OWNER" not in text
        moved = with_address(text, place, "https://github.com/me/mine")
        assert moved.count(" @ git+https://github.com/me/mine") == 1
        assert moved.count(f"/github/me/mine/blob/main/{place})") == (path.parent == FOLDER)
        assert with_address(moved, place, "") == with_address(text, place, "")
        json.loads(moved)


@pytest.mark.parametrize("line", ["", "url =", "url = https://github.com/me/mine/", "url = somewhere"])
def test_the_address_is_that_of_the_settings(line, tmp_path):
    from docs.make.address import address

    (tmp_path / "setup.cfg").write_text(f"[metadata]\nname = x\n{line}\n")
    if "somewhere" in line:
        with pytest.raises(ValueError, match="https://github.com/OWNER/NAME"):
            address(tmp_path / "setup.cfg")
    else:
        assert address(tmp_path / "setup.cfg") == ("https://github.com/me/mine" if "mine" in line else "")


def test_the_index_names_every_notebook_and_no_other():
    linked = re.findall(r"\]\((\w+)\.ipynb\)", (FOLDER / "index.md").read_text())
    assert sorted(linked) == sorted(NAMES) == sorted(p.stem for p in FOLDER.glob("*.ipynb"))


def test_other_numbers_and_names_are_noticed_and_rounding_is_not():
    said = "Austin falls from 99.7% to 57.9%, KL 0.553, 53 features, error 1e-07, L1/F280@7"
    assert difference(said, said.replace("57.9%", "58.0%").replace("0.553", "0.552").replace("1e-07", "4e-07")) is None
    for old, new in (
        ("57.9%", "61.0%"),
        ("0.553", "0.6"),
        ("53", "60"),
        ("F280", "F281"),
        ("Austin", "Dallas"),
        (", L1/F280@7", ""),
        ("1e-07", "1e-03"),
    ):
        assert difference(said, said.replace(old, new)) is not None
