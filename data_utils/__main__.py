"""Look at data files before training on them: what is wrong with them (check), and what the model will see (show)."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_utils.conversations import DataOptions, read_conversations, read_names
from data_utils.hub import HUBS, choose_hub, fetch_model
from data_utils.hub_data import find_data
from data_utils.model_path import explain_missing_model, explain_unreachable_model
from data_utils.new_tokens import read_new_tokens
from data_utils.report import Account, Statistics, group_problems, hash_conversation
from data_utils.schema import FORMATS, Conversation, parse_record
from data_utils.sources import DataError, printable, read_records

if TYPE_CHECKING:  # transformers and pyarrow take seconds to import: only where tokens are asked for
    from data_utils.rows import Row
    from data_utils.template import ChatTemplate


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see --help")


def main() -> int:
    """Entry point. Returns: exit code: 2 for the user's mistakes, 1 where `check` found problems, 130 for Ctrl-C."""
    try:
        args = _build_parser().parse_args()
        return args.command(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_utils", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, parser_class=_Parser)

    check = commands.add_parser("check", help="read everything, name every problem, account for every row")
    check.add_argument("data", nargs="+", help="data files, FILE#N (a sample of N rows), directories, hf:OWNER/NAME")
    check.add_argument("--model", help="model or tokenizer directory, or hub name; without it no tokens are counted")
    check.add_argument("--eval_data_path", nargs="+", help="evaluation data, to count what is in both")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(command=_check)

    show = commands.add_parser("show", help="print conversations as they would be trained")
    show.add_argument("data", nargs="+", help="data files, FILE#N (a sample of N rows), directories, hf:OWNER/NAME")
    show.add_argument("--model", required=True, help="model or tokenizer directory, or hub name")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--num", type=int, default=3, help="conversations to print (default 3)")
    which.add_argument("--all", action="store_true", help="print all")
    which.add_argument("--index", type=int, help="print the one with this number, from 0")
    which.add_argument("--id", help="print the one with this id")
    show.add_argument("--ids", action="store_true", help="print token ids, too")
    show.add_argument("--json", action="store_true", help="one JSON object a row: id, input_ids, labels, pieces")
    show.add_argument("--html", type=Path, help="write a page instead")
    show.set_defaults(command=_show)

    for command in (check, show):
        command.add_argument("--model_max_length", type=int, help="tokens a row may have (default: no limit)")
        command.add_argument("--on_long", choices=["drop_turns", "drop", "error"], default="drop_turns")
        command.add_argument("--on_bad_row", choices=["error", "skip"], default="error", help="skip: no problem")
        command.add_argument(
            "--map", nargs="+", default=[], help="what the rows call our keys: role=speaker content=text"
        )
        command.add_argument("--data_format", choices=list(FORMATS), help="default: told by each row's keys")
        command.add_argument("--supervise", choices=["all", "last"], default="all", help="assistant turns to train")
        command.add_argument("--system_message", help="system turn for conversations without one")
        command.add_argument("--chat_template", help="file with a chat template to use, or chatml-tools")
        command.add_argument("--chat_template_kwargs", help="defaults for the template, as JSON")
        command.add_argument("--add_special_tokens", nargs="+", help="new tokens that conversations may use, or a file")
        command.add_argument(
            "--label_mask", choices=["assistant", "qwen"], default="assistant", help="which tokens are trained"
        )
        command.add_argument("--data_seed", type=int, default=42, help="of samples")
        command.add_argument("--hub", choices=HUBS, help="of the model's name (default: huggingface)")
        command.add_argument("--cache_dir", help="where hub downloads are kept")
        command.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    return parser


def _load_template(args: argparse.Namespace) -> "ChatTemplate":
    mistake = explain_missing_model(args.model)
    if choose_hub(args.hub) != "modelscope":
        mistake = mistake or explain_unreachable_model(args.model, args.cache_dir)
    if mistake:
        raise DataError(mistake)
    model = fetch_model(args.model, hub=args.hub, cache_dir=args.cache_dir, tokenizer_only=True)
    from data_utils.template import ChatTemplate
    from data_utils.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(
        model,
        system_message=args.system_message,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        cache_dir=args.cache_dir,
        trust_remote_code=args.trust_remote_code,
        new_tokens=read_new_tokens(args.add_special_tokens) if args.add_special_tokens else (),
    )
    return ChatTemplate(tokenizer, system_message=args.system_message, label_mask=args.label_mask)


def _options(args: argparse.Namespace) -> DataOptions:
    return DataOptions(
        max_length=args.model_max_length,
        on_long=args.on_long,
        data_format=args.data_format,
        supervise=args.supervise,
        on_bad_row="skip",  # all problems are shown
        seed=args.data_seed,
        names=read_names([pair for word in args.map for pair in word.split(",")]),
    )


# ---- check ----


def _check(args: argparse.Namespace) -> int:
    find_data(args.data, weighted=True)
    find_data(args.eval_data_path or [])  # what does not exist is said before a tokenizer loads
    _check_length(args)
    template = _load_template(args) if args.model else None
    account, seen = _account_for(args.data, args, template)
    problems = list(account.problems)
    lines = account.describe_fully(args.model_max_length)
    overlap = None
    if args.eval_data_path:
        evaluation, seen_there = _account_for(args.eval_data_path, args, template)
        problems += evaluation.problems
        overlap = len(seen & seen_there)
        lines += [f"evaluation: {line}" for line in evaluation.describe_fully(args.model_max_length)]
        lines.append(f"conversations in both: {overlap:,}")
    if args.json:
        found = {"problems": problems, "account": account.to_json(), "overlap": overlap}
        print(printable(json.dumps(found, ensure_ascii=False, indent=2)))
    else:
        if template is None:
            lines.append("without --model no token was counted and no chat template tried: rows may still be refused")
        print("\n".join([*group_problems(problems), *lines, f"problems: {len(problems):,}"]))
    return 1 if problems and args.on_bad_row == "error" else 0


def _check_length(args: argparse.Namespace) -> None:
    if args.model_max_length is not None and args.model_max_length < 2:
        raise DataError(f"--model_max_length {args.model_max_length}: must be at least 2")
    if args.model_max_length is not None and not args.model:
        raise DataError("--model_max_length: has no effect without --model, whose tokens it counts")
    for name in ("hub", "add_special_tokens") if not args.model else ():
        if getattr(args, name):
            raise DataError(f"--{name}: has no effect without --model")


def _account_for(
    paths: list[str], args: argparse.Namespace, template: "ChatTemplate | None"
) -> tuple[Account, set[int]]:
    """The account of data files, and the hashes of their conversations."""
    sources, options = find_data(paths, weighted=True), _options(args)
    if template is not None:
        from data_utils.dataset import TokenizedRows, build_rows

        with tempfile.TemporaryDirectory() as directory:
            account = build_rows(sources, template, options, Path(directory), may_be_empty=True)
            rows = TokenizedRows.from_directory(Path(directory))
            return account, set(rows.conversations().tolist())
    account = Account()
    statistics = Statistics(account)
    seen = set()
    for source in sources:
        for conversation in read_conversations(source, options, account):
            account.conversations_trained += bool(conversation.supervised_turns) or conversation.text is not None
            account.turns_trained += len(conversation.supervised_turns)
            account.count_texts(conversation)
            number = hash_conversation(conversation)
            statistics.add([(number, conversation.where)])
            seen.add(number)
    return account, seen


# ---- show ----


def _show(args: argparse.Namespace) -> int:
    find_data(args.data)
    _check_length(args)
    template = _load_template(args)
    from data_utils.show import as_html, as_json, as_text

    pages = []
    for conversation, rows in _conversations(args, template):
        named = [(f"{conversation.id}#{n}" if len(rows) > 1 else conversation.id, row) for n, row in enumerate(rows, 1)]
        for row_id, row in named:
            if args.html:
                pages.append((row_id, conversation.where, row))
            elif args.json:
                print(as_json(row_id, row, template))
            else:
                print(as_text(row_id, row, template, colour=sys.stdout.isatty(), ids=args.ids))
        if not rows:
            print(f"--- {conversation.id}: no supervised turn", file=sys.stderr)
    if args.html:
        try:
            args.html.write_text(as_html(pages, template, ids=args.ids), encoding="utf-8")
        except OSError as error:
            raise DataError(f"--html {args.html}: cannot be written: {error.strerror}") from None
        print(f"{args.html}: {len(pages):,} rows")
    return 0


def _conversations(args: argparse.Namespace, template: "ChatTemplate") -> Iterator[tuple[Conversation, list["Row"]]]:
    """The conversations that were asked for, with their rows by the definition, cut to length.

    Raises: DataError: the first bad row among those before the last one shown (unless they are skipped), or none that
        was asked for.
    """
    from data_utils.rows import cut_row

    if args.num < 1 or (args.index or 0) < 0:
        raise DataError("--num: at least 1; --index: counts from 0")
    options = _options(args)
    number = found = 0
    for source in find_data(args.data):
        for record in read_records(source, seed=args.data_seed):
            chosen = number < args.num or args.all
            try:
                if isinstance(record, DataError):
                    raise record
                conversation = parse_record(
                    record,
                    name=source.name,
                    data_format=options.data_format,
                    supervise=options.supervise,
                    names=dict(options.names),
                )
                if args.index is not None or args.id is not None:
                    chosen = number == args.index or (args.id is not None and conversation.id == args.id)
                rows = template.encode_conversation(conversation) if chosen else []
            except DataError as error:
                if args.on_bad_row == "error":
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                continue
            number += 1
            if chosen:
                found += 1
                limit = options.max_length
                yield conversation, rows if limit is None else [part for row in rows for part in cut_row(row, limit)]
            if not args.all and args.id is None and number > (args.num - 1 if args.index is None else args.index):
                return
    if not found:
        asked = f"--id {args.id}" if args.id is not None else f"--index {args.index}"
        raise DataError(f"{asked}: no such conversation among the {number:,} of {', '.join(args.data)}")


def run_script() -> None:
    """The command, with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    run_script()
