"""chat.py's work: a conversation in the terminal, one answer, or many."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from commands.conversation import Chat, Continuation
from commands.prompts import Prompt, describe_answers, write_answers
from data_utils.sources import printable
from inference.batches import answer_in_order
from tuning.console import say


def run(args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Answer once, many times (prompts), or in a conversation. args: of chat.py."""
    chat = Continuation(args) if args.raw else Chat(args)
    if args.prompts:
        write_answers(args.out, _answer_all(chat, args, prompts))
        if args.out:
            say(describe_answers(args, len(prompts)))
    elif args.prompt is not None:
        chat.ask(args.prompt)
    else:
        converse(chat, args.model)


def _answer_all(
    chat: Chat | Continuation, args: argparse.Namespace, prompts: Sequence[Prompt]
) -> Iterator[dict[str, Any]]:
    first = args.first if args.out else 0
    ids = [chat.encode_row(prompt) for prompt in prompts]
    tools = [chat.find_tools(prompt) for prompt in prompts]
    answers = answer_in_order(
        chat.model,
        chat.tokenizer,
        ids,
        batch_size=args.batch_size,
        seed=args.seed,
        first=first,
        shown=chat.find_shown(any(tools)),
        **chat.options,
    )
    for index, answer in enumerate(answers, first):
        message = chat.read_message(ids[index], answer.text, tools[index])
        yield prompts[index].record(message, answer.text, answer.ended_by)


def converse(chat: Chat | Continuation, name: str) -> None:
    """Read questions and commands from the terminal until :exit, :quit or Ctrl-D."""
    import readline  # line editing and history

    # Terminals then send pasted text in one piece, which Python's readline turns off.
    readline.parse_and_bind("set enable-bracketed-paste on")
    raw = isinstance(chat, Continuation)
    ways = "a line is continued, :exit leaves" if raw else ":help lists the commands, :exit leaves"
    print(printable(f"{name}: {ways}"))
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
        if line.startswith(":") and isinstance(chat, Chat):
            print(printable(chat.command(line.strip())))
        else:
            chat.ask(line, input)


def _read_question() -> str:
    line = input("> ")
    if line.strip() != '"""':
        return line
    lines = []
    while (line := input("... ")).strip() != '"""':
        lines.append(line)
    return "\n".join(lines)
