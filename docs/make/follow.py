"""Follows the README and the quickstart line by line, as a newcomer: ``python -m docs.make.follow`` (``make follow``).

It clones the repository, runs ``make demo`` there, and then every line that the two pages show, in order and in an
empty folder, with Chromium for what a browser shows. A line that fails, or does not do what the page says of it, ends
in exit code 1. It takes about ten minutes, most of them for installing; PIP_CONSTRAINT is honoured, the model hub is
not used.
"""

import argparse
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from docs.make.blocks import fences
from docs.make.chromium import chromium

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/quickstart.md")
LIMIT = 1800  # seconds for one line; the installation is one
logger = logging.getLogger("follow")

# What a line must print: where the page says more of it than that it runs.
PROMISES = {
    "make demo": r"Paris[\s\S]*random sets[\s\S]*How much is explained",
    "tl-circuits demo": r"Texas",
    "--more": r"2000 of \d+ active features",
    "tl-circuits heads": r"layer \d+ head \d+",
    "tl-circuits steer": r"The capital of France is\W+France",
    "tl-circuits circuit": r"F: the share of the answer[\s\S]*Half of the answer",
    "tl-circuits models": r"smollm2-135m[\s\S]*gemma-3-270m",
    "tl-circuits doctor": r"figure",
    "big - large": r"big",
}
# What needs the hub of models is refused in one sentence without it.
HUB = r"tl-circuits: .*(is not in the cache|google/gemma-2-2b).*"


@dataclass
class Walk:
    """A walk through the pages: where it takes place, and what went wrong."""

    checkout: Path
    folder: Path
    browser: Browser
    problems: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": path,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / ".hub"),
            "COLUMNS": "120",
        }

    def note(self, what: str, began: float, problem: str = "") -> None:
        logger.info("%-7s %6.1f s  %s", "FAILED" if problem else "right", time.monotonic() - began, what)
        if problem:
            logger.info("%s", problem)
            self.problems.append(what)


def run(walk: Walk, words: str, where: Path) -> subprocess.CompletedProcess[str]:
    """One shell line, with the checkout's programs."""
    return subprocess.run(
        words, shell=True, cwd=where, env=walk.environment, capture_output=True, text=True, timeout=LIMIT
    )


def follow_line(walk: Walk, row: str) -> None:
    """Run one line of a page and compare with what the page says."""
    words = shlex.split(row, comments=True)
    if not words or words[0] == "make":  # make demo came first; the others are for developers
        return
    began = time.monotonic()
    if words[0] == ".":
        return walk.note(row, began, "" if (walk.checkout / words[1]).is_file() else f"there is no {words[1]}")
    if words[:2] == ["tl-circuits", "view"]:
        return walk.note(row, began, viewed(walk, row))
    done = run(walk, row, walk.checkout if words[0] == "pip" else walk.folder)
    asked = re.search(r"Run: (\S+ -m pip install .*)", done.stderr)
    if done.returncode and asked:  # do what the program says, and try again
        run(walk, asked[1], walk.folder)
        done = run(walk, row, walk.folder)
    said = done.stdout + done.stderr
    if "google/" in row:
        return walk.note(row, began, "" if done.returncode == 1 and re.search(HUB, said) else said[-2000:])
    promised = [pattern for part, pattern in PROMISES.items() if part in row]
    kept = done.returncode == 0 and all(re.search(pattern, said) for pattern in promised)
    walk.note(row, began, "" if kept else f"exit code {done.returncode}; expected {promised}; it said: {said[-2000:]}")


def opened(walk: Walk, address: str, picture: str, live: bool = False) -> str:
    """Open a page, choose a box, and take a picture; steer the box if the page is ``live``. What went wrong, or
    nothing."""
    page = walk.browser.new_page(viewport={"width": 1440, "height": 900})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".tlc svg .unit", timeout=60_000)
    page.locator(".unit.box").first.click()
    page.wait_for_selector(".tlc .card h2")
    if live:
        page.locator("input.steer").fill("0")
        page.wait_for_selector(".result table", timeout=120_000)
    page.screenshot(path=walk.folder / picture)
    page.close()
    return "; ".join(problems)


def viewed(walk: Walk, row: str) -> str:
    """Start ``tl-circuits view``, open what it serves, end it with Ctrl-C. What went wrong, or nothing."""
    with (walk.folder / "view.txt").open("w+") as said:
        server = subprocess.Popen(
            f"exec {row.split('#')[0]}",
            shell=True,
            cwd=walk.folder,
            env=walk.environment,
            stdout=said,
            stderr=said,
        )
        try:
            for _ in range(LIMIT):
                found = re.search(r"http://\S+", (walk.folder / "view.txt").read_text())
                if found or server.poll() is not None:
                    break
                time.sleep(1)
            problem = opened(walk, found[0], "view.png", live=True) if found else (walk.folder / "view.txt").read_text()
            server.send_signal(signal.SIGINT)
            code = server.wait(60)
            return problem or ("" if code == 0 else f"exit code {code} after Ctrl-C")
        finally:
            server.kill()


def follow_python(walk: Walk, page: str) -> None:
    """Run a page's Python blocks, one after the other in one process."""
    began = time.monotonic()
    blocks = [code for language, code, *_ in fences(ROOT / page) if language == "python"]
    script = walk.folder / "page.py"
    script.write_text("\n".join(blocks))
    done = run(walk, f"python {script.name}", walk.folder)
    walk.note(f"the Python of {page}", began, "" if done.returncode == 0 else done.stderr[-2000:])


def lay_out_hub(walk: Walk) -> None:
    """Put SmolLM2 where the hub's files would lie, since the pages name it as the hub does."""
    code = "from tl_circuits.models import PACKAGED, open_packaged; print(open_packaged(PACKAGED['smollm2-135m']))"
    source = Path(run(walk, f'python -c "{code}"', walk.folder).stdout.strip().splitlines()[-1])
    offline_hub(source, walk.folder / ".hub", "HuggingFaceTB/SmolLM2-135M-Instruct")


def offline_hub(checkpoint: Path, home: Path, name: str) -> None:
    """Lay a checkpoint's folder out as the hub's cache in ``home`` (HF_HOME), as if ``name`` had been downloaded."""
    revision, repository = "0" * 40, home / "hub" / f"models--{name.replace('/', '--')}"
    for folder in ("refs", f"snapshots/{revision}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for file in checkpoint.iterdir():
        (repository / "snapshots" / revision / file.name).symlink_to(file)


def main() -> None:
    """Walk through the pages; exit code 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, help="a checkout in which make demo was run; default: a fresh clone")
    parser.add_argument(
        "--keep", type=Path, help="where to work and keep pictures and files; default: a folder that is removed"
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    executable = chromium()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        home = given.keep or Path(temporary)
        checkout = given.checkout or home / "checkout"
        folder = home / "work"
        folder.mkdir(parents=True)
        if given.checkout is None:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        walk = Walk(
            checkout.resolve(),
            folder.resolve(),
            playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"]),
        )
        follow(walk)
        walk.browser.close()
    if walk.problems:
        raise SystemExit(f"{len(walk.problems)} lines do not do what the pages say.")


def follow(walk: Walk) -> None:
    """Everything, in the order in which a newcomer meets it."""
    began = time.monotonic()
    done = run(walk, "make demo", walk.checkout)
    kept = done.returncode == 0 and re.search(PROMISES["make demo"], done.stdout)
    walk.note("make demo", began, "" if kept else (done.stdout + done.stderr)[-3000:])
    if done.returncode:
        return
    began = time.monotonic()
    walk.note("demo.html in Chromium", began, opened(walk, (walk.checkout / "demo.html").as_uri(), "demo.png"))
    started = walk.folder
    for page in PAGES:
        folder = started / Path(page).stem  # an empty one for each page
        folder.mkdir()
        walk = replace(walk, folder=folder)  # the list of problems is shared
        lay_out_hub(walk)
        follow_python(walk, page)
        rows: list[Any] = [
            row for language, code, *_ in fences(ROOT / page) if language == "sh" for row in code.splitlines()
        ]
        for row in rows:
            follow_line(walk, row)


if __name__ == "__main__":
    main()
