"""Training speed and memory on CPU, side by side in one run: python benchmarks/bench_train.py DATA... --tokenizer DIR.

Arms, each in a process of its own, in turn, `--repeats` times; the table holds medians. All train the same rows, one
epoch in steps of 8, LoRA r16 on every linear layer, fp32, AdamW, dropout 0, from the same random weights:

    ours          tuning.trainer.StepTrainer, 8 rows a step, packed
    before        the same of another checkout of this program (--before DIR)
    trl_packing   TRL's SFTTrainer, packing=True: packs of --max_length tokens, 4 a step (about as many tokens)
    trl_default   TRL's SFTTrainer as it is: 4 rows x 2 accumulated
    pad_to_max    every row padded to --max_length, loss over the logits of all positions: the original's way
    reference     plain transformers and peft, one row at a time; its losses and gradient norms are what ours must equal
    matmul        the machine's own product of two fp32 matrices, for comparison
    padded        ours with padded rows: its losses and gradient norms (once)

No arm recomputes activations (TRL would by default).

DATA are alpaca files (instruction, input, output). Time is that of the steps: no import, loading or tokenising.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402

SHAPES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "large": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4},
    # To try the benchmark itself.
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
}
VOCABULARY = {"tiny": 4096}  # else the real one's
TIMED = ("ours", "before", "trl_packing", "trl_default", "pad_to_max", "reference", "matmul")
CHECKED = ("padded",)
ROWS_PER_STEP = 8
LEARNING_RATE = 1e-4
Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Run the arms, print a table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "large"])
    parser.add_argument("--arms", nargs="+", choices=[*TIMED, *CHECKED], default=[*TIMED, *CHECKED])
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, for an arm of its own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--arm", choices=[*TIMED, *CHECKED], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm:
        print(json.dumps(run_here(args)))
        return
    for path in (*args.data, args.tokenizer):
        if not path.exists():
            parser.error(f"{path}: not there; name alpaca files, and a directory with a tokenizer")
    if args.before and not (args.before / "benchmarks" / "bench_train.py").is_file():
        parser.error(f"--before {args.before}: no checkout of this program")
    args.arms = [arm for arm in args.arms if arm != "before" or args.before]
    with tempfile.TemporaryDirectory() as directory:
        args.work = Path(directory)
        prepare_rows(args)
        shapes = {shape: measure_shape(shape, args) for shape in args.shapes}
    report(shapes, args)


def measure_shape(shape: str, args: argparse.Namespace) -> Figures:
    """All arms of one shape, in turn. Returns: medians, ratios of ours to the others, and every run."""
    arms = [arm for arm in args.arms if not (arm == "pad_to_max" and shape == "large")]  # half an hour each
    runs: dict[str, list[Figures]] = {arm: [] for arm in arms}
    for repeat in range(args.repeats):
        for arm in arms:
            if repeat == 0 or arm in TIMED:
                runs[arm].append(run_arm(arm, shape, args))
                shown = {name: value for name, value in runs[arm][-1].items() if name != "steps"}
                print(f"{shape} {arm}: {shown}", file=sys.stderr, flush=True)

    def median(name: str) -> dict[str, float]:
        timed = {arm: [run[name] for run in runs[arm] if name in run] for arm in arms if arm in TIMED}
        return {arm: round(statistics.median(values), 3) for arm, values in timed.items() if values}

    figures: Figures = {name: median(name) for name in ("tokens_per_s", "supervised_tokens_per_s", "peak_rss_gib")}
    rates = figures["tokens_per_s"]
    figures["ratios"] = {arm: round(rates["ours"] / rate, 2) for arm, rate in rates.items() if arm != "ours"}
    if "matmul" in arms:
        machine = statistics.median(run["flops_per_s"] for run in runs["matmul"])
        figures["matmul_gflops_per_s"] = round(machine / 1e9, 1)
        figures["matmul_share"] = round(statistics.median(run["flops_per_s"] for run in runs["ours"]) / machine, 3)
    if "reference" in arms:
        figures["difference_to_plain_transformers"] = {
            arm: compare_steps(runs[arm][0]["steps"], runs["reference"][0]["steps"])
            for arm in ("ours", "padded")
            if arm in arms
        }
    return figures | {"runs": runs}


def compare_steps(steps: list[list[float]], expected: list[list[float]]) -> Figures:
    """Largest relative differences of loss and gradient norm over all steps."""
    pairs = list(zip(steps, expected, strict=True))
    loss, norm = (max(abs(one[i] - other[i]) / other[i] for one, other in pairs) for i in (0, 1))
    return {"loss": float(f"{loss:.2g}"), "gradient_norm": float(f"{norm:.2g}")}


def run_arm(arm: str, shape: str, args: argparse.Namespace) -> Figures:
    """One arm in a fresh process."""
    script = Path(__file__)
    if arm == "before":
        arm, script = "ours", args.before.resolve() / "benchmarks" / script.name
    words = [*map(str, args.data), "--tokenizer", str(args.tokenizer), "--work", str(args.work)]
    words += ["--shapes", shape, "--rows", str(args.rows), "--max_length", str(args.max_length)]
    return harness.run_arm(arm, str(script), words)


def report(shapes: dict[str, Figures], args: argparse.Namespace) -> None:
    """Print the table of medians; --out keeps everything."""
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    result = {
        **harness.describe_machine(packages),
        "rows": args.rows,
        "max_length": args.max_length,
        "repeats": args.repeats,
        "shapes": shapes,
    }
    print("| shape | arm | tokens/s | supervised tokens/s | peak RSS GiB | ours is faster |\n|---|---|---|---|---|---|")
    for shape, figures in shapes.items():
        for arm, rate in figures["tokens_per_s"].items():
            supervised, peak = figures["supervised_tokens_per_s"][arm], figures["peak_rss_gib"][arm]
            ratio = f"{figures['ratios'][arm]} times" if arm in figures["ratios"] else ""
            print(f"| {shape} | {arm} | {rate:,.0f} | {supervised:,.0f} | {peak:.2f} | {ratio} |")
    for shape, figures in shapes.items():
        for name in ("matmul_gflops_per_s", "matmul_share", "difference_to_plain_transformers"):
            if name in figures:
                print(f"{shape} {name}: {figures[name]}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# ---- what all arms share ----


def prepare_rows(args: argparse.Namespace) -> None:
    """Real conversations of all files in turn, as a jsonl file; tokenised by ours, once, for every arm."""
    import trl

    sources = [json.loads(path.read_text(encoding="utf-8")) for path in args.data]
    with open(args.work / "rows.jsonl", "w", encoding="utf-8") as file:
        for index in range(args.rows):
            row = sources[index % len(sources)][index // len(sources)]
            asked = "\n".join(text for text in (row["instruction"], row["input"]) if text)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    (args.work / "template.jinja").write_bytes(template.read_bytes())


def load_steps(args: argparse.Namespace, *, packed: bool = True):
    """The rows, and the steps that they make."""
    from data_utils.conversations import DataOptions
    from data_utils.dataset import load_rows
    from data_utils.steps import StepDataset
    from data_utils.template import ChatTemplate
    from data_utils.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(args.tokenizer), chat_template=str(args.work / "template.jinja"))
    rows, _ = load_rows([args.work / "rows.jsonl"], ChatTemplate(tokenizer), DataOptions(max_length=args.max_length))
    budget = ROWS_PER_STEP * args.max_length
    return rows, StepDataset(rows, rows_per_step=ROWS_PER_STEP, max_tokens=budget, packed=packed, seed=0)


def list_rows(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Ids and labels in the order that ours trains them in."""
    rows, steps = load_steps(args)
    order = [index for step in range(len(steps)) for index in steps.layout.rows_of(step)]
    return [{"input_ids": rows[i][0].tolist(), "labels": rows[i][1].tolist()} for i in order]


def build_model(args: argparse.Namespace):
    """A Qwen3 of the shape, with random weights and the real vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    (shape,) = args.shapes
    torch.manual_seed(0)
    settings = SHAPES[shape]
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    config = Qwen3Config(
        vocab_size=VOCABULARY.get(shape, 151_936), intermediate_size=3 * width, head_dim=width // heads,
        max_position_embeddings=4096, tie_word_embeddings=False, **settings,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def lora_config():
    """Adapters for every arm."""
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")


def describe_speed(args: argparse.Namespace, elapsed_s: float) -> Figures:
    """Rates by the tokens that are there to train, whatever an arm pads; memory of this process."""
    rows, _ = load_steps(args)
    return {
        "seconds": round(elapsed_s, 2),
        "tokens_per_s": int(rows.lengths.sum()) / elapsed_s,
        "supervised_tokens_per_s": int(rows.num_targets.sum()) / elapsed_s,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def time_training(trainer: Any) -> float:
    """Seconds from the first step's begin to the last one's end, of any transformers Trainer."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.ended - clock.began


# ---- arms ----


def run_ours(args: argparse.Namespace, *, packed: bool = True) -> Figures:
    """StepTrainer."""
    import torch

    from tuning.model.lora import add_lora
    from tuning.model.packing import enable_packing
    from tuning.model.training_model import TrainingModel
    from tuning.planning.operations import count_operations
    from tuning.settings.arguments import RunArguments
    from tuning.training.trainer import StepTrainer

    _, steps = load_steps(args, packed=packed)
    model = build_model(args)
    torch.manual_seed(1)
    config = lora_config()
    lora = {"r": config.r, "alpha": config.lora_alpha, "dropout": 0.0, "target_modules": list(config.target_modules)}
    training_model = TrainingModel(*add_lora(model, **lora))
    if packed:
        assert enable_packing(training_model, max_length=args.max_length, dtype=torch.float32) is None
    with tempfile.TemporaryDirectory() as directory:
        settings = RunArguments(
            output_dir=directory, num_train_epochs=1, per_device_train_batch_size=ROWS_PER_STEP,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", save_strategy="no", report_to="none",
            use_cpu=True,
        )  # fmt: skip
        trainer = StepTrainer(training_model, settings, train_dataset=steps, writer=None)  # type: ignore[arg-type]
        elapsed_s = time_training(trainer)
    flops = count_operations(training_model)
    assert flops is not None
    work = sum(flops.of(steps[step]) for step in range(len(steps)))
    logged = [[entry["loss"], float(entry["grad_norm"])] for entry in trainer.state.log_history if "loss" in entry]
    return describe_speed(args, elapsed_s) | {"flops_per_s": work / elapsed_s, "steps": logged}


def run_padded(args: argparse.Namespace) -> Figures:
    """Ours, rows padded."""
    return run_ours(args, packed=False)


def run_trl(args: argparse.Namespace, *, packing: bool) -> Figures:
    """TRL's SFTTrainer on rows that are tokenised already."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(list_rows(args))
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            output_dir=directory, num_train_epochs=1, per_device_train_batch_size=4,
            gradient_accumulation_steps=1 if packing else 2, packing=packing, max_length=args.max_length,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", save_strategy="no", report_to="none",
            logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        trainer = SFTTrainer(
            build_model(args), settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config()
        )
        elapsed_s = time_training(trainer)
    return describe_speed(args, elapsed_s)


def run_trl_packing(args: argparse.Namespace) -> Figures:
    """TRL, packed."""
    return run_trl(args, packing=True)


def run_trl_default(args: argparse.Namespace) -> Figures:
    """TRL as it is."""
    return run_trl(args, packing=False)


def run_plain(args: argparse.Namespace, *, rows_per_pass: int, width: int | None) -> Figures:
    """A plain loop around transformers and peft; rows padded to `width`, or to the longest of a pass."""
    import torch
    from peft import get_peft_model

    rows, model = list_rows(args), build_model(args)
    torch.manual_seed(1)
    model = get_peft_model(model, lora_config()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    measured = []
    began = time.perf_counter()
    for start in range(0, len(rows), ROWS_PER_STEP):
        step = rows[start : start + ROWS_PER_STEP]
        num_targets = sum(label != -100 for row in step for label in row["labels"])
        total = 0.0
        for first in range(0, len(step), rows_per_pass):
            part = step[first : first + rows_per_pass]
            longest = width or max(len(row["input_ids"]) for row in part)

            def pad(name: str, filler: int, part: Any = part, longest: int = longest) -> torch.Tensor:
                return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in part])

            ids, labels = pad("input_ids", 0), pad("labels", -100)
            mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in part])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=num_targets).loss
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        measured.append([total, norm])
    return describe_speed(args, time.perf_counter() - began) | {"steps": measured}


def run_pad_to_max(args: argparse.Namespace) -> Figures:
    """The original's way."""
    return run_plain(args, rows_per_pass=4, width=args.max_length)


def run_reference(args: argparse.Namespace) -> Figures:
    """One row at a time."""
    return run_plain(args, rows_per_pass=1, width=None)


def run_matmul(args: argparse.Namespace) -> Figures:
    """The machine."""
    import torch

    from tuning.planning.operations import measure_matmul_rate

    return {"flops_per_s": measure_matmul_rate(torch.device("cpu"), torch.float32, size=2048, seconds=3.0)}


RUN: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "ours": run_ours,
    "trl_packing": run_trl_packing,
    "trl_default": run_trl_default,
    "pad_to_max": run_pad_to_max,
    "matmul": run_matmul,
    "reference": run_reference,
    "padded": run_padded,
}


def run_here(args: argparse.Namespace) -> Figures:
    """One arm in this process."""
    return RUN[args.arm](args)


if __name__ == "__main__":
    main()
