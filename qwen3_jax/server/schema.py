"""What requests look like: names and types of fields.

Ranges of sampling are those of `SamplingParams`, tested there; what depends on the model is checked where it is used.
Fields nobody here knows are ignored; fields known elsewhere that would change the text and are not implemented are
refused by name (`REFUSED`), so that nothing is silently dropped.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, field_validator, model_validator


def few(most: int) -> BeforeValidator:
    """Refuse an object or a list of more entries before looking at any: pydantic would report each one."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"has {len(value)} entries: at most {most} are allowed")
        return value

    return BeforeValidator(check)


class _FirstError(FailFast):
    """Ends a list with its first error: a million wrong elements would otherwise become a million errors."""

    def __hash__(self) -> int:  # which typing needs of a member of a union
        return id(type(self))


Texts = Annotated[list[str], _FirstError()]
Ids = Annotated[list[int], _FirstError()]
IdLists = Annotated[list[Ids], _FirstError()]
Objects = Annotated[list[dict[str, Any]], _FirstError()]

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Body(BaseModel):
    """Strict about types: no number from text, no integer from a boolean; NaN and infinities are refused."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    REFUSED: ClassVar[dict[str, str]] = {}  # field → why; any value but null, false, 0 and emptiness is refused

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, reason in cls.REFUSED.items():
            if isinstance(data, dict) and data.get(name):
                raise ValueError(f"{name} is not supported: {reason}")
        return data


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Body):
    """Exactly one form for the answer."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None


class JsonSchema(Body):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`text`, `json_object`, `json_schema` with a schema, or `structural_tag` with its own fields."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema is missing: give {'name': ..., 'schema': {...}}")
        return self


class Generating(Body):
    """The fields that chat, completions and responses share."""

    model: str | None = None
    # sampling; unset is the model's default
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[str, float] | None, few(8192)] = None
    # where it ends
    stop: str | Texts | None = None
    stop_token_ids: Annotated[Ids | None, few(1024)] = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    # the form of the answer
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    allowed_token_ids: Annotated[Ids | None, few(2**18)] = None
    bad_words: Annotated[Texts | None, few(128)] = None
    # what else is returned
    n: int | None = Field(None, ge=1)
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    # how it is run
    thinking_token_budget: int | None = Field(None, ge=-1)
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=128)
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    REFUSED: ClassVar[dict[str, str]] = {
        "prompt_embeds": "give text or token ids",
        "logits_processors": "no code runs for a request",
        "use_beam_search": "tokens are sampled",
        "guided_whitespace_pattern": "use structured_outputs with a regex or grammar",
        "guided_decoding_backend": "there is one, and nothing to choose",
    }

    @field_validator("cache_salt")
    @classmethod
    def _salt(cls, value: str | None) -> str | None:
        if value is not None and re.search(r"[@/\\\x00]", value):
            raise ValueError("must not contain @, /, \\ or NUL")
        return value

    @field_validator("seed")
    @classmethod
    def _seed(cls, value: int | None) -> int | None:
        if value is not None and not -(2**63) <= value < 2**63:
            raise ValueError("must be an integer of 64 bits")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for streams: set stream to true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not supported in streams: set stream to false")
        return self


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: "Function"


class Function(Body):
    name: str  # its form is checked by text.tools, with the rest of the tool
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Rendering(Body):
    """How the chat template is to render messages: open for a new one of the assistant's, or in its last one."""

    tools: Annotated[list[Tool] | None, few(256)] = Field(None, min_length=1)
    chat_template: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, few(64)] = None
    add_generation_prompt: bool | None = None  # unset: unless the final message is continued
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _renders(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt to be false, or unset")
        switch = (self.chat_template_kwargs or {}).get("enable_thinking")
        if switch is not None and not isinstance(switch, bool):
            raise ValueError("chat_template_kwargs.enable_thinking must be true or false")
        return self


class ChatBody(Generating, Rendering):
    """POST /v1/chat/completions."""

    messages: Objects = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None

    REFUSED: ClassVar[dict[str, str]] = Generating.REFUSED | {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this is a text model",
        "mm_processor_kwargs": "this is a text model",
        "media_io_kwargs": "this is a text model",
        "echo": "use /v1/completions",
    }

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        if self.reasoning_effort is not None and self.reasoning_effort not in REASONING_EFFORTS:
            raise ValueError(f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools: give a list of tools")
        if isinstance(self.tool_choice, NamedTool):
            wanted, names = self.tool_choice.function.name, [t.function.name for t in self.tools or ()]
            if wanted not in names:
                raise ValueError(f"tool_choice names {wanted[:64]!r}, which is not one of the tools")
        return self


class CompletionBody(Generating):
    """POST /v1/completions."""

    prompt: str | Texts | Ids | IdLists
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    REFUSED: ClassVar[dict[str, str]] = Generating.REFUSED | {"suffix": "the models cannot fill in"}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0: must be at least 1, unless echo is true")
        return self


class ResponseText(Body):
    format: dict[str, Any] | None = None


class ResponseReasoning(Body):
    effort: str | None = None


class ResponsesBody(Generating):
    """POST /v1/responses; tools and text formats are flat there, see `responses_input`."""

    input: str | Objects
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    tools: Annotated[Objects | None, few(256)] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    include: Annotated[list[str] | None, few(64)] = None
    metadata: Annotated[dict[str, str] | None, few(64)] = None
    chat_template: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, few(64)] = None
    enable_thinking: bool | None = None

    REFUSED: ClassVar[dict[str, str]] = Generating.REFUSED | {
        "previous_response_id": "nothing is stored: send the conversation as input",
        "conversation": "nothing is stored: send the conversation as input",
        "background": "nothing is stored: keep the connection open",
        "prompt": "nothing is stored: send instructions and input",
    }

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value is not None and value > 1:
            raise ValueError("a response has one choice")
        return value


class TokenizeBody(Rendering):
    """POST /tokenize: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
    skip_special_tokens: bool = False
