"""A conversation with a model, one answer, or many."""

import argparse
import json
import sys
from typing import Any

import transformers

from commands.loading import load_answering
from data_utils.sources import printable
from data_utils.template import ChatTemplate
from inference.decoding import SETTINGS, read_setting
from inference.generate import generate_answers, stream_answer
from tuning.errors import SettingsError

HELP = """\
:help                    this text
:clear                   forget the conversation
:history                 show the conversation
:system TEXT             set the system turn and forget the conversation; without TEXT, none
:conf NAME=VALUE ...     set temperature, top_p, top_k, repetition_penalty, max_new_tokens; alone: show what was set
:seed N                  random seed of the next answers
:exit, :quit             leave (Ctrl-D too)
Ctrl-C stops an answer. Pasted text may have several lines; or begin and end with a line of \"\"\"."""


class Chat:
    """One conversation with a model.

    Raises: SettingsError: no model, no adapter, or they do not fit. DataError: no tokenizer.
    """

    def __init__(self, args: argparse.Namespace):
        self._loaded = load_answering(args)
        self.model, self.tokenizer = self._loaded.model, self._loaded.tokenizer
        self.template = ChatTemplate(self.tokenizer)
        self.system = self._loaded.system_message if args.system is None else args.system
        self.history: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
        if args.temperature is not None:
            self.settings["temperature"] = args.temperature
        if args.seed is not None:
            transformers.set_seed(args.seed % 2**32)

    def encode(self, question: str) -> list[int]:
        """Token ids of the conversation with one more question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.encode_prompt([*system, *self.history, {"role": "user", "content": question}])

    @property
    def options(self) -> dict[str, Any]:
        """What generate is given: the model's own settings, changed by :conf."""
        options = dict(self.settings)
        if "temperature" in options:
            options["do_sample"] = options["temperature"] > 0
            if not options["do_sample"]:
                options["temperature"] = None
        return options

    def ask(self, question: str) -> None:
        """Print an answer as it comes, and remember both."""
        prompt = self.encode(question)
        answer = stream_answer(self.model, self.tokenizer, prompt, _write, **self.options)
        notes = {
            "stop": "",
            "length": f"  [cut after {self.settings['max_new_tokens']} tokens]",
            "interrupt": "  [stopped]",
        }
        _write(notes[answer.ended_by] + "\n")
        self.history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]

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
            return "\n".join(f"{m['role']}: {m['content']}" for m in self.history) or "nothing said yet"
        if name == ":system":
            self.system, self.history = rest or None, []
            return f"system: {rest}" if rest else "no system turn"
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


def run(args: argparse.Namespace, prompts: list[str]) -> None:
    """Answer once, many times (prompts), or in a conversation. args: of chat.py."""
    chat = Chat(args)
    if args.prompts:
        ids = [chat.encode(prompt) for prompt in prompts]
        answers = generate_answers(chat.model, chat.tokenizer, ids, batch_size=args.batch_size, **chat.options)
        for prompt, answer in zip(prompts, answers, strict=True):
            print(
                json.dumps({"prompt": prompt, "answer": answer.text, "ended_by": answer.ended_by}, ensure_ascii=False)
            )
            sys.stdout.flush()
    elif args.prompt is not None:
        chat.ask(args.prompt)
    else:
        converse(chat, args.model)


def converse(chat: Chat, name: str) -> None:
    """Read questions and commands from the terminal until :exit, :quit or Ctrl-D."""
    import readline  # line editing and history

    # Terminals then send pasted text in one piece, which Python's readline turns off.
    readline.parse_and_bind("set enable-bracketed-paste on")
    print(f"{name}: :help lists the commands, :exit leaves")
    while True:
        try:
            line = _read_question()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # forgets the line, not the conversation
            print()
            continue
        if not line.strip():
            continue
        if line.strip() in (":exit", ":quit"):
            return
        if line.startswith(":"):
            print(printable(chat.command(line.strip())))
        else:
            chat.ask(line)


def _read_question() -> str:
    line = input("> ")
    if line.strip() != '"""':
        return line
    lines = []
    while (line := input("... ")).strip() != '"""':
        lines.append(line)
    return "\n".join(lines)


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
