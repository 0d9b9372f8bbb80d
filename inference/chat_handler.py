"""Chat requests to answers, on transformers' handler of /v1/chat/completions.

Theirs are the thread that generates, the form of responses and the parser of markup. Ours are the prompt, rendered as
in training, the decoding, which is chat.py's, and the checks.
"""

import asyncio
import json
import secrets
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Container
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from transformers import StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, InferenceThread

from data_utils.sources import DataError
from data_utils.template import ChatTemplate
from inference.chat_model import choose_cache
from inference.decoding import choose_options
from inference.gate import CLIENT_GONE
from inference.generate import Answer, TokenScores, stream_answer
from inference.jobs import Client, Job, StopGenerating
from inference.markup import MessageParser, Piece, find_markup
from inference.one_model import OneModel
from inference.requests import RequestError, limit_tokens, read_request
from inference.stop_texts import StopTexts
from tuning.errors import SettingsError
from tuning.model.stop_token import list_eos_ids

_LEAST_LOGPROB = -9999.0  # OpenAI's for tokens of no probability; JSON knows no infinity
MAX_WAITING = 64  # requests, that which is answered included


class ChatHandler(ChatCompletionHandler):
    """transformers' handler of /v1/chat/completions, with our prompt, our decoding and our markup.

    template: of the model's prompts. kv_cache: as ChatModel has it.

    Answers are generated one after another, in the order of their requests.
    """

    def __init__(self, manager: OneModel, template: ChatTemplate, kv_cache: str = "full"):
        super().__init__(manager, GenerationState())
        self.name, self.model, self.tokenizer = manager.name, manager.model, manager.tokenizer
        self.template, self.markup = template, find_markup(template)
        self.context = read_context(manager.model)
        self._cache = choose_cache(manager.model, kv_cache)
        self._reader = ThreadPoolExecutor(1, "read-requests")  # one: the template's caches are not for several
        self._thread = InferenceThread()
        self._num_waiting = 0  # clients
        self._watching: set[asyncio.Task[None]] = set()

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer one request: a JSON response, or a stream. Raises: RequestError."""
        from fastapi.responses import JSONResponse, StreamingResponse

        if self._num_waiting >= MAX_WAITING:
            raise RequestError(f"{MAX_WAITING} requests are waiting; try again", status=429, code="too_many_requests")
        client = Client(asyncio.get_running_loop(), CLIENT_GONE.get())
        self._num_waiting += 1
        watching = asyncio.create_task(self._tell_when_gone(client))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        job = await client.loop.run_in_executor(self._reader, self._read, body, client)
        self._thread.submit(self._generate, job)
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        if job.request.stream:
            return StreamingResponse(self._stream(job, answer_id), media_type="text/event-stream")
        return JSONResponse(await self._collect(job, answer_id))

    async def _tell_when_gone(self, client: Client) -> None:
        await client.gone.wait()
        client.left.set()
        self._num_waiting -= 1

    def _read(self, body: dict[str, Any], client: Client) -> Job:
        try:
            request = read_request(body, self.name)
            conversation = request.conversation
            if conversation.tools and not self.template.for_tools.writes_tools:
                raise RequestError("tools: this model's chat template cannot express tools", param="tools")
            if conversation.tools and self.markup.calls is None:
                raise RequestError("tools: calls as this model's template writes them cannot be read", param="tools")
            prompt = self.template.encode_prompt(
                list(conversation.messages),
                tools=conversation.tools,
                template_kwargs=conversation.template_kwargs,
                check=True,
            )
        except DataError as error:
            raise RequestError(str(error).removeprefix("prompt: "), param="messages") from None
        except RecursionError:
            raise RequestError("the request is nested too deeply") from None
        max_tokens = limit_tokens(request, len(prompt), self.context)
        samples = bool(self.model.generation_config.do_sample)
        options = {**choose_options(request.decoding, samples=samples), **self._cache}
        wanted = request.top_logprobs is not None or request.return_token_ids
        scores = TokenScores(request.top_logprobs or 0) if wanted else None
        return Job(request, prompt, max_tokens, options, client, scores)

    def _generate(self, job: Job) -> None:
        """In the thread that generates. Nothing is raised: an exception there would be kept, with all it refers to."""
        failure = None
        try:
            if not job.client.left.is_set():
                job.put(self._answer(job))
        except (torch.OutOfMemoryError, MemoryError):
            failure = RequestError("not enough memory for this request; make it shorter", status=503)
        except SettingsError as error:
            is_mistake = isinstance(error.__cause__, ValueError)
            if not is_mistake:
                traceback.print_exception(error, file=sys.stderr)
            failure = RequestError(str(error), status=400 if is_mistake else 500)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            failure = RequestError("the answer failed; the server's log says why", status=500)
        if failure is not None:
            torch.cuda.empty_cache()  # now that nothing refers to what was computed
            job.put(failure)

    def _answer(self, job: Job) -> Answer:
        """Generate as chat.py does; the pieces go to the job. Returns: the answer and what ended it."""
        tools = job.request.conversation.tools
        response_template = self.markup.choose(has_tools=bool(tools))
        parser = response_template and MessageParser(response_template, self.tokenizer.decode(job.prompt), tools)
        stops = StopTexts(job.request.stops)

        def put(text: str) -> None:
            for piece in parser.feed(text) if parser else [Piece("content", text)] if text else []:
                job.put(piece)

        seed = job.request.seed
        transformers.set_seed(secrets.randbits(32) if seed is None else seed % 2**32)
        answer = stream_answer(
            self.model,
            self.tokenizer,
            job.prompt,
            lambda text: put(stops.feed(text)),
            self.markup.shown,
            job.scores,
            max_new_tokens=job.max_tokens,
            stopping_criteria=StoppingCriteriaList([StopGenerating(job, stops)]),
            **job.options,
        )
        put(stops.end())
        for piece in parser.finish() if parser else ():
            job.put(piece)
        cut = not stops.found and answer.ended_by == "length" and answer.num_tokens >= job.max_tokens
        return Answer(answer.text, "length" if cut else "stop", answer.num_tokens)

    async def _take(self, job: Job) -> AsyncIterator[Piece | Answer]:
        """The pieces of an answer and its end; nothing more when the client has gone. Raises: RequestError."""
        gone = asyncio.ensure_future(job.client.gone.wait())
        try:
            while True:
                item = asyncio.ensure_future(job.pieces.get())
                await asyncio.wait((item, gone), return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    return
                if isinstance(found := item.result(), RequestError):
                    raise found
                yield found
                if isinstance(found, Answer):
                    return
        finally:
            gone.cancel()

    async def _collect(self, job: Job, answer_id: str) -> dict[str, Any]:
        texts: dict[str, str] = {}
        calls: list[dict[str, Any]] = []
        end = Answer("", "length", 0)
        async for item in self._take(job):
            if isinstance(item, Answer):
                end = item
            elif item.kind == "call":
                calls.append(_call(item, answer_id, len(calls)))
            else:
                texts[item.kind] = texts.get(item.kind, "") + item.text
        completion: dict[str, Any] = self._build_completion(
            answer_id,
            texts.get("content", None if calls else ""),
            self.name,
            _finish_reason(end, bool(calls)),
            usage=_usage(job, end),
            tool_calls=calls or None,
            reasoning_content=texts.get("reasoning"),
        )
        choice = completion["choices"][0]
        choice["message"].setdefault("content", None)
        if job.scores and job.request.top_logprobs is not None:
            choice["logprobs"] = {
                "content": describe_scores(job.scores, self.tokenizer, list_eos_ids(self.model.generation_config))
            }
        if job.scores and job.request.return_token_ids:
            completion["prompt_token_ids"] = job.prompt
            choice["token_ids"] = [token_id for token_id, _, _ in job.scores.entries]
        return completion

    async def _stream(self, job: Job, answer_id: str) -> AsyncIterator[str]:
        num_calls = 0
        try:
            yield self._build_chunk_sse(answer_id, role="assistant", model=self.name)
            async for item in self._take(job):
                if isinstance(item, Answer):
                    reason = _finish_reason(item, bool(num_calls))
                    yield self._build_chunk_sse(answer_id, finish_reason=reason, model=self.name)
                    if job.request.include_usage:
                        yield self._usage_chunk(answer_id, _usage(job, item))
                    yield "data: [DONE]\n\n"
                elif item.kind == "call":
                    call = {"index": num_calls, **_call(item, answer_id, num_calls)}
                    num_calls += 1
                    yield self._build_chunk_sse(answer_id, tool_calls=[call], model=self.name)
                else:
                    name = {"content": "content", "reasoning": "reasoning_content"}[item.kind]
                    yield self._build_chunk_sse(answer_id, model=self.name, **{name: item.text})
        except RequestError as error:
            yield f"data: {json.dumps(error.to_json())}\n\n"

    def _usage_chunk(self, answer_id: str, usage: Any) -> str:
        from openai.types.chat import ChatCompletionChunk

        chunk = ChatCompletionChunk(
            id=answer_id,
            choices=[],
            created=int(time.time()),
            model=self.name,
            object="chat.completion.chunk",
            usage=usage,
        )
        return self.chunk_to_sse(chunk)


def read_context(model: Any) -> int | None:
    """How many tokens a model takes, by its configuration."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def describe_scores(scores: TokenScores, tokenizer: Any, stop_ids: Container[int]) -> list[dict[str, Any]]:
    """Log probabilities in OpenAI's form, but for the stop token at the end, which is no part of the content."""
    entries = scores.entries
    if entries and entries[-1][0] in stop_ids:
        entries = entries[:-1]

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token_id])
        # A part of a character has no text of its own.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(text.encode()) if whole else None}

    return [
        {**describe(token_id, logprob), "top_logprobs": [describe(*each) for each in likeliest]}
        for token_id, logprob, likeliest in entries
    ]


def _call(piece: Piece, answer_id: str, number: int) -> dict[str, Any]:
    call_id = f"call_{answer_id.removeprefix('chatcmpl-')[:16]}_{number}"
    return {"id": call_id, "type": "function", "function": {"name": piece.text, "arguments": piece.arguments}}


def _finish_reason(answer: Answer, has_calls: bool) -> str:
    return "tool_calls" if has_calls and answer.ended_by == "stop" else answer.ended_by


def _usage(job: Job, answer: Answer) -> Any:
    from openai.types import CompletionUsage

    num_prompt = len(job.prompt)
    total = num_prompt + answer.num_tokens
    return CompletionUsage(prompt_tokens=num_prompt, completion_tokens=answer.num_tokens, total_tokens=total)
