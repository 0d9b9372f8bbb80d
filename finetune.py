"""Fine-tune a chat model on conversations: python finetune.py --model_name_or_path M --data_path D --output_dir O.

Reads top to bottom: settings -> data -> model -> training -> result. `--help` lists every setting.
"""

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from data_utils.cache import RowCache, default_root
from data_utils.dataset import DROPPED_FILE, DataOptions, TokenizedRows, count_overlap, load_rows
from data_utils.report import Account
from data_utils.sources import DataError, read_lines
from data_utils.steps import StepDataset
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tuning import checkpoint, record
from tuning.adapters import build_training_model, find_trained_quantization
from tuning.args import Arguments, RunArguments, describe_settings
from tuning.base_model import judge_base_model
from tuning.command_line import parse_arguments
from tuning.errors import MachineError, SettingsError, first_line
from tuning.machine import check_device, check_reporters, describe_device, process_memory
from tuning.memory import MicroBatchShape
from tuning.model import (
    TrainingModel,
    check_loss_path,
    check_positions,
    choose_dtypes,
    count_parameters,
    enable_gradient_checkpointing,
    find_quantization,
    identify_checkpoint,
    load_model,
)
from tuning.packing import describe_rotary_switch, enable_packing, find_obstacle
from tuning.plan import Plan, Survey, check_plan, make_plan
from tuning.processes import (
    adopt_mpi,
    check_agreement,
    check_connection,
    check_shared,
    is_first_process,
    on_all,
    on_first,
    speaks_for_machine,
)
from tuning.progress import LOSS_PLOT_FILE, ProgressCallback, SampleCallback
from tuning.quantization import Quantization, choose_quantization
from tuning.resume import describe_trajectory, find_starting_point
from tuning.sharding import SHARDED, check_packed_weights, deal_out
from tuning.stopping import GO_ON
from tuning.trainer import StepTrainer

CONSOLE = Console()
_SURVEYED_STEPS = 1000  # enough to know how rows lie; a million rows take minutes


def main(argv: list[str] | None = None) -> int:
    """Run one fine-tuning. Returns: exit code. Raises: DataError, SettingsError: the user's mistakes."""
    # ---- settings ----
    adopt_mpi()
    arguments = parse_arguments(argv)
    model_args, data_args, lora_args, run_args = arguments.model, arguments.data, arguments.lora, arguments.run
    settings, environment, started = describe_settings(arguments), record.describe_environment(), time.perf_counter()
    output_dir = Path(os.path.normpath(run_args.output_dir))
    check_connection(run_args.device)
    check_agreement({**flatten_settings(settings), **environment["versions"], "python": environment["python"]})
    on_first(lambda: check_output_directory(arguments, output_dir))
    check_shared(output_dir)
    check_reporters(run_args.report_to)
    check_device(run_args.device)
    say(f"device: {describe_device(run_args.device)}{describe_engine(run_args)}")
    if data_args.lazy_preprocess:
        say("--lazy_preprocess: rows are always tokenised first here; it has no effect")

    # ---- data ----
    data = on_all(lambda: read_data(arguments))
    tokenizer, template, account, eval_account = data.tokenizer, data.template, data.account, data.eval_account
    check_agreement(
        {
            "the tokenised data": account.fingerprint,
            "the tokenised evaluation data": eval_account and eval_account.fingerprint,
        }
    )

    # ---- plan ----
    base = identify_checkpoint(model_args.model_name_or_path, model_args.cache_dir)
    load_dtype, compute_dtype = choose_dtypes(
        use_lora=lora_args.use_lora,
        pure_bf16=model_args.pure_bf16,
        bf16=run_args.bf16,
        fp16=run_args.fp16,
        deepspeed=run_args.deepspeed is not None,
    )
    quantization = on_first(lambda: choose_model(arguments, load_dtype))
    if lora_args.lora_weight_path and (Path(lora_args.lora_weight_path) / record.MANIFEST_FILE).is_file():
        before = find_trained_quantization(Path(lora_args.lora_weight_path))
        was, now = (q.describe() if q else "no quantisation" for q in (before, quantization))
        if was != now:
            say(f"adapter: trained with {was} before, goes on with {now}")
    plan = on_first(lambda: plan_run(arguments, data, base["fingerprint"], quantization, load_dtype, compute_dtype))
    if run_args.dry_run:
        say("plan: " + "\n      ".join(plan.describe()))
        on_first(lambda: write_plan(output_dir, plan, account))
        return 0
    say(plan.describe_memory())
    if not run_args.ignore_memory_plan:
        check_plan(plan, run_args)

    # ---- model ----
    transformers.set_seed(run_args.seed)  # fresh adapters are random
    is_sharded = run_args.engine in SHARDED
    model = on_all(
        lambda: load_model(
            model_args.model_name_or_path,
            dtype=load_dtype,
            allow_pickle=model_args.allow_pickle,
            skeleton=is_sharded and not is_first_process(),
            quantization=quantization,
            device=None if is_sharded else run_args.device,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
        )
    )
    facts = {
        "trajectory": describe_trajectory(
            arguments,
            base_fingerprint=base["fingerprint"],
            rows_fingerprint=account.fingerprint,
            files=account.files,
            quantization=quantization,
        ),
        "layout": {
            "processes": run_args.world_size,
            "batch": run_args.per_device_train_batch_size,
            "engine": run_args.engine,
            "micro_batch_tokens": plan.layout.max_tokens,
        },
        **{name: environment[name] for name in ("command", "versions")},
        "quantization": quantization.to_json() if quantization else None,
    }
    wanted, force = run_args.resume_from_checkpoint, run_args.force_resume
    start = on_first(lambda: find_starting_point(wanted, output_dir, facts, force=force))
    for note in start.notes:
        say(note)
    if start.finished:
        return 0
    evidence = on_first(lambda: judge_base_model(model, template.stop_id, template.stop, len(tokenizer)))
    training_model = build_model(arguments, data, model, is_base=evidence.is_base, base_fingerprint=base["fingerprint"])
    if plan.checkpointing:
        enable_gradient_checkpointing(model)
    if not is_sharded:
        training_model.to(run_args.device)
    on_first(lambda: check_loss_path(training_model))
    trainable, total = count_parameters(training_model)
    say(f"model: {evidence.describe()}")
    say(f"       {trainable:,} of {total:,} parameters train; computing in {str(compute_dtype).removeprefix('torch.')}")
    if quantization:
        say(f"       its linear layers: {quantization.describe()}")
    longest = data.longest
    check_positions(training_model, longest)
    obstacle = enable_packing(training_model, max_length=longest, dtype=compute_dtype)
    say(
        "layout: rows are packed"
        if obstacle is None
        else f"layout: rows are padded; this model cannot pack: {obstacle}"
    )
    if warning := describe_rotary_switch(model.config, longest):
        say(f"layout: {warning}")
    generation = checkpoint.align_stop_token(model, tokenizer, stop_id=template.stop_id, is_base=evidence.is_base)
    deal_out(training_model, run_args, compute_dtype)

    # ---- training ----
    packed = obstacle is None
    train_steps = build_steps(
        arguments, data.rows, packed=packed, rows_per_step=start.rows_per_step, max_tokens=plan.layout.max_tokens
    )
    eval_steps = None
    if data.eval_rows:
        eval_steps = build_eval_steps(arguments, data.eval_rows, packed=packed, limit=plan.layout.max_tokens)
    facts["rows_per_step"] = train_steps.rows_per_step
    writer = checkpoint.ResultWriter(training_model, tokenizer, generation, base=base, dtype=compute_dtype, facts=facts)
    run: dict[str, Any] = {
        **environment,
        "settings": settings,
        "base_model": {**base, "evidence": evidence.describe()},
        "stop_token": {"text": template.stop, "id": template.stop_id},
        "resumed_from": str(start.checkpoint) if start.checkpoint else None,
        "data": account.to_json(),
        "eval_data": eval_account.to_json() if eval_account else None,
        "parameters": {"trainable": trainable, "total": total},
        "quantization": facts["quantization"],
        "rows_per_step": train_steps.rows_per_step,
        "layout": {"packed": packed, "padded_because": obstacle},
        "plan": plan.to_json(),
        "processes": run_args.world_size,
        "engine": run_args.engine,
    }

    def open_run() -> None:
        checkpoint.prepare_output_directory(output_dir, overwrite=start.checkpoint is None, checkpoint=start.checkpoint)
        if account.dropped:
            shutil.copy(data.rows.directory / DROPPED_FILE, output_dir / DROPPED_FILE)
        run["status"] = "running"
        record.write_run(output_dir, run)

    trainer = StepTrainer(
        training_model,
        run_args,
        train_dataset=train_steps,
        eval_dataset=eval_steps,
        writer=writer,
        on_begin=open_run,
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )
    if is_first_process():
        if data.samples:
            trainer.add_callback(
                SampleCallback(
                    training_model,
                    tokenizer,
                    data.samples,
                    output_dir=output_dir,
                    log_line=say,
                    max_new_tokens=run_args.sample_max_new_tokens,
                )
            )
        trainer.add_callback(progress := ProgressCallback(CONSOLE, output_dir))
    try:
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    except BaseException as error:
        if is_first_process():
            progress.close()
        if "status" in run:  # begun, on the first process
            run["status"] = f"failed: {error}"
            with contextlib.suppress(MachineError):  # where the disk is full, the error itself is what to say
                record.write_run(output_dir, run)
        raise
    run |= trainer.summarize()
    if trainer.stopped_by:
        name = signal.Signals(trainer.stopped_by).name
        run["status"] = f"stopped by {name}"
        on_first(lambda: record.write_run(output_dir, run))
        step, last = trainer.state.global_step, trainer.state.max_steps
        then = "it was saved without what going on needs (--save_only_model)" if run_args.save_only_model else GO_ON
        say(f"stopped by {name} at step {step:,} of {last:,}; {then}")
        trainer.close()
        return 128 + trainer.stopped_by

    # ---- result ----
    run |= {"status": "finished", "wall_s": round(time.perf_counter() - started, 1)}
    result = writer.collect()

    def write_result() -> None:
        with record.explain_failed_write(output_dir, GO_ON):
            writer.write(output_dir, result)
            record.write_run(output_dir, run)
            writer.seal(output_dir, step=run["steps"])

    on_first(write_result)
    if is_first_process():
        say_summary(run, output_dir, use_lora=lora_args.use_lora)
    trainer.close()
    return 0


@dataclass
class Data:
    """What is trained and evaluated on, and how it was rendered. samples: (text, token ids) of prompts to answer."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    rows: TokenizedRows
    account: Account
    eval_rows: TokenizedRows | None
    eval_account: Account | None
    samples: list[tuple[str, list[int]]]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(rows.lengths.max()) for rows in (self.rows, self.eval_rows) if rows is not None)


def read_data(arguments: Arguments) -> Data:
    """Tokenise the files, or find them tokenised. Raises: DataError, SettingsError."""
    model_args, data_args, run_args = arguments.model, arguments.data, arguments.run
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        system_message=data_args.system_message,
        chat_template=data_args.chat_template,
        chat_template_kwargs=data_args.chat_template_kwargs,
        cache_dir=model_args.cache_dir,
        trust_remote_code=model_args.trust_remote_code,
    )
    template = ChatTemplate(tokenizer, system_message=data_args.system_message, label_mask=data_args.label_mask)
    options = DataOptions(
        max_length=data_args.model_max_length,
        on_long=data_args.on_long,
        data_format=data_args.data_format,
        supervise=data_args.supervise,
        on_bad_row=data_args.on_bad_row,
        seed=run_args.seed if run_args.data_seed is None else run_args.data_seed,
    )
    cache = RowCache(None if data_args.no_cache else default_root(model_args.cache_dir))
    rows, account = load_rows(data_args.data_path, template, options, cache=cache)
    say("data: " + "\n      ".join(account.describe()))
    eval_rows, eval_account = None, None
    if data_args.eval_data_path:
        eval_rows, eval_account = load_rows(data_args.eval_data_path, template, options, cache=cache)
        say("evaluation data: " + "\n      ".join(eval_account.describe()))
        if overlap := count_overlap(rows, eval_rows):
            say(f"evaluation data: {overlap:,} conversations are in the training data, too")
    samples = load_prompts(run_args.sample_prompts, template) if run_args.sample_prompts else []
    return Data(tokenizer, template, rows, account, eval_rows, eval_account, samples)


def check_output_directory(arguments: Arguments, output_dir: Path) -> None:
    """Raises: SettingsError: it holds something that may neither be deleted nor gone on with."""
    wanted = arguments.run.resume_from_checkpoint
    resumes = wanted is not None and (
        wanted == "auto" or checkpoint.lies_in(Path(wanted), output_dir) or not checkpoint.holds_results(output_dir)
    )
    inputs = [path for path in (arguments.model.model_name_or_path, arguments.lora.lora_weight_path) if path]
    checkpoint.check_output_directory(
        output_dir, overwrite=arguments.run.overwrite_output_dir or arguments.run.dry_run, resume=resumes, inputs=inputs
    )


def choose_model(arguments: Arguments, load_dtype: torch.dtype) -> Quantization | None:
    """How the model is quantised in training. Raises: SettingsError: not as the flags and the checkpoint say."""
    model_args, lora = arguments.model, arguments.lora
    path = model_args.model_name_or_path
    own = find_quantization(path, cache_dir=model_args.cache_dir, trust_remote_code=model_args.trust_remote_code)
    if lora.q_lora:
        check_packed_weights(arguments.run)
    return choose_quantization(
        own, path=path, q_lora=lora.q_lora, bits=lora.bits, quant_type=lora.quant_type, dtype=load_dtype
    )


def plan_run(
    arguments: Arguments,
    data: Data,
    base_fingerprint: str,
    quantization: Quantization | None,
    load_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Plan:
    """What the run will do and take, from the checkpoint's configuration and the lengths of the rows."""
    model_args, run_args = arguments.model, arguments.run
    process_bytes, unknown = process_memory(), None
    skeleton: TrainingModel | None = None
    notes: tuple[str, ...] = ()
    try:
        model = load_model(
            model_args.model_name_or_path,
            dtype=load_dtype,
            skeleton=True,
            quantization=quantization,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
        )
        evidence = judge_base_model(model, data.template.stop_id, data.template.stop, len(data.tokenizer))
        skeleton = build_model(arguments, data, model, is_base=evidence.is_base, base_fingerprint=base_fingerprint)
        notes = (evidence.describe(), *([f"linear layers: {quantization.describe()}"] if quantization else []))
    except SettingsError:
        raise
    except Exception as error:  # code that comes with a model may need values
        unknown = first_line(error)
    longest = data.longest
    packed = skeleton is None or find_obstacle(skeleton, longest) is None
    budget, wanted = run_args.per_device_train_batch_size * arguments.data.model_max_length, run_args.micro_batch_tokens
    if wanted is not None and wanted != "auto":
        budget = int(wanted)
        if budget < longest:
            raise SettingsError(f"--micro_batch_tokens {wanted}: the longest row has {longest} tokens")

    def plan_with(budget: int, checkpointing: bool | None) -> Plan:
        steps = build_steps(arguments, data.rows, packed=packed, max_tokens=budget)
        return make_plan(
            skeleton,
            survey_steps(arguments, steps),
            settings=run_args,
            dtype=compute_dtype,
            row_tokens=min(arguments.data.model_max_length, longest),
            checkpointing=checkpointing,
            process_bytes=process_bytes,
            outlook=run_args.dry_run or wanted == "auto",
            unknown=unknown,
            notes=notes,
        )

    plan = plan_with(budget, None if run_args.checkpoints_if_needed else bool(run_args.gradient_checkpointing))
    if wanted != "auto":
        return plan
    if plan.largest_micro_batch is None:
        raise SettingsError(f"--micro_batch_tokens auto: {plan.unknown or 'the memory of this device is not known'}")
    # Whether activations are computed again is settled: the skeleton computes them so by now.
    return plan_with(max(longest, plan.largest_micro_batch), plan.checkpointing)


def survey_steps(arguments: Arguments, steps: StepDataset) -> Survey:
    """How rows lie, looked at over some steps."""
    run_args = arguments.run
    num_steps = run_args.max_steps if run_args.max_steps > 0 else math.ceil(run_args.num_train_epochs * len(steps))
    found = steps.survey(min(_SURVEYED_STEPS, num_steps))
    lengths, num_targets = found["largest"]
    max_tokens = steps.layout.max_tokens
    return Survey(
        steps_per_epoch=len(steps),
        num_steps=num_steps,
        micro_batches=found["micro_batches"],
        fill=found["num_tokens"] / (found["micro_batches"] * run_args.world_size * max_tokens),
        num_tokens=found["num_tokens"],
        num_targets=found["num_targets"],
        num_pairs=found["num_pairs"],
        max_tokens=max_tokens,
        largest=MicroBatchShape(tuple(lengths), num_targets, steps.layout.packed),
    )


def write_plan(output_dir: Path, plan: Plan, account: Account) -> None:
    """Write plan.json, beside which a run may begin."""
    output_dir.mkdir(parents=True, exist_ok=True)
    record.write_json(output_dir / checkpoint.PLAN_FILE, {"data": account.to_json(), **plan.to_json()})
    say(f"plan: {output_dir / checkpoint.PLAN_FILE}")


def build_model(arguments: Arguments, data: Data, model: Any, *, is_base: bool, base_fingerprint: str) -> TrainingModel:
    """A loaded model, or one without storage, with what trains of it."""
    return build_training_model(
        model,
        arguments.lora,
        is_base=is_base,
        stop_id=data.template.stop_id,
        token_ids=data.template.encoder.template_ids,
        largest_token_id=max(a.largest_token_id for a in (data.account, data.eval_account) if a is not None),
        base_fingerprint=base_fingerprint,
    )


def build_steps(
    arguments: Arguments, rows: TokenizedRows, *, packed: bool, max_tokens: int, rows_per_step: int | None = None
) -> StepDataset:
    """This rank's share of every step.

    rows_per_step: of the checkpoint; None: batch x accumulation x processes, as in every HF script.
    """
    run = arguments.run
    batch, accumulation = run.per_device_train_batch_size, run.gradient_accumulation_steps
    return StepDataset(
        rows,
        rows_per_step=rows_per_step or batch * accumulation * run.world_size,
        max_tokens=max_tokens,
        packed=packed,
        seed=run.seed if run.data_seed is None else run.data_seed,
        rank=run.process_index,
        num_ranks=run.world_size,
    )


def build_eval_steps(arguments: Arguments, rows: TokenizedRows, *, packed: bool, limit: int) -> StepDataset:
    """This rank's share of the evaluation, in the order of the file.

    limit: tokens of a micro-batch of training, whose memory was planned; how rows lie does not change the loss.
    """
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


def load_prompts(path: str, template: ChatTemplate) -> list[tuple[str, list[int]]]:
    """(text, token ids) of each line of a file of prompts."""
    return [(line, template.encode_prompt([{"role": "user", "content": line}])) for line in read_lines(path)]


def say_summary(run: dict[str, Any], output_dir: Path, *, use_lora: bool) -> None:
    """Where everything is, and what to do next."""
    scripts = Path(__file__).parent
    python = f"python {'' if Path.cwd() == scripts else shlex.quote(f'{scripts}/')}"
    out, merged = shlex.quote(str(output_dir)), shlex.quote(f"{output_dir}-merged")
    if run["loss"]:
        say(f"loss: first {run['loss']['first']:.4f}, last {run['loss']['last']:.4f}")
    say(f"trained {run['steps']:,} steps in {run['train_s']:,} s, {run['tokens_per_s']:,} tokens/s")
    planned = run["plan"]["memory"] and f" (planned: {run['plan']['memory']['total'] / 2**30:.2f})"
    say(f"peak memory: {run['peak_gib']:.2f} GiB{planned or ''}")
    say(f"result: {output_dir} (run.json, metrics.jsonl, {LOSS_PLOT_FILE})")
    say(f"talk to it: {python}chat.py {out}")
    if use_lora:
        say(f"merge it:   {python}merge_lora.py {out} {merged}")


def flatten_settings(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those that must be the same in all processes, by flag."""
    return {f"--{name}": value for group in settings.values() for name, value in group.items() if name != "local_rank"}


def describe_engine(run: RunArguments) -> str:
    """What spreads the work over processes, where there are several."""
    names = {"ddp": "DDP", "fsdp": f"FSDP2 ({run.fsdp})", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
    processes = "1 process" if run.world_size == 1 else f"{run.world_size} processes"
    return "" if run.engine == "single" else f"; {processes}, {names[run.engine]}"


def say(line: str) -> None:
    """Print a line on the first process."""
    if is_first_process():
        CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, SettingsError) as error:
        if speaks_for_machine():
            print("\n".join(f"error: {line}" for line in str(error).split("\n")), file=sys.stderr)
        sys.exit(2)
    except MachineError as error:
        if speaks_for_machine() or not error.agreed:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if speaks_for_machine():
            print("interrupted before training began or after it ended", file=sys.stderr)
        sys.exit(130)
