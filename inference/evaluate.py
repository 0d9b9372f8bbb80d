"""Compare models: python evaluate.py MODEL|ADAPTER ... [--data EVAL.json] [--tasks mmlu ceval-valid ...].

One table: of held-out conversations loss, exact match, ROUGE-L, F1 of tool calls, share of answers that stop, length;
of lm-eval's tasks their metrics; each with its standard error, and differences to the first model. An adapter brings
its base, which comes first. All are asked the same prompts, those of the last model. Exit code 1: that one is below
--fail_below or above --fail_above.
"""

import argparse
import importlib.util
import math
from pathlib import Path

from commands.compared import Bound, find_columns
from commands.model_flags import add_loading_flags
from data_utils.conversations import DataOptions, check_first_rows, read_names
from data_utils.hub_data import find_data
from data_utils.sources import DataError
from inference.metrics import DATA_METRICS
from inference.task_files import check_task_files
from tuning.entry import OneLineParser, run_entry
from tuning.errors import SettingsError

# What has an effect only with --data, or only with --tasks: default values.
_OF_DATA = {"max_new_tokens": 512, "model_max_length": 2048, "supervise": "all", "map": [], "worst": 3}
_OF_TASKS = {
    **dict.fromkeys(("task_path", "dataset_dir", "num_fewshot", "limit")),
    "allow_code_execution": False,
}
_RUN_CODE = ("humaneval", "mbpp")  # tasks that run what the model writes


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table, write what was asked for. Returns: exit code."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    args.task_metrics = check_task_files(args.task_path) if args.task_path and not args.allow_code_execution else None
    args.columns = find_columns(args)
    if args.data:
        find_data(args.data)
        check_first_rows(args.data, read_options(args))
    if importlib.util.find_spec("rich") is None:
        raise SettingsError("rich is not installed: pip install rich")
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise SettingsError("--tasks: lm-eval is not installed: pip install -r requirements_eval.txt")
    from commands import evaluate  # torch and transformers, once nothing is left to say without them

    return evaluate.run(args)


def check_flags(args: argparse.Namespace) -> None:
    """Hold the flags against each other, and set what was not named. Raises: SettingsError."""
    if not args.data and not args.tasks:
        raise SettingsError("nothing to evaluate on: name --data FILE, --tasks NAME, or both")
    for owner, defaults in (("data", _OF_DATA), ("tasks", _OF_TASKS)):
        for name, default in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif not getattr(args, owner):
                raise SettingsError(f"--{name}: has no effect without --{owner}")
    least = {"model_max_length": 2, "worst": 0, "num_fewshot": 0}
    for name in ("batch_size", "max_new_tokens", "limit", *least):
        if (value := getattr(args, name)) is not None and value < least.get(name, 1):
            raise SettingsError(f"--{name} {value}: must be at least {least.get(name, 1)}")
    if args.tasks and args.kv_cache != "full":
        raise SettingsError(f"--kv_cache {args.kv_cache}: not with --tasks, where lm-eval generates")
    for name in args.tasks or () if not args.allow_code_execution else ():
        if name.startswith(_RUN_CODE):
            raise SettingsError(f"--tasks {name}: runs code that the model writes; --allow_code_execution lets it")
    if args.dataset_dir and not Path(args.dataset_dir).is_dir():
        raise SettingsError(f"--dataset_dir {args.dataset_dir}: no such directory")
    for name in ("json", "markdown"):
        if (file := getattr(args, name)) and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise SettingsError(f"--{name} {file}: is a directory, or its directory is not there")
        if file and Path(file).exists() and not args.overwrite:
            raise SettingsError(f"--{name} {file}: is there; name another file, or pass --overwrite")
    if args.json and args.markdown and Path(args.json).resolve() == Path(args.markdown).resolve():
        raise SettingsError(f"--json, --markdown {args.markdown}: name two files")
    args.bounds = [
        read_bound(text, args, is_least=is_least)
        for texts, is_least in ((args.fail_below, True), (args.fail_above, False))
        for text in texts
    ]


def read_bound(text: str, args: argparse.Namespace, *, is_least: bool) -> Bound:
    """A bound of the command line, METRIC=NUMBER. Raises: SettingsError: no metric of this evaluation, or no number."""
    flag = f"--fail_{'below' if is_least else 'above'} {text}"
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise SettingsError(f"{flag}: expected METRIC=NUMBER")
    task, slash, _ = name.partition("/")
    if slash:
        if task not in (args.tasks or ()):
            raise SettingsError(f"{flag}: {task} is not among --tasks")
    elif name not in DATA_METRICS:
        raise SettingsError(f"{flag}: no metric ({', '.join(DATA_METRICS)}; of a task: TASK/METRIC)")
    elif not args.data:
        raise SettingsError(f"{flag}: {name} needs --data")
    elif DATA_METRICS[name] is (not is_least):
        raise SettingsError(f"{flag}: {'lower' if is_least else 'more'} is better; use --fail_"
                            f"{'above' if is_least else 'below'}")  # fmt: skip
    return Bound(name, value, is_least)


def read_options(args: argparse.Namespace) -> DataOptions:
    """How --data becomes rows: as in training."""
    return DataOptions(max_length=args.model_max_length, supervise=args.supervise, names=read_names(args.map))


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = OneLineParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="merged or full models, adapter directories")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="held-out conversations, as training takes them")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default 512)")
    parser.add_argument("--model_max_length", type=int, help="tokens a row may have, as in training (default 2048)")
    parser.add_argument("--supervise", choices=["all", "last"], help="turns of which the loss is taken (default all)")
    parser.add_argument("--map", nargs="+", metavar="KEY=NAME", help="what the rows call our keys, as in training")
    parser.add_argument("--worst", type=int, metavar="N", help="conversations of highest loss to show (default 3)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="lm-eval's: mmlu ceval-valid cmmlu gsm8k ...")
    parser.add_argument("--task_path", metavar="DIR", help="local task files of lm-eval (.yaml)")
    parser.add_argument("--dataset_dir", metavar="DIR", help="where the tasks' data sets lie, under their names")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="solved examples a prompt (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    parser.add_argument(
        "--allow_code_execution",
        action="store_true",
        default=None,
        help="tasks may run code: what the model writes (humaneval), and what local task files name",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="conversations or questions at a time (default 8)")
    parser.add_argument("--json", metavar="FILE", help="write all values, conversations and answers")
    parser.add_argument("--markdown", metavar="FILE", help="write the table and the worst conversations")
    parser.add_argument("--overwrite", action="store_true", help="write over these files")
    parser.add_argument("--fail_below", nargs="+", default=[], metavar="METRIC=NUMBER", help="of the last model")
    parser.add_argument("--fail_above", nargs="+", default=[], metavar="METRIC=NUMBER", help="of the last model")
    add_loading_flags(parser)
    return parser


def run_script() -> None:
    """The command, with its mistakes in one line and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted")


if __name__ == "__main__":
    run_script()
