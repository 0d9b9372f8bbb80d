"""What an OpenAI endpoint answers, with all that it tells of it."""

from dataclasses import dataclass, field
from typing import Any

from tuning.errors import SettingsError

TOP_LOGPROBS = 5


@dataclass(frozen=True)
class Served:
    """An endpoint's answer to one prompt.

    text: None where it has calls of tools alone. finish_reason: "stop", "length", "tool_calls". num_prompt_tokens,
    prompt_ids, ids (of the answer, the stop token included), logprobs (text, log probability of each token): None where
    the endpoint does not tell.
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

    Raises: SettingsError: it does not answer, or has no such model.
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
        names = [model.id for model in self._call(self._client.models.list).data]
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
                response = self._call(
                    self._client.chat.completions.create,
                    model=self.name,
                    messages=messages,
                    temperature=0,
                    max_tokens=max_tokens,
                    extra_body=body,
                    **options,
                )
            except self._openai.BadRequestError as error:
                if len(self._extras) == 1:
                    message = " ".join(str(error).split())
                    raise SettingsError(f"{self.url}: refuses a prompt: {message[:300]}") from None
                del self._extras[0]
                continue
            return read_response(response)


def read_response(response: Any) -> Served:
    """What a chat completion says; fields that are no part of OpenAI's API are vLLM's."""
    choice = response.choices[0]
    message = choice.message
    content = choice.logprobs.content if choice.logprobs else None
    prompt_ids, ids = getattr(response, "prompt_token_ids", None), getattr(choice, "token_ids", None)
    return Served(
        message.content,
        choice.finish_reason,
        response.usage.prompt_tokens if response.usage else None,
        [int(i) for i in prompt_ids] if prompt_ids else None,
        [int(i) for i in ids] if ids else None,
        [(entry.token, entry.logprob) for entry in content] if content else None,
        getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or "",
        [{"name": call.function.name, "arguments": call.function.arguments} for call in message.tool_calls or []],
    )
