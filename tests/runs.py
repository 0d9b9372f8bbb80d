"""Runs for the tests: our trainer in any layout, and the slow obvious reference it must equal."""

from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoConfig, PreTrainedModel

from data_utils.conversations import DataOptions
from data_utils.dataset import TokenizedRows, load_rows
from data_utils.steps import StepDataset
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS, needs
from tuning.checkpoint.adapter import adapter_config, adapter_state
from tuning.distributed.sharding import shard_model
from tuning.distributed.startup import start_processes
from tuning.model.loading import load_model
from tuning.model.lora import add_lora
from tuning.model.other_parts import find_other_parts
from tuning.model.packing import enable_packing
from tuning.model.quantization import Quantization
from tuning.model.training_model import TrainingModel
from tuning.settings.arguments import Arguments, RunArguments
from tuning.settings.options import DataArguments, LoraArguments, ModelArguments
from tuning.training.trainer import StepTrainer

MAX_LENGTH = 160
LEARNING_RATES = {"full": 1e-3, "lora": 3e-3, "tokens": 3e-3, "matrices": 1e-3, "loraplus": 1e-3, "nf4": 3e-3}


NF4 = Quantization("bitsandbytes", 4, "nf4", double=True, dtype="float32")


def example_rows(checkpoint: Path) -> tuple[TokenizedRows, ChatTemplate]:
    template = ChatTemplate(load_tokenizer(str(checkpoint)))
    rows, _ = load_rows([CONVERSATIONS], template, DataOptions(max_length=MAX_LENGTH))
    return rows, template


def build(
    checkpoint: Path, kind: str, template: ChatTemplate, *, dropout: float = 0.0, meta: bool = False
) -> TrainingModel:
    """kind: "full", "lora", "tokens" (LoRA and control tokens' rows) or "matrices" (LoRA and both whole matrices),
    "loraplus" (as "tokens"; the rate is train_with's), "nf4" (as "tokens", on a model quantised at loading)."""
    if kind == "nf4":
        needs("bitsandbytes")
    torch.manual_seed(1)
    quantization = NF4 if kind == "nf4" else None
    model = load_model(str(checkpoint), dtype=torch.float32, meta=meta, quantization=quantization)
    if kind == "full":
        return TrainingModel(model)
    embeddings = {"lora": "off", "tokens": "tokens", "matrices": "full", "loraplus": "tokens", "nf4": "tokens"}[kind]
    ids = template.encoder.template_ids
    return TrainingModel(*add_lora(model, r=4, alpha=8, dropout=dropout, embeddings=embeddings, token_ids=ids))


def train(
    training_model: TrainingModel,
    rows: TokenizedRows,
    output: Path,
    *,
    kind: str,
    batch: int,
    accumulation: int,
    steps: int = 6,
    packed: bool = True,
    **options,
) -> StepTrainer:
    """Train with StepTrainer; the layout's ranks come from the process group, if there is one."""
    args = run_arguments(output, kind=kind, batch=batch, accumulation=accumulation, steps=steps, **options)
    return train_with(args, training_model, rows, packed=packed)


def run_arguments(output: Path, *, kind: str, batch: int, accumulation: int, steps: int, **options) -> RunArguments:
    run = RunArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=LEARNING_RATES[kind],
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **options,
    )
    start_processes(Arguments(ModelArguments("model"), DataArguments(["data"]), LoraArguments(), run))
    return run


def train_with(
    args: RunArguments, training_model: TrainingModel, rows: TokenizedRows, *, packed: bool, **options
) -> StepTrainer:
    assert not packed or enable_packing(training_model, max_length=MAX_LENGTH, dtype=torch.float32) is None
    shard_model(training_model, args, torch.float32)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    steps_dataset = StepDataset(
        rows,
        rows_per_step=batch * accumulation * args.world_size,
        max_tokens=batch * MAX_LENGTH,
        packed=packed,
        seed=args.seed,
        rank=args.process_index,
        num_ranks=args.world_size,
    )
    trainer = StepTrainer(
        training_model,
        args,
        train_dataset=steps_dataset,
        eval_dataset=steps_dataset,
        writer=None,  # nothing is saved
        **options,
    )
    trainer.train()
    return trainer


def measured(trainer: StepTrainer) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def reference(
    checkpoint: Path, kind: str, training_model: TrainingModel, rows: TokenizedRows, *, steps: int = 6
) -> list[tuple[float, float]]:
    """Plain transformers and peft: one row at a time, their own loss and rows. Starts as training_model."""
    model = load_plain(checkpoint)
    for part in find_other_parts(model).values():
        part.requires_grad_(False)
    if kind != "full":
        ours = training_model.model, training_model.token_rows
        config, state = adapter_config(*ours), {n: t.detach().clone() for n, t in adapter_state(*ours).items()}
        config = LoraConfig(**{**config.to_dict(), "inference_mode": False})
        model = get_peft_model(model, config)
        set_peft_model_state_dict(model, state)
        assert isinstance(model, PeftModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATES[kind], weight_decay=0.0)
    everything = StepDataset(rows, rows_per_step=8, max_tokens=8 * MAX_LENGTH, packed=False, seed=42)
    by_id = {rows.row_id(index): rows[index] for index in range(len(rows))}
    results = []
    for step in range(steps):
        ids = [row_id for micro_batch in everything[step]["row_ids"] for row_id in micro_batch]
        num_targets = everything[step]["num_targets"]
        total = 0.0
        for input_ids, labels, _ in (by_id[row_id] for row_id in ids):
            ids_T, labels_T = torch.tensor(input_ids)[None], torch.tensor(labels)[None]
            loss = model(
                input_ids=ids_T, attention_mask=torch.ones_like(ids_T), labels=labels_T, num_items_in_batch=num_targets
            ).loss
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        results.append((total, norm))
    return results


@torch.no_grad()
def probe_logits(base: Path, out: Path) -> torch.Tensor:
    """Logits of a saved result, loaded by plain transformers or peft."""
    ids = torch.tensor([[1022, 40, 41, 1023, 5, 1022, 7, 8, 1023, 1021]])
    if not (out / "adapter_config.json").exists():
        return load_plain(out).eval()(input_ids=ids).logits
    return PeftModel.from_pretrained(load_plain(base), out).eval()(input_ids=ids).logits


def load_plain(directory: Path) -> PreTrainedModel:
    """A checkpoint by transformers alone, in the class that its configuration names."""
    (name,) = AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, name).from_pretrained(directory)
