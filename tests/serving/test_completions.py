"""Completions and chats through OpenAI's own client: texts are the ensemble's, and answers have its shapes."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from running import ASSISTANT, MAIN, PROMPT, Running

from deepen_ext import Ensemble


def test_texts_are_the_ensembles(client: openai.OpenAI, pair: Ensemble) -> None:
    expected = pair.generate(PROMPT, max_new_tokens=12, draft=0)
    answer = client.completions.create(model="deepen", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "deepen"
    assert answer.usage is not None
    main = pair.members[0].vocabulary
    assert answer.usage.prompt_tokens == len(main.prefix_ids) + len(main.encode(PROMPT))
    assert answer.usage.completion_tokens == 12
