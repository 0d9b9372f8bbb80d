"""A conversation with a model, one answer, or many."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from commands.original import find_loadable, find_loadable_base
from data_utils.sources import printable
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from inference.decoding import SETTINGS, read_setting
from inference.generate import generate_answers, stream_answer
from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.loading import Trust, load_generation_config, load_model

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
        path = Path(args.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = vars(Trust(args.trust_remote_code, args.allow_pickle))
        dtype: Any = "auto" if device.type == "cuda" else torch.float32
        if (path / "adapter_config.json").is_file():
            # peft and what it imports take a second, which a model without an adapter need not.
            from tuning.checkpoint.adapter import check_adapter_fits, find_trained_quantization, load_lora
            from tuning.checkpoint.adapter_base import find_base, tokenizer_source
            from tuning.model.training_model import TrainingModel

            base = find_base(path, find_loadable_base(path, args.base, args, _note), None)
            self.tokenizer = load_tokenizer(str(tokenizer_source(path, base)), trust_remote_code=args.trust_remote_code)
            check_adapter_fits(path, base, trust_remote_code=args.trust_remote_code)
            model = load_model(
                str(base), dtype=dtype, quantization=find_trained_quantization(path), device=device, **options
            )
            # Its trained token rows take part by hooks: kept as long as the model.
            self._training_model = TrainingModel(*load_lora(model, path)).to(device).eval()
            model = self._training_model.causal_lm
            if (generation_config := load_generation_config(str(path))) is not None:
                model.generation_config = generation_config  # where the adapter was trained to stop
        else:
            name = find_loadable(args.model, allow_pickle=args.allow_pickle, say=_note)
            self.tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
            model = load_model(name, dtype=dtype, device=device, **options).to(device).eval()
        self.model = model
        self.template = ChatTemplate(self.tokenizer)
        self.system = _trained_system_message(path) if args.system is None else args.system
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


def _trained_system_message(path: Path) -> str | None:
    """The --system_message of the run, where the template does not carry it itself."""
    run = path / "run.json"
    if not run.is_file():
        return None
    with explain_bad_files(f"{run}: is not as it was written"):
        message = read_json_object(run)["settings"]["data"]["system_message"]
    return None if message is None else str(message)


def _note(line: str) -> None:
    """Tell of a conversion where answers do not go."""
    print(printable(line), file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
