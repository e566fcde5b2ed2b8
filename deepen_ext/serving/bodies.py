"""The bodies of requests. A field that is not here is refused by name; null is as good as not given."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from deepen_ext.decoding.drafts.draft_settings import LONGEST
from deepen_ext.fusers.weights import WeightsRule

# Texts of one request: prompts times `n`.
MOST_TEXTS = 128
# As OpenAI has it where a request does not say.
COMPLETION_TOKENS = 16
# Where a chat does not say; OpenAI writes to the end of the context.
CHAT_TOKENS = 512

Text: TypeAlias = Annotated[str, StringConstraints(max_length=4_000_000)]
Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
Stop: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return (
            {key: value for key, value in given.items() if value is not None}
            if isinstance(given, dict)
            else given
        )


class StreamOptions(_Body):
    """What comes with a stream."""

    include_usage: bool = Field(False, description="A last chunk with the token counts of the request.")
    include_obfuscation: Literal[False] = Field(False, description="Chunks are not padded.")


class TextFormat(_Body):
    """Free text, the only format there is."""

    type: Literal["text"]


class _Asked(_Body):
    """What completions and chats have in common."""

    model: Name = Field(description="A name that /v1/models lists.")
    max_tokens: int | None = Field(None, ge=0, le=1 << 24)
    n: int = Field(1, ge=1, le=MOST_TEXTS, description="Texts for each prompt.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="The text ends before any of these."
    )
    seed: int | None = Field(
        None, ge=-(1 << 61), le=1 << 61, description="Of sampling; text i of a prompt has seed + i."
    )
    temperature: float = Field(1.0, ge=0, le=100, description="0: always the most probable token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=1 << 31, description="-1 or 0: all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="transformers': 1 is none.")
    logit_bias: (
        dict[
            Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-100, le=100)],
        ]
        | None
    ) = Field(None, description="By token id of the main model.", max_length=1024)
    user: Annotated[str, StringConstraints(max_length=1000)] | None = Field(
        None, description="Not looked at."
    )
    fuser: Annotated[str, StringConstraints(min_length=1, max_length=60)] | None = Field(
        None, description="Ours: another way of fusing, for this request."
    )
    weights: WeightsRule | Annotated[list[float], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Ours: the members' weights, for this request."
    )
    draft: Literal["auto"] | Annotated[int, Field(ge=0, le=LONGEST)] = Field(
        0, description="Ours: tokens written ahead."
    )
    explain: bool = Field(False, description="Ours: every token comes with what each member said.")

    @property
    def stops(self) -> list[str]:
        """As a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(_Asked):
    """Of /v1/completions."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]
    ) = Field(description="A text or token ids of the main model; or a list of either.")
    echo: bool = Field(False, description="The prompt stands before the text.")
    logprobs: int | None = Field(
        None, ge=0, description="Most probable tokens at each place: 5 at most, of a member alone 128."
    )
    prompt_logprobs: int | None = Field(None, ge=0, description="As vLLM has it; of a member alone.")
    best_of: int | None = Field(None, ge=1, description="No more than n.")
    return_tokens_as_token_ids: bool = Field(False, description='Tokens as "token_id:123".')
    add_special_tokens: bool = Field(True, description="Whether BOS stands before a prompt that is a text.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The content."""
        return self.content if isinstance(self.content, str) else "".join(one.text for one in self.content)


class ChatBody(_Asked):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 24)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With logprobs: true.")
    response_format: TextFormat | None = None
    without_template: Literal["error", "plain"] | None = Field(
        None, description="Ours: what to do for a member that has no chat template."
    )


class TokenizeBody(_Body):
    """Of /tokenize, as vLLM has it; llama.cpp's names of the same are taken too."""

    model: Name | None = None
    prompt: Text | None = None
    content: Text | None = None
    add_special_tokens: bool = True
    add_special: bool | None = None
    parse_special: bool | None = None

    @property
    def text(self) -> str | None:
        """The text under either name."""
        return self.content if self.prompt is None else self.prompt


class DetokenizeBody(_Body):
    """Of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20)]
