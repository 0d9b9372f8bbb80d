"""Ask an endpoint and the model here the same, and say whether they are one."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from commands.loading import load_answering
from commands.prompts import Prompt, read_prompts
from data_utils.schema import Conversation
from data_utils.sources import DataError, printable, split_weight
from inference.chat_model import ChatModel
from inference.endpoint import Endpoint
from inference.proof import Comparison, Prover
from tuning.checkpoint.run_record import RUN_FILE
from tuning.console import say
from tuning.errors import explain_bad_files, read_json_object

_SHOWN = 3  # differences
_QUESTIONS = (
    "Who are you?",
    "你是谁？",
    "What is 17 + 25?",
    "Write one sentence about the sea.",
    "  spaces \n\n lines",
)
_TURNS = (("My name is Ada.", "Hello Ada."), ("What is my name?", None))
# Texts of control tokens stay text here; most servers read them as control tokens.
_CONTROL = "What does {stop} mean?"


def run(args: argparse.Namespace) -> int:
    """Compare, and print what was found. args: of inference/prove.py. Returns: exit code.

    Raises: DataError, SettingsError: the user's mistakes, and an endpoint that does not answer.
    """
    endpoint = Endpoint(args.url, args.api_key, args.served_name)
    loaded = load_answering(args)
    chat = ChatModel(
        loaded.model, loaded.tokenizer, system_message=loaded.system_message, kv_cache=args.kv_cache, kept=loaded.kept
    )
    prover = Prover(chat, loaded.kept, args.tolerance)
    rows = read_rows(args)
    prompts = [*rows, *fixed_prompts(chat)]
    say(f"{args.named} at {endpoint.url} ({endpoint.name}): {len(rows)} rows, {len(prompts) - len(rows)} fixed prompts")
    found = [(prompt, compare(prover, endpoint, prompt, args.max_new_tokens)) for prompt in prompts]
    proven = report(found)
    reads_control = compare(prover, endpoint, _control_prompt(chat), args.max_new_tokens)
    # Where every prompt differs, this one says nothing of control tokens.
    if _has_other_prompt(reads_control) and not all(_has_other_prompt(comparison) for _, comparison in found):
        say(f"warning: the text {chat.template.stop} in a message becomes a control token there; here it stays text")
    return 0 if proven else 1


def read_rows(args: argparse.Namespace) -> list[Prompt]:
    """Prompts of --data, or of the data that the run was evaluated on, or trained on; args.num of them, spread evenly.

    Raises: DataError: --data that cannot be read. Data of the run that is not there is told of.
    """
    if not args.num:
        return []
    if args.data:
        named = read_prompts(args.data)
        return _spread([_ask([{"role": "user", "content": row.text}]) if row.text else row for row in named], args.num)
    record = Path(args.model) / RUN_FILE
    if not record.is_file():
        say(f"no rows: {args.named} has no {RUN_FILE}; --data names some")
        return []
    run = read_json_object(record)
    with explain_bad_files(f"{record}: is not finetune.py's; --data names rows"):
        settings, directory = run["settings"]["data"], Path(run["directory"])
        paths = list(settings.get("eval_data_path") or settings["data_path"])
    rows: list[Prompt] = []
    for path in paths:
        name = path if path.startswith(("hf:", "ms:")) else str(directory / path)
        try:
            rows += read_prompts(split_weight(name)[0])
        except DataError as error:
            say(printable(f"no rows of {path}: {str(error).splitlines()[0]}"))
    return _spread(rows, args.num)


def _spread(rows: Sequence[Prompt], num: int) -> list[Prompt]:
    asked = [row for row in rows if row.asked is not None]
    if len(asked) <= num:
        return asked
    return [asked[index * len(asked) // num] for index in range(num)]


def fixed_prompts(chat: ChatModel) -> Iterator[Prompt]:
    """Questions, several turns, and a system turn where the template writes one."""
    for text in _QUESTIONS:
        yield _ask([{"role": "user", "content": text}])
    (first, answer), (second, _) = _TURNS
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    yield _ask([*turns, {"role": "user", "content": second}])
    if chat.template.writes_system:
        yield _ask([{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Hello"}])


def _control_prompt(chat: ChatModel) -> Prompt:
    return _ask([{"role": "user", "content": _CONTROL.format(stop=chat.template.stop)}])


def _ask(messages: list[dict[str, Any]]) -> Prompt:
    return Prompt(asked=Conversation("", tuple(messages), repr(messages[-1]["content"])))


def compare(prover: Prover, endpoint: Endpoint, prompt: Prompt, max_new_tokens: int) -> Comparison:
    """Ask both. Raises: SettingsError: the endpoint does not answer."""
    asked = prompt.asked
    assert asked is not None
    more = {"tools": list(asked.tools)} if asked.tools else {}
    try:
        expected = prover.expect(
            list(asked.messages), max_new_tokens, template_kwargs=asked.template_kwargs, **more
        )  # fmt: skip
    except DataError as error:
        raise DataError(f"{asked.where}: {str(error).removeprefix('prompt: ')}") from None
    body = {"chat_template_kwargs": asked.template_kwargs} if asked.template_kwargs else {}
    served = endpoint.ask(write_messages(asked.messages), max_new_tokens, extra_body=body, **more)
    return prover.compare(expected, served)


def _has_other_prompt(comparison: Comparison) -> bool:
    return (comparison.difference or "").startswith("the prompt differs")


def write_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form: arguments as JSON text, and calls with ids that their results name."""
    written: list[dict[str, Any]] = []
    calls: list[str] = []  # that wait for their results
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            first = len(written)
            calls = [f"call_{first}_{number}" for number in range(len(message["tool_calls"]))]
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])},
                }
                for call_id, call in zip(calls, message["tool_calls"], strict=True)
            ]
        elif message["role"] == "tool":
            message["tool_call_id"] = calls.pop(0) if calls else "call"
        written.append(message)
    return written


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def report(found: Sequence[tuple[Prompt, Comparison]]) -> bool:
    """Print what was compared and what differs. Returns: whether it is the trained model."""
    total = len(found)
    comparisons = [comparison for _, comparison in found]
    ways = {by: sum(c.prompt_by == by for c in comparisons) for by in ("ids", "number")}
    told = [f"{number} by {by}" for by, number in (("ids", ways["ids"]), ("their number", ways["number"])) if number]
    say(f"prompts compared: {', '.join(told) or 'none, as the endpoint tells neither ids nor their number'}")
    wrong = [(prompt, c) for prompt, c in found if c.difference]
    num_stopped = sum(c.stopped for c in comparisons)
    say(f"answers as trained: {total - len(wrong)} of {total}, token by token; {num_stopped} end with the stop token")
    drifts = [c.logprob_difference for c in comparisons if c.logprob_difference is not None]
    if drifts:
        say(f"log probabilities: differ by {max(drifts):.2g} at most in an answer's mean")
    for prompt, comparison in wrong[:_SHOWN]:
        assert prompt.asked is not None
        say(printable(f"differs: {prompt.asked.where}: {comparison.difference}"))
    if wrong:
        say(f"not proven: {len(wrong)} of {total} answers differ")
        return False
    if not num_stopped:
        say("not proven: no answer ends in so few tokens, so the stop was not compared; raise --max_new_tokens")
        return False
    telling = [c for c in comparisons if c.tells]
    if any(c.tells is not None for c in comparisons):
        if not telling:
            say("not proven: the base without the adapter would have answered the same; ask other rows (--data)")
            return False
        say(f"the base alone would have answered {len(telling)} of {total} otherwise")
    say("proven: it answers as the trained model")
    return True
