"""Conversations to token ids and labels: the definition of what is trained.

A supervised turn is trained as inference would meet it: the *prompt* is the rendering of the messages before it
with the generation prompt, the *target* is what the rendering with the turn adds to that, up to and with the stop
token. A turn whose prompt begins with the row so far continues that row. Where it does not (templates that strip
or move earlier reasoning, or an answer whose first token would merge into the prompt), it starts a row of its own.
"""

from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from data_utils.schema import Conversation
from data_utils.sources import DataError
from data_utils.tokenizer import PROBE, SafeEncoder

IGNORE_INDEX = -100
LABEL_MASKS = ("assistant", "qwen")


@dataclass
class Row:
    """One training row.

    input_ids, labels: same length, not shifted; labels are IGNORE_INDEX where nothing is trained.
    ends: for each supervised turn in the row, the index after its last token, ascending.
    """

    input_ids: list[int]
    labels: list[int]
    ends: list[int]

    @property
    def num_supervised(self) -> int:
        """Supervised tokens: labels that some position predicts (the first token is predicted by none)."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class ChatTemplate:
    """Renders conversations with one tokenizer's chat template and labels them.

    system_message: system turn for conversations without one; None leaves them to the template.
    label_mask: "assistant" trains the targets; "qwen" is the original Qwen recipe, which also trains
        <|im_start|>, <|im_end|> and the newline after it in every turn.
    stop_id: the token that ends an assistant's turn.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system_message: str | None = None, label_mask: str = "assistant"
    ):
        self.tokenizer = tokenizer
        self.encoder = SafeEncoder(tokenizer)
        self.system_message = system_message
        self.label_mask = label_mask
        self.stop, self._appends_stop = self._find_stop()
        self.stop_id = self.encoder.control_ids[self.stop]
        if label_mask == "qwen":
            lacking = [t for t in ("<|im_start|>", "<|im_end|>") if t not in self.encoder.control_ids]
            if lacking:
                raise DataError(f"--label_mask qwen needs a ChatML template; this one has no {lacking[0]}")
            if not self.encoder.pieces_equal_whole:
                raise DataError("--label_mask qwen needs a byte-level tokenizer; use --label_mask assistant")

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """The chat template's text. Raises: jinja2.TemplateError: the template refuses the messages."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids that inference feeds to have these messages answered; control-token texts in them stay plain text."""
        messages = self._escape(self._with_system_message(messages))
        return self.encoder.encode(self.render(messages, add_generation_prompt=True))

    def encode_conversation(self, conversation: Conversation) -> list[Row]:
        """Rows of a conversation, whole turns, of any length; none where no turn is supervised.

        Raises: DataError: the template refuses the conversation, or a turn cannot be placed after its prompt.
        """
        messages = self._with_system_message(list(conversation.messages))
        added = len(messages) - len(conversation.messages)
        turns = [turn + added for turn in conversation.supervised_turns]
        messages = self._escape(messages)
        try:
            if self.label_mask == "qwen":
                return self._encode_like_qwen(messages) if turns else []
            rows: list[Row] = []
            for turn in turns:
                self._add_turn(rows, messages, turn, conversation.where)
            return rows
        except jinja2.TemplateError as error:
            raise DataError(f"{conversation.where}: the chat template refuses this conversation: {error}") from None

    def _add_turn(self, rows: list[Row], messages: list[dict[str, str]], turn: int, where: str) -> None:
        prompt = self.render(messages[:turn], add_generation_prompt=True)
        rendered = self.render(messages[: turn + 1])
        if not rendered.startswith(prompt):
            raise DataError(
                f"{where}: turn {turn}: the chat template's rendering of this turn does not begin with its own "
                "generation prompt, so no prompt leads to it; use another chat template"
            )
        target = rendered[len(prompt) :]
        if self._appends_stop:
            target += self.stop
        else:
            end = target.find(self.stop)
            if end < 0:
                raise DataError(f"{where}: turn {turn}: the chat template writes no {self.stop} after this turn")
            target = target[: end + len(self.stop)]
        prompt_ids = self.encoder.encode(prompt)
        target_ids = self.encoder.encode_target(prompt, prompt_ids, target)
        if not rows or prompt_ids[: len(rows[-1].input_ids)] != rows[-1].input_ids:
            rows.append(Row([], [], []))
        row = rows[-1]
        row.labels += [IGNORE_INDEX] * (len(prompt_ids) - len(row.labels)) + target_ids
        row.input_ids = prompt_ids + target_ids
        row.ends.append(len(row.input_ids))

    def _encode_like_qwen(self, messages: list[dict[str, str]]) -> list[Row]:
        """The original recipe: one row of the whole rendering; role names and other roles' contents are not trained.

        Source: QwenLM/Qwen finetune.py `preprocess`.
        """
        start, end = (self.encoder.control_ids[token] for token in ("<|im_start|>", "<|im_end|>"))
        newline = self.encoder.encode("\n")
        before, *blocks = self.render(messages).split("<|im_start|>")
        row = Row(self.encoder.encode(before), [], [])
        row.labels = [IGNORE_INDEX] * len(row.input_ids)
        for block in blocks:
            role, _, rest = block.partition("\n")
            header = [start, *self.encoder.encode(role), *newline]
            body = self.encoder.encode(rest)
            if role == "assistant":
                trained = body
            else:
                content = body.index(end) if end in body else len(body)
                trained = [IGNORE_INDEX] * content + body[content:]
            row.input_ids += header + body
            row.labels += [start] + [IGNORE_INDEX] * (len(header) - 1) + trained
            if role == "assistant":
                row.ends.append(len(row.input_ids))
        return [row]

    def _with_system_message(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def _escape(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{**m, "content": self.encoder.escape(m["content"], m["role"])} for m in messages]

    def _find_stop(self) -> tuple[str, bool]:
        """The control token after an answer, and whether it has to be appended since the template writes none."""
        question = {"role": "user", "content": "Q"}
        answered = [question, {"role": "assistant", "content": PROBE}]
        try:
            for messages, appends in ((answered, False), ([*answered, question], True)):
                _, written, tail = self.render(messages).rpartition(PROBE)
                if not written:
                    raise DataError("the chat template does not write the text of an answer; use one for text chats")
                found = [(tail.find(text), text) for text in self.encoder.control_ids if text in tail]
                if found:
                    return min(found)[1], appends
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template cannot render a question and its answer: {error}") from None
        if self.tokenizer.eos_token is None:
            raise DataError("the chat template ends an answer with no control token and the tokenizer has no eos token")
        return str(self.tokenizer.eos_token), True


def cut_to_length(row: Row, max_length: int) -> Row | None:
    """The row without the last turns that do not fit in max_length tokens; None where the first does not fit."""
    if len(row.input_ids) <= max_length:
        return row
    ends = [end for end in row.ends if end <= max_length]
    if not ends:
        return None
    return Row(row.input_ids[: ends[-1]], row.labels[: ends[-1]], ends)
