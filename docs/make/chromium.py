"""The browser that draws the screenshots and follows the pages."""

import shutil


def chromium() -> str:
    """Where this machine's Chromium is.

    Raises:
        SystemExit: if there is none.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("this needs Chromium (Debian: apt-get install chromium).")
    return found
