"""The documentation: its site builds without a warning, its links lead somewhere, its code runs, its figures are
ours."""

import contextlib
import io
import logging
import re
import shlex
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

import tl_circuits as tlc
from docs.make.blocks import fences

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_README = [ROOT / "README.md", *PAGES]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in PAGES if "```python" in p.read_text()], ids=name_of)
def test_every_python_block_runs_and_prints_what_the_page_says(path, tmp_path, monkeypatch):
    """Blocks of a page run in order, in one namespace and an empty folder. ``text`` right after one is what it
    prints."""
    monkeypatch.chdir(tmp_path)
    namespace, printed, previous = {}, "", ""
    for language, code, line, between in fences(path):
        if language == "python":
            lines = "\n" * line + code  # so that a traceback names the page's own lines
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(lines, str(path), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and previous == "python" and not between.strip():
            shown = [row.rstrip() for row in code.rstrip().splitlines()]
            assert [row.rstrip() for row in printed.rstrip().splitlines()] == shown, f"{path.name}:{line}"
        previous = language
    attached = namespace.get("replacement")
    if attached is not None:
        attached.detach()


@pytest.mark.parametrize("path", WITH_README, ids=name_of)
def test_every_block_says_its_language(path):
    assert {language for language, *_ in fences(path)} <= {"python", "sh", "text"}


@cache
def program():
    from docs.make.commands import commands

    return dict(commands())


@pytest.mark.parametrize("path", [p for p in WITH_README if "```sh" in p.read_text()], ids=name_of)
def test_every_shell_line_names_commands_and_options_that_exist(path):
    for language, code, line, _ in fences(path):
        if language == "sh":
            for row in code.splitlines():
                assert check_line(row), f"{path.name}:{line}: {row}"


def check_line(row):
    words = shlex.split(row, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    if not words or words[0] in ("for", "done", "jupyter", "printf", "export", "."):
        return True
    if words[0] == "make":
        return re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(.*?)\]", words[-1])
        known = (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1].split("[options.entry_points]")[0]
        return all(re.search(rf"^{e} =", known, re.MULTILINE) for extra in extras for e in extra.split(","))
    if words[0] in ("git", "cd"):
        return True
    return words[0] == "tl-circuits" and parses(words)


def parses(words):
    """Whether the program takes these words: the command, its options, as many arguments as it needs."""
    length = next((n for n in (3, 2) if " ".join(words[:n]) in program()), None)
    if length is None:
        return False
    parameters = program()[" ".join(words[:length])].params
    options = {name: p for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    rest, given = iter(words[length:]), 0
    for word in rest:
        if not re.match(r"--?[a-z]", word):
            given += 1
        elif word not in options:
            return False
        elif not options[word].is_flag and next(rest, None) is None:
            return False
    most = float("inf") if any(a.nargs < 0 for a in arguments) else len(arguments)
    return sum(a.required for a in arguments) <= given <= most


@pytest.mark.parametrize(
    "row",
    [
        "tl-circuits trce hello",
        "tl-circuits trace hello --modle gemma",
        "tl-circuits trace",
        "tl-circuits course begin 1 folder",
        "make everything",
        "pip install 'tl_circuits[trian]'",
    ],
)
def test_a_shell_line_with_a_mistake_is_found(row):
    assert not check_line(row)


def test_every_public_name_has_one_place_in_the_reference():
    listed = re.findall(
        r"^::: (\S+)$", "\n".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md")), re.MULTILINE
    )
    assert [name for name, count in Counter(listed).items() if count > 1] == []
    assert set(tlc.__all__) - {name.rpartition(".")[2] for name in listed} == set()


def test_the_references_front_page_lists_what_its_pages_hold():
    rows = re.findall(
        r"^\| \[[^]]*\]\((\w[\w-]*\.md)\) \| (`.*`) \|$", Path("docs/reference/index.md").read_text(), re.M
    )
    listed = {page: set(re.findall("`([^`]*)`", names)) for page, names in rows if page != "commands.md"}
    held = {
        page: {
            "attribute" if name.endswith(".attribute") else name
            for name in re.findall(r"^::: tl_circuits\.(\S+)", Path("docs/reference", page).read_text(), re.M)
        }
        for page in listed
    }
    assert len(listed) >= 11 and listed == held


def test_the_reference_has_every_error():
    written = re.findall(r"^::: tl_circuits\.errors\.(\w+)", Path("docs/reference/errors.md").read_text(), re.M)
    assert sorted(written) == sorted(tlc.errors.__all__)


def test_every_figure_is_drawn_by_the_repository():
    from docs.make.figures import EARLIER, FIGURES
    from docs.make.house import PICTURE

    shown = {m for p in WITH_README for m in re.findall(r"images/([\w.-]+)", p.read_text())}
    kept = {p.name for p in (ROOT / "docs/images").iterdir()} - {"favicon.svg"}
    assert shown == {*FIGURES, *EARLIER, PICTURE.name} == kept


def test_figures_show_what_the_code_draws(tmp_path):
    from docs.make.figures import draw_story, story

    draw_story(story(), tmp_path)
    for drawn in tmp_path.iterdir():
        texts = [re.findall(r"<!-- (.*?) -->", p.read_text()) for p in (drawn, ROOT / "docs/images" / drawn.name)]
        assert texts[0] == texts[1] != [], f"{drawn.name} is out of date: make docs"


class Links(HTMLParser):
    """The ids of a page, where it links to, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script", "iframe") and found.get("src"):
            self.loads.append(found["src"])
        elif tag == "link" and found.get("href") and "canonical" not in found.get("rel", ""):
            self.loads.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and every warning of the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder, said = tmp_path_factory.mktemp("site"), io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return folder, said.getvalue()


def test_the_site_builds_without_a_warning(site):
    assert site[1] == ""


def test_every_link_of_the_site_leads_to_something_in_it(site):
    pages = {p: Links(p.read_text()) for p in site[0].rglob("*.html") if p.name != "404.html"}
    assert len(pages) > len(PAGES) - 2
    wrong = []
    for page, found in pages.items():
        for address in found.links:
            if urlparse(address).scheme:
                continue
            place, anchor = urldefrag(unquote(address))
            target = (page.parent / place).resolve() if place else page
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                wrong.append(f"{page.relative_to(site[0])}: {address}")
    assert wrong == []


def test_pages_load_nothing_from_elsewhere(site):
    for page in site[0].rglob("*.html"):
        loads = Links(page.read_text()).loads
        assert [a for a in loads if urlparse(a).scheme or a.startswith("//")] == [], page.name


def test_equations_need_no_script(site):
    page = (site[0] / "method.html").read_text()
    assert page.count("<math") > 20 and "arithmatex" not in page and "$$" not in page


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert links and [a for a in links if not (ROOT / a).exists()] == []
