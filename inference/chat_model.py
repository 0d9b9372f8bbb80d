"""A loaded model that answers conversations as it was trained to."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, QuantizedCache, cache_utils

from data_utils.schema import parse_record
from data_utils.sources import Record
from data_utils.template import ChatTemplate, Message
from inference.decoding import SETTINGS, choose_options, read_setting
from inference.generate import Answer, stream_answer
from tuning.errors import SettingsError

# No library is needed for it, and what is cached stays as it was first rounded.
_QUANTIZED = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


@dataclass(frozen=True)
class Reply(Answer):
    """An answer, and as a message to go on from: {"role": "assistant", "content": ...}, with its calls of tools."""

    message: dict[str, Any]


class ChatModel:
    """A model, its tokenizer and its chat template, which answer together.

    system_message: system turn of conversations without one. kv_cache: "full", or "quantized" to 8-bit floats. kept:
    whose hooks the model needs.

    Raises: SettingsError: a model whose cache cannot be quantised.

    Example: ChatModel(model, tokenizer).chat([{"role": "user", "content": "Hi"}]).text -> "Hello!"
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_message: str | None = None,
        kv_cache: str = "full",
        kept: Any = None,
    ):
        self.model, self.tokenizer, self._kept = model, tokenizer, kept
        self.template = ChatTemplate(tokenizer, system_message=system_message)
        self._cache = choose_cache(model, kv_cache)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        write: Callable[[str], None] | None = None,
        seed: int | None = None,
        **settings: float,
    ) -> Reply:
        """Answer a conversation that ends with a user's turn or the results of tools.

        tools: in OpenAI's form. template_kwargs: variables of the chat template. write: takes the answer as it comes.
        settings: of decoding.SETTINGS; max_new_tokens is 512 if it is not named.

        Raises: DataError: messages or tools that are none, or that the template cannot express. SettingsError.
        """
        row = {
            "messages": list(messages),
            "tools": list(tools or ()),
            "chat_template_kwargs": dict(template_kwargs or {}),
        }
        asked = parse_record(Record(row, "chat", 0), data_format="messages")
        decoding: dict[str, float] = {"max_new_tokens": 512}
        for name, value in settings.items():
            if name not in SETTINGS:
                raise SettingsError(f"{name}: not a setting ({', '.join(SETTINGS)})")
            try:
                decoding[name] = read_setting(name, str(value))
            except SettingsError as error:
                raise SettingsError(f"{name} {value}: {error}") from None
        prompt = self.template.encode_prompt(
            list(asked.messages), tools=asked.tools, template_kwargs=asked.template_kwargs, check=True
        )
        if seed is not None:
            transformers.set_seed(seed % 2**32)
        return self.answer(prompt, write or (lambda _: None), tools=asked.tools, **decoding)

    def answer(
        self, prompt: list[int], write: Callable[[str], None], *, tools: Sequence[Message] = (), **settings: float
    ) -> Reply:
        """Answer a prompt as template.encode_prompt gives it; the text goes to write as it comes.

        tools: of the prompt; then calls in the answer are read, and markup that consists of special tokens is shown.
        """
        shown = self.find_shown(bool(tools))
        options = self.choose_options(settings)
        answer = stream_answer(self.model, self.tokenizer, prompt, write, shown, **options)
        message = self.read_message(prompt, answer.text, tools)
        return Reply(answer.text, answer.ended_by, answer.num_tokens, message)

    def choose_options(self, settings: Mapping[str, float]) -> dict[str, Any]:
        """Settings as generate takes them, with the kind of cache."""
        return {**choose_options(settings, samples=bool(self.model.generation_config.do_sample)), **self._cache}

    @cached_property
    def _markup(self) -> Any:
        return load_markup(self.template)

    def find_shown(self, has_tools: bool) -> frozenset[str]:
        """Special tokens that are part of an answer's text: the markup of calls."""
        return self._markup.shown if has_tools else frozenset()

    def read_message(self, prompt: list[int], text: str, tools: Sequence[Message]) -> dict[str, Any]:
        """An answer's text as a message, its calls of tools and its reasoning apart. tools: of the prompt."""
        if not tools or self._markup.calls is None:
            return {"role": "assistant", "content": text}
        from inference.markup import MessageParser

        parser = MessageParser(self._markup.calls, self.tokenizer.decode(prompt), tools)
        return _as_message([*parser.feed(text), *parser.finish()])


def load_markup(template: ChatTemplate) -> Any:
    """What a template writes calls of tools with (markup.Markup). Raises: SettingsError: libraries are lacking."""
    try:
        from inference.markup import find_markup
    except ImportError as error:
        raise SettingsError(f"tools: {error}; pip install -r requirements_serve.txt") from None
    return find_markup(template)


def choose_cache(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """What generate is told of its cache. kind: "full" or "quantized". Raises: SettingsError: not with this model."""
    if kind == "full":
        return {}
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        raise SettingsError(
            f"--kv_cache quantized: transformers {transformers.__version__} cannot do it without other libraries; "
            "pip install -U transformers"
        )
    try:
        QuantizedCache("fp8", config=model.config)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"--kv_cache quantized: not with this model ({error})") from None
    return dict(_QUANTIZED)


def _as_message(pieces: Iterable[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for piece in pieces:
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": json.loads(piece.arguments)}
            calls.append({"type": "function", "function": function})
        else:
            name = {"content": "content", "reasoning": "reasoning_content"}[piece.kind]
            message[name] = message.get(name, "") + piece.text
    return {**message, **({"tool_calls": calls} if calls else {})}
