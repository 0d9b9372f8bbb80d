"""Held-out conversations: their loss under a model, and its answers beside the expected ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from data_utils.conversations import DataOptions, read_conversations
from data_utils.dataset import load_rows
from data_utils.hub_data import find_data
from data_utils.micro_batch import pad_rows
from data_utils.report import Account
from data_utils.rows import TokenizedRows
from data_utils.schema import Conversation
from data_utils.sources import DataError
from data_utils.template import ChatTemplate, Message
from inference.batches import answer_in_order, plan_batches
from inference.chat_model import ChatModel, load_markup
from inference.estimates import Value, estimate_mean, estimate_perplexity, estimate_ratio
from inference.generate import Answer
from inference.metrics import DATA_METRICS, count_calls, match_exactly, measure_rouge_l
from tuning.model.loss import change_logits, chunk_rows, find_logit_change

_OF_LOSS = ("loss", "perplexity")


@dataclass(frozen=True)
class Question:
    """The last supervised turn of a conversation, asked for.

    prompt: token ids. messages: before it. tools: that the answer's calls are read by.
    """

    prompt: list[int]
    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    expected: Message


@dataclass(frozen=True)
class Result:
    """One model on the conversations.

    losses: [N] summed over the conversation's supervised tokens. answers: by the conversation's number, as text and as
        message.
    """

    losses: NDArray[np.float64]
    answers: dict[int, tuple[Answer, Message]]


class HeldOut:
    """Conversations as a run with these options would evaluate them, and the questions in them.

    template: of all prompts. say: takes lines for the log. A conversation that a run would leave out is left out.

    sources: [N] `file:line`. num_targets: [N] supervised tokens. questions: by the conversation's number; texts
    that are no conversation have none. largest_token_id: of rows and prompts.

    Raises: DataError: mistakes in the data.
    """

    def __init__(
        self, paths: Sequence[str], template: ChatTemplate, options: DataOptions, say: Callable[[str], None]
    ) -> None:
        self.rows, account = load_rows(paths, template, options)
        say("data: " + "\n      ".join(account.describe()))
        of_rows = self.rows.describe(np.arange(len(self.rows)))["source"].to_pylist()
        self.sources = list(dict.fromkeys(of_rows))
        numbers = {source: number for number, source in enumerate(self.sources)}
        self._conversation_of_row = np.array([numbers[source] for source in of_rows])
        self.num_targets = self._sum(self.rows.num_targets)
        self.largest_token_id = account.largest_token_id
        self.questions: dict[int, Question] = {}
        seen: set[str] = set()
        for conversation in _read(paths, options):
            if conversation.where in seen:
                raise DataError(f"{conversation.where}: is read twice; name each file once")
            seen.add(conversation.where)
            if conversation.where in numbers and conversation.supervised_turns:
                question = _ask_last(conversation, template)
                self.questions[numbers[conversation.where]] = question
                self.largest_token_id = max(self.largest_token_id, *question.prompt)
        self._has_tools = any(question.tools for question in self.questions.values())
        calls = any(question.expected.get("tool_calls") for question in self.questions.values())
        reads_calls = calls and load_markup(template).calls is not None
        if calls and not reads_calls:
            say("tool_call_f1 is left out: calls as this chat template writes them cannot be read")
        left_out = set() if reads_calls else {"tool_call_f1"}
        self.metrics = [name for name in DATA_METRICS if name not in left_out] if self.questions else [*_OF_LOSS]

    def measure(self, chat: ChatModel, *, batch_size: int, max_new_tokens: int) -> Result:
        """Loss and answers of a model, the likeliest token each time. Raises: SettingsError: see ChatModel."""
        losses = self._sum(measure_losses(chat.model, self.rows, batch_size=batch_size))
        questions = list(self.questions.values())
        answers = answer_in_order(
            chat.model,
            chat.tokenizer,
            [question.prompt for question in questions],
            batch_size=batch_size,
            shown=chat.find_shown(self._has_tools),
            **chat.choose_options({"max_new_tokens": max_new_tokens, "temperature": 0}),
        )
        pairs = [(a, chat.read_message(q.prompt, a.text, q.tools)) for q, a in zip(questions, answers, strict=True)]
        return Result(losses, dict(zip(self.questions, pairs, strict=True)))

    def estimate(self, result: Result) -> dict[str, Value]:
        """The metrics of a result, those of self.metrics."""
        loss = estimate_ratio(result.losses.tolist(), self.num_targets.tolist())
        found: dict[str, Value] = {"loss": loss, "perplexity": estimate_perplexity(loss)}
        if not self.questions:
            return found
        expected = [question.expected for question in self.questions.values()]
        pairs = list(zip([message for _, message in result.answers.values()], expected, strict=True))
        found["exact_match"] = estimate_mean([match_exactly(*pair) for pair in pairs])
        found["rouge_l"] = estimate_mean([measure_rouge_l(m["content"], e["content"]) for m, e in pairs])
        if "tool_call_f1" in self.metrics:
            right, of_both = zip(*(count_calls(*pair) for pair in pairs), strict=True)
            found["tool_call_f1"] = estimate_ratio(right, of_both)
        found["stopped"] = estimate_mean([answer.ended_by == "stop" for answer, _ in result.answers.values()])
        found["answer_tokens"] = estimate_mean([answer.num_tokens for answer, _ in result.answers.values()])
        return found

    def _sum(self, of_rows: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(self._conversation_of_row, of_rows, len(self.sources)).astype(np.float64)


def _read(paths: Sequence[str], options: DataOptions) -> list[Conversation]:
    account = Account()  # what cannot be read was told of when the rows were made
    return [each for source in find_data(paths) for each in read_conversations(source, options, account)]


def _ask_last(conversation: Conversation, template: ChatTemplate) -> Question:
    turn = conversation.supervised_turns[-1]
    messages, expected = conversation.messages[:turn], conversation.messages[turn]
    try:
        prompt = template.encode_prompt(
            list(messages), tools=conversation.tools, template_kwargs=conversation.template_kwargs, check=True
        )
    except DataError as error:
        raise DataError(f"{conversation.where}: {str(error).removeprefix('prompt: ')}") from None
    # Rows may have calls and no description of the tools; their names are enough to read calls by.
    named = [call["function"]["name"] for call in expected.get("tool_calls", ())]
    tools = conversation.tools or tuple({"type": "function", "function": {"name": name}} for name in named)
    return Question(prompt, messages, tools, expected)


@torch.no_grad()
def measure_losses(model: PreTrainedModel, rows: TokenizedRows, *, batch_size: int) -> NDArray[np.float64]:
    """Each row's cross-entropy, summed over its supervised tokens with their weights, as training's evaluation sums.

    It goes by the model's own output layer, so that it is also right for the base inside an adapter.

    Shapes: [R]. Logits exist for a few hundred tokens at a time.
    """
    change, head = find_logit_change(model.config), model.get_output_embeddings()
    device = next(model.parameters()).device
    sums = np.zeros(len(rows))
    for batch in plan_batches(rows.lengths.tolist(), batch_size):
        inputs = pad_rows([rows[index] for index in batch])
        hidden = model.get_decoder()(input_ids=inputs["input_ids"].to(device), use_cache=False)[0]
        supervised = hidden.flatten(0, 1).index_select(0, inputs["target_index"].to(hidden.device))
        targets = inputs["targets"].to(hidden.device)
        size = chunk_rows(len(targets), model.config.get_text_config().vocab_size, hidden.device.type)
        losses = []
        for start in range(0, len(targets), size):
            logits = head(supervised[start : start + size])
            change_logits(logits, change)
            part = targets[start : start + size].to(logits.device)
            losses.append(F.cross_entropy(logits.float(), part, reduction="none").cpu().double())
        of_targets = torch.cat(losses).numpy()
        if "weights" in inputs:
            of_targets = of_targets * inputs["weights"].numpy()
        sums[batch] = np.bincount(inputs["target_rows"].numpy(), weights=of_targets, minlength=len(batch))
    return sums
