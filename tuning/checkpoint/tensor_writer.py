"""Weights files, written while the rest of their tensors is still being computed."""

import hashlib
import json
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuning.checkpoint.tensor_files import PIECE, Entry, StoredTensor

_FLUSH = 256 << 20  # bytes after which the disk is told to take them
_QUEUE = 8  # pieces between the computation and the disk


class TensorFile:
    """A safetensors file that is being written: its tensors come one after another, in the order of the entries.

    Threads write and hash, so that the disk and the computation do not wait for each other.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.num_bytes],
            }  # fmt: skip
            at += entry.num_bytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._num_bytes = 8 + len(text) + at
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._written = self._flushed_at = 0  # bytes
        self._flushed: Future[None] | None = None
        self._error: BaseException | None = None
        self._pieces: queue.Queue[Any] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: Tensor) -> None:
        """The next tensor, or a part of it: its rows in order. It must not change afterwards."""
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), PIECE):
            self._put(flat[start : start + PIECE].data)

    def copy(self, stored: StoredTensor) -> None:
        """The next tensor, byte for byte."""
        for piece in stored.pieces():
            self._put(piece)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def close(self) -> None:
        """Have everything on disk. Raises: OSError."""
        self._end()
        if self._error is not None:
            raise self._error

    @property
    def facts(self) -> dict[str, Any]:
        """Size and hash of the closed file, as manifests have them."""
        return {"bytes": self._num_bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """End without the rest."""
        self._error = self._error or RuntimeError("abandoned")
        self._end()

    def _end(self) -> None:
        self._pieces.put(None)
        self._thread.join()
        self._file.close()

    def _put(self, piece: Any) -> None:
        if self._error is not None:
            raise self._error
        self._pieces.put(piece)

    def _write_all(self) -> None:
        with ThreadPoolExecutor(2) as beside:
            while (piece := self._pieces.get()) is not None:
                try:
                    if self._error is None:
                        self._write_piece(memoryview(piece), beside)
                except BaseException as error:
                    self._error = error
        try:
            if self._error is None:
                assert self._written == self._num_bytes, "every tensor of the header, and no more"
                os.fsync(self._file.fileno())
        except BaseException as error:
            self._error = error

    def _write_piece(self, piece: memoryview, beside: Executor) -> None:
        """Write and hash at the same time, and have the disk take what there is, so that the end need not wait."""
        hashed = beside.submit(self._hash.update, piece)
        rest = piece
        while rest:
            rest = rest[self._file.write(rest) :]
        hashed.result()
        self._written += len(piece)
        if self._flushed is None or (self._flushed.done() and self._written - self._flushed_at > _FLUSH):
            if self._flushed is not None:
                self._flushed.result()
            self._flushed_at = self._written
            self._flushed = beside.submit(os.fdatasync, self._file.fileno())
