"""Data files to tokenised rows: read, checked and encoded once, then taken from the cache."""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_utils.cache import RowCache
from data_utils.chunks import TOO_LONG, EncodedChunk, encode_chunk
from data_utils.conversations import DataOptions, read_conversations
from data_utils.hub_data import find_data
from data_utils.render_cache import RowEncoder
from data_utils.report import Account, DataErrors, Statistics
from data_utils.rows import DROPPED_FILE, ROWS_FILE, TokenizedRows, arrow_schema
from data_utils.safe_encoder import TiktokenDiffers
from data_utils.schema import Conversation
from data_utils.sources import DataError, Source, hash_file, printable
from data_utils.template import ChatTemplate
from data_utils.worker_pool import WorkerDied, count_workers, map_in_order

# Conversations that are encoded together. Fewer start no worker processes, which cost more than they would save.
# The fingerprint depends on it.
_CHUNK_SIZE = 1024


def load_rows(
    paths: Sequence[str | Path],
    template: ChatTemplate,
    options: DataOptions | None = None,
    *,
    cache: RowCache | None = None,
    weighted: bool = False,
) -> tuple[TokenizedRows, Account]:
    """Read, check and tokenise data files, or take the result from the cache. weighted: as find_data has it.

    Several processes may call this at once: one builds while the others wait for its file lock, outside any
    collective operation.

    Raises: DataError: bad input (see sources, schema, template), or no supervised token in all of it.
    """
    options = options or DataOptions()
    cache = cache or RowCache(None)
    sources = find_data(paths, weighted=weighted)
    hashes = [hash_file(source.path) for source in sources]
    key = [[str(source), digest] for source, digest in zip(sources, hashes, strict=True)]
    matters = vars(options) | ({} if any(source.sample for source in sources) else {"seed": None})
    with cache.entry(key, template, matters) as entry:
        if entry.account is None:
            account = build_rows(sources, template, options, entry.directory)
            for file, digest in zip(account.files, hashes, strict=True):
                file["sha256"] = digest
            entry.seal(account.to_json())
        assert entry.account is not None
        account = Account(**entry.account)
        rows = TokenizedRows.from_directory(entry.directory)
    if any(source.weight != 1 for source in sources):
        _weigh(sources, rows, account)
    return rows, account


def _weigh(sources: Sequence[Source], rows: TokenizedRows, account: Account) -> None:
    """Train rows as often as `file*W` says.

    Raises: DataError: a file that is named twice, or of which nothing is left.
    """
    names = [source.label or printable(str(source.path)) for source in sources]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{again}: is named twice, so that a weight (*) of it is not clear; name it once")
    rows.weigh({name: source.weight for name, source in zip(names, sources, strict=True)})
    for source, file, (indices, weight) in zip(sources, account.files, rows.groups or (), strict=True):
        if indices and not round(len(indices) * weight):
            raise DataError(f"{source}*{weight:g}: leaves none of its {len(indices):,} rows in an epoch")
        file["weight"], file["rows"] = weight, len(indices)


def build_rows(
    sources: Sequence[Source],
    template: ChatTemplate,
    options: DataOptions,
    directory: Path,
    *,
    may_be_empty: bool = False,
) -> Account:
    """Tokenise files into a directory: the rows, and the list of what was dropped.

    Raises: DataError: all bad rows at once (unless options skip them), or no supervised token in all.
    """
    if template.label_mask == "qwen" and options.supervise == "last":
        raise DataError("--supervise last: --label_mask qwen trains every turn alike; use --label_mask assistant")
    try:
        try:
            account = _write_rows(sources, template, options, directory)
        except TiktokenDiffers:
            account = _write_rows(sources, template, options, directory, tiktoken=False)
    except OSError as error:
        raise DataError(f"{directory}: cannot write tokenised rows: {error.strerror or error}; make room") from None
    problems = [each for each in account.problems if options.on_bad_row == "error" or each.endswith(TOO_LONG)]
    if problems and not may_be_empty:
        raise DataErrors(problems)
    if account.supervised_tokens == 0 and not may_be_empty:
        reasons = "; ".join(account.describe()[1:]) or "no conversation was left"
        raise DataError(f"{', '.join(map(str, sources))}: no supervised token in the whole set: {reasons}")
    return account


def _write_rows(
    sources: Sequence[Source], template: ChatTemplate, options: DataOptions, directory: Path, *, tiktoken: bool = True
) -> Account:
    account = Account()
    statistics = Statistics(account)
    digest = hashlib.sha256()
    with (
        open(directory / DROPPED_FILE, "w", encoding="utf-8") as dropped,
        pa.OSFile(str(directory / ROWS_FILE), "wb") as sink,
        pa.ipc.new_file(sink, arrow_schema()) as writer,
    ):
        for chunk in _encode(_read_chunks(sources, options, account), template, options, tiktoken=tiktoken):
            account.add(chunk.account)
            statistics.add(chunk.hashes, chunk.lengths)
            dropped.writelines(chunk.dropped)
            dropped.writelines(map(_describe_skipped, chunk.account.problems))
            if chunk.rows is not None:
                writer.write_batch(chunk.rows)
                for name in ("input_ids", "starts", "ends", "weights"):
                    digest.update(chunk.rows[name].offsets.buffers()[1])
                    digest.update(chunk.rows[name].values.buffers()[1])
    account.fingerprint = digest.hexdigest()
    account.thinking_switch = template.thinking_switch if account.empty_thinking else None
    statistics.finish(options.max_length)
    return account


def _describe_skipped(problem: str) -> str:
    """A line of dropped.jsonl for a row that cannot be read or trained. problem: `file:line: ...`."""
    where, _, reason = problem.partition(": ")
    return json.dumps({"id": None, "where": where, "reason": reason}, ensure_ascii=False) + "\n"


Chunk = tuple[list[Conversation], list[str]]  # conversations, and the problems that were met while they were read


def _read_chunks(sources: Sequence[Source], options: DataOptions, account: Account) -> Iterator[Chunk]:
    """Yield chunks of conversations; account gets the files and their numbers of conversations."""
    reading = Account()  # of its own: problems of reading are reported with the chunk they belong to
    conversations = itertools.chain.from_iterable(read_conversations(source, options, reading) for source in sources)
    while (chunk := list(itertools.islice(conversations, _CHUNK_SIZE))) or reading.problems:
        yield chunk, reading.problems
        reading.problems, reading.num_problems = [], 0
    account.files, account.conversations = reading.files, reading.conversations


def _encode(
    chunks: Iterator[Chunk], template: ChatTemplate, options: DataOptions, *, tiktoken: bool
) -> Iterator[EncodedChunk]:
    """Encode chunks in order: one chunk here, several in worker processes, and those by tiktoken where it fits."""
    encode = functools.partial(_encode_one, encoder=RowEncoder(template), options=options)
    head = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(head, chunks)
    if len(head) < 2:
        yield from map(encode, chunks)
        return
    num_workers = count_workers()
    try:
        with template.encoder.use_tiktoken() if tiktoken else contextlib.nullcontext():
            yield from map_in_order(encode, chunks, num_workers) if num_workers > 1 else map(encode, chunks)
    except WorkerDied as error:
        conversations, _ = error.item
        where = conversations[0].where if conversations else "end of the data"
        raise DataError(
            f"{where}: a worker process ended while it encoded the {len(conversations):,} conversations from here on "
            f"({error.cause}), perhaps for lack of memory; free memory, or run the command with `taskset -c 0`, which "
            "encodes in one process"
        ) from None


def _encode_one(chunk: Chunk, encoder: RowEncoder, options: DataOptions) -> EncodedChunk:
    conversations, problems = chunk
    encoded = encode_chunk(conversations, encoder, options)
    encoded.account.problems[:0] = problems
    encoded.account.num_problems += len(problems)
    return encoded


def count_overlap(rows: TokenizedRows, others: TokenizedRows) -> int:
    """Count the conversations that are in both, by their hashes."""
    return len(np.intersect1d(rows.conversations(), others.conversations()))
