"""What chat.py talks with: a conversation, or texts that are continued."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from commands.loading import load_answering
from commands.prompts import Prompt
from data_utils.safe_encoder import SafeEncoder
from data_utils.sources import DataError, printable
from data_utils.turns import parse_tools
from inference.chat_model import ChatModel, choose_cache
from inference.decoding import SETTINGS, choose_options, read_setting
from inference.generate import Answer, stream_answer
from inference.tool_module import call_function, describe_functions, load_functions
from tuning.errors import SettingsError

HELP = """\
:help                    this text
:clear                   forget the conversation
:history                 show the conversation
:system TEXT             set the system turn and forget the conversation; without TEXT, none
:tools FILE              what the model may call (a JSON list); you type the results in; without FILE, none
:conf NAME=VALUE ...     set temperature, top_p, top_k, repetition_penalty, max_new_tokens; alone: show what was set
:seed N                  random seed of the next answers
:exit, :quit             leave (Ctrl-D too)
Ctrl-C stops an answer. Pasted text may have several lines; or begin and end with a line of \"\"\"."""


class Chat:
    """One conversation with a model.

    Raises: SettingsError: no model, no adapter, or they do not fit; tools that are none. DataError: no tokenizer.
    """

    def __init__(self, args: argparse.Namespace):
        self.tools: tuple[dict[str, Any], ...] = ()
        self._functions: dict[str, Callable[..., Any]] = {}
        if args.tool_module:
            self._functions = load_functions(args.tool_module)
            self.tools = tuple(describe_functions(args.tool_module, self._functions))
        if args.tools:
            self.tools = read_tools(args.tools)
        loaded = load_answering(args)
        self.answering = ChatModel(loaded.model, loaded.tokenizer, kv_cache=args.kv_cache, kept=loaded.kept)
        self.model, self.tokenizer, self.template = loaded.model, loaded.tokenizer, self.answering.template
        self.find_shown, self.read_message = self.answering.find_shown, self.answering.read_message
        self.system = loaded.system_message if args.system is None else args.system
        self.history: list[dict[str, Any]] = []
        self.settings = read_decoding(args)
        if self.tools:
            self.encode("Q")  # a template that has no tools says so now

    def encode(self, question: str) -> list[int]:
        """Token ids of the conversation with one more question."""
        return self._encode([*self.history, {"role": "user", "content": question}])

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.encode_prompt([*system, *messages], tools=self.tools)

    def encode_row(self, prompt: Prompt) -> list[int]:
        """Token ids of a row of a file; its own system turn and tools come before the conversation's."""
        if prompt.asked is None:
            return self.encode(str(prompt.text))
        messages = list(prompt.asked.messages)
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            return self.template.encode_prompt(
                messages,
                tools=self.find_tools(prompt),
                template_kwargs=prompt.asked.template_kwargs,
                check=True,
            )
        except DataError as error:
            raise DataError(f"{prompt.asked.where}: {str(error).removeprefix('prompt: ')}") from None

    def find_tools(self, prompt: Prompt) -> Sequence[dict[str, Any]]:
        """The tools that a row of a file may call: its own, or the conversation's."""
        return (prompt.asked.tools if prompt.asked else ()) or self.tools

    @property
    def options(self) -> dict[str, Any]:
        """What generate is given: the model's own settings, changed by :conf."""
        return self.answering.choose_options(self.settings)

    def ask(self, question: str, read_result: Callable[[str], str] | None = None) -> None:
        """Print an answer as it comes, and remember both.

        read_result: asks for the result of a call of a tool, which is shown to it; the model then goes on from there.
        """
        messages = [*self.history, {"role": "user", "content": question}]
        while True:
            reply = self.answering.answer(self._encode(messages), _write, tools=self.tools, **self.settings)
            _write(describe_end(reply, self.settings) + "\n")
            messages.append(reply.message)
            calls = reply.message.get("tool_calls", []) if read_result else []
            if not calls:
                break
            try:
                for call in calls:
                    messages.append({"role": "tool", "content": self._find_result(call["function"], read_result)})
            except (EOFError, KeyboardInterrupt):
                _write("\nno result: question forgotten\n")
                return
        self.history = messages

    def _find_result(self, call: dict[str, Any], read_result: Callable[[str], str] | None) -> str:
        assert read_result is not None
        said = f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})"
        function = self._functions.get(call["name"])
        way = " (Enter runs it; or type a result)" if function else " (type its result)"
        typed = read_result(printable(f"{said}{way}: "))
        if typed or function is None:
            return typed
        result = call_function(function, call["arguments"])
        _write(f"{result}\n")
        return result

    def command(self, line: str) -> str:
        """Run a :command. Returns: what to print."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == ":help":
            return HELP
        if name == ":clear":
            self.history = []
            return "conversation forgotten"
        if name == ":history":
            return "\n".join(map(_show_message, self.history)) or "nothing said yet"
        if name == ":system":
            self.system, self.history = rest or None, []
            return f"system: {rest}" if rest else "no system turn"
        if name == ":tools":
            return self._set_tools(rest)
        if name == ":seed":
            # int() reads any digits, of any length up to Python's own limit; what it does not read is no number.
            try:
                transformers.set_seed(int(rest) % 2**32)
            except ValueError:
                return f":seed {rest}: expected a whole number"
            return f"seed {rest}"
        if name == ":conf":
            return self._configure(rest)
        return f"{line}: not a command; :help lists them"

    def _set_tools(self, file: str) -> str:
        before = self.tools
        try:
            self.tools = read_tools(file) if file else ()
            self.encode("Q")
        except ValueError as error:
            self.tools = before
            return str(error)
        return "tools: " + (", ".join(tool["function"]["name"] for tool in self.tools) or "none")

    def _configure(self, words: str) -> str:
        for word in words.split():
            name, _, text = word.partition("=")
            if name not in SETTINGS:
                return f"{name}: not a setting ({', '.join(SETTINGS)})"
            try:
                self.settings[name] = read_setting(name, text)
            except SettingsError as error:
                return f"{word}: {error}"
        return "  ".join([*(f"{name}={value}" for name, value in self.settings.items()), self._describe_decoding()])

    def _describe_decoding(self) -> str:
        config = self.model.generation_config
        if self.options.get("do_sample", config.do_sample):
            given = self.options.get("temperature", config.temperature)
            return f"(samples at temperature {1.0 if given is None else given:g})"
        return "(greedy: the likeliest token each time; temperature=0.7 samples)"


class Continuation:
    """A model that continues texts, without a chat template."""

    def __init__(self, args: argparse.Namespace):
        self._loaded = load_answering(args, needs_template=False)
        self._encoder = SafeEncoder(self._loaded.tokenizer)
        self.settings = read_decoding(args)
        self.options = {
            **choose_options(self.settings, samples=bool(self._loaded.model.generation_config.do_sample)),
            **choose_cache(self._loaded.model, args.kv_cache),
        }
        self.model, self.tokenizer = self._loaded.model, self._loaded.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises: DataError: an empty one."""
        if not (ids := self._encoder.encode_document(text)):
            raise DataError("nothing to continue: the text is empty")
        return ids

    def encode_row(self, prompt: Prompt) -> list[int]:
        """Token ids of a row of a file."""
        return self.encode(str(prompt.text))

    def find_tools(self, _: Prompt) -> Sequence[dict[str, Any]]:
        """None: a text has no turns."""
        return ()

    def find_shown(self, _: bool) -> frozenset[str]:
        """None: a text has no markup."""
        return frozenset()

    def read_message(self, _: list[int], text: str, __: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What follows, as it is."""
        return {"role": "assistant", "content": text}

    def ask(self, text: str, read_result: object = None) -> None:
        """Print what follows a text."""
        answer = stream_answer(self.model, self.tokenizer, self.encode(text), _write, **self.options)
        _write(describe_end(answer, self.settings) + "\n")


def read_decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names; its seed is set."""
    if args.seed is not None:
        transformers.set_seed(args.seed % 2**32)
    named = {} if args.temperature is None else {"temperature": args.temperature}
    return {"max_new_tokens": args.max_new_tokens, **named}


def read_tools(file: str) -> tuple[dict[str, Any], ...]:
    """The tools of a JSON file, in OpenAI's form. Raises: DataError: no such file, or no tools in it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not (tools := tuple(parse_tools(text, file))):
        raise DataError(f"{file}: no tools in it")
    return tools


def describe_end(answer: Answer, settings: dict[str, Any]) -> str:
    """What ended an answer, if it was no stop token."""
    notes = {"stop": "", "length": f"  [cut after {settings['max_new_tokens']} tokens]", "interrupt": "  [stopped]"}
    return notes[answer.ended_by]


def _show_message(message: dict[str, Any]) -> str:
    calls = [each["function"] for each in message.get("tool_calls", [])]
    said = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return f"{message['role']}: " + "\n".join([*([message["content"]] if message["content"] else []), *said])


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
