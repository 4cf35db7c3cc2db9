"""Drive the playground in a real browser: every tab, by mouse and keyboard, on a desktop and a phone.

Run by `make playground-check`; not part of `make test`, since it needs a Chromium. It fails on a console error,
on a rule of axe-core that is broken, on a page wider than its window, and on a layout that jumps. Screenshots are
kept, to be looked at. With `--pictures` it makes those of the guides, docs/guides/pictures, instead.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# The results that are published with the documentation.
CLAIMS = Path(__file__).parents[1] / "docs" / "claims"
KEY = "a-key-for-the-browser-test"
SHIFTS = """
window.jumps = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.jumps += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""
# The largest layout shift that counts as none, far below the 0.1 that is called good on the web.
JUMP = 0.02
# Of a picture in the guides.
MOST_BYTES = 150_000


def start_server(model: str, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """A server of the model with a key, on a free port."""
    command = [sys.executable, "-c", "from plait.cli import main; main()", "serve", "--model", model]
    command += ["--port", "0", *flags]
    server = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PLAIT_SERVE_API_KEYS": KEY, "PLAIT_CLAIMS": str(CLAIMS)},
    )
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"Listening on (http://\S+)\.", line):
            return server, found[1]
    raise SystemExit("the server did not start")


def check_rules(page: Page, axe: str, where: str) -> None:
    """Fail on what axe-core finds."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document)")["violations"]
    told = [
        f"{rule['id']}: {rule['help']}: {[node['html'][:120] for node in rule['nodes'][:3]]}"
        for rule in found
    ]
    assert not told, f"{where}: {told}"
    is_wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert not is_wide, f"{where} is wider than the window"


def wait_until_done(page: Page, form: str) -> None:
    """Wait for the end of an answer."""
    page.wait_for_selector(f"{form} .stop:disabled")
    page.wait_for_function("document.querySelector('#notice').textContent === ''")


def give_key(page: Page) -> None:
    """Let the page in."""
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#model').textContent.length > 3")


def send(page: Page, text: str, *, tokens: int = 30) -> None:
    """Ask in the chat, and rest on the fourth word of the answer."""
    page.evaluate(f"document.querySelector('#max-tokens').value = {tokens}")
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")
    page.wait_for_selector("#chat-log .turn:last-child .answer span")
    wait_until_done(page, "#chat-form")
    page.hover("#chat-log .turn:last-child .answer span:nth-child(4)")
    page.wait_for_selector("#token .laws td")


def draw_main(page: Page, to: Callable[[str], None]) -> None:
    """The pictures of the guides about a server with all its defaults."""
    send(page, "Why is the sky blue?")
    to("chat")
    page.click("#chat-clear")
    page.click("#options summary")
    page.fill("#system", "You answer questions about geography in one short sentence. " * 8)
    for country in ("France", "Japan"):
        send(page, f"What is the capital of {country}?")
    page.wait_for_timeout(2500)
    to("shared-prompts")
    page.click("#tab-drafts")
    page.select_option("#drafts-how", "drawn")
    page.click("#drafts-form button:not([type])")
    page.wait_for_selector("#drafts-list small:not(:empty)")
    wait_until_done(page, "#drafts-form")
    to("many-drafts")
    page.click("#tab-edit")
    page.click("#edit-form button:not([type])")
    page.wait_for_selector("#edit-log .answer span")
    wait_until_done(page, "#edit-form")
    page.evaluate(
        "document.querySelector('#edit-text').value = document.querySelector('#edit-text').value.replace('a shop', 'one small shop')"
    )
    page.click("#edit-form button:not([type])")
    page.wait_for_function("document.querySelector('#edit-report').textContent.includes('saved')")
    page.wait_for_selector("#edit-log .answer span")
    wait_until_done(page, "#edit-form")
    to("code-editing")


def draw_long(page: Page, to: Callable[[str], None], name: str, text: str) -> None:
    """A picture of a text that is continued."""
    page.click("#tab-complete")
    page.evaluate("document.querySelector('#max-tokens').value = 6")
    page.fill("#complete-text", text)
    page.click("#complete-form button:not([type])")
    page.wait_for_selector("#complete-log .answer span")
    wait_until_done(page, "#complete-form")
    page.hover("#complete-log .answer span:nth-child(2)")
    page.wait_for_selector("#token .laws td")
    # What the memory did lies below.
    page.evaluate("document.querySelector('#h-token').scrollIntoView()")
    to(name)


def take_pictures(browser: Browser, model: str, folder: Path) -> None:
    """The pictures of the guides, each from a server as its guide starts it."""
    note = "The key of the archive is under the green stone. "
    report = note + "Nothing was heard from the lighthouse today, and the sea was calm. " * 30
    log = "The ship's log says that the wind was low and the water calm on every day of the journey. " * 12
    pages: dict[tuple[str, ...], Callable[[Page, Callable[[str], None]], None]] = {
        ("--draft", "token-recycling"): draw_main,
        ("--memory", "infllm:local=64,initial=2,block=16,topk=4,execution=64"): lambda page, to: draw_long(
            page, to, "long-documents", report + "The key of the archive is under the"
        ),
        ("--memory", "gear:bits=4"): lambda page, to: draw_long(
            page, to, "low-memory", log + "The water was"
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for flags, draw in pages.items():
        server, url = start_server(model, *flags)
        try:
            page = browser.new_page(
                viewport={"width": 1040, "height": 820}, color_scheme="light", bypass_csp=True
            )
            page.set_default_timeout(180_000)
            page.goto(url)
            page.wait_for_selector("#key-form:not([hidden])")
            give_key(page)

            def to(name: str, page: Page = page) -> None:
                size = len(page.screenshot(path=folder / f"{name}.png"))
                assert size < MOST_BYTES, f"{name}.png has {size} bytes"

            draw(page, to)
            page.close()
        finally:
            server.terminate()
            server.wait(timeout=60)


def drive(page: Page, url: str, axe: str, shots: Path, name: str) -> None:
    """Use every tab."""
    page.goto(url)
    page.wait_for_selector("#key-form:not([hidden])")
    check_rules(page, axe, f"{name}: key")
    give_key(page)

    page.evaluate("document.querySelector('#max-tokens').value = 30")
    page.fill("#chat-text", "Why is the sky blue? Answer in two sentences.")
    before = page.evaluate("window.jumps")
    page.press("#chat-text", "Enter")
    page.wait_for_selector("#chat-log .answer span")
    wait_until_done(page, "#chat-form")
    jumps = page.evaluate("window.jumps") - before
    assert jumps < JUMP, f"{name}: the layout jumped by {jumps:.3f} while an answer came"
    page.focus("#chat-log .answer")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#token .laws td")
    assert "Byte by byte" in page.inner_text("#token")
    assert "attention" in page.inner_text("#strands table")
    page.screenshot(path=shots / f"{name}-chat.png", full_page=True)
    check_rules(page, axe, f"{name}: chat")

    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    page.click("#complete-form button:not([type])")
    page.wait_for_selector("#complete-log .answer span")
    wait_until_done(page, "#complete-form")
    page.hover("#complete-log .answer span:nth-child(4)")
    page.wait_for_selector("#token .laws td")
    page.screenshot(path=shots / f"{name}-complete.png", full_page=True)
    check_rules(page, axe, f"{name}: complete")

    page.click("#tab-drafts")
    page.click("#drafts-form button:not([type])")
    page.wait_for_selector("#drafts-list li")
    assert page.locator("#drafts-list li").count() == 4
    page.screenshot(path=shots / f"{name}-drafts.png", full_page=True)
    page.select_option("#drafts-how", "drawn")
    page.click("#drafts-form button:not([type])")
    page.wait_for_selector("#drafts-list small:not(:empty)")
    wait_until_done(page, "#drafts-form")
    page.screenshot(path=shots / f"{name}-drawn.png", full_page=True)
    check_rules(page, axe, f"{name}: drafts")

    page.click("#tab-edit")
    page.click("#edit-form button:not([type])")
    wait_until_done(page, "#edit-form")
    page.wait_for_function("document.querySelector('#edit-report').textContent.startsWith('All')")
    page.wait_for_selector("#edit-log .answer span")
    page.evaluate(
        "document.querySelector('#edit-text').value = document.querySelector('#edit-text').value.replace('a shop', 'one small shop')"
    )
    page.click("#edit-form button:not([type])")
    page.wait_for_function("document.querySelector('#edit-report').textContent.includes('saved')")
    page.wait_for_selector("#edit-log .answer span")
    wait_until_done(page, "#edit-form")
    page.screenshot(path=shots / f"{name}-edit.png", full_page=True)
    check_rules(page, axe, f"{name}: edit")

    page.click("#tab-claims")
    page.wait_for_selector(".claim .plot")
    page.screenshot(path=shots / f"{name}-claims.png", full_page=True)
    check_rules(page, axe, f"{name}: claims")


def check_policy(browser: Browser, url: str) -> None:
    """The page works under its own content security policy, which the tools of the other checks need to get round."""
    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda said: said.type == "error" and problems.append(said.text))
    page.goto(url)
    page.wait_for_selector("#key-form:not([hidden])")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.click("#options summary")
    page.fill("#max-tokens", "4")
    page.click("#tab-complete")
    page.click("#complete-form button:not([type])")
    page.wait_for_selector("#complete-log .answer span", timeout=180_000)
    page.wait_for_selector("#complete-form .stop:disabled", timeout=180_000)
    told = [problem for problem in problems if "401" not in problem]
    assert not told, f"under its policy: {told}"
    page.close()


def main() -> None:
    """Check the page on both sizes, light and dark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of npm's axe-core")
    parser.add_argument("--shots", type=Path, default=Path("build/playground"), help="folder for screenshots")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser's program")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pictures", type=Path, help="make the guides' pictures in this folder instead")
    given = parser.parse_args()
    axe = given.axe.read_text("utf-8")
    given.shots.mkdir(parents=True, exist_ok=True)
    if given.pictures is not None:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=given.chromium, args=ARGUMENTS)
            take_pictures(browser, given.model, given.pictures)
            browser.close()
        return
    server, url = start_server(given.model, "--draft", "token-recycling")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=given.chromium, args=ARGUMENTS)
            check_policy(browser, url)
            for name, (width, height) in SIZES.items():
                for scheme in ("light", "dark"):
                    page: Any = browser.new_page(
                        viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True
                    )
                    page.set_default_timeout(180_000)
                    problems: list[str] = []
                    page.on(
                        "console", lambda said, to=problems: said.type == "error" and to.append(said.text)
                    )
                    page.on("pageerror", lambda error, to=problems: to.append(str(error)))
                    page.add_init_script(SHIFTS)
                    drive(page, url, axe, given.shots, f"{name}-{scheme}")
                    # The first question for the status is refused, which is how the page learns that a key is needed.
                    told = [problem for problem in problems if "401" not in problem]
                    assert not told, f"{name}-{scheme}: {told}"
                    page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert server.returncode == 0, f"the server ended with {server.returncode}"
    sys.stdout.write(f"The playground is in order; screenshots are in {given.shots}.\n")


if __name__ == "__main__":
    main()
