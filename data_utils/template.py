"""Conversations to token ids and labels: the definition of what is trained.

A supervised turn is trained as inference would meet it: the *prompt* is the rendering of the messages before it
with the generation prompt, the *target* is what the rendering with the turn adds to that, up to and with the stop
token. A turn whose prompt begins with the row so far continues that row. Where it does not (templates that strip
or move earlier reasoning, or an answer whose first token would merge into the prompt), it starts a row of its own.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from data_utils.completeness import find_lost_answer, find_lost_context, find_lost_tool
from data_utils.qwen_recipe import check_conversation, label_rendering
from data_utils.rows import IGNORE_INDEX, Row
from data_utils.safe_encoder import PROBE, SafeEncoder
from data_utils.schema import Conversation
from data_utils.sources import DataError, as_line
from data_utils.template_source import explain_no_variable, find_variables

# What a target begins with where the turn has no reasoning; the prompt may have opened the block.
EMPTY_THINKING = re.compile(r"\s*(<think>)?\s*</think>")
_ENDS_EMPTY = re.compile(r"<think>\s*</think>\s*\Z")
_THINKING_SWITCHES = ("enable_thinking", "thinking")
LABEL_MASKS = ("assistant", "qwen")
Message = dict[str, Any]
_QUESTION: Message = {"role": "user", "content": "Q"}
_CALL: Message = {
    "type": "function",
    "function": {"name": f"{PROBE}_name", "arguments": {f"{PROBE}_key": f"{PROBE}_value"}},
}


class ChatTemplate:
    """Renders conversations with one tokenizer's chat template and labels them.

    system_message: system turn for conversations without one; None leaves them to the template.
    label_mask: "assistant" trains the targets; "qwen" is the original Qwen recipe, which also trains
        <|im_start|>, <|im_end|> and the newline after it in every turn.
    writes_empty_thinking: an answer without reasoning is trained with an empty think block before it.
    opens_thinking: the prompt opens that block, so that a target with reasoning begins with the reasoning.
    variables: names of the template's variables that a row can set.
    stop_id: the token that ends an assistant's turn. stop_ids: likewise, calls of tools and plain text included.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system_message: str | None = None, label_mask: str = "assistant"
    ):
        self.tokenizer = tokenizer
        named = tokenizer.chat_template
        self._for_tools: ChatTemplate | None = None  # for rows with tools, where the tokenizer has a template for them
        if isinstance(named, dict) and "tool_use" in named:
            with_tools = copy.copy(tokenizer)
            with_tools.chat_template = named["tool_use"]
            self._for_tools = ChatTemplate(with_tools, system_message=system_message, label_mask=label_mask)
        self.encoder = SafeEncoder(tokenizer)
        self.variables = find_variables(tokenizer.get_chat_template())
        self.system_message = system_message
        self.label_mask = label_mask
        self.stop, self._appends_stop = self._find_stop()
        self.stop_id = self.encoder.control_ids[self.stop]
        self.stop_ids = {self.stop_id, *({eos} if (eos := tokenizer.eos_token_id) is not None else ())}
        self.writes_system = self._writes([{"role": "system", "content": f"{PROBE}_system"}, _QUESTION], "_system")
        reasoned = {
            "role": "assistant",
            "content": PROBE,
            **dict.fromkeys(("reasoning_content", "thinking"), f"{PROBE}_r"),
        }
        self.writes_reasoning = self._writes([_QUESTION, reasoned], "_r")
        self.opens_thinking = False
        self.writes_empty_thinking = self._writes_empty_thinking()
        self._calls_as_text = False
        self.writes_calls = self._writes_calls()
        if not self.writes_calls:  # it may want the arguments as JSON text
            self._calls_as_text = True
            self.writes_calls = self._calls_as_text = self._writes_calls()
        called = self._call(_CALL)
        result = {"role": "tool", "name": f"{PROBE}_name", "content": f"{PROBE}_result"}
        if self.writes_calls:
            self.writes_results = self._writes([_QUESTION, called, result], "_result")
            self._call_stop, self._appends_call_stop = self._find_call_stop(result)
            self.stop_ids.add(self.encoder.control_ids[self._call_stop])
        else:
            self.writes_results = False
        tool = {"type": "function", "function": {"name": f"{PROBE}_name", "description": "d", "parameters": {}}}
        self.writes_tools = self._writes([_QUESTION], "_name", tools=[tool])
        self._lost_in_shape: dict[Any, int | None] = {}
        if system_message and not self.writes_system:
            raise DataError("--system_message: the chat template does not write system turns; use one that does")
        if label_mask == "qwen":
            lacking = [t for t in ("<|im_start|>", "<|im_end|>") if t not in self.encoder.control_ids]
            if lacking:
                raise DataError(f"--label_mask qwen needs a ChatML template; this one has no {lacking[0]}")
            if not self.encoder.pieces_equal_whole:
                raise DataError("--label_mask qwen needs a byte-level tokenizer; use --label_mask assistant")
        if self._for_tools is not None:
            self.stop_ids |= self._for_tools.stop_ids
            template_ids = {*self.encoder.template_ids, *self._for_tools.encoder.template_ids}
            self.encoder.template_ids = sorted(template_ids)

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The chat template's text; variables: tools and what else the template takes.

        Raises: jinja2.TemplateError: the template refuses the messages, or fails at them in whatever way.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except jinja2.TemplateError:
            raise
        except Exception as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def encode_prompt(
        self,
        messages: list[Message],
        *,
        tools: Sequence[Message] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        check: bool = False,
    ) -> list[int]:
        """Ids that inference feeds to have these messages answered; control-token texts in them stay plain text.

        tools, template_kwargs: as a Conversation has them. check: nothing that is said may be lacking in the prompt.

        Raises: DataError: the template refuses them, or cannot express them.
        """
        if tools and self._for_tools is not None:
            return self._for_tools.encode_prompt(messages, tools=tools, template_kwargs=template_kwargs, check=check)
        asked = Conversation(
            "", tuple(messages), "prompt", tools=tuple(tools), template_kwargs={**(template_kwargs or {})}
        )
        self._check_expressible(asked)
        messages = self.escape_messages(self.with_system_message(messages))
        try:
            prompt = self.render(messages, add_generation_prompt=True, **self._variables(asked))
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses this prompt: {error}") from None
        if check:
            self._check_context(asked, messages, 0, len(messages), prompt)
        return self.encoder.encode(prompt)

    @property
    def for_tools(self) -> "ChatTemplate":
        """The template of prompts with tools, where the tokenizer has one for them; else this one."""
        return self._for_tools or self

    def encode_conversation(self, conversation: Conversation) -> list[Row]:
        """Rows of a conversation, whole turns, of any length; none where no turn is supervised.

        Raises: DataError: the template refuses the conversation, or a turn cannot be placed after its prompt.
        """
        if conversation.text is not None:
            return [self._encode_text(conversation.text)]
        if conversation.tools and self._for_tools is not None:
            return self._for_tools.encode_conversation(conversation)
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
                rendered = self.render(messages, **variables)
                self._check_rendering(conversation, messages, rendered, variables)
                return [label_rendering(rendered, self.encoder)]
            rows: list[Row] = []
            so_far, num_checked = "", 0  # the row as rendered, and how many of its messages were found in it
            for turn, weight in weights.items():
                prompt, target = self.place_turn(messages, turn, self._name(conversation, turn), variables)
                if not prompt.startswith(so_far):
                    so_far, num_checked = "", 0
                self._check_context(conversation, messages, num_checked, turn, prompt[len(so_far) :])
                so_far, num_checked = prompt + target, turn + 1
                self._add_turn(rows, prompt, target, weight)
                self._explain_turn(rows[-1], messages, turn, weights)
            if weights:
                self._check_shape(conversation, messages, max(weights), variables)
            return rows
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{conversation.where}: the chat template refuses this conversation: {error}") from None

    def place_turn(self, messages: list[Message], turn: int, at: str, variables: dict[str, Any]) -> tuple[str, str]:
        """(prompt, target) of an assistant's turn: what inference renders before it, and what is to be generated.

        messages: escaped. at: the turn's place. Raises: DataError: no prompt leads to this turn, or part of it is not
        written; jinja2.TemplateError and others.
        """
        prompt = self.render(messages[:turn], add_generation_prompt=True, **variables)
        rendered = self.render(messages[: turn + 1], **variables)
        if not rendered.startswith(prompt):
            raise DataError(f"{at}: {self._explain_no_prompt(messages, turn, variables)}")
        target = rendered[len(prompt) :]
        calls = bool(messages[turn].get("tool_calls"))
        stop, appends = (self._call_stop, self._appends_call_stop) if calls else (self.stop, self._appends_stop)
        if appends:
            target += stop
        else:
            end = target.rfind(stop)  # the last one: what closes a part of a turn may be the same token
            if end < 0:
                raise DataError(f"{at}: the chat template writes no {stop} after this turn")
            target = target[: end + len(stop)]
        self._check_target(messages[turn], target, at)
        return prompt, target

    def _explain_no_prompt(self, messages: list[Message], turn: int, variables: dict[str, Any]) -> str:
        """Why the rendering of a turn does not begin with its prompt, and the way out."""
        if turn and messages[turn - 1]["role"] == "assistant":
            return "two assistant turns in succession, which this chat template cannot write; join them"
        for name in _THINKING_SWITCHES:
            for value in (False, True) if name in self.variables - {*variables} else ():
                try:
                    prompt = self.render(messages[:turn], add_generation_prompt=True, **{**variables, name: value})
                    found = self.render(messages[: turn + 1], **{**variables, name: value}).startswith(prompt)
                except Exception:  # a template may fail in any way
                    found = False
                if found:
                    setting = json.dumps({name: value})
                    return f"no prompt of this chat template leads to it; --chat_template_kwargs '{setting}' does"
        return (
            "the chat template's rendering of this turn does not begin with its own generation prompt, so no prompt "
            "leads to it; use another chat template"
        )

    def _check_target(self, message: Message, target: str, at: str) -> None:
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
        self._check_escapes(target, at)
        if (lost := find_lost_answer(self._as_given(message), target, self.encoder.markup_pattern)) is not None:
            raise DataError(
                f"{at}: the chat template drops part of what the assistant says ({self._quote(lost)}), so that it "
                "would not be trained; use one that writes it, or take it out of the turn"
            )

    def _check_rendering(
        self, conversation: Conversation, messages: list[Message], rendered: str, variables: dict[str, Any]
    ) -> None:
        """Raises: DataError: something of a whole conversation, which is trained as it is rendered, is not written."""
        self._check_context(conversation, messages, 0, len(messages), rendered)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        blocks = rendered.split("<|im_start|>assistant\n")[1:]
        if len(blocks) != len(turns):
            raise DataError(
                f"{conversation.where}: the chat template writes {len(blocks)} of {len(turns)} assistant turns as "
                "--label_mask qwen knows them; use --label_mask assistant"
            )
        for turn, block in zip(turns, blocks, strict=True):
            try:
                self._check_target(messages[turn], block.partition("<|im_start|>")[0], self._name(conversation, turn))
            except DataError as error:
                if turn == turns[-1]:
                    raise
                raise DataError(
                    f"{error}; or use --label_mask assistant, which trains each turn as a last one"
                ) from None
        self._check_shape(conversation, messages, len(messages) - 1, variables)

    def _check_context(
        self, conversation: Conversation, messages: list[Message], first: int, end: int, prompt: str
    ) -> None:
        """Raises: DataError: something of messages[first:end], or of the tools, is not in a prompt."""
        for index in range(first, end):
            message = messages[index]
            lost = find_lost_context(self._as_given(message), prompt, self.encoder.markup_pattern)
            if lost is not None:
                raise DataError(self._say_lost(conversation, index, message["role"], lost))
        self._check_escapes(prompt, conversation.where)
        for number, tool in enumerate(conversation.tools if first == 0 else ()):
            if (lost := find_lost_tool(self._escape_all(tool["function"]), prompt)) is not None:
                raise DataError(
                    f"{conversation.where}: tools[{number}]: the chat template does not write {self._quote(lost)}; use "
                    "one that does, or take it out"
                )

    def _check_shape(
        self, conversation: Conversation, messages: list[Message], last: int, variables: dict[str, Any]
    ) -> None:
        """Refuse what the template has no branch for, even where a short text stands in the rendering by chance.

        The messages up to the last trained one are rendered once for each shape of them, with unique texts.
        """
        kept = messages[: last + 1]
        settings = json.dumps(conversation.template_kwargs, sort_keys=True)
        shape = (*((m["role"], bool(m["content"].strip()), *m) for m in kept), bool(conversation.tools), settings)
        if shape not in self._lost_in_shape:
            marked = [
                {**m, "content": f"{PROBE}_{index}_"} if m["content"].strip() else m for index, m in enumerate(kept)
            ]
            try:
                rendered = self.render(marked, **variables)
                lost = [i for i, m in enumerate(marked) if m["content"].strip() and m["content"] not in rendered]
            except Exception:  # it may ask for other texts
                lost = []
            self._lost_in_shape[shape] = lost[0] if lost else None
        index = self._lost_in_shape[shape]
        if index is not None:
            raise DataError(self._say_lost(conversation, index, messages[index]["role"], messages[index]["content"]))

    def _say_lost(self, conversation: Conversation, index: int, role: str, lost: str) -> str:
        if role == "system" and not self.writes_system:
            way_out = "use one that does, or put the text into the first question"
            return f"{conversation.where}: the chat template does not write system turns; {way_out}"
        return (
            f"{self._name(conversation, index)}: the chat template drops part of what the {role} says "
            f"({self._quote(lost)}); use one that writes it, or take it out of the turn"
        )

    def _check_escapes(self, rendered: str, at: str) -> None:
        if self.encoder.has_mangled_escape(rendered):
            raise DataError(
                f"{at}: the chat template writes the text of a control token in an escaped form; take it out of the "
                "tools or arguments"
            )

    def _quote(self, text: str) -> str:
        return repr(as_line(self.encoder.unescape(text).strip(), 60))

    def _name(self, conversation: Conversation, index: int) -> str:
        """`file:line: field` of a message of with_system_message."""
        index -= len(self.with_system_message(list(conversation.messages))) - len(conversation.messages)
        place = conversation.places[index] if 0 <= index < len(conversation.places) else f"turn {index}"
        return f"{conversation.where}: {place}"

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
        eos = self.tokenizer.eos_token_id
        ids = [*self.encoder.encode_document(text), self.stop_id if eos is None else eos]
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
                name: [self._as_template_wants(self._escape_all(call)) for call in value]
                if name == "tool_calls"
                else self.encoder.escape(value, message["role"])
                if name in ("content", "reasoning_content", "thinking")
                else value
                if name == "role"
                else self._escape_all(value)
                for name, value in message.items()
            }
            for message in messages
        ]

    def _as_template_wants(self, call: Message) -> Message:
        if not self._calls_as_text:
            return call
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    def _as_given(self, message: Message) -> Message:
        """The message with its calls' arguments as objects again."""
        if not (self._calls_as_text and message.get("tool_calls")):
            return message
        functions = [call["function"] for call in message["tool_calls"]]
        read = [{**function, "arguments": json.loads(function["arguments"])} for function in functions]
        return {**message, "tool_calls": [{"function": function} for function in read]}

    def _escape_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.encoder.escape(value)
        if isinstance(value, dict):
            return {self.encoder.escape(name): self._escape_all(inner) for name, inner in value.items()}
        return [self._escape_all(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        tools = {"tools": self._escape_all(conversation.tools)} if conversation.tools else {}
        for name in conversation.template_kwargs:
            if name not in self.variables:
                reason = explain_no_variable(name, self.variables)
                raise DataError(f"{conversation.where}: chat_template_kwargs: {reason}")
        return {**self._escape_all(conversation.template_kwargs), **tools}

    def _check_expressible(self, conversation: Conversation) -> None:
        for can, has, what in (
            (self.writes_tools, conversation.tools, "tools"),
            (self.writes_calls, any(m.get("tool_calls") for m in conversation.messages), "calls of tools"),
            (self.writes_results, any(m["role"] == "tool" for m in conversation.messages), "results of tools"),
        ):
            if has and not can:
                raise DataError(
                    f"{conversation.where}: the chat template cannot express {what}; {self._way_to_tools()}"
                )

    def _writes_empty_thinking(self) -> bool:
        try:
            answered = [_QUESTION, {"role": "assistant", "content": PROBE}]
            prompt = self.render(answered[:1], add_generation_prompt=True)
            self.opens_thinking = prompt.rstrip().endswith("<think>")
            return EMPTY_THINKING.match(self.render(answered).removeprefix(prompt)) is not None
        except jinja2.TemplateError:
            return False

    @property
    def thinking_switch(self) -> str | None:
        """The template's variable that puts an empty think block into the prompt, if it has one."""
        return next((name for name in _THINKING_SWITCHES if name in self.variables and self._closes(name)), None)

    def _closes(self, variable: str) -> bool:
        """Whether the variable, set to false, puts an empty think block into the prompt."""
        try:
            prompt = self.render([_QUESTION], add_generation_prompt=True, **{variable: False})
        except jinja2.TemplateError:
            return False
        return _ENDS_EMPTY.search(prompt) is not None

    def _way_to_tools(self) -> str:
        if all(text in self.encoder.control_ids for text in ("<|im_start|>", "<|im_end|>")):
            return "--chat_template chatml-tools can"
        return "name one that can: --chat_template FILE"

    def _writes(self, messages: list[Message], *marks: str, without: str | None = None, **variables: Any) -> bool:
        try:
            rendered = self.render(messages, add_generation_prompt=messages[-1]["role"] != "assistant", **variables)
        except Exception:  # a template may fail in any way
            return False
        return all(PROBE + mark in rendered for mark in marks) and (without is None or without not in rendered)

    def _call(self, *calls: Message) -> Message:
        return {"role": "assistant", "content": "", "tool_calls": [self._as_template_wants(call) for call in calls]}

    def _writes_calls(self) -> bool:
        return self._writes([_QUESTION, self._call(_CALL)], "_name", "_key", "_value", without=f"'{PROBE}_key'")

    def _find_stop(self) -> tuple[str, bool]:
        """The control token after an answer, and whether it has to be appended since the template writes none."""
        answered = [_QUESTION, {"role": "assistant", "content": PROBE}]
        try:
            for messages, appends in ((answered, False), ([*answered, _QUESTION], True)):
                _, written, tail = self.render(messages).rpartition(PROBE)
                if not written:
                    raise DataError("the chat template does not write the text of an answer; use one for text chats")
                if found := self._control_tokens(tail):
                    return found[0], appends
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template cannot render a question and its answer: {error}") from None
        if self.tokenizer.eos_token is None:
            raise DataError("the chat template ends an answer with no control token and the tokenizer has no eos token")
        return str(self.tokenizer.eos_token), True

    def _find_call_stop(self, result: Message) -> tuple[str, bool]:
        """The control token after a turn of calls, and whether it has to be appended.

        It is the answers' stop token, or the last one that the template writes once for a turn, not once for a call.
        Where there is none, generation ends at what introduces the result.
        """
        prompt = self.render([_QUESTION], add_generation_prompt=True)
        once = self.render([_QUESTION, self._call(_CALL)]).removeprefix(prompt)
        written = self._control_tokens(once)
        if self.stop in written:
            return self.stop, False
        try:
            twice = self._control_tokens(self.render([_QUESTION, self._call(_CALL, _CALL)]).removeprefix(prompt))
            answered = self.render([_QUESTION, self._call(_CALL), result]).removeprefix(prompt)
        except Exception:  # it may write one call a turn, or no results
            return self.stop, True
        if ends := [token for token in written if written.count(token) == twice.count(token) == 1]:
            return ends[-1], False
        same = next((i for i, (a, b) in enumerate(zip(once, answered, strict=False)) if a != b), len(once))
        following = self._control_tokens(answered[same:])
        return following[0] if following else self.stop, True

    def _control_tokens(self, rendered: str) -> list[str]:
        """The control tokens in a rendering, markup left out, in their order."""
        return [token for token in self.encoder.find_control_tokens(rendered) if token not in self.encoder.markup]
