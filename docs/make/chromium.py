"""The browser that draws the screenshots and follows the pages."""

import shutil


def find_chromium() -> str | None:
    """Where this machine's Chromium is; None if there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def chromium() -> str:
    """Where this machine's Chromium is.

    Raises:
        SystemExit: if there is none.
    """
    found = find_chromium()
    if found is None:
        raise SystemExit("this needs Chromium (Debian: apt-get install chromium).")
    return found
