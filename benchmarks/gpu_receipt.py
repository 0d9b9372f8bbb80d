"""What a GPU shows, in one command: python benchmarks/gpu_receipt.py [--minutes N] [--stages ...] [--out FILE].

Stages, most valuable first: environment (the device's own rates), correctness (loss, gradients, attention, experts,
NF4, merging, each against fp32 on the device), training (tokens/s, memory and plan of Qwen-7B's and Qwen3-8B's shapes;
ours, transformers with peft, TRL), qlora, profile (kernels, launches and gaps of the slowest cell). Weights are random
and made on the device: nothing is downloaded.

The receipt is FILE, and FILE's name in .md as a table, both written after each job. The same command goes on where it
stopped. What fails stands there with its error, what the minutes do not allow as "not run". Without a GPU everything
runs at a tiny size, marked as a rehearsal. It needs torch, transformers, peft and accelerate, and no network.

    python benchmarks/gpu_receipt.py --table [FILE ...]    README's table, of docs/receipts or of these receipts
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECEIPTS = ROOT / "docs" / "receipts"
sys.path.insert(0, str(ROOT))

from benchmarks.receipt_run import ReceiptError, make_receipt, write_receipt  # noqa: E402
from benchmarks.receipt_schema import STAGES, find_faults  # noqa: E402
from benchmarks.receipt_table import count_statuses, draw_table  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Make a receipt, or draw the table of several. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="all of it ends then (default 10)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "gpu-receipt.json", metavar="FILE")
    parser.add_argument("--table", nargs="*", type=Path, metavar="FILE", help="only print the table of receipts")
    # What a job's own process gets.
    for flag in ("--stage", "--names", "--cell"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        from benchmarks.receipt_stages.one_job import end_with_parent, run_job

        end_with_parent()
        run_job(args.stage, json.loads(args.names), args.out, json.loads(args.cell or "null"))
        return 0
    try:
        if args.table is not None:
            print(draw_table([read_receipt(path) for path in args.table or sorted(RECEIPTS.glob("*.json"))]))
            return 0
        if not 0 < args.minutes < 24 * 60:
            raise ReceiptError(f"--minutes {args.minutes:g}: expected more than 0, and less than a day")
        if args.out.suffix != ".json":
            raise ReceiptError(f"--out {args.out}: expected a name that ends with .json; the table goes beside it")
        earlier = read_receipt(args.out) if args.out.exists() else None
        stages = [stage for stage in STAGES if stage in args.stages]
        receipt = make_receipt(earlier, args.minutes, stages, lambda made: write_receipt(args.out, made))
    except (ReceiptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {args.out}", file=sys.stderr)
        return 130
    print(f"{args.out}: {count_statuses(receipt)}")
    return 0


def read_receipt(path: Path) -> dict[str, Any]:
    """A valid receipt. Raises: ReceiptError: it is none."""
    try:
        receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReceiptError(f"{path}: cannot be read as a receipt ({error}); move it away or repair it") from None
    if faults := find_faults(receipt):
        raise ReceiptError(f"{path}: is no valid receipt: " + "; ".join(faults[:5]))
    return receipt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a job's process is ended, too
    sys.exit(main())
