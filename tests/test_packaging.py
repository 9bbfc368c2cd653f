"""What gets installed."""

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tl_circuits
from tests.conftest import need

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    need(importlib.util.find_spec("setuptools") is not None, "setuptools")
    out = tmp_path_factory.mktemp("dist")
    code = (
        "import sys, setuptools.build_meta as b; out = sys.argv[1]; sys.argv = ['setup.py']; "
        "b.build_sdist(out); b.build_wheel(out)"
    )
    copy = tmp_path_factory.mktemp("source") / "tree"
    files = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_hooks_under_tl_circuits_and_nothing_beside(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert "tl_circuits/hooks/attach.py" in names and "tl_circuits/py.typed" in names
    assert "tl_circuits/view/page/page.js" in names
    assert {
        "tl_circuits/course/notebooks/fact_neurons.ipynb",
        "tl_circuits/course/recorded/fact_effects.safetensors",
    } <= set(names)
    assert {"tl_circuits/feature_labels/text/facts.txt", "tl_circuits/feature_labels/text/LICENCE.txt"} <= set(names)
    assert "tl_circuits/builtin/tiny_facts/transcoders.safetensors" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tl_circuits"}


def test_every_module_of_the_source_is_in_the_wheel(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tl_circuits").rglob("*.py")}
    sources |= {f"tl_circuits/hooks/{p.name}" for p in (ROOT / "hooks").glob("*.py")}
    assert sources <= names


def test_the_wheel_works_from_a_folder_of_its_own(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    code = "import tl_circuits, tl_circuits.hooks as h; print(tl_circuits.__file__); print(h.__file__)"
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path += {sys.path!r}; {code}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 and all(str(tmp_path) in line for line in done.stdout.split())


def test_the_sdist_can_be_built_again(built):
    names = tarfile.open(built[1]).getnames()
    assert any(name.endswith("/hooks/attach.py") for name in names)
    assert any(name.endswith("/setup.cfg") for name in names)


def test_nothing_called_hooks_is_importable_at_top_level(tmp_path):
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('hooks') is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_everything_public_exists_and_hooks_import_nothing_of_ours():
    assert all(hasattr(tl_circuits, name) for name in tl_circuits.__all__)
    for path in (ROOT / "hooks").glob("*.py"):
        text = path.read_text()
        assert "import tl_circuits" not in text and "from tl_circuits" not in text, path.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "Usage"),
        (["demo", "--out", "there"], "exists already"),
        (["trace", "x", "--out", "there"], "exists already"),
        (["trace", "x", "--out", "no/where"], "does not exist"),
        (["trace", "x", "--more", "--out", "new"], "without --more first"),
    ],
)
def test_help_and_early_refusals_do_not_wait_for_torch(arguments, said, tmp_path):
    (tmp_path / "there.html").touch()
    code = """
import sys
from tl_circuits.cli.main import main
try:
    main()
except SystemExit:
    sys.exit(2 * ("torch" in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0 and said in done.stdout + done.stderr, done.stderr


def test_public_names_mean_the_same_whatever_was_imported_before():
    """A folder of the package takes the place of a function of its name as soon as something in it is imported."""
    folders_and_modules = {p.stem for p in (ROOT / "tl_circuits").iterdir() if p.suffix == ".py" or p.is_dir()} | {
        "hooks"
    }
    assert not folders_and_modules & set(tl_circuits.__all__)


@pytest.mark.parametrize(("old", "new"), list(tl_circuits._RENAMED.items()))
def test_a_former_name_still_works_and_says_the_new_one(old, new):
    with pytest.warns(FutureWarning, match=new):
        assert getattr(tl_circuits, old) is getattr(tl_circuits, new)
