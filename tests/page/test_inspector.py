"""What the page shows of a token, by pointer and by keyboard."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from page_driver import Records, changed, ended, held_up, open_page, start, token, write
from stand_in import StandIn

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


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
