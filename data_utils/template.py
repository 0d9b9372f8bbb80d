"""Conversations to token ids and labels: the definition of what is trained.

A supervised turn is trained as inference would meet it: the *prompt* is the rendering of the messages before it
with the generation prompt, the *target* is what the rendering with the turn adds to that, up to and with the stop
token. A turn whose prompt begins with the row so far continues that row. Where it does not (templates that strip
or move earlier reasoning, or an answer whose first token would merge into the prompt), it starts a row of its own.
"""

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from data_utils.qwen_recipe import check_conversation, label_rendering
from data_utils.rows import IGNORE_INDEX, Row
from data_utils.safe_encoder import PROBE, SafeEncoder
from data_utils.schema import Conversation
from data_utils.sources import DataError

LABEL_MASKS = ("assistant", "qwen")
Message = dict[str, Any]
_QUESTION: Message = {"role": "user", "content": "Q"}
_CALL: Message = {"function": {"name": f"{PROBE}_name", "arguments": {f"{PROBE}_key": f"{PROBE}_value"}}}
_RENDERING = {"tools", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}


class ChatTemplate:
    """Renders conversations with one tokenizer's chat template and labels them.

    system_message: system turn for conversations without one; None leaves them to the template.
    label_mask: "assistant" trains the targets; "qwen" is the original Qwen recipe, which also trains
        <|im_start|>, <|im_end|> and the newline after it in every turn.
    stop_id: the token that ends an assistant's turn. stop_ids: likewise, calls of tools and plain text included.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system_message: str | None = None, label_mask: str = "assistant"
    ):
        self.tokenizer = tokenizer
        self.encoder = SafeEncoder(tokenizer)
        self.system_message = system_message
        self.label_mask = label_mask
        self.stop, self._appends_stop = self._find_stop({"content": PROBE}, [_QUESTION])
        self.stop_id = self.encoder.control_ids[self.stop]
        self.stop_ids = {self.stop_id, *({eos} if (eos := tokenizer.eos_token_id) is not None else ())}
        reasoned = {
            "role": "assistant",
            "content": PROBE,
            **dict.fromkeys(("reasoning_content", "thinking"), f"{PROBE}_r"),
        }
        self.writes_reasoning = self._writes([_QUESTION, reasoned], "_r")
        called = {"content": "", "tool_calls": [_CALL]}
        self.writes_calls = self._writes([_QUESTION, {"role": "assistant", **called}], "_name", "_key", "_value")
        result = {"role": "tool", "name": f"{PROBE}_name", "content": f"{PROBE}_result"}
        if self.writes_calls:
            self.writes_results = self._writes([_QUESTION, {"role": "assistant", **called}, result], "_result")
            self._call_stop, self._appends_call_stop = self._find_stop(called, [result])
            self.stop_ids.add(self.encoder.control_ids[self._call_stop])
        else:
            self.writes_results = False
        tool = {"type": "function", "function": {"name": f"{PROBE}_name", "description": "d", "parameters": {}}}
        self.writes_tools = self._writes([_QUESTION], "_name", tools=[tool])
        if label_mask == "qwen":
            lacking = [t for t in ("<|im_start|>", "<|im_end|>") if t not in self.encoder.control_ids]
            if lacking:
                raise DataError(f"--label_mask qwen needs a ChatML template; this one has no {lacking[0]}")
            if not self.encoder.pieces_equal_whole:
                raise DataError("--label_mask qwen needs a byte-level tokenizer; use --label_mask assistant")

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The chat template's text; variables: tools and what else the template takes.

        Raises: jinja2.TemplateError, TypeError and others: the template refuses the messages.
        """
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
        )
        assert isinstance(text, str)
        return text

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Ids that inference feeds to have these messages answered; control-token texts in them stay plain text."""
        messages = self.escape_messages(self.with_system_message(messages))
        return self.encoder.encode(self.render(messages, add_generation_prompt=True))

    def encode_conversation(self, conversation: Conversation) -> list[Row]:
        """Rows of a conversation, whole turns, of any length; none where no turn is supervised.

        Raises: DataError: the template refuses the conversation, or a turn cannot be placed after its prompt.
        """
        if conversation.text is not None:
            return [self._encode_text(conversation.text)]
        messages = self.with_system_message(list(conversation.messages))
        added = len(messages) - len(conversation.messages)
        self._check_expressible(conversation)
        weights = {turn + added: conversation.weights[turn] for turn in conversation.supervised_turns}
        try:
            messages = self.escape_messages(messages)
            variables = self._variables(conversation)
            if self.label_mask == "qwen":
                if not weights:
                    return []
                check_conversation(conversation)
                return [label_rendering(self.render(messages, **variables), self.encoder)]
            rows: list[Row] = []
            for turn, weight in weights.items():
                prompt, target = self.place_turn(messages, turn, conversation.where, variables)
                self._add_turn(rows, prompt, target, weight)
                self._explain_turn(rows[-1], messages, turn, weights)
            return rows
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{conversation.where}: the chat template refuses this conversation: {error}") from None

    def place_turn(self, messages: list[Message], turn: int, where: str, variables: dict[str, Any]) -> tuple[str, str]:
        """(prompt, target) of an assistant's turn: what inference renders before it, and what is to be generated.

        messages: escaped. Raises: DataError: no prompt leads to this turn; jinja2.TemplateError and others.
        """
        prompt = self.render(messages[:turn], add_generation_prompt=True, **variables)
        rendered = self.render(messages[: turn + 1], **variables)
        if not rendered.startswith(prompt):
            raise DataError(
                f"{where}: turn {turn}: the chat template's rendering of this turn does not begin with its own "
                "generation prompt, so no prompt leads to it; use another chat template"
            )
        target = rendered[len(prompt) :]
        calls = bool(messages[turn].get("tool_calls"))
        stop, appends = (self._call_stop, self._appends_call_stop) if calls else (self.stop, self._appends_stop)
        self._check_written(messages[turn], target, f"{where}: turn {turn}", rendered)
        if appends:
            return prompt, target + stop
        end = target.find(stop)
        if end < 0:
            raise DataError(f"{where}: turn {turn}: the chat template writes no {stop} after this turn")
        return prompt, target[: end + len(stop)]

    def _check_written(self, message: Message, target: str, at: str, rendered: str) -> None:
        """Raises: DataError: something of the turn is not in what would be trained."""
        reasoning, content = message.get("reasoning_content", "").strip(), message["content"].strip()
        if reasoning and not (self.writes_reasoning and reasoning in target):
            raise DataError(
                f"{at}: the chat template does not write reasoning_content; remove it, or write it into the content as "
                "the model should"
            )
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(target.count(name) < names.count(name) for name in names):
            raise DataError(f"{at}: the chat template does not write all {len(names)} calls; make turns of them")
        if names and content and content not in target:
            raise DataError(f"{at}: the chat template does not write content beside tool_calls; make two turns of it")
        if self.encoder.has_mangled_escape(rendered):
            raise DataError(
                f"{at}: the chat template writes the text of a control token in an escaped form; take it out of the "
                "tools or arguments"
            )

    def _add_turn(self, rows: list[Row], prompt: str, target: str, weight: float) -> None:
        prompt_ids = self.encoder.encode(prompt)
        target_ids = self.encoder.encode_target(prompt, prompt_ids, target)
        if not rows or prompt_ids[: len(rows[-1].input_ids)] != rows[-1].input_ids:
            rows.append(Row([], [], []))
        row = rows[-1]
        row.labels += [IGNORE_INDEX] * (len(prompt_ids) - len(row.labels)) + target_ids
        row.input_ids = prompt_ids + target_ids
        row.ends.append(len(row.input_ids))
        row.weights.append(weight)
        row.pieces.append((len(prompt_ids), ""))

    def _explain_turn(self, row: Row, messages: list[Message], turn: int, weights: dict[int, float]) -> None:
        """Say why the stretch before a turn is not trained, and the turn is."""

        def describe(index: int) -> str:
            role = messages[index]["role"]
            if role == "assistant":
                role += ", trained in a row of its own" if index in weights else ", not to be trained"
            return f"turn {index} ({role})"

        before = [index for index in weights if index < turn]  # those of this row are the last of them
        first = before[-1] + 1 if len(row.ends) > 1 else 0
        said = ", ".join(describe(index) for index in range(first, turn)) or "what the template begins with"
        row.pieces[-1] = (row.pieces[-1][0], f"not trained: {said}")
        scaled = "" if weights[turn] == 1 else f", its loss times {weights[turn]:g}"
        row.pieces.append((len(row.input_ids), f"trained: turn {turn} (assistant), up to its stop token{scaled}"))

    def _encode_text(self, text: str) -> Row:
        """Every token of a document, and the end of it."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.encoder.encode(self.encoder.escape(text))
        if bos is not None and self.tokenizer("a").input_ids[0] == bos:
            ids.insert(0, bos)
        ids.append(self.stop_id if eos is None else eos)
        return Row(ids, list(ids), [len(ids)], [1.0], [(len(ids), "trained: plain text, up to its end")])

    def with_system_message(self, messages: list[Message]) -> list[Message]:
        """The messages, with the default system turn before them if they have none."""
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def escape_messages(self, messages: list[Message]) -> list[Message]:
        """Every text in them escaped; an assistant's markup stays in what it says and thinks."""
        return [
            {
                name: self.encoder.escape(value, message["role"])
                if name in ("content", "reasoning_content", "thinking")
                else value
                if name == "role"
                else self._escape_all(value)
                for name, value in message.items()
            }
            for message in messages
        ]

    def _escape_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.encoder.escape(value)
        if isinstance(value, dict):
            return {self.encoder.escape(name): self._escape_all(inner) for name, inner in value.items()}
        return [self._escape_all(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        tools = {"tools": self._escape_all(conversation.tools)} if conversation.tools else {}
        for name in conversation.template_kwargs:
            if name in _RENDERING or name not in self.tokenizer.get_chat_template():
                raise DataError(f"{conversation.where}: chat_template_kwargs: the chat template has no variable {name}")
        return {**self._escape_all(conversation.template_kwargs), **tools}

    def _check_expressible(self, conversation: Conversation) -> None:
        for can, has, what in (
            (self.writes_tools, conversation.tools, "tools"),
            (self.writes_calls, any(m.get("tool_calls") for m in conversation.messages), "calls of tools"),
            (self.writes_results, any(m["role"] == "tool" for m in conversation.messages), "results of tools"),
        ):
            if has and not can:
                raise DataError(f"{conversation.where}: the chat template cannot express {what}; use one that can")

    def _writes(self, messages: list[Message], *marks: str, **variables: Any) -> bool:
        try:
            rendered = self.render(messages, add_generation_prompt=messages[-1]["role"] != "assistant", **variables)
        except Exception:  # a template may fail in any way
            return False
        return all(PROBE + mark in rendered for mark in marks)

    def _find_stop(self, answer: Message, following: list[Message]) -> tuple[str, bool]:
        """The control token after an answer, and whether it has to be appended since the template writes none."""
        answered = [_QUESTION, {"role": "assistant", **answer}]
        calls = bool(answer.get("tool_calls"))
        try:
            for messages, appends in ((answered, False), ([*answered, *following], True)):
                _, written, tail = self.render(messages).rpartition(f"{PROBE}_value" if calls else PROBE)
                if calls and appends:
                    tail = tail.partition(f"{PROBE}_result")[0]
                if calls and not appends and self.stop in tail:  # what closes a call may be a control token, too
                    return self.stop, False
                if not written:
                    raise DataError("the chat template does not write the text of an answer; use one for text chats")
                found = [
                    (tail.find(text), text)
                    for text in self.encoder.control_ids
                    if text in tail and text not in self.encoder.markup
                ]
                if found:
                    return min(found)[1], appends
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template cannot render a question and its answer: {error}") from None
        if self.tokenizer.eos_token is None:
            raise DataError("the chat template ends an answer with no control token and the tokenizer has no eos token")
        return str(self.tokenizer.eos_token), True
