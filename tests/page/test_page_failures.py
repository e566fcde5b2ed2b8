"""The page where servers fail and texts are hostile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from page_driver import Records, ended, open_page, shown, start, text_of, token, write
from stand_in import Handler, StandIn

from deepen_ext.serving.page import trace_html

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.slow

# Each would do harm where it is read as HTML, or as a part of a script.
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "</script><script>document.title = 'taken'</script><!-- <script>",
    "&lt;b&gt; &amp; {{script}} ${1} `",
    "\u2028\u2029\x00\x07",
    "\u202eevil\u2066",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
    "a\tb\r\n\n  c",
    "\U000e0041\u2800\ufff9",
    "\ud800",  # half of a character, as JSON may hold it
]


def hostile(records: Records) -> Records:
    """The records, with texts and names that would do harm as HTML."""
    made = []
    for i, text in enumerate(HOSTILE):
        record = json.loads(json.dumps(records[i]))
        record["text"] = record["token"]["text"] = record["main_choice"]["text"] = text
        for member in record["members"]:
            member["name"] = f"<i>{member['name']}</i>"
            for one in member["top"]:
                one["text"] = text
        record["ms"]["members"] = {f"<i>{name}</i>": spent for name, spent in record["ms"]["members"].items()}
        made.append(record)
    return made


def seen(text: str) -> str:
    """What a browser makes of it: half a character is no character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TestFailures:
    def test_a_refusal(self, page: Page, server: StandIn) -> None:
        cases: list[tuple[int, dict[str, str], str]] = [
            (429, {"Retry_After": "7"}, "The server is busy. Start again in 7 s."),
            (500, {}, "The server could not answer (500). It says: <b>broken</b>"),
            (400, {}, "The server could not answer (400). It says: <b>broken</b>"),
            (503, {}, "The server takes no requests now. Start again a little later."),
            (503, {"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "Start again a little later."),
        ]
        open_page(page, server)
        for status, headers, said in cases:

            def refuse(handler: Handler, status: int = status, more: dict[str, str] = headers) -> bool:
                return handler.error(status, "<b>broken</b>", **more)

            server.fault = refuse
            start(page)
            ended(page)
            assert said in page.locator(".answer .problem").inner_text()
        server.fault = None
        page.click("[name=start]")  # and the next one works
        ended(page)
        assert page.locator(".problem:visible").count() == 0
        assert shown(page)

    def test_what_is_no_json(self, page: Page, server: StandIn) -> None:
        server.fault = lambda handler: handler.answer(502, b"<h1>Bad gateway</h1>", "text/html")
        write(page, server)
        assert "(502). It says: <h1>Bad gateway</h1>" in page.locator(".answer .problem").inner_text()

    @pytest.mark.parametrize("how", ["cut", "ended", "told"])
    def test_a_stream_that_breaks_off(self, page: Page, server: StandIn, records: Records, how: str) -> None:
        def after(handler: Handler, sent: int) -> bool:
            if sent == 20 and how == "cut":  # in the midst of an event, and of a character
                handler.wfile.write(b'data: {"choices": [{"text": "\xf0\x9f')
            if sent == 20 and how == "told":
                handler.send({"error": {"message": "bytes: out of memory"}})
            return sent == 20

        server.after = after
        write(page, server, beside="bytes")
        expected = "out of memory" if how == "told" else "The connection ended before the text did"
        for i in (0, 1):
            assert expected in page.locator(".answer .problem").nth(i).inner_text()
        assert shown(page) == text_of(records[:20])
        assert page.locator(".answer .status").first.inner_text().startswith("cut off, 20 tokens")
        token(page, 3).hover()
        assert page.locator("#inspected .place").count() == 1

    def test_a_record_that_is_none(self, page: Page, server: StandIn, records: Records) -> None:
        """The connection is not blamed."""
        nothing = {"choices": [{"text": "x"}], "deepen": {}}
        server.after = lambda handler, sent: sent == 20 and handler.send(nothing) is None
        write(page, server)
        assert "The page failed here: " in page.locator(".answer .problem").inner_text()
        assert shown(page) == text_of(records[:20])

    def test_a_connection_that_is_reset(self, page: Page, server: StandIn, records: Records) -> None:
        read = threading.Event()  # what the browser has not read goes with a reset

        def after(handler: Handler, sent: int) -> bool:
            if sent == 20:
                assert read.wait(60)
                handler.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: reset, not closed
                handler.rfile.close()
                handler.wfile.close()
                handler.connection.close()
            return sent == 20

        server.after = after
        open_page(page, server)
        start(page)
        token(page, 19).wait_for()
        read.set()
        ended(page)
        assert (
            "The connection was lost. What was written stays."
            in page.locator(".answer .problem").inner_text()
        )
        assert shown(page) == text_of(records[:20])

    def test_a_key(self, page: Page, server: StandIn, records: Records) -> None:
        server.key = "secret"
        page.goto(server.url)
        page.wait_for_selector("[name=key]:visible")
        assert "asks for a key" in page.locator("#notice").inner_text()
        page.fill("[name=key]", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("[name=start]:enabled")
        start(page)
        ended(page)
        assert shown(page) == text_of(records)
        server.key = "another"
        page.click("[name=start]")
        ended(page)
        assert "asks for a key" in page.locator(".answer .problem").inner_text()

    def test_an_answer_to_an_earlier_key(self, page: Page, server: StandIn) -> None:
        """That comes after the one to the key that is right."""
        server.key = "secret"
        page.goto(server.url)
        page.wait_for_selector("[name=key]:visible")
        held: list[Route] = []
        page.route("**/v1/models", lambda route: route.continue_() if held else held.append(route))
        page.fill("[name=key]", "wrong")
        page.keyboard.press("Tab")
        page.wait_for_selector("#notice", state="hidden")
        page.fill("[name=key]", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("[name=start]:enabled")
        with page.expect_response("**/v1/models") as late:
            held[0].continue_()
        assert late.value.status == 401
        late.value.finished()
        page.evaluate("new Promise((done) => setTimeout(done, 100))")
        assert not page.locator("#notice").is_visible()

    @pytest.mark.parametrize("body", ["<html>log in</html>", "{}", "null", '{"data": 1}'])
    def test_a_list_of_models_that_is_none(self, page: Page, server: StandIn, body: str) -> None:
        page.route("**/v1/models", lambda route: route.fulfill(body=body))
        page.goto(server.url)
        page.wait_for_selector("#notice:visible")
        assert "no deepen-ext serve" in page.locator("#notice").inner_text()

    def test_a_server_that_has_gone(self, page: Page, server: StandIn) -> None:
        open_page(page, server)
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        start(page)
        ended(page)
        assert "cannot be reached" in page.locator(".answer .problem").inner_text()
        page.reload()
        page.unroute("**/v1/**")
        page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
        page.reload()
        page.wait_for_selector("#notice:visible")
        page.unroute("**/v1/models")
        page.click("#again")
        page.wait_for_selector("[name=start]:enabled")
        assert not page.locator("#notice").is_visible()


class TestHostileText:
    def test_is_shown_as_text(self, page: Page, server: StandIn, records: Records) -> None:
        server.texts = {"<b>pair</b>": hostile(records)}
        write(page, server, "</textarea><script>document.title = 'taken'</script>")
        self.check(page)
        assert page.locator(".answer h2").inner_text() == "<b>pair</b>"

    def test_in_a_trace(self, page: Page, records: Records, tmp_path: Path) -> None:
        file = tmp_path / "page.html"
        file.write_text(trace_html(hostile(records), title="</title><script>x"), encoding="utf-8")
        page.goto(file.as_uri())
        page.wait_for_selector(f"[data-i='{len(HOSTILE) - 1}']")
        self.check(page)
        assert page.title() == "</title><script>x · deepen-ext"

    def check(self, page: Page) -> None:
        assert page.title() != "taken"
        assert (
            page.locator(
                "#answers script, #answers img, #inspector script, #inspector img, h2 b, i i"
            ).count()
            == 0
        )
        assert seen(shown(page)) == seen("".join(HOSTILE))
        page.locator(".text").focus()
        page.keyboard.press("Home")
        labels = []
        for i in range(len(HOSTILE)):
            assert page.locator("#inspected .place").inner_text().startswith(f"token {i + 1} ")
            assert page.locator("#inspected b, #inspected img, #inspected script").count() == 0
            labels.append(page.locator("#inspected > .token").inner_text())
            page.keyboard.press("ArrowRight")
        assert labels[:4] == HOSTILE[:4]
        assert labels[5] == "U+202EevilU+2066"  # nothing that turns the text around goes unseen
        assert labels[9] == "U+E0041U+2800U+FFF9"
        page.keyboard.press("Escape")
        # A line of Arabic runs from the right; the title beside it does not.
        assert (
            page.locator(".text .line").first.evaluate("one => getComputedStyle(one).unicodeBidi")
            == "plaintext"
        )
