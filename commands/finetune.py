"""One fine-tuning, top to bottom: data -> plan -> where to start -> model -> training -> result."""

from pathlib import Path

from commands.original import find_training_model
from commands.paths import read_options
from data_utils.cache import RowCache, default_root
from data_utils.dataset import DROPPED_FILE, TokenizedRows
from data_utils.hub import fetch_model
from data_utils.new_tokens import find_pieces, read_new_tokens, read_saved_tokens
from data_utils.steps import StepDataset
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from data_utils.training_data import GENERAL_FILE, TrainingData, read_training_data
from inference.eval_answers import AnswersCallback, find_questions
from inference.samples import SampleCallback
from tuning.checkpoint.base import inspect_base
from tuning.checkpoint.result import ResultWriter
from tuning.checkpoint.resume import describe_facts, find_starting_point
from tuning.console import is_rank_0, say
from tuning.distributed.processes import check_agreement, leave_processes, on_all_ranks, on_rank_0
from tuning.distributed.startup import start_processes
from tuning.errors import SettingsError
from tuning.model.build import TokensInUse
from tuning.model.loading import local_directory
from tuning.model.new_tokens import NewTokens
from tuning.planning.plan import check_plan, plan_run
from tuning.planning.survey import survey_steps
from tuning.settings.arguments import Arguments, RunArguments, build_arguments
from tuning.settings.options import ModelArguments, Settings
from tuning.training.announce import describe_checkpoints, describe_training, find_doubts, find_rates
from tuning.training.forgetting import ForgettingMeter
from tuning.training.prepare import prepare_model
from tuning.training.row_recorder import RowRecorder
from tuning.training.run import begin_run, check_run, describe_run, finish_dry_run, run_training, say_summary
from tuning.training.trainer import StepTrainer


def run(settings: Settings, *, began: float) -> int:
    """Run one fine-tuning. began: time.perf_counter() when the program began.

    Returns: exit code. Raises: DataError, SettingsError: the user's mistakes. MachineError: what could not be done.
    """
    # ---- processes ----
    download_model(settings.model)
    new_tokens = read_tokens_to_add(settings)
    arguments = build_arguments(settings)
    start_processes(arguments)
    environment = check_run(arguments)
    given, run = arguments, arguments.run
    arguments, name_base = find_training_model(given)

    # ---- data ----
    data = on_all_ranks(lambda: read_data(arguments, new_tokens))
    check_agreement(data.fingerprints)
    questions = find_questions(data.eval_rows, run.eval_generate) if run.eval_generate and data.eval_rows else []
    if run.eval_generate and not questions:
        raise SettingsError("--eval_generate: the evaluation data asks nothing: it is plain text alone")

    # ---- plan ----
    tokens = describe_tokens(data, new_tokens)
    base = name_base(inspect_base(arguments, tokens))
    plan = on_rank_0(
        lambda: plan_run(
            base,
            lambda budget, packed: survey_steps(build_steps(arguments, data.rows, budget, packed=packed), run),
            run,
            model_max_length=arguments.data.model_max_length,
            longest=data.longest,
        )
    )
    for doubt in find_doubts(arguments, plan, find_rates(run, plan.survey.num_steps)):
        say(doubt)
    if run.dry_run:
        return finish_dry_run(run, plan, data.account)

    # ---- where to start ----
    facts = describe_facts(arguments, base, environment, data.account, plan.survey.max_tokens)
    start = on_rank_0(lambda: find_starting_point(run, facts))
    for note in start.notes:
        say(note)
    if start.finished:
        leave_processes()
        return 0

    # ---- model ----
    rows_per_step = start.rows_per_step or count_rows_per_step(run)
    say("run: " + "\n     ".join(describe_training(arguments, plan, rows_per_step)))
    for line in describe_checkpoints(arguments, plan, base.compute_dtype):
        say(line)
    say(plan.describe_memory())
    if warning := check_plan(plan, run):
        say(warning)
    model = prepare_model(
        arguments, base, data.tokenizer, tokens, longest=data.longest, checkpointing=plan.checkpointing
    )

    # ---- training ----
    packed, budget = model.padded_because is None, plan.survey.max_tokens
    steps = build_steps(arguments, data.rows, budget, packed=packed, rows_per_step=rows_per_step)
    eval_steps = build_eval_steps(arguments, data.eval_rows, budget, packed=packed)
    facts = facts.with_step(steps.rows_per_step)
    record = describe_run(given, base, model, plan, facts, environment, start, data, began=began)
    if arguments is not given and arguments.lora.use_lora:  # peft and servers cannot load the original that it names
        record.values["serving"]["as_it_is"] += f", on {arguments.model.model_name_or_path}"
    writer = ResultWriter(model.training_model, data.tokenizer, model.generation_config, base=base, facts=facts)
    dropped = data.rows.directory / DROPPED_FILE if data.account.dropped or data.account.num_problems else None
    recorder = None
    if run.record_rows:
        recorder = RowRecorder(data.rows.num_targets, data.rows.describe, len(steps))
    trainer = StepTrainer(
        model.training_model,
        run,
        train_dataset=steps,
        eval_dataset=eval_steps,
        writer=writer,
        on_begin=lambda: begin_run(arguments, record, start, dropped),
        loraplus_lr_ratio=arguments.lora.loraplus_lr_ratio,
        recorder=recorder,
        meter=build_meter(arguments, data.general_rows, budget, packed=packed),
    )
    if data.samples and is_rank_0():
        trainer.add_callback(SampleCallback(model.training_model, data.tokenizer, data.samples, run, say))
    if questions and is_rank_0():
        trainer.add_callback(AnswersCallback(model.training_model, data.tokenizer, questions, run, say))

    # ---- result ----
    code = run_training(trainer, record, writer, start, recorder)
    if code == 0:
        say_summary(record, Path(__file__).parent.parent, use_lora=arguments.lora.use_lora)
    return code


def download_model(model: ModelArguments) -> None:
    """Have a model of ModelScope's hub in a directory, and train that."""
    model.model_name_or_path = fetch_model(
        model.model_name_or_path, hub=model.hub, cache_dir=model.cache_dir, allow_pickle=model.allow_pickle
    )


def read_tokens_to_add(settings: Settings) -> list[str]:
    """The tokens of --add_special_tokens, or of the adapter that training starts from and not of its base.

    A file is replaced by what it has, so that run.json and a resumed run know the tokens themselves.
    """
    if settings.lora.lora_weight_path:
        saved = read_saved_tokens(Path(settings.lora.lora_weight_path))
        base = local_directory(settings.model.model_name_or_path, settings.model.cache_dir) if saved else Path()
        known = read_saved_tokens(base) if saved else []
        return [token for token in saved if token not in known]
    if settings.data.add_special_tokens is None:
        return []
    settings.data.add_special_tokens = read_new_tokens(settings.data.add_special_tokens)
    return settings.data.add_special_tokens


def read_data(arguments: Arguments, new_tokens: list[str]) -> TrainingData:
    """Tokenise the files, or find them tokenised. Raises: DataError, SettingsError."""
    model, data, run = arguments.model, arguments.data, arguments.run
    if data.lazy_preprocess:
        say("--lazy_preprocess: conversations are always tokenised first here; it has no effect")
    tokenizer = load_tokenizer(
        model.model_name_or_path,
        system_message=data.system_message,
        chat_template=data.chat_template,
        chat_template_kwargs=data.chat_template_kwargs,
        cache_dir=model.cache_dir,
        trust_remote_code=model.trust_remote_code,
        new_tokens=new_tokens,
    )
    template = ChatTemplate(tokenizer, system_message=data.system_message, label_mask=data.label_mask)
    options = read_options(data, seed=run.order_seed)
    return read_training_data(
        tokenizer,
        template,
        options,
        paths=data.data_path,
        eval_paths=data.eval_data_path,
        eval_share=data.eval_share,
        prompts_path=run.sample_prompts,
        general_path=(run.general or GENERAL_FILE) if run.forgetting else None,
        cache=RowCache(None if data.no_cache else default_root(model.cache_dir)),
        say=say,
    )


def describe_tokens(data: TrainingData, new_tokens: list[str]) -> TokensInUse:
    """What the model must know of the template and the data."""
    template, tokenizer, new = data.template, data.tokenizer, None
    if new_tokens:
        pieces = find_pieces(tokenizer, new_tokens)
        new = NewTokens(tuple(tokenizer.convert_tokens_to_ids(new_tokens)), tuple(map(tuple, pieces)))
    return TokensInUse(
        stop_id=template.stop_id,
        stop=template.stop,
        template_ids=template.encoder.template_ids,
        largest_id=data.largest_token_id,
        vocabulary_size=len(tokenizer) - len(new_tokens),
        new=new,
    )


def build_steps(
    arguments: Arguments, rows: TokenizedRows, max_tokens: int, *, packed: bool, rows_per_step: int | None = None
) -> StepDataset:
    """This rank's micro-batches of every training step.

    rows_per_step: conversations of a step over all ranks, of the checkpoint on resume; None: per-device batch size x
    accumulation x ranks.
    """
    run = arguments.run
    return StepDataset(
        rows,
        rows_per_step=rows_per_step or count_rows_per_step(run),
        max_tokens=max_tokens,
        packed=packed,
        seed=run.order_seed,
        rank=run.process_index,
        num_ranks=run.world_size,
    )


def build_meter(
    arguments: Arguments, rows: TokenizedRows | None, limit: int, *, packed: bool
) -> ForgettingMeter | None:
    """What measures forgetting on general rows. limit, packed: as in build_eval_steps."""
    if rows is None:
        return None
    batch = arguments.run.per_device_eval_batch_size
    budget = max(int(rows.lengths.max()), min(batch * arguments.data.model_max_length, limit))
    steps = StepDataset(rows, rows_per_step=batch, max_tokens=budget, packed=packed, seed=None)
    lora = arguments.lora
    has_adapter = lora.use_lora and lora.lora_bias == "none"  # biases train in place: the base is not there any more
    return ForgettingMeter(steps, arguments.run.device, has_adapter=has_adapter)


def count_rows_per_step(run: RunArguments) -> int:
    """Conversations of a step over all processes, as the settings say it."""
    return run.per_device_train_batch_size * run.gradient_accumulation_steps * run.world_size


def build_eval_steps(
    arguments: Arguments, rows: TokenizedRows | None, limit: int, *, packed: bool
) -> StepDataset | None:
    """This rank's share of the evaluation, in the order of the file.

    limit: tokens of a micro-batch of training, whose memory was planned; the batch layout does not change the loss.
    """
    if rows is None:
        return None
    run = arguments.run
    batch = run.per_device_eval_batch_size
    budget = batch * arguments.data.model_max_length
    return StepDataset(
        rows,
        rows_per_step=batch * run.world_size,
        max_tokens=max(int(rows.lengths.max()), min(budget, limit)),
        packed=packed,
        seed=None,
        rank=run.process_index,
        num_ranks=run.world_size,
    )
