"""Whether an endpoint's answers are those of the trained model, and if not, what differs first and why it may."""

import contextlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from data_utils.template import Message
from inference.chat_model import ChatModel
from inference.endpoint import Served
from inference.generate import TokenScores, stream_answer
from tuning.model.stop_token import list_eos_ids
from tuning.model.training_model import TrainingModel

_NEAR = 1.0  # nats; tokens that another rounding hardly swaps, but another dtype or quantisation may


@dataclass(frozen=True)
class Expected:
    """The trained model's likeliest answer. ids: of the answer, with the stop token where it came (stopped)."""

    prompt: list[int]
    ids: list[int]
    text: str
    stopped: bool
    max_new_tokens: int
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One prompt's outcome.

    prompt_by: "ids", "number" (of tokens alone), or None: the endpoint does not tell.
    largest_gap: by how much (nats) a served token is less likely than the likeliest one here; 0: all are the likeliest.
    logprob_difference: mean over the answer; None: not told.
    stopped: whether the trained answer ends within its length.
    tells: whether the base would not have answered so; None: no base is known.
    difference: what differs first, and why it may; None: nothing.
    """

    prompt_by: str | None
    largest_gap: float
    logprob_difference: float | None
    stopped: bool
    tells: bool | None
    difference: str | None


class Prover:
    """Holds answers of an endpoint against a model.

    training_model: an adapter's, to tell its base from it; None: the model is no adapter. tolerance: in nats; two
    dtypes may round a tie to different sides.
    """

    def __init__(self, chat: ChatModel, training_model: TrainingModel | None, tolerance: float):
        self.chat, self._training_model, self._tolerance = chat, training_model, tolerance
        self._stops = set(list_eos_ids(chat.model.generation_config))

    def expect(self, messages: list[Message], max_new_tokens: int, **more: Any) -> Expected:
        """Answer a prompt here. more: tools and template_kwargs. Raises: DataError: a prompt that cannot be."""
        tools = tuple(more.get("tools") or ())
        return self._answer(self.chat.template.encode_prompt(messages, **more), max_new_tokens, tools)

    def _answer(self, prompt: list[int], max_new_tokens: int, tools: tuple[Message, ...]) -> Expected:
        scores = TokenScores(1)
        options = self.chat.choose_options({"max_new_tokens": max_new_tokens, "temperature": 0})
        shown = self.chat.find_shown(bool(tools))
        answer = stream_answer(
            self.chat.model, self.chat.tokenizer, prompt, lambda _: None, shown, scores, **options
        )  # fmt: skip
        ids = [token_id for token_id, _, _ in scores.entries]
        return Expected(prompt, ids, answer.text, answer.ended_by == "stop", max_new_tokens, tools)

    def compare(self, expected: Expected, served: Served) -> Comparison:
        """Hold one answer against what was expected."""
        prompt_by = "ids" if served.prompt_ids else "number" if served.num_prompt_tokens else None
        ids = self._find_ids(expected, served)
        if ids is None:
            why = "its calls or its reasoning are others"
            difference = self._explain_prompt(expected, served) or _quote("the answer", served, expected, why)
            return Comparison(prompt_by, math.inf, None, expected.stopped, None, difference)
        if max(ids) >= self.chat.model.config.get_text_config().vocab_size:
            difference = f"token {max(ids)} of the answer is not in the vocabulary: another model"
            return Comparison(prompt_by, math.inf, None, expected.stopped, None, difference)
        gaps, logprobs = self._measure(expected.prompt, ids)
        base_gaps: torch.Tensor | None = None
        base_logprobs: torch.Tensor | None = None
        if self._training_model is not None:
            with self._training_model.without_adapter():
                base_gaps, base_logprobs = self._measure(expected.prompt, ids)
        told = _align(served, len(ids))
        found = self._explain_prompt(expected, served) or self._explain_stop(expected, served, ids)
        if found is None and not gaps.max() <= self._tolerance:  # NaN, too
            found = self._explain_answer(expected, served, ids, gaps, base_gaps)
        drift = base_drift = None
        if told is not None:
            drift = (told - logprobs[: len(told)]).abs().mean().item()
            if base_logprobs is not None:
                base_drift = (told - base_logprobs[: len(told)]).abs().mean().item()
            if found is None and not drift <= self._tolerance:  # NaN, too
                nearer = base_drift is not None and base_drift < drift
                why = "those of the base: the adapter is not applied" if nearer else "another model or dtype"
                found = f"the log probabilities differ by {drift:.3g} in the mean: {why}"
        tells = None
        if base_gaps is not None:
            tells = bool(base_gaps.max() > self._tolerance)
            if drift is not None and base_drift is not None:
                tells = tells or base_drift > drift + self._tolerance
        return Comparison(prompt_by, gaps.max().item(), drift, expected.stopped, tells, found)

    def _find_ids(self, expected: Expected, served: Served) -> list[int] | None:
        """Ids of the served answer, with the stop token where it stopped; None where its parts cannot be put together.

        An endpoint that tells no ids leaves the text: of the expected text the ids are the expected ones.
        """
        ended = served.finish_reason in ("stop", "tool_calls")
        if served.ids:
            ids = list(served.ids)
        elif served.calls or served.reasoning:
            message = self.chat.read_message(expected.prompt, expected.text, expected.tools)
            calls = [call["function"] for call in message.get("tool_calls", ())]
            same = [(c["name"], _parse(c["arguments"])) for c in served.calls] == [
                (c["name"], c["arguments"]) for c in calls
            ]
            same = same and (served.text or "").strip() == message["content"].strip()
            if not same or served.reasoning.strip() != message.get("reasoning_content", "").strip():
                return None
            ids = list(expected.ids)
        elif served.text == expected.text:
            ids = list(expected.ids)
            if ended != expected.stopped:
                ids = [token_id for token_id in ids if token_id not in self._stops]
        else:
            encoder = self.chat.template.encoder
            ids = encoder.encode(encoder.escape(served.text or ""))
        if ended and (not ids or ids[-1] not in self._stops):
            ids.append(expected.ids[-1] if expected.stopped else self.chat.template.stop_id)
        # An endpoint may say more than it was asked for; what it says beyond decides nothing.
        return ids[: expected.max_new_tokens + 1] or None

    @torch.no_grad()
    def _measure(self, prompt: list[int], ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token of an answer: by how much it is less likely than the likeliest, and its log probability.

        The first counts the repetition penalty of the model's settings, which generation goes by; the second does not.
        """
        model = self.chat.model
        whole = torch.tensor([[*prompt, *ids]], device=next(model.parameters()).device)
        logits = model(whole).logits[0, len(prompt) - 1 : -1].float().cpu()
        answer = torch.tensor(ids).unsqueeze(1)
        logprobs = torch.log_softmax(logits, -1).gather(1, answer).squeeze(1)
        penalty = getattr(model.generation_config, "repetition_penalty", None) or 1.0
        if penalty != 1.0:
            for place in range(len(ids)):
                seen = whole[0, : len(prompt) + place].cpu().unique()
                values = logits[place, seen]
                logits[place, seen] = torch.where(values > 0, values / penalty, values * penalty)
        chosen = logits.gather(1, answer).squeeze(1)
        return logits.amax(1) - chosen, logprobs

    def _explain_prompt(self, expected: Expected, served: Served) -> str | None:
        decode = self.chat.tokenizer.decode
        if served.prompt_ids:
            if served.prompt_ids == expected.prompt:
                return None
            pairs = zip(served.prompt_ids, expected.prompt, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            at = min(len(served.prompt_ids), len(expected.prompt)) if place is None else place
            theirs, ours = decode(served.prompt_ids[at : at + 8]), decode(expected.prompt[at : at + 8])
            where = f"at token {at}: {theirs!r}, trained {ours!r}"
        elif served.num_prompt_tokens and served.num_prompt_tokens != len(expected.prompt):
            where = f"{served.num_prompt_tokens} tokens, trained {len(expected.prompt)}"
        else:
            return None
        system = self.chat.template.system_message
        why = "another chat template" + (", or the run's system message is not added there" if system else "")
        return f"the prompt differs, {where}: {why}"

    def _explain_stop(self, expected: Expected, served: Served, ids: list[int]) -> str | None:
        if served.finish_reason == "tool_calls":
            return None
        ended = ids[-1] in self._stops
        text = served.text or ""
        trained = expected.text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that was cut in two
        if not ended and len(text) < len(trained) and trained.startswith(text):
            return f"the answer is cut after {text[-40:]!r}: the endpoint allows fewer tokens than were asked for"
        if not expected.stopped:
            return None
        before = expected.ids[:-1]
        goes_on = ids[: len(before)] == before and len(ids) > len(expected.ids)
        if goes_on or (text.startswith(expected.text) and (text != expected.text or served.finish_reason == "length")):
            stop = self.chat.tokenizer.decode(expected.ids[-1:])
            more = self.chat.tokenizer.decode(ids[len(before) : len(before) + 12])
            return (
                f"the answer goes on after {expected.text[-40:]!r}: {more!r}: it does not stop at {stop} "
                "(generation_config.json of the checkpoint, or the endpoint's stop setting)"
            )
        if not ended and text == expected.text:
            return f"the endpoint does not say that the answer ended (finish_reason {served.finish_reason!r})"
        return None

    def _explain_answer(
        self, expected: Expected, served: Served, ids: list[int], gaps: torch.Tensor, base_gaps: torch.Tensor | None
    ) -> str:
        place = int((~(gaps <= self._tolerance)).nonzero()[0])
        if base_gaps is not None and (base_gaps.max() <= self._tolerance or self._is_of_base(expected, served)):
            why = "the base answers so: the adapter is not applied"
        elif gaps.max() < _NEAR:
            why = "a near tie, which another dtype or quantisation may decide otherwise; --tolerance allows more"
        elif ids[place] in self._stops or (place < len(expected.ids) and expected.ids[place] in self._stops):
            why = "it stops elsewhere"
        else:
            why = "another model, or other settings of decoding than the likeliest token"
        return _quote(f"token {place} of the answer, {gaps[place]:.2f} nats below the likeliest", served, expected, why)

    def _is_of_base(self, expected: Expected, served: Served) -> bool:
        """Whether a text is the base's answer: text alone, with characters cut in two, does not give its tokens."""
        assert self._training_model is not None
        with self._training_model.without_adapter():
            return self._answer(expected.prompt, expected.max_new_tokens, expected.tools).text == served.text


def _quote(what: str, served: Served, expected: Expected, why: str) -> str:
    return f"{what}: {(served.text or '')[:80]!r}, trained {expected.text[:80]!r}: {why}"


def _align(served: Served, num_ids: int) -> torch.Tensor | None:
    """Log probabilities of the answer's first tokens; the stop token's may be lacking. None: not told."""
    if served.logprobs is None or len(served.logprobs) not in (num_ids, num_ids - 1):
        return None
    return torch.tensor([logprob for _, logprob in served.logprobs])


def _parse(arguments: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(arguments)
    return None
