"""Answers to held-out conversations at each evaluation, held against what the data says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainerCallback

from data_utils.rows import IGNORE_INDEX, TokenizedRows
from inference.generate import decode_answer, generate_answers
from inference.metrics import find_said, measure_rouge_l
from tuning.checkpoint.run_record import METRICS_FILE, append_metrics
from tuning.model.training_model import TrainingModel
from tuning.settings.arguments import RunArguments

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that the data has for it, as token ids; the answer's stop token is its last."""

    prompt: list[int]
    expected: list[int]


def find_questions(rows: TokenizedRows, num: int) -> list[Question]:
    """The last supervised turn of `num` rows, spread evenly, each behind the prompt that it was tokenised with."""
    num = min(num, len(rows))
    questions = []
    for index in (number * len(rows) // num for number in range(num)):
        input_ids, labels, _ = rows[index]
        supervised = np.flatnonzero(labels != IGNORE_INDEX)
        gaps = np.flatnonzero(np.diff(supervised) > 1)
        start = int(supervised[gaps[-1] + 1] if len(gaps) else supervised[0])
        if start:  # of plain text nothing is asked
            questions.append(Question(input_ids[:start].tolist(), input_ids[start : supervised[-1] + 1].tolist()))
    return questions


class AnswersCallback(TrainerCallback):
    """Answers questions at each evaluation, the likeliest token each time, and measures the answers.

    Into metrics.jsonl and the log: eval_exact_match, eval_rouge_l, eval_stopped (shares), eval_answer_tokens (mean).
    An answer may have twice the tokens of the longest expected one.
    """

    def __init__(
        self,
        training_model: TrainingModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        settings: RunArguments,
        log_line: Callable[[str], None],
    ):
        self._training_model, self._tokenizer, self._questions = training_model, tokenizer, questions
        self._expected = [find_said(decode_answer(tokenizer, question.expected)) for question in questions]
        self._max_new_tokens = 2 * max(len(question.expected) for question in questions)
        self._metrics_path = Path(settings.output_dir) / METRICS_FILE
        self._log_line = log_line

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Generate, measure, log and record."""
        model, prompts = self._training_model.causal_lm, [question.prompt for question in self._questions]
        options: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "do_sample": False}
        answers = list(generate_answers(model, self._tokenizer, prompts, batch_size=_BATCH_SIZE, **options))
        pairs = list(zip(answers, self._expected, strict=True))
        measured = {
            "eval_exact_match": _mean([find_said(answer.text) == expected for answer, expected in pairs]),
            "eval_rouge_l": _mean([measure_rouge_l(answer.text, expected) for answer, expected in pairs]),
            "eval_stopped": _mean([answer.ended_by == "stop" for answer in answers]),
            "eval_answer_tokens": _mean([answer.num_tokens for answer in answers]),
        }
        append_metrics(self._metrics_path, {"step": state.global_step, **measured})
        self._log_line(
            f"  {len(answers)} answers: {measured['eval_exact_match']:.0%} as expected, ROUGE-L "
            f"{measured['eval_rouge_l']:.3f}, {measured['eval_stopped']:.0%} end by themselves, "
            f"{measured['eval_answer_tokens']:.0f} tokens"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
