"""`python -m data_utils show DATA --model M`: what would be trained, token by token."""

import argparse
import json
import sys
from typing import NoReturn

from data_utils.dataset import TokenizedRows, load_rows
from data_utils.sources import DataError
from data_utils.template import IGNORE_INDEX, LABEL_MASKS, ChatTemplate
from data_utils.tokenizer import load_tokenizer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see --help")


def main() -> int:
    """Entry point. Returns: exit code, 2 for the user's mistakes."""
    parser = _Parser(prog="python -m data_utils", description=__doc__, allow_abbrev=False)
    show = parser.add_subparsers(required=True).add_parser("show", help="print rows as they would be trained")
    show.add_argument("data", nargs="+", help=".json or .jsonl files")
    show.add_argument("--model", required=True, help="model or tokenizer directory, or hub name")
    show.add_argument("--num", type=int, default=3, help="rows to print (default 3)")
    show.add_argument("--all", action="store_true", help="print all rows")
    show.add_argument("--json", action="store_true", help="one JSON object a row: id, input_ids, labels")
    show.add_argument("--model_max_length", type=int, help="tokens a row may have (default: no limit)")
    show.add_argument("--system_message", help="system turn for conversations without one")
    show.add_argument("--chat_template", help="file with a chat template to use")
    show.add_argument("--chat_template_kwargs", help="defaults for the template, as JSON")
    show.add_argument("--label_mask", choices=LABEL_MASKS, default="assistant", help="which tokens are trained")
    show.add_argument("--cache_dir", help="where hub downloads are kept")
    show.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    try:
        args = parser.parse_args()
        tokenizer = load_tokenizer(
            args.model,
            system_message=args.system_message,
            chat_template=args.chat_template,
            chat_template_kwargs=args.chat_template_kwargs,
            cache_dir=args.cache_dir,
            trust_remote_code=args.trust_remote_code,
        )
        template = ChatTemplate(tokenizer, system_message=args.system_message, label_mask=args.label_mask)
        rows, account = load_rows(args.data, template, max_length=args.model_max_length)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        for index in range(len(rows) if args.all else min(args.num, len(rows))):
            print(_row_as_json(rows, index) if args.json else _row_as_text(rows, index, template))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    for line in account.describe():
        print(line, file=sys.stderr)
    return 0


def _row_as_json(rows: TokenizedRows, index: int) -> str:
    input_ids, labels = rows[index]
    return json.dumps({"id": rows.ids[index], "input_ids": input_ids, "labels": labels}, ensure_ascii=False)


def _row_as_text(rows: TokenizedRows, index: int, template: ChatTemplate) -> str:
    """The row's text with trained stretches in [[ ]]."""
    input_ids, labels = rows[index]
    text, start = "", 0
    for end in range(1, len(input_ids) + 1):
        trained = labels[start] != IGNORE_INDEX
        if end == len(input_ids) or (labels[end] != IGNORE_INDEX) != trained:
            piece = template.tokenizer.decode(input_ids[start:end])
            text += f"[[{piece}]]" if trained else piece
            start = end
    return f"--- {rows.ids[index]}: {len(input_ids)} tokens, {rows.num_targets(index)} supervised\n{text}"


if __name__ == "__main__":
    sys.exit(main())
