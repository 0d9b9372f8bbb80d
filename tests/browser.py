"""A headless Chromium for the tests, Debian's own with its driver: nothing is downloaded. `make setup-browser`."""

import contextlib
import json
import shutil

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--window-size=1100,760",
)


@contextlib.contextmanager
def chromium(directory, *, language="en"):
    """A browser with a fresh profile in the directory. Skips the test where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with chromedriver here: make setup-browser")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements_dev.txt)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={directory}", f"--accept-lang={language}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


def read_requests(browser):
    """Addresses that pages asked for since the last call, over any network."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
    return [url for url in sent if not url.startswith(("chrome:", "chrome-untrusted:", "data:"))]
