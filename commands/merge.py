"""Adapter and base model -> standalone checkpoint, verified."""

import argparse
from pathlib import Path

import torch

from commands.original import find_adapter_base
from data_utils.tokenizer import load_tokenizer
from tuning.checkpoint import merge
from tuning.checkpoint.adapter import check_adapter_fits
from tuning.checkpoint.manifest import write_manifest
from tuning.checkpoint.output_directory import check_result_directory
from tuning.checkpoint.ownership import new_result
from tuning.errors import SettingsError
from tuning.model.loading import Trust, find_quantization, read_dtype

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(args: argparse.Namespace) -> None:
    """Merge, save, verify. args: of merge_lora.py.

    Raises: DataError, SettingsError: the user's mistakes, or a merge that does not verify.
    """
    adapter, out = Path(args.adapter), Path(args.out)
    trust = Trust(args.trust_remote_code, args.allow_pickle)
    trained = merge.choose_onto(adapter, args.onto, args.base, args.cache_dir, trust=trust)
    onto = None if args.onto == "base" else trained
    # A checkpoint that is quantised itself has another one that it was made from.
    other = args.onto == "base" and trained is not None and trained.dtype is None
    base = merge.find_base(adapter, find_adapter_base(adapter, args.base, args), args.cache_dir, other=other)
    if onto is None and (own := find_quantization(str(base), cache_dir=None, trust_remote_code=args.trust_remote_code)):
        raise SettingsError(f"--onto base: {base} is quantised ({own.describe()}); --base must name another")
    trained_on = base
    if other and not args.no_verify:
        trained_on = merge.find_base(adapter, find_adapter_base(adapter, None, args), args.cache_dir)
        merge.check_same_origin(base, trained_on, trust=trust)
    check_adapter_fits(adapter, base, trust_remote_code=args.trust_remote_code)

    def check() -> None:
        check_result_directory(out, [adapter, base, trained_on], overwrite=args.overwrite, mark="onto")

    check()
    tokenizer = load_tokenizer(str(merge.tokenizer_source(adapter, base)), trust_remote_code=args.trust_remote_code)
    said = read_dtype(str(base), trust_remote_code=args.trust_remote_code)
    dtype = said if args.dtype == "auto" else DTYPES[args.dtype]

    # Verified in float32, where a right merge differs by almost nothing; the rounding to dtype is checked to be exact.
    probes = merge.build_probes(tokenizer, adapter)
    expected = of_trained = None
    if not args.no_verify:
        expected = merge.compute_expected_logits(adapter, base, onto, probes, trust=trust)
        of_trained = expected
        if onto != trained:
            of_trained = merge.compute_expected_logits(adapter, trained_on, trained, probes, trust=trust)
    if merge.changes_nothing(adapter):
        print(f"{adapter}: every lora_B is zero, so the adapter changes nothing: it is untrained")
    model = merge.merge_adapter(adapter, base, onto, trust=trust)
    with new_result(out, check=check) as unfinished:
        merge.save_merged(
            model, adapter, base, unfinished, dtype=dtype, max_shard_size=args.max_shard_size, trust=trust
        )
        verdict = "merge not verified (--no-verify)"
        if expected is not None:
            comparison = merge.verify_saved(model, unfinished, expected, probes, dtype=dtype, trust=trust)
            if not comparison.holds:
                raise SettingsError(f"the merged model differs from the adapter: {comparison.describe()}")
            verdict = f"merge verified: {comparison.describe()}"
            del model
            if trained is not None and of_trained is not None:
                distance = merge.measure_distance(unfinished, of_trained, probes, dtype=dtype, trust=trust)
                verdict += f"\nfrom the {trained.describe()} model it was trained on: {distance.describe()}"
        write_manifest(unfinished, onto="base" if onto is None else "dequantized")
    print(verdict)
    print(f"merged: {out} ({str(dtype).removeprefix('torch.')})")
