"""The page in a browser: texts as they come, what is known of each token, failures, hostile text."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stand_in import Handler, StandIn

from deepen_ext.serving.page import trace_html

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route

pytestmark = pytest.mark.slow
Records = list[dict[str, Any]]

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


class TestStream:
    def test_the_text_comes_token_by_token(self, page: Page, server: StandIn, records: Records) -> None:
        with held_up(server, 20):
            open_page(page, server)
            start(page)
            page.wait_for_selector("[data-i='19']")
            assert shown(page) == text_of(records[:20])
            assert page.locator("[name=stop]").is_visible()
            token(page, 5).hover()  # and can be asked about at once
            assert page.locator("#inspected .place").inner_text().startswith("token 6 of 20,")
        ended(page)
        assert shown(page) == text_of(records)
        assert page.locator(".problem:visible").count() == 0
        status = page.locator(".answer .status").inner_text()
        assert status.startswith(f"token limit, {len(records)} tokens, {len(changed(records))} changed")
        assert not [path for path in server.paths if path not in ("/", "/v1/models", "/v1/completions")]

    def test_what_is_asked_for(self, page: Page, server: StandIn) -> None:
        write(page, server, "One", tokens="9", temperature="0.7", fuser="average", draft="4")
        page.click("text=Message")
        page.fill("[name=draft]", "auto")
        page.keyboard.press("Enter")  # a field's Enter starts, as in any form
        ended(page)
        (path, body), (chat_path, chat) = server.requests
        assert path == "/v1/completions"
        assert body == {
            "model": "pair",
            "stream": True,
            "explain": True,
            "stream_options": {"include_usage": True},
            "prompt": "One",
            "max_tokens": 9,
            "temperature": 0.7,
            "fuser": "average",
            "draft": 4,
        }
        assert chat_path == "/v1/chat/completions"
        assert chat["messages"] == [{"role": "user", "content": "One"}]
        assert chat["draft"] == "auto"

    def test_a_setting_that_means_nothing_is_not_sent(self, page: Page, server: StandIn) -> None:
        open_page(page, server)
        start(page, draft="many")
        assert page.locator("[name=draft]").evaluate("one => one.validationMessage")
        page.fill("[name=draft]", "0")
        page.click("[name=start]")
        ended(page)
        assert [body["draft"] for _, body in server.requests] == [0]

    def test_who_decided_each_token(self, page: Page, server: StandIn, records: Records) -> None:
        write(page, server)
        found = page.locator(".text .t").evaluate_all(
            "all => all.filter(one => one.matches('.changed, .joint')).map(one => Number(one.dataset.i))"
        )
        assert sorted(set(found)) == changed(records)
        fates = page.locator(".text .stood").evaluate_all(
            "all => new Set(all.map(one => one.dataset.i)).size"
        )
        assert fates == sum(one["draft"] == "stood" for one in records) > 10
        counts = page.locator(".legend button").evaluate_all(
            "all => Object.fromEntries(all.map(one => [one.dataset.key, Number(one.lastChild.textContent)]))"
        )
        assert counts["replaced"] == sum(one["draft"] == "replaced" for one in records)
        drafts = counts.pop("stood") + counts.pop("replaced")
        assert drafts == sum(one["draft"] is not None for one in records)
        assert sum(counts.values()) == len(records)

    def test_colours_are_not_all_there_is(self, page: Page, server: StandIn) -> None:
        """Kinds differ in their lines, their slant or their weight too."""
        write(page, server)
        looks = page.evaluate(
            """() => Object.keys(KINDS).filter((kind) => kind !== "own").map((kind) => {
                const one = sampleOf(kind, kind === "changed" ? 1 : undefined);
                document.querySelector(".text").append(one);
                const style = getComputedStyle(one);
                return [style.textDecorationLine, style.textDecorationStyle, style.textDecorationThickness,
                        style.fontWeight, style.fontStyle, style.backgroundSize].join();
            })"""
        )
        assert len(looks) == len(set(looks)) == 9

    def test_the_models(self, page: Page, server: StandIn) -> None:
        open_page(page, server)
        choices = "all => all.map(one => [one.parentElement.label, one.value])"
        both = [["Together", "pair"], ["One alone", "bytes"]]
        assert page.locator("[name=model] option").evaluate_all(choices) == both
        assert page.locator("[name=beside] option").evaluate_all(choices)[1:] == both
        page.fill("[name=fuser]", "average")
        page.select_option("[name=model]", "bytes")
        assert page.locator("[name=fuser]").is_disabled()  # nobody to fuse it with
        start(page)
        ended(page)
        assert "fuser" not in server.requests[0][1]

    def test_sampling_against_the_fusion(self, page: Page, server: StandIn, records: Records) -> None:
        """The fusion preferred another token, and the draw gave the main model's: it was not "kept"."""
        record = next(one for one in records if one["fused"][0]["id"] != one["main_choice"]["id"])
        server.texts["pair"] = [{**record, "token": record["main_choice"], "draft": None}]
        write(page, server)
        assert token(page, 0).get_attribute("class") == "t drawn"

    def test_parts_of_characters(self, page: Page, server: StandIn, records: Records) -> None:
        """All show as U+FFFD; what they are is in their bytes."""

        def part(number: int, data: str) -> dict[str, Any]:
            return {"id": number, "text": "\ufffd", "bytes": data, "probability": 0.3}

        def record(assistant: dict[str, Any]) -> dict[str, Any]:
            tops = [[part(1, "f09f")], [assistant]]
            both = [{**member, "top": top} for member, top in zip(records[0]["members"], tops, strict=True)]
            own = {"token": tops[0][0], "main_choice": tops[0][0], "fused": tops[0], "members": both}
            return {**records[0], **own, "text": "", "draft": None}

        whole = {"id": 3, "text": "🙂", "probability": 0.3}
        server.texts["pair"] = [record(one) for one in (part(2, "e6"), part(2, "f09f99"), whole)]
        write(page, server)
        kinds = [token(page, i).get_attribute("class") for i in range(3)]
        assert kinds == ["t kept empty", "t agreed empty", "t agreed empty"]
        token(page, 0).hover()
        labels = page.locator("#inspected td .label").all_inner_texts()
        assert labels[:2] == ["\ufffd f09f", "\ufffd e6"]

    def test_a_lost_member_is_told(self, page: Page, server: StandIn, records: Records) -> None:
        server.texts["pair"] = [*records[:3], {**records[3], "lost": ["bytes"]}]
        write(page, server)
        assert "\u2068bytes\u2069 lost" in page.locator(".answer .status").inner_text()

    @pytest.mark.parametrize("secure", [True, False])
    def test_copy(self, page: Page, server: StandIn, records: Records, secure: bool) -> None:
        if not secure:  # as over plain HTTP from another machine
            page.add_init_script("delete Navigator.prototype.clipboard")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        write(page, server)
        assert page.evaluate("'clipboard' in navigator") == secure
        page.evaluate("addEventListener('copy', () => { window.taken = document.activeElement.value; })")
        page.click("text=Copy")
        page.wait_for_selector("text=Copied")
        taken = page.evaluate("navigator.clipboard?.readText() ?? window.taken")
        assert taken == text_of(records)
        page.wait_for_selector("text=/^Copy$/")
        assert page.evaluate("document.activeElement.textContent") == "Copy"

    def test_stop_keeps_what_was_written(self, page: Page, server: StandIn, records: Records) -> None:
        with held_up(server, 20):
            open_page(page, server)
            start(page)
            page.wait_for_selector("[data-i='19']")
            page.click("[name=stop]")
            ended(page)
        assert page.locator(".answer .status").inner_text().startswith("stopped, 20 tokens")
        assert shown(page) == text_of(records[:20])
        assert page.locator(".problem:visible").count() == 0

    def test_side_by_side(self, page: Page, server: StandIn, records: Records, alone: Records) -> None:
        open_page(page, server)
        with held_up(server, 20):
            start(page, beside="bytes", fuser="average")
            page.wait_for_selector(".answer:nth-child(1) [data-i='19']")
            page.wait_for_selector(".answer:nth-child(2) [data-i='19']")  # at once
            assert page.locator(".answer.writing").count() == 2
        ended(page)
        assert [shown(page, 0), shown(page, 1)] == [text_of(records), text_of(alone)]
        assert page.locator(".answer h2").all_inner_texts() == ["pair", "bytes"]
        boxes = [page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]
        assert boxes[1]
        assert boxes[0]["y"] == boxes[1]["y"]
        by_model = {body["model"]: body for _, body in server.requests}
        assert by_model["pair"]["prompt"] == by_model["bytes"]["prompt"]
        assert "fuser" not in by_model["bytes"]

    def test_a_long_text_is_drawn_once(self, page: Page, server: StandIn, records: Records) -> None:
        """2,000 tokens, made of the records again and again: no element is made twice or taken away."""
        long = [{**records[i % len(records)], "position": i} for i in range(2000)]
        server.texts["pair"] = long
        server.pause = 0.001
        open_page(page, server)
        page.evaluate(
            """() => {
                window.removed = 0; window.added = 0;
                new MutationObserver((all) => all.forEach((one) => {
                    if (!one.target.closest(".text")) return;
                    window.removed += one.removedNodes.length;
                    window.added += [...one.addedNodes].filter((node) => node.matches?.(".t")).length;
                })).observe(document.body, {childList: true, subtree: true});
            }"""
        )
        start(page, tokens="2000")
        ended(page)
        page.wait_for_selector("[data-i='1999']")
        assert shown(page) == text_of(long)
        tokens = page.locator(".text .t").count()
        page.locator(".text").focus()
        for key in ("End", "ArrowUp", "Home", "n"):
            page.keyboard.press(key)
        assert page.locator(".text .at").count() >= 1
        assert page.evaluate("[window.removed, window.added]") == [0, tokens]


class TestInspector:
    def test_pointing_at_a_token(self, page: Page, server: StandIn, records: Records) -> None:
        write(page, server)
        index = changed(records)[0]
        record = records[index]
        token(page, index).hover()
        panel = page.locator("#inspected")
        sections = panel.locator("section.candidates:not(.times)")
        assert sections.count() == 3
        for i, member in enumerate([*record["members"], {"name": "fused", "top": record["fused"]}]):
            section = sections.nth(i)
            assert section.locator("h3 bdi").inner_text() == member["name"] if i < 2 else True
            assert section.locator("tr").count() == len(member["top"])
            widths = section.locator(".bar i").evaluate_all(
                "all => all.map(one => parseFloat(one.style.width))"
            )
            assert widths == pytest.approx([100 * one["probability"] for one in member["top"]], abs=0.01)
        words = panel.inner_text()
        assert f"token {index + 1} of {len(records)}, id {record['token']['id']}" in words
        assert "Changed by" in words
        assert "The main model alone would have written" in words
        assert words.count("weight 50 %") == 2
        assert panel.locator(".times tr").count() == 5
        total = sum(record["ms"]["members"].values()) + sum(
            record["ms"][name] for name in ("fusion", "sampling", "handoff")
        )
        (said,) = re.findall(r"([\d.]+) ms in this step", words)
        assert float(said) == pytest.approx(total, rel=0.02)

    def test_whose_candidates_speak_for_the_token(
        self, page: Page, server: StandIn, records: Records
    ) -> None:
        """By the id with the main model. An assistant's longer token speaks for the main's shorter one."""

        def record(token: str, main: list[str], assistant: list[str]) -> dict[str, Any]:
            def top(texts: list[str]) -> list[dict[str, Any]]:
                return [{"id": i, "text": text, "probability": 0.3} for i, text in enumerate(texts)]

            written = {"id": main.index(token), "text": token}
            both = [
                {**member, "top": top(texts)}
                for member, texts in zip(records[0]["members"], (main, assistant), strict=True)
            ]
            fused = sorted(top(main), key=lambda one: one["text"] != token)
            more = {"token": written, "main_choice": {"id": 0, "text": main[0]}, "members": both}
            return {**records[0], **more, "text": token, "fused": fused, "draft": None}

        server.texts["pair"] = [
            record(" Ant", [" Ant", " also"], [" Antarctica", " a"]),  # the main model has no " Antarctica"
            record(" a", [" a", " also"], [" also", " a"]),  # but it has " also"
            record(" also", [" a", " also"], [" also", " a"]),
            record(" also", [" a", " also"], [" one", " two"]),
        ]
        write(page, server)
        kinds = [token(page, i).get_attribute("class") for i in range(4)]
        assert kinds == ["t agreed", "t kept", "t changed m1", "t joint"]
        token(page, 1).hover()
        bold = page.locator("#inspected .written td:first-child").all_inner_texts()
        assert bold == ["·a", "·a", "·a"]

    def test_the_keyboard_alone(self, page: Page, server: StandIn, records: Records) -> None:
        write(page, server)
        page.locator(".legend button").last.focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "text"
        place = page.locator("#inspected .place")
        text = page.locator(".text")
        assert place.inner_text().startswith("token 1 of")
        for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", len(records) - 1)):
            page.keyboard.press(key)
            assert place.inner_text().startswith(f"token {index + 1} of"), key
            id_ = text.get_attribute("aria-activedescendant")
            assert page.locator(f"#{id_}").get_attribute("data-i") == str(index)
        page.keyboard.press("Home")
        page.keyboard.press("n")
        first = changed(records)[0]
        assert place.inner_text().startswith(f"token {first + 1} of")
        assert "The main model alone would have written" in page.locator("#spoken").inner_text()
        top = token(page, first).bounding_box()
        page.keyboard.press("ArrowDown")
        below = page.locator(".at").first.bounding_box()
        assert top
        assert below
        assert 0 < below["y"] - top["y"] < 60
        page.keyboard.press("Escape")
        assert place.count() == 0
        assert page.locator(".at").count() == 0

    def test_one_kind_alone(self, page: Page, server: StandIn, records: Records) -> None:
        write(page, server)
        page.locator(".legend button[data-key^=changed]").first.click()
        opacity = "one => getComputedStyle(one).opacity"
        assert token(page, changed(records)[0]).evaluate(opacity) == "1"
        other = page.locator(".text .t:not(.changed, .joint)").first
        assert float(other.evaluate(opacity)) < 0.5
        page.locator(".legend button[data-key^=changed]").first.click()
        assert other.evaluate(opacity) == "1"

    def test_one_of_many_members_alone(self, page: Page, server: StandIn, records: Records) -> None:
        """Ten assistants, so colours come again: the tokens that the ninth changed, also while they come."""
        index = changed(records)[0]
        main, other = records[index]["members"]
        names = [f"assistant {i}" for i in range(1, 11)]
        made = [{**records[index], "members": [main, {**other, "name": name}]} for name in names]
        server.texts["pair"] = [*made, *made]
        with held_up(server, 10):
            open_page(page, server)
            start(page)
            page.wait_for_selector("[data-i='9']")
            page.get_by_role("button", name="changed by assistant 9").click()
        ended(page)
        opacities = [token(page, i).evaluate("one => getComputedStyle(one).opacity") for i in range(20)]
        assert [i for i, one in enumerate(opacities) if one == "1"] == [8, 18]

    def test_a_step_that_took_no_time(self, page: Page, server: StandIn, records: Records) -> None:
        server.texts["pair"] = [{**records[0], "ms": {"members": {"words": 0, "bytes": 0}}}]
        write(page, server)
        token(page, 0).hover()
        widths = "all => all.map(one => one.style.width)"
        assert page.locator("#inspected .times .bar i").evaluate_all(widths) == ["0%", "0%"]

    def test_the_selected_token_in_the_systems_own_colours(
        self, page: Page, server: StandIn, records: Records
    ) -> None:
        page.emulate_media(forced_colors="active")
        write(page, server)
        token(page, 3).click()
        ground = "one => getComputedStyle(one).backgroundColor"
        assert token(page, 3).evaluate(ground) != page.locator(".answer").evaluate(ground)
        page.emulate_media(forced_colors="none")

    def test_why_the_assistants_sat_out(self, page: Page, server: StandIn, records: Records) -> None:
        one = {**records[0], "members": records[0]["members"][:1]}
        one["token"] = one["main_choice"]
        reasons = ["settled", "gated", "boundary", "unfinished character", "something new", "constructor"]
        server.texts["pair"] = [records[0], *({**one, "not_asked": reason} for reason in reasons)]
        write(page, server)
        said = []
        for i in range(len(reasons)):
            token(page, i + 1).hover()
            assert "had no say here" in page.locator("#inspected .silent").inner_text()
            said.append(page.locator("#inspected .verdict").inner_text())
        assert "by the certificate" in said[0]
        assert "confidence gate" in said[1]
        assert "longer one" in said[2]
        assert "whole characters" in said[3]
        assert "something new" in said[4]
        assert "alone: constructor." in said[5]
        assert [token(page, i).get_attribute("class").split()[1] for i in (1, 2)] == ["settled", "satout"]


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
        def after(handler: Handler, sent: int) -> bool:
            if sent == 20:
                time.sleep(0.05)
                handler.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: reset, not closed
                handler.rfile.close()
                handler.wfile.close()
                handler.connection.close()
            return sent == 20

        server.after = after
        write(page, server)
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


class TestLooks:
    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_narrow(self, page: Page, server: StandIn, records: Records, dark: bool) -> None:
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.set_viewport_size({"width": 320, "height": 640})
        write(page, server, beside="bytes")
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        paper = page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 60) == dark
        token(page, 2).click()
        box = page.locator("#inspector").bounding_box()
        assert box
        assert (box["x"], box["width"]) == (0, 320)
        assert box["y"] + box["height"] == pytest.approx(640, abs=1)
        assert box["height"] < 330
        spot = token(page, 2).bounding_box()
        assert spot
        assert spot["y"] + spot["height"] < box["y"]  # the token is still in sight
        page.click("#close")
        assert page.locator("#inspected .place").count() == 0

    def test_a_trace_of_several_texts(
        self, page: Page, records: Records, alone: Records, tmp_path: Path
    ) -> None:
        file = tmp_path / "page.html"
        second = [{**one, "row": 1} for one in alone]
        mixed = [one for both in zip(records, second, strict=False) for one in both]  # as a batch writes them
        file.write_text(trace_html([*mixed, *records[len(second) :]], title="some.jsonl"), encoding="utf-8")
        page.goto(file.as_uri())
        page.wait_for_selector(".answer:nth-child(2) [data-i='59']")
        assert page.locator(".answer h2").all_inner_texts() == ["Text 1", "Text 2"]
        assert [shown(page, 0), shown(page, 1)] == [text_of(records), text_of(alone)]
        assert not page.locator("form").count()
        token(page, 1, answer=1).hover()
        assert page.locator("#inspected section.candidates:not(.times)").count() == 2
