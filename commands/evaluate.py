"""evaluate.py's work: models one after another on the same prompts, then a table of all."""

import argparse
import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from commands.compared import Bound, Column
from commands.evaluation_report import Report
from commands.loading import Asking, load_answering, load_asking
from data_utils.conversations import DataOptions, read_names
from data_utils.template import ChatTemplate
from inference.chat_model import ChatModel
from inference.estimates import Value
from inference.held_out import HeldOut, Result
from inference.lm_eval_tasks import Tasks
from tuning.console import say
from tuning.errors import SettingsError
from tuning.model.stop_token import list_eos_ids
from tuning.model.training_model import TrainingModel, check_loss_path, check_positions


def run(args: argparse.Namespace) -> int:
    """Evaluate the columns. args: of inference/evaluate.py. Returns: exit code.

    Raises: DataError, SettingsError: the user's mistakes; those of data, tasks and bounds before a model loads.
    """
    columns: list[Column] = args.columns
    asking = load_asking(columns[-1].args)
    template = ChatTemplate(asking.tokenizer, system_message=asking.system_message)
    stops = dict.fromkeys([*list_eos_ids(asking.generation_config), *sorted(template.stop_ids)])
    asking.generation_config.eos_token_id = list(stops)
    options = DataOptions(
        max_length=args.model_max_length, supervise=args.supervise, names=read_names(args.map)
    )  # fmt: skip
    held_out = HeldOut(args.data, template, options, say) if args.data else None
    tasks = _load_tasks(args) if args.tasks else None
    check_bounds(args.bounds, held_out, tasks)
    largest = max([*template.encoder.template_ids, *stops, *([held_out.largest_token_id] if held_out else [])])
    results: dict[str, Result] = {}
    values: dict[str, dict[str, Value]] = {column.name: {} for column in columns}

    def measure(column: Column, chat: ChatModel) -> None:
        say(f"{column.name}: evaluating{', without the adapter' if column.is_base else ''}")
        if held_out:
            results[column.name] = held_out.measure(
                chat, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens
            )
            values[column.name] |= held_out.estimate(results[column.name])
        if tasks:
            values[column.name] |= tasks.measure(chat, batch_size=args.batch_size)

    longest = int(held_out.rows.lengths.max()) if held_out else 0
    for named in columns:
        if not named.is_base:
            same = [column for column in columns if column.args is named.args]
            load_and_measure(same, asking, measure, largest_id=largest, longest=longest)
            gc.collect()
            torch.cuda.empty_cache()
    report = Report(columns, values, held_out, results)
    return report.give(args)


def _load_tasks(args: argparse.Namespace) -> Tasks:
    return Tasks(
        args.tasks,
        task_path=args.task_path,
        metrics=args.task_metrics,
        dataset_dir=args.dataset_dir,
        allow_code=args.allow_code_execution,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )


def check_bounds(bounds: list[Bound], held_out: HeldOut | None, tasks: Tasks | None) -> None:
    """Raises: SettingsError: a bound for a metric that the data or the tasks do not have."""
    known = {*(held_out.metrics if held_out else ()), *(tasks.metrics if tasks else ())}
    for bound in bounds:
        if bound.metric.partition(",")[0] not in known:
            raise SettingsError(f"{bound.describe()}: no such metric here; there are {', '.join(sorted(known))}")


def load_and_measure(
    columns: list[Column],
    asking: Asking,
    measure: Callable[[Column, ChatModel], None],
    *,
    largest_id: int,
    longest: int,
) -> None:
    """Load what one named model needs, and measure it, or an adapter's base and then the adapter, in one memory.

    asking: what all models are asked and stopped with. largest_id: a token id, longest: tokens, that it must take.

    Raises: SettingsError: another vocabulary, or as load_answering raises.
    """
    args: Any = columns[0].args
    loaded = load_answering(args, needs_template=False)
    check_same_tokens(loaded.tokenizer, asking.tokenizer, columns[-1].name)
    training_model = loaded.kept or TrainingModel(loaded.model)
    check_loss_path(training_model)
    check_positions(training_model, longest)
    if largest_id >= (num_rows := loaded.model.get_input_embeddings().weight.shape[0]):
        raise SettingsError(
            f"{columns[-1].name}: has {num_rows:,} vocabulary rows, and the prompts have token {largest_id}"
        )
    loaded.model.generation_config = copy.deepcopy(asking.generation_config)
    chat = ChatModel(
        loaded.model,
        asking.tokenizer,
        system_message=asking.system_message,
        kv_cache=args.kv_cache,
        kept=training_model,
    )
    for column in columns:
        with training_model.without_adapter() if column.is_base else contextlib.nullcontext():
            measure(column, chat)


def check_same_tokens(own: PreTrainedTokenizerBase, asking: PreTrainedTokenizerBase, name: str) -> None:
    """Raises: SettingsError: a model's tokens are not those of the prompts. One may have more than the other."""
    texts = {token_id: text for text, token_id in asking.get_vocab().items()}
    for text, token_id in own.get_vocab().items():
        if texts.get(token_id, text) != text:
            raise SettingsError(
                f"{name}: its token {token_id} is {text!r}, of the last model {texts[token_id]!r}; models of different "
                "vocabularies cannot be asked the same prompts: evaluate each in a run of its own"
            )
