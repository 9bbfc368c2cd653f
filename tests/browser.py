"""One Chromium for all tests of pages, and tabs that report every problem and every request."""

import time
from contextlib import contextmanager

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NASTY = "</script><img src=x onerror=alert(1)>&\"'‏שלום"


@contextmanager
def tab(browser, url, allowed=None, width=1280, height=800, context=None):
    """A page at ``url``. Fails on any console message, error, or request that starts with none of ``allowed``."""
    own = context or browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
    page = own.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.wait_for_selector(".tlc svg .unit")
    yield page
    assert problems == []
    expected = (*(allowed or (url,)), "blob:")
    assert [r for r in requests if not r.startswith(expected)] == []
    page.close()
    if context is None:
        own.close()


def wait_until(page, expression, seconds=30):
    """Waits until ``expression`` is true in ``page``; the page's policy forbids the eval that ``wait_for_function``
    polls with."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} is still false after {seconds} seconds"
        page.wait_for_timeout(20)
