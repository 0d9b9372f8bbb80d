"""Sample answers at each evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from data_utils.sources import printable
from inference.generate import generate_answers
from tuning.checkpoint.run_record import METRICS_FILE, append_metrics
from tuning.model.training_model import TrainingModel
from tuning.settings.arguments import RunArguments


class SampleCallback(TrainerCallback):
    """Answers fixed prompts at each evaluation: into metrics.jsonl and the log. Greedy, so it takes no random numbers.

    prompts: (text, token ids) of each.
    """

    def __init__(
        self,
        training_model: TrainingModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[tuple[str, list[int]]],
        settings: RunArguments,
        log_line: Callable[[str], None],
    ):
        self._training_model = training_model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._metrics_path = Path(settings.output_dir) / METRICS_FILE
        self._max_new_tokens = settings.sample_max_new_tokens
        self._log_line = log_line

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Generate, log and record."""
        model = self._training_model.causal_lm
        prompts = [ids for _text, ids in self._prompts]
        options: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "do_sample": False}
        answers = list(generate_answers(model, self._tokenizer, prompts, batch_size=8, **options))
        samples = []
        for (prompt, _ids), answer in zip(self._prompts, answers, strict=True):
            samples.append({"prompt": prompt, "answer": answer.text, "ended_by": answer.ended_by})
            cut = "" if answer.ended_by == "stop" else "  [cut at the length limit]"
            self._log_line(printable(f"  > {prompt}\n    {answer.text}{cut}"))
        append_metrics(self._metrics_path, {"step": state.global_step, "samples": samples})
