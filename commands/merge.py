"""Adapters and base model -> standalone checkpoint, verified."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

from commands.loading import DTYPES, keep_system_message
from commands.original import find_loadable_base
from data_utils.tokenizer import load_tokenizer
from tuning.checkpoint import adapter_base, merge, verify
from tuning.checkpoint.adapter import read_adapter
from tuning.checkpoint.base_tensors import BaseTensors
from tuning.checkpoint.changes import Changes
from tuning.checkpoint.files import write_json
from tuning.checkpoint.manifest import write_manifest
from tuning.checkpoint.output_directory import check_result_directory
from tuning.checkpoint.ownership import new_result
from tuning.errors import SettingsError
from tuning.model.loading import Trust, find_quantization, identify_checkpoint, load_model, read_dtype
from tuning.model.quantization import Quantization

_FINISHED_FILE = ".finished.json"  # weights files that are whole, of a merge that can go on


@dataclass(frozen=True)
class _Sources:
    """What is merged.

    adapters: with their weights. base: merged onto. trained_on: by the first adapter; the same, but for --onto base.
    trained: how that was quantised. onto: how the base is before it is dequantised; None where it is plain.
    """

    adapters: list[tuple[Path, float]]
    base: Path
    trained_on: Path
    trained: Quantization | None
    onto: Quantization | None
    trust: Trust

    def read_base(self) -> BaseTensors:
        """The tensors merged onto, and a model for them."""
        return _open(self.base, self.onto, self.trust)


def run(args: argparse.Namespace) -> None:
    """Merge, save, verify. args: of merge_lora.py.

    Raises: DataError, SettingsError: the user's mistakes, or a merge that does not verify.
    """
    out = Path(args.out)
    sources = _find_sources(args)
    inputs = [*(path for path, _ in sources.adapters), sources.base, sources.trained_on]

    def check() -> None:
        check_result_directory(out, inputs, overwrite=args.overwrite, mark="onto")

    check()
    first, base, trust = sources.adapters[0][0], sources.base, sources.trust
    tokenizer = load_tokenizer(
        str(adapter_base.tokenizer_source(first, base)), trust_remote_code=trust.trust_remote_code
    )
    kept = keep_system_message(*(path for path, _ in sources.adapters))
    dtype = None if args.dtype == "auto" else DTYPES[args.dtype]
    said = dtype or read_dtype(str(base), trust_remote_code=trust.trust_remote_code)
    merged = _prepare(sources, dtype)
    files = merge.split_files(list(merge.list_items(merged)), args.max_shard_size)
    for path, _ in sources.adapters:
        if adapter_base.changes_nothing(path):
            print(f"{path}: every lora_B is zero, so the adapter changes nothing: it is untrained")
    probes = None if args.no_verify else verify.build_probes(tokenizer, [path for path, _ in sources.adapters])
    with new_result(out, check=check, work=_describe_work(args, sources)) as unfinished:
        finished = _read_finished(unfinished)
        for file in unfinished.glob("*.safetensors"):  # what was begun takes the room that it needs
            if file.name not in finished:
                file.unlink()
        if finished:
            print(f"{out}: goes on with a merge that was interrupted; {len(finished)} of {len(files)} files are there")
        merge.check_room(files, out, sum(each["bytes"] for each in finished.values()))
        merge.write_weights(
            merged, files, unfinished, finished, lambda: write_json(unfinished / _FINISHED_FILE, finished)
        )
        merge.write_others(merged, first, unfinished, dtype=said, trust=trust)
        verdict = "merge not verified (--no-verify)"
        if probes is not None:
            verdict = _verify(sources, merged, unfinished, probes)
        onto = "base" if sources.onto is None else "dequantized"
        write_manifest(unfinished, finished, onto=onto, **kept)
    print(verdict)
    print(f"merged: {out} ({str(said).removeprefix('torch.')})")


def _find_sources(args: argparse.Namespace) -> _Sources:
    """Adapters and base, held against each other. Raises: SettingsError."""
    adapters: list[tuple[Path, float]] = [(Path(path), weight) for path, weight in args.adapters]
    first, trust = adapters[0][0], Trust(args.trust_remote_code, args.allow_pickle)
    trained = adapter_base.choose_onto(first, args.onto, args.bases[0], args.cache_dir, trust=trust)
    onto = None if args.onto == "base" else trained
    # A checkpoint that is quantised itself has another one that it was made from.
    other = args.onto == "base" and trained is not None and trained.dtype is None
    base = adapter_base.find_base(first, find_loadable_base(first, args.bases[0], args), args.cache_dir, other=other)
    if onto is None and (own := find_quantization(str(base), cache_dir=None, trust_remote_code=args.trust_remote_code)):
        raise SettingsError(f"--onto base: {base} is quantised ({own.describe()}); --base must name another")
    for (path, _), named in zip(adapters[1:], args.bases[1:], strict=True):
        if adapter_base.choose_onto(path, args.onto, named, args.cache_dir, trust=trust) != trained:
            raise SettingsError(f"{path}: was trained on weights that were quantised otherwise than {first}'s")
        its_base = adapter_base.find_base(path, find_loadable_base(path, named, args), args.cache_dir, other=other)
        adapter_base.check_same_base(path, its_base, base)
        adapter_base.check_same_template(first, path)
        adapter_base.check_same_tokens(first, path)
    trained_on = base
    if other and not args.no_verify:
        trained_on = adapter_base.find_base(first, find_loadable_base(first, None, args), args.cache_dir)
    sources = _Sources(adapters, base, trained_on, trained, onto, trust)
    if trained_on != base:
        adapter_base.check_same_origin(sources.read_base(), _open(trained_on, trained, trust))
    return sources


def _open(directory: Path, quantization: Quantization | None, trust: Trust) -> BaseTensors:
    wanted = quantization if quantization is not None and quantization.dtype is not None else None
    model = _build_model(directory, trust, wanted)
    return BaseTensors(model, directory, quantization, pickled=trust.allow_pickle)


def _build_model(directory: Path, trust: Trust, quantization: Quantization | None = None) -> PreTrainedModel:
    """A checkpoint's model on the meta device, but for its buffers."""
    options: dict[str, Any] = {"meta": True, "buffers": True, "quantization": quantization}
    return load_model(str(directory), dtype=torch.float32, **options, **vars(trust))


def _prepare(sources: _Sources, dtype: torch.dtype | None) -> merge.Merge:
    base = sources.read_base()
    weighted = []
    for path, weight in sources.adapters:
        model = _open_plain(sources)
        weighted.append(merge.Weighted(Changes(model, read_adapter(path)), weight))
    sizes = {each.changes.num_rows for each in weighted}
    if len(sizes) > 1:
        raise SettingsError(f"--adapter: trained with {sizes} vocabulary rows, so with other new tokens each")
    base.grow(sizes.pop())
    return merge.Merge(base, weighted, dtype=dtype, trust=sources.trust)


def _open_plain(sources: _Sources) -> PreTrainedModel:
    """A model as the merged one will be: nothing in it is quantised."""
    return sources.read_base().model if sources.onto is not None else _build_model(sources.base, sources.trust)


def _verify(sources: _Sources, merged: merge.Merge, directory: Path, probes: list[list[int]]) -> str:
    """Hold a merged checkpoint against base and adapters. Returns: the verdict. Raises: SettingsError: it differs."""
    saved = verify.SavedMerge(merged, _open(directory, None, Trust(sources.trust.trust_remote_code)))
    expected = verify.compute_adapter_logits(merged.base, _open_plain(sources), sources.adapters, probes)
    if expected is None:
        saved.check_rest()
        return (
            "merge verified: every tensor in the files is the computed one, products by peft's arithmetic; no logits, "
            "as peft adds up LoRA on layers only"
        )
    logits = verify.stream_logits(_build_model(directory, sources.trust), saved.fetch, probes)
    saved.check_rest()
    comparison = verify.compare_logits(expected, logits)
    if not comparison.holds:
        raise SettingsError(f"the merged model differs from the adapter: {comparison.describe()}")
    verdict = f"merge verified: {comparison.describe()}"
    if sources.trained is None:
        return verdict
    of_trained: Any = expected
    if sources.onto != sources.trained:
        trained = _open(sources.trained_on, sources.trained, sources.trust)
        trained.grow(merged.base.num_rows)
        plain = _open(sources.trained_on, sources.trained, sources.trust).model
        of_trained = verify.compute_adapter_logits(trained, plain, sources.adapters, probes)
    rounded = _open(directory, None, Trust(sources.trust.trust_remote_code))
    distance = verify.compare_logits(of_trained, verify.stream_logits(rounded.model, rounded.read, probes))
    return f"{verdict}\nfrom the {sources.trained.describe()} model it was trained on: {distance.describe()}"


def _describe_work(args: argparse.Namespace, sources: _Sources) -> str:
    """What a merge writes: one that was killed goes on where it is the same."""
    digest = hashlib.sha256()
    facts = {
        "base": identify_checkpoint(str(sources.base)),
        "adapters": [weight for _, weight in sources.adapters],
        "options": [args.dtype, args.onto, args.max_shard_size, repr(sources.onto)],
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for path, _ in sources.adapters:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            with open(path / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_finished(directory: Path) -> dict[str, Any]:
    """The weights files that an interrupted merge left whole."""
    try:
        finished = json.loads((directory / _FINISHED_FILE).read_text(encoding="utf-8"))
        return {name: facts for name, facts in finished.items() if (directory / name).stat().st_size == facts["bytes"]}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}
