"""What an OpenAI endpoint answers, with all that it tells of it."""

from dataclasses import dataclass, field
from typing import Any

from tuning.errors import SettingsError, explain_bad_files

TOP_LOGPROBS = 5


@dataclass(frozen=True)
class Served:
    """An endpoint's answer to one prompt.

    text: None where it has calls of tools alone. finish_reason: "stop", "length", "tool_calls"; "": not told.
    num_prompt_tokens, prompt_ids, ids (of the answer, the stop token included), logprobs (text, log probability of each
    token): None where the endpoint does not tell.
    """

    text: str | None
    finish_reason: str
    num_prompt_tokens: int | None = None
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None
    logprobs: list[tuple[str, float]] | None = None
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class Endpoint:
    """An endpoint and the model that it serves. name: None takes the only one.

    Raises: SettingsError: it does not answer, answers as no such API does, or has no such model.
    """

    def __init__(self, url: str, key: str, name: str | None):
        import openai

        self._openai = openai
        self.url = url
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=600, max_retries=1)
        # What says most, and what is left where an endpoint refuses that.
        self._extras: list[dict[str, Any]] = [
            {"logprobs": True, "top_logprobs": TOP_LOGPROBS, "extra_body": {"return_token_ids": True}},
            {"logprobs": True, "top_logprobs": TOP_LOGPROBS},
            {},
        ]
        self._misread = f"{url}: does not answer as OpenAI's API does (is it the address up to and with /v1?)"
        with explain_bad_files(self._misread):
            names = [str(model.id) for model in self._call(self._client.models.list).data]
        if name is None and len(names) != 1:
            raise SettingsError(f"{url}: serves {', '.join(names) or 'nothing'}; choose one with --served_name")
        if name is not None and name not in names:
            raise SettingsError(f"{url}: serves {', '.join(names) or 'nothing'}, not {name}")
        self.name = name or names[0]

    def _call(self, function: Any, **options: Any) -> Any:
        try:
            return function(**options)
        except self._openai.BadRequestError:
            raise
        except self._openai.APIError as error:
            message = " ".join(str(error).split())
            raise SettingsError(f"{self.url}: {message[:300]}") from None

    def ask(self, messages: list[dict[str, Any]], max_tokens: int, **more: Any) -> Served:
        """Its likeliest answer. more: tools, and extra_body. Raises: SettingsError: it refuses, or does not answer."""
        while True:
            extras = dict(self._extras[0])
            body = {**extras.pop("extra_body", {}), **more.get("extra_body", {})}
            options = {**extras, **{name: value for name, value in more.items() if name != "extra_body"}}
            try:
                with explain_bad_files(self._misread, but=(self._openai.BadRequestError,)):
                    response = self._call(
                        self._client.chat.completions.create,
                        model=self.name,
                        messages=messages,
                        temperature=0,
                        max_tokens=max_tokens,
                        extra_body=body,
                        **options,
                    )
                    return read_response(response)
            except self._openai.BadRequestError as error:
                if len(self._extras) == 1:
                    message = " ".join(str(error).split())
                    raise SettingsError(f"{self.url}: refuses a prompt: {message[:300]}") from None
                del self._extras[0]


def read_response(response: Any) -> Served:
    """What a chat completion says; fields that are no part of OpenAI's API are vLLM's.

    Raises: ValueError, TypeError, LookupError, AttributeError: it says none, as others may write anything.
    """
    choice = response.choices[0]
    message = choice.message
    content = choice.logprobs.content if choice.logprobs else None
    prompt_ids, ids = getattr(response, "prompt_token_ids", None), getattr(choice, "token_ids", None)
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
    calls = [{"name": call.function.name, "arguments": call.function.arguments} for call in message.tool_calls or []]
    for text in (message.content or "", choice.finish_reason or "", reasoning, *(c["arguments"] for c in calls)):
        if not isinstance(text, str):
            raise ValueError(f"expected text, not {str(text)[:80]}")
        text.encode()  # halves of surrogate pairs are no text
    return Served(
        message.content,
        choice.finish_reason or "",
        int(response.usage.prompt_tokens) if response.usage else None,
        _read_ids(prompt_ids) if prompt_ids else None,
        _read_ids(ids) if ids else None,
        [(entry.token, float(entry.logprob)) for entry in content] if content else None,
        reasoning,
        calls,
    )


def _read_ids(values: Any) -> list[int]:
    if any(type(value) is not int or not 0 <= value < 2**31 for value in values):
        raise ValueError(f"expected token ids, not {str(values)[:80]}")
    return list(values)
