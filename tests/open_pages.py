"""A real browser for the explorer's pages, which notices errors, dialogs and requests that leave the folder."""

import shutil

import pytest

from benchmarks.explorer.load_times import FLAGS

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""Names of the browser on different systems."""


@pytest.fixture(scope="session")
def chromium():
    """Debian's browser, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"there is none of {', '.join(NAMES)}")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=executable, args=FLAGS, ignore_default_args=["--hide-scrollbars"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens pages; afterwards none of them may have had an error, a dialog, or a request to anywhere else.

    `allowed` is the address of a server that pages may ask. Without one, the browser is offline.
    """
    contexts, problems = [], []

    def open_one(address, allowed=None, **settings):
        context = chromium.new_context(offline=allowed is None, **settings)
        contexts.append(context)
        page = context.new_page()
        at_home = ("file:", "data:", "blob:", *([allowed] if allowed else []))
        page.on("console", lambda message: message.type == "log" or problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url.startswith(at_home) or problems.append(f"request: {request.url}")
        )
        page.set_default_timeout(120_000)  # behaviour is tested, not the speed of a busy machine
        page.goto(address)
        return page

    open_one.problems = problems
    yield open_one
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Address of a folder with 300 features in each of two layers."""
    from hand_made_site import write_hand_made_site  # lies next to the tests of the browser

    return write_hand_made_site(tmp_path_factory.mktemp("site"), 300).as_uri()


@pytest.fixture(scope="session")
def hostile_site(tmp_path_factory):
    """Address of a folder where every text is hostile, the model's name included."""
    from hand_made_site import HOSTILE, write_hand_made_site

    return write_hand_made_site(tmp_path_factory.mktemp("hostile"), 24, (3,), HOSTILE, HOSTILE[1]).as_uri()
