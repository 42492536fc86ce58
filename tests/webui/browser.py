"""Use the web page in a real Chromium, measure it, and save pictures: `make browser`.

The arguments are a folder for the pictures, by default one in the system's temporary folder.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

LONG = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many in total?"
HOSTILE = "<script>window.isBroken = true</script><img src=x onerror='window.isBroken = true'>"
MAX_PAINT_MILLISECONDS = 2000
MIN_UPDATES_PER_SECOND = 10
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 360, "height": 740}

COUNT_UPDATES = """() => {
  window.times = [];
  let before = 0;
  new MutationObserver(() => {
    const now = document.querySelectorAll("#talk .text span").length;
    if (now !== before) window.times.push(performance.now());
    before = now;
  }).observe(document.querySelector("#talk"), { childList: true, subtree: true });
}"""


def chromium() -> str:
    """Return the path of Chromium."""
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None or not Path(found).is_file():
        sys.exit(
            f"Chromium is {found!r}, expected a program: install it (Debian: apt-get install "
            "chromium), or name it in the environment variable CHROMIUM"
        )
    return found


@contextmanager
def served() -> Iterator[str]:
    """Run the command and yield its address."""
    command = [sys.executable, "-m", "speclm", "webui", "--port", "0", "--max-new-tokens", "300"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", "".join(lines))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        try:
            yield found[0]
        finally:
            process.terminate()


@contextmanager
def opened(browser: Browser, address: str, **options: object) -> Iterator[Page]:
    """Open the page, which may fetch nothing from other machines and log no error."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("request", lambda r: r.url.startswith((address, "blob:")) or complaints.append(r.url))
    page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    question(page).wait_for()
    yield page
    context.close()
    assert complaints == []


def question(page: Page):
    return page.get_by_label("Message", exact=False).and_(page.locator("textarea")).first


def send(page: Page, text: str) -> None:
    """Write a question and press Enter."""
    box = question(page)
    box.fill(text)
    box.press("Enter")


def finish(page: Page) -> None:
    """Wait until the answer is complete."""
    expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
    expect(page.locator("#send")).to_be_enabled(timeout=60_000)


def measure_paint(browser: Browser, address: str) -> float:
    """Return the median time of five first paints, in milliseconds."""
    entry = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    times = []
    for _ in range(5):
        with opened(browser, address) as page:
            times.append(page.wait_for_function(entry).json_value())
    return statistics.median(times)


def stream(page: Page, pictures: Path) -> float:
    """Send, compare and point at a token; return the updates per second."""
    expect(question(page)).to_be_focused()  # a keyboard is enough
    page.screenshot(path=pictures / "empty.png")
    page.get_by_label("Draft tokens per round").click()
    page.get_by_role("option", name="8", exact=True).click()  # drafts in every round
    page.evaluate(COUNT_UPDATES)
    send(page, LONG)
    expect(page.locator("#stop")).to_be_enabled()
    finish(page)
    times = page.evaluate("window.times")
    page.get_by_label("Compare with regular generation").check()
    send(page, HOSTILE)
    page.get_by_text("✓ identical").wait_for()
    finish(page)
    assert page.evaluate("window.isBroken") is None
    expect(page.locator("#talk")).to_contain_text("prompt tokens from the cache")
    page.locator("#new").click()
    expect(page.locator("#talk article")).to_have_count(0)
    page.get_by_role("button", name="Text to SQL").click()
    expect(question(page)).not_to_be_empty()
    question(page).press("Enter")
    page.get_by_text("✓ identical").wait_for()
    finish(page)
    send(page, "What was the time at the european championships?")
    expect(page.get_by_text("✓ identical")).to_have_count(2)
    finish(page)
    page.locator("article .drafted").nth(3).hover()
    expect(page.locator("#tip")).to_have_text(re.compile(r"drafted: depth \d, round \d+"))
    page.screenshot(path=pictures / "compare.png")
    return (len(times) - 1) / (times[-1] - times[0]) * 1000


def stop_and_export(page: Page) -> None:
    """Stop an answer with Escape, and download the conversation."""
    page.get_by_label("Compare with regular generation").uncheck()
    send(page, LONG)
    expect(page.locator("#stop")).to_be_enabled()
    page.keyboard.press("Escape")
    page.get_by_text("; stopped").wait_for()
    finish(page)
    with page.expect_download() as download:
        page.locator("#export").click()
    found = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert found["turns"][-1]["finish"] == "stopped"
    page.locator("#new").click()
    expect(page.locator("#talk article")).to_have_count(0)


def fail(page: Page, pictures: Path) -> None:
    """Cause errors, after which the page goes on."""
    send(page, "a " * 5000)
    page.get_by_role("alert").get_by_text("the conversation has").wait_for()
    page.screenshot(path=pictures / "error.png")
    page.locator("#max-tokens input").fill("0")
    send(page, LONG)
    page.get_by_role("alert").get_by_text("max_new_tokens is 0").wait_for()
    page.locator("#max-tokens input").fill("20")
    send(page, LONG)
    finish(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("article .drafted").first).to_be_visible()


def show_narrow_and_dark(page: Page, pictures: Path) -> None:
    """Use the page on a phone's width in the dark."""
    expect(page.locator("body.dark")).to_have_count(1)
    page.get_by_label("Compare with regular generation").check()
    send(page, LONG)
    page.get_by_text("✓ identical").wait_for()
    finish(page)
    page.locator("article").scroll_into_view_if_needed()
    page.screenshot(path=pictures / "narrow.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


def main() -> None:
    """Run everything, and print the figures."""
    program = chromium()
    pictures = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="speclm-page-"))
    pictures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, served() as address:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        paint = measure_paint(browser, address)
        with opened(browser, address) as page:
            updates = stream(page, pictures)
            stop_and_export(page)
            fail(page, pictures)
        with opened(browser, address, viewport=NARROW, color_scheme="dark") as page:
            show_narrow_and_dark(page, pictures)
        with opened(browser, address, color_scheme="dark") as page:
            send(page, LONG)
            expect(page.locator("#stop")).to_be_enabled()
            finish(page)
            page.screenshot(path=pictures / "dark.png")
        browser.close()
    print(f"first paint {paint:.0f} ms, {updates:.1f} updates/s; pictures in {pictures}")
    assert paint < MAX_PAINT_MILLISECONDS
    assert updates >= MIN_UPDATES_PER_SECOND


if __name__ == "__main__":
    main()
