"""What the tests of the page do in a browser, and what they read there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stand_in import StandIn

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

Records = list[dict[str, Any]]


def open_page(page: Page, server: StandIn) -> None:
    page.goto(server.url)
    page.wait_for_selector("[name=start]:enabled")


def write(page: Page, server: StandIn, prompt: str = "The ", **fields: str) -> None:
    """Ask for a text, and wait until it has ended."""
    open_page(page, server)
    start(page, prompt, **fields)
    ended(page)


def start(page: Page, prompt: str = "The ", **fields: str) -> None:
    page.fill("[name=prompt]", prompt)
    for name, value in fields.items():
        field = page.locator(f"[name={name}]")
        if field.evaluate("one => one.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    page.click("[name=start]")


def ended(page: Page) -> None:
    page.wait_for_selector("form.running, .answer.writing", state="detached")
    page.evaluate("new Promise(requestAnimationFrame)")


def shown(page: Page, answer: int = 0) -> str:
    """The text as a reader sees it."""
    lines = page.locator(".answer").nth(answer).locator(".text .line")
    return "\n".join(lines.evaluate_all("all => all.map(one => one.textContent)"))


def text_of(records: Records) -> str:
    return "".join(one["text"] for one in records)


def token(page: Page, index: int, answer: int = 0) -> Locator:
    return page.locator(".answer").nth(answer).locator(f"[data-i='{index}']").first


def changed(records: Records) -> list[int]:
    return [i for i, one in enumerate(records) if one["token"]["id"] != one["main_choice"]["id"]]


@contextmanager
def held_up(server: StandIn, tokens: int) -> Iterator[None]:
    """The server sends so many tokens, and the next one when the block ends."""
    go_on = threading.Event()
    server.after = lambda handler, sent: sent == tokens and not go_on.wait(60)
    try:
        yield
    finally:
        go_on.set()
        server.after = None
