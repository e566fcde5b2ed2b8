"""The page in a browser: texts as they come, on wide and narrow screens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_driver import Records, changed, ended, held_up, open_page, shown, start, text_of, token, write
from stand_in import StandIn

from deepen_ext.serving.page import trace_html

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


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
