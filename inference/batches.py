"""Many answers: in batches of like length, in the order of their prompts."""

from collections.abc import Iterator, Sequence
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inference.generate import Answer, generate_answers

_WINDOW = 32  # batches that are sorted together; an answer waits for at most so many


def answer_in_order(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    seed: int | None = None,
    first: int = 0,
    shown: frozenset[str] = frozenset(),
    **options: Any,
) -> Iterator[Answer]:
    """Answer prompts from number `first` on, each as soon as those before it are answered.

    A batch holds prompts of like length, so that little is computed for padding. Which prompts are together, and the
    random numbers of a batch where seed is given, do not depend on `first`: who goes on gets the answers that were due.
    shown: special tokens that are part of an answer. options: of transformers' generate.
    """
    done: dict[int, Answer] = {}
    due = first
    for batch in plan_batches([len(prompt) for prompt in prompts], batch_size):
        if max(batch) < first:
            continue
        if seed is not None:
            transformers.set_seed((seed + min(batch)) % 2**32)
        batch_prompts = [prompts[index] for index in batch]
        answers = generate_answers(model, tokenizer, batch_prompts, batch_size=len(batch), shown=shown, **options)
        done |= zip(batch, answers, strict=True)
        while due in done:
            yield done.pop(due)
            due += 1


def plan_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the prompts of each batch: windows in order, in each the longest first, whose memory is the most.

    Example: lengths [1, 5, 2], batch size 2 -> [1, 2], [0]
    """
    size = _WINDOW * batch_size
    for start in range(0, len(lengths), size):
        window = range(start, min(start + size, len(lengths)))
        ordered = sorted(window, key=lambda index: (-lengths[index], index))
        for at in range(0, len(ordered), batch_size):
            yield ordered[at : at + batch_size]
