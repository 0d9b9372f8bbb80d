"""Show runs: python -m tuning.report OUT [OUT2 ...].

OUT is the output directory of a run of finetune.py, finished or still training. One HTML page that needs nothing else:
losses, evaluation, learning rate, gradient norm, speed, memory against its plan, answers over time, the data's account,
rows as they are trained, the worst rows, settings and versions. Several runs stand in the same charts.

  python -m tuning.report OUT                     writes OUT/report.html
  python -m tuning.report OUT OUT2 --out FILE     both runs, into FILE
  python -m tuning.report OUT --serve             on this machine, renewed while the run trains
  python -m tuning.report OUT --rows              the worst rows, in the terminal
"""

import argparse

from commands.report_page.verdicts import SORTS, VERDICTS
from data_utils.sources import DataError
from tuning.entry import OneLineParser, run_entry
from tuning.errors import SettingsError

_NEEDS = {"port": "serve", **dict.fromkeys(("epoch", "sort", "verdict", "filter", "num", "json"), "rows")}


def main(argv: list[str] | None = None) -> None:
    """Write, serve or list. Raises: DataError, MachineError, SettingsError: the user's mistakes, and the machine's."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    from commands import report

    report.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(prog="python -m tuning.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="OUT", help="output directory of a run")
    parser.add_argument("--out", help="the page's file (default: report.html in the first OUT)")
    parser.add_argument("--serve", action="store_true", help="serve the page on 127.0.0.1 instead of writing it")
    parser.add_argument("--port", type=int, help="with --serve (default: a free one)")
    rows = parser.add_argument_group("--rows")
    rows.add_argument("--rows", action="store_true", help="list rows of one run by their losses instead")
    rows.add_argument("--epoch", type=int, help="as of the end of this epoch, counted from 0 (default: the last)")
    sorts = "; ".join(f"{name}: {what}" for name, what in SORTS.items())
    rows.add_argument("--sort", choices=list(SORTS), help=f"most first; {sorts} (default: excess)")
    rules = "; ".join(f"{name}: {rule}" for name, rule in VERDICTS.items())
    rows.add_argument("--verdict", choices=list(VERDICTS), help=f"only rows with it; {rules}")
    rows.add_argument("--filter", metavar="TEXT", help="only rows whose place, id, prompt or answer contains it")
    rows.add_argument("--num", type=int, help="rows to list (default: 20)")
    rows.add_argument("--json", action="store_true", default=None, help="a JSON object a line")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Flags that would be ignored, or cannot be. Raises: SettingsError: all of them, a line each."""
    mistakes = [
        f"--{name}: has no effect without --{needed}"
        for name, needed in _NEEDS.items()
        if getattr(args, name) is not None and not getattr(args, needed)
    ]
    if args.serve and args.rows:
        mistakes.append("--serve, --rows: one of them")
    if args.out is not None and (args.serve or args.rows):
        mistakes.append(f"--out: has no effect with --{'serve' if args.serve else 'rows'}, which writes no file")
    if args.rows and len(args.runs) > 1:
        mistakes.append(f"--rows: lists the rows of one run, not of {len(args.runs)}")
    if args.num is not None and args.num < 1:
        mistakes.append(f"--num {args.num}: must be at least 1")
    if args.port is not None and not 0 <= args.port < 65536:
        mistakes.append(f"--port {args.port}: must be from 0 (a free one) to 65535")
    if again := next((run for run in args.runs if args.runs.count(run) > 1), None):
        mistakes.append(f"{again}: is named twice")
    if mistakes:
        raise SettingsError("\n".join(mistakes))


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
