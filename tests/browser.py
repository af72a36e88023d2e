"""A headless Chromium for tests, through playwright, where both are installed; `pip install playwright`, `apt-get install chromium`."""

import contextlib
import shutil

import pytest


def chromium_path():
    """Where a Chromium is, or `None`."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser_page(width=1280, scheme="light"):
    """A page, and all that went wrong on it: errors of scripts, of the console and of the policy, and dialogs."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if chromium_path() is None:
        pytest.skip("no Chromium is installed")
    wrong = []

    def dialog(opened):
        wrong.append(f"dialog: {opened.message}")
        opened.dismiss()

    with playwright.sync_playwright() as driver:
        # a container's root has no sandbox to give
        browser = driver.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on(
            "console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", dialog)
        try:
            yield page, wrong
        finally:
            browser.close()
