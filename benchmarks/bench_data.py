"""Tokenising speed and memory, side by side in one run: python benchmarks/bench_data.py DATA... --tokenizer DIR.

Arms, each in a process of its own, in turn, `--repeats` times; the table holds medians:

    ours        from file to Arrow rows with ids and labels (data_utils.load_rows), nothing cached
    definition  the same without cached renderings: every turn is rendered (ChatTemplate.encode_conversation)
    plain       the same without cached renderings and without tiktoken
    tools       long tool conversations of --tool_data, as `ours`
    warm        `ours` again, from the cache
    tokenizer   the tokenizer's encode_batch_fast alone, on rendered texts in memory
    trl         TRL's SFTTrainer preparation, dataset_num_proc=2, assistant-only loss
    check       `check` and tokenise a generated jsonl of --check_gb gigabytes: time and peak memory

DATA are alpaca files (instruction, input, output), --tool_data is a file of ShareGPT rows with tools (glaive). Every
answer is made unique, so that no arm gains by repetition.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402

ARMS = ("ours", "definition", "plain", "tools", "warm", "tokenizer", "trl", "check")


def main() -> None:
    """Run the arms and print a table; --out keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--tool_data", type=Path, help="ShareGPT rows with tools; without it there is no `tools` arm")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tool_rows", type=int, default=4_000)
    parser.add_argument("--min_turns", type=int, default=8, help="turns of a long tool conversation")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check_gb", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(RUN[args.arm](args)))
        return
    with tempfile.TemporaryDirectory() as directory:
        args.work = Path(directory)
        write_conversations(args.data, args.work / "rows.jsonl", rows=args.rows)
        if args.tool_data:
            write_tool_conversations(args.tool_data, args.work / "tools.jsonl", args.tool_rows, args.min_turns)
        else:
            args.arms = [arm for arm in args.arms if arm != "tools"]
        figures: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
        for repeat in range(args.repeats):
            for arm in args.arms:
                if arm == "check" and repeat:
                    continue
                figures[arm].append(run_arm(arm, args))
                print(f"{arm}: {figures[arm][-1]}", file=sys.stderr, flush=True)
    report(figures, args)


def run_arm(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """One arm in a fresh process."""
    words = [*map(str, args.data), "--tokenizer", str(args.tokenizer), "--rows", str(args.rows)]
    words += ["--work", str(args.work), "--check_gb", str(args.check_gb)]
    return harness.run_arm(arm, __file__, words)


def report(figures: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """Print the table of medians."""
    packages = ("tokenizers", "transformers", "datasets", "trl", "pyarrow")
    medians = {
        arm: {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
        for arm, runs in figures.items()
    }
    result = {
        **harness.describe_machine(packages),
        "rows": args.rows,
        "repeats": args.repeats,
        "medians": medians,
        "runs": figures,
    }
    print("| arm | seconds | rows/s | peak memory MB |\n|---|---|---|---|")
    for arm, median in medians.items():
        print(f"| {arm} | {median['seconds']} | {median['rows'] / median['seconds']:,.0f} | {median['peak_mb']:,.0f} |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_conversations(sources: list[Path], path: Path, *, rows: int) -> None:
    """Real conversations, repeated until there are enough, each answer with a number of its own."""
    found = [row for source in sources for row in json.loads(source.read_text(encoding="utf-8"))]
    with open(path, "w", encoding="utf-8") as file:
        for index in range(rows):
            row = found[index % len(found)]
            asked = "\n".join(text for text in (row["instruction"], row["input"]) if text)
            messages = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": f"{row['output']} ({index})"},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_tool_conversations(source: Path, path: Path, rows: int, min_turns: int) -> None:
    """Real tool conversations of at least min_turns turns, repeated, each answer with a number of its own."""
    found = [row for row in json.loads(source.read_text(encoding="utf-8")) if len(row["conversations"]) >= min_turns]
    with open(path, "w", encoding="utf-8") as file:
        for index in range(rows):
            row = found[index % len(found)]
            turns = [
                {**turn, "value": f"{turn['value']} ({index})"} if turn["from"] in ("human", "gpt") else turn
                for turn in row["conversations"]
            ]
            file.write(json.dumps({**row, "conversations": turns}, ensure_ascii=False) + "\n")


def load_template(path: Path):
    """The tokenizer with Qwen3's chat template."""
    import trl

    from data_utils.template import ChatTemplate
    from data_utils.tokenizer import load_tokenizer

    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    return ChatTemplate(load_tokenizer(str(path), chat_template=str(template)))


class PeakMemory:
    """Most memory that this process and its children held at once, shared pages counted once (Linux: Pss)."""

    def __init__(self) -> None:
        self.mb = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.25):
            self.mb = max(self.mb, sum(map(self._read, [os.getpid(), *self._children(os.getpid())])))

    def _children(self, pid: int) -> list[int]:
        found = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
        return found + [grandchild for child in found for grandchild in self._children(child)]

    def _read(self, pid: int) -> float:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            return 0.0
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def run_ours(args: argparse.Namespace, *, file: str = "rows.jsonl", warm: bool = False) -> dict[str, float]:
    """From file to rows."""
    from data_utils.cache import RowCache
    from data_utils.dataset import load_rows

    template = load_template(args.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        cache = RowCache(Path(directory))
        if warm:
            load_rows([args.work / file], template, cache=cache)
        started = time.perf_counter()
        with PeakMemory() as peak:
            _, account = load_rows([args.work / file], template, cache=cache)
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": account.conversations, "tokens": account.tokens, "peak_mb": peak.mb}


def run_definition(args: argparse.Namespace) -> dict[str, float]:
    """Every turn rendered."""
    from data_utils.render_cache import RowEncoder

    RowEncoder.encode_cached = lambda self, conversation: None
    return run_ours(args)


def run_plain(args: argparse.Namespace) -> dict[str, float]:
    """Every turn rendered, and encoded by the tokenizer."""
    from data_utils.tiktoken_encoder import TiktokenEncoder

    TiktokenEncoder.build = lambda *_: None
    return run_definition(args)


def run_tools(args: argparse.Namespace) -> dict[str, float]:
    """Long tool conversations."""
    return run_ours(args, file="tools.jsonl")


def run_warm(args: argparse.Namespace) -> dict[str, float]:
    """From the cache."""
    return run_ours(args, warm=True)


def run_tokenizer(args: argparse.Namespace) -> dict[str, float]:
    """Encoding alone."""
    template = load_template(args.tokenizer)
    lines = (args.work / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [template.render(json.loads(line)["messages"]) for line in lines]
    tokenizer = template.tokenizer.backend_tokenizer
    started = time.perf_counter()
    with PeakMemory() as peak:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds = time.perf_counter() - started
    tokens = sum(len(each.ids) for each in encoded)
    return {"seconds": seconds, "rows": len(texts), "tokens": tokens, "peak_mb": peak.mb}


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    """TRL's preparation: template, tokens and masks."""
    import datasets
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.chat_template = qwen3_chat_template
    config = Qwen3Config(
        vocab_size=152_064, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
        num_key_value_heads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        few = datasets.Dataset.from_list(
            [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
        )
        settings = SFTConfig(
            output_dir=directory, assistant_only_loss=True, dataset_num_proc=2, max_length=None, use_cpu=True,
            report_to="none", bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(Qwen3ForCausalLM(config), settings, train_dataset=few, processing_class=tokenizer)
        started = time.perf_counter()
        with PeakMemory() as peak:
            loaded = datasets.load_dataset(
                "json", data_files=str(args.work / "rows.jsonl"), split="train", cache_dir=f"{directory}/cache"
            )
            prepared = trainer._prepare_dataset(loaded, trainer.processing_class, settings, False, None, "train")
            seconds = time.perf_counter() - started
        tokens = sum(map(len, prepared["input_ids"]))
    return {"seconds": seconds, "rows": len(prepared), "tokens": tokens, "peak_mb": peak.mb}


def run_check(args: argparse.Namespace) -> dict[str, float]:
    """A large generated file: checked, tokenised, counted."""
    from data_utils.conversations import DataOptions
    from data_utils.dataset import build_rows
    from data_utils.sources import find_sources

    template = load_template(args.tokenizer)
    path = args.work / "large.jsonl"
    block = (args.work / "rows.jsonl").read_bytes()
    with open(path, "wb") as file:
        number = 0
        while file.tell() < args.check_gb * 1e9:
            file.write(block.replace(b'"}]}', f' {number}"}}]}}'.encode()))
            number += 1
    with tempfile.TemporaryDirectory(dir=args.work) as directory:
        started = time.perf_counter()
        with PeakMemory() as peak:
            account = build_rows(find_sources([path]), template, DataOptions(max_length=2048), Path(directory))
            seconds = time.perf_counter() - started
    path.unlink()
    return {"seconds": seconds, "rows": account.conversations, "tokens": account.tokens, "peak_mb": peak.mb}


RUN = {
    "ours": run_ours,
    "definition": run_definition,
    "plain": run_plain,
    "tools": run_tools,
    "warm": run_warm,
    "tokenizer": run_tokenizer,
    "trl": run_trl,
    "check": run_check,
}

if __name__ == "__main__":
    main()
