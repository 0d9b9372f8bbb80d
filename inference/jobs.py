"""An answer on its way from the thread that generates to the client that waits for it."""

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

from inference.generate import Answer, TokenScores
from inference.markup import Piece
from inference.requests import ChatRequest, RequestError
from inference.stop_texts import StopTexts


@dataclass
class Client:
    """Who waits for an answer. gone: it has its answer, or has gone away; left says that to the thread."""

    loop: asyncio.AbstractEventLoop
    gone: asyncio.Event
    left: threading.Event = field(default_factory=threading.Event)


@dataclass
class Job:
    """One answer on its way from the thread that generates to the client.

    pieces: of the answer, then an Answer, or what went wrong. scores: of its tokens, where they are wanted.
    """

    request: ChatRequest
    prompt: list[int]
    max_tokens: int
    options: dict[str, Any]
    client: Client
    scores: TokenScores | None = None
    pieces: "asyncio.Queue[Piece | Answer | RequestError]" = field(default_factory=asyncio.Queue)

    def put(self, item: Piece | Answer | RequestError) -> None:
        """From the thread that generates."""
        self.client.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class StopGenerating(StoppingCriteria):
    """Ends generation at a stop text, and where nobody waits."""

    def __init__(self, job: Job, stops: StopTexts):
        self._job, self._stops = job, stops

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """Whether it ends, after each token."""
        over = self._stops.found or self._job.client.left.is_set()
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)  # type: ignore[return-value]
