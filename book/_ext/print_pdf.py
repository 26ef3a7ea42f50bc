"""Print the single-page book with Chromium: ``print_pdf.py SINGLEHTML_FOLDER OUTPUT.pdf``."""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def chromium():
    """Path of a Chromium: ``$CHROMIUM``, else one on the path; None if there is none."""
    names = "chromium", "chromium-browser", "google-chrome"
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def print_pdf(folder, target):
    """Print the book; formulas are typeset before, and folded solutions are open."""
    folder = Path(folder).resolve()
    # The root page lies in a subfolder, but its links are written as seen from the top.
    page_file = shutil.copy(folder / "book/intro.html", folder / "all.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(color_scheme="light")
        page.goto(Path(page_file).as_uri())
        page.wait_for_function("window.MathJax && MathJax.startup.promise.then(() => true)")
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        margin = dict.fromkeys(["top", "bottom", "left", "right"], "15mm")
        page.pdf(path=target, format="A4", margin=margin, tagged=True, outline=True)
        browser.close()


if __name__ == "__main__":
    if chromium() is None:
        sys.exit("print_pdf: no Chromium found; install one or set CHROMIUM to its path")
    print_pdf(*sys.argv[1:])
    print(f"wrote {sys.argv[2]}")
