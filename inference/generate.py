"""Answers: streaming one, or many in left-padded batches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from data_utils.new_tokens import list_content_tokens
from tuning.errors import explain_bad_files
from tuning.model.stop_token import list_eos_ids

_SETTLED_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """Text of an answer and what ended it: "stop" (a stop token), "length", or "interrupt".

    num_tokens: that were generated, the stop token included.
    """

    text: str
    ended_by: str
    num_tokens: int


class TokenScores:
    """Log probabilities of an answer's tokens, as the model gives them: before temperature, penalties and choices.

    num_top: of the likeliest tokens that are kept in each place. entries: (token id, its log probability,
    [(id, log probability), ...] of the likeliest) of each token.
    """

    def __init__(self, num_top: int):
        self._num_top = num_top
        self._latest: torch.Tensor | None = None  # [V]
        self.entries: list[tuple[int, float, list[tuple[int, float]]]] = []

    def see(self, _module: Any, _inputs: Any, output: Any) -> None:
        """A forward hook of the model."""
        self._latest = torch.log_softmax(output.logits[0, -1].float(), -1)

    def take(self, token_id: int) -> None:
        """The token that was chosen."""
        assert self._latest is not None
        values, ids = self._latest.topk(min(self._num_top, len(self._latest)))
        likeliest = list(zip(ids.tolist(), values.tolist(), strict=True))
        self.entries.append((token_id, self._latest[token_id].item(), likeliest))


class TextPieces(BaseStreamer):
    """Passes generated text to a function, whole characters only. shown: special tokens that are part of it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
        shown: frozenset[str] = frozenset(),
        scores: TokenScores | None = None,
    ):
        self._tokenizer = tokenizer
        self._write = write
        self._shown = shown
        self._scores = scores
        self._prompt_seen = False
        self._written = 0
        self.ids: list[int] = []
        self._settled, self._start = "", 0  # text of the tokens before _start, which is not decoded again

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call), then one token a call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token_id in value.flatten().tolist():
            self.ids.append(token_id)
            if self._scores:
                self._scores.take(token_id)
        text = self.text
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is not whole yet
            self._write(text[self._written :])
            self._written = len(text)
            if len(self.ids) - self._start >= 2 * _SETTLED_TOKENS and len(self.ids) % 16 == 0:
                self._settle(text)

    def _settle(self, text: str) -> None:
        """Decode the first half no more, if the halves decoded apart are the text: no character lies in both."""
        for middle in range(self._start + _SETTLED_TOKENS, self._start + _SETTLED_TOKENS + 4):
            first, second = self._decode(self.ids[self._start : middle]), self._decode(self.ids[middle:])
            if self._settled + first + second == text:
                self._settled, self._start = self._settled + first, middle
                return

    def end(self) -> None:
        """Write what is left."""
        self._write(self.text[self._written :])
        self._written = len(self.text)

    @property
    def text(self) -> str:
        """All of the answer so far."""
        return self._settled + self._decode(self.ids[self._start :])

    def _decode(self, ids: list[int]) -> str:
        return decode_answer(self._tokenizer, ids, self._shown)


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], shown: frozenset[str] = frozenset()) -> str:
    """Text of generated tokens, without special tokens but for those that were added for the text, or are shown."""
    kept = {*list_content_tokens(tokenizer), *shown}
    if not kept:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content not in kept}
    return str(tokenizer.decode([token_id for token_id in ids if token_id not in special]))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    shown: frozenset[str] = frozenset(),
    **options: Any,
) -> Iterator[Answer]:
    """Answer prompts in batches, padded on the left.

    shown: as TextPieces has it. options: of transformers' generate (max_new_tokens, ...).
    """
    stops = set(list_eos_ids(model.generation_config))
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        with _explain():
            output = model.generate(**inputs, **_complete(model, tokenizer, options))
        for new in output[:, width:].tolist():
            end = next((position for position, token_id in enumerate(new) if token_id in stops), None)
            text = decode_answer(tokenizer, new if end is None else new[:end], shown)
            yield Answer(text, "length" if end is None else "stop", len(new) if end is None else end + 1)


@torch.no_grad()
def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    write: Callable[[str], None],
    shown: frozenset[str] = frozenset(),
    scores: TokenScores | None = None,
    **options: Any,
) -> Answer:
    """Answer one prompt, piece by piece. Ctrl-C ends the answer, not the program.

    shown: as TextPieces has it. scores: gets every token.
    """
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    streamer = TextPieces(tokenizer, write, shown, scores)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": streamer}
    hook = model.register_forward_hook(scores.see) if scores else contextlib.nullcontext()
    try:
        with hook, _explain():
            model.generate(**inputs, **_complete(model, tokenizer, options))
    except KeyboardInterrupt:
        return Answer(streamer.text, "interrupt", len(streamer.ids))
    stopped = bool(streamer.ids) and streamer.ids[-1] in list_eos_ids(model.generation_config)
    return Answer(streamer.text, "stop" if stopped else "length", len(streamer.ids))


def _explain() -> contextlib.AbstractContextManager[None]:
    return explain_bad_files("no answer can be generated with these settings and those of generation_config.json")


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the tokenizer where the model's own settings stop at texts."""
    stops_at_texts = model.generation_config is not None and model.generation_config.stop_strings
    return {"use_cache": True, **options, **({"tokenizer": tokenizer} if stops_at_texts else {})}
