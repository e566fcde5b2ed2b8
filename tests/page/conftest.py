"""One browser for all tests of the page, and records of texts that a tiny ensemble has written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_driver import Records
from stand_in import StandIn
from tiny_models import PROSE, one_byte_tokens, save_model, tiny_reader
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from deepen_ext import Ensemble
from deepen_ext.members.loading import load_member

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",  # for root, as in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")  # its event loop would be in the way of other tests'
def browser() -> Iterator[BrowserContext]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("NO chromium ON PATH: the page was not tried in a browser; install Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_context()
        browser.close()


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    """A window in which no script may fail, and which asks no other host."""
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 800})
    page.set_default_timeout(60_000)  # a loaded machine draws 2,000 tokens slowly
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Policy" in message.text else None)
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1:", "file:", "data:"))
            else wrong.append(request.url)
        ),
    )
    yield page
    page.close()
    assert not wrong


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    """Two members that have read parts of a text: one writes single bytes, one pieces of words."""
    folder = tmp_path_factory.mktemp("page")
    words = one_byte_tokens()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([PROSE], trainer)
    return Ensemble(
        [
            _reader(folder / "words", words, PROSE[:1500], seed=1),
            _reader(folder / "bytes", one_byte_tokens(), PROSE[700:2200], seed=2),
        ],
        fuser="deepen",
        learning_rate=0.4,
    )


def _reader(folder: Path, tokenizer: Tokenizer, text: str, seed: int) -> Any:
    folder.mkdir()
    return tiny_reader(load_member(save_model(folder, tokenizer, seed=seed)), folder.name, text, seed=seed)


@pytest.fixture(scope="session")
def records(pair: Ensemble) -> Records:
    """Of one text of 120 tokens, with drafts."""
    found: Records = []
    pair.generate("The ", max_new_tokens=120, min_new_tokens=120, draft=3, trace=found.append)
    return found


@pytest.fixture(scope="session")
def alone(pair: Ensemble) -> Records:
    """Of the text that the second member writes by itself."""
    found: Records = []
    single = Ensemble(pair.members[1:], fuser="single")
    single.generate("The ", max_new_tokens=60, min_new_tokens=60, trace=found.append)
    return found


@pytest.fixture
def server(records: Records, alone: Records) -> Iterator[StandIn]:
    with StandIn({"pair": records, "bytes": alone}) as server:
        yield server
