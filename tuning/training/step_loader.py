"""Steps on their way to the trainer: built ahead of time, pinned, moved to the device without waiting for it."""

import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments


def build_loader(dataset: Dataset[Any], args: TrainingArguments, sampler: Sampler[int] | None = None) -> DataLoader:
    """Loader of whole steps: in worker processes with --dataloader_num_workers, else one step ahead in a thread."""
    workers = args.dataloader_num_workers
    return _StepLoader(
        dataset if workers else _Ahead(dataset),
        batch_size=1,  # not None: accelerate's skip_first_batches needs a batch sampler
        sampler=sampler,
        collate_fn=_only_item,
        worker_init_fn=_ignore_signals,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
    )


def move_micro_batch(micro_batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Its tensors on the device; from pinned memory without waiting for what the device is doing."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in micro_batch.items()
    }


class _StepLoader(DataLoader[Any]):
    """Tells of a worker process that died where its item is waited for, and nowhere else.

    torch also raises it from a handler of SIGCHLD, wherever the main process happens to be: in a save that has nothing
    to do with it, after the last step, or in a callback that Python runs for a weak reference, which swallows it.
    """

    def __iter__(self) -> Any:
        before = signal.getsignal(signal.SIGCHLD)
        iterator = super().__iter__()
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
        workers = getattr(iterator, "_workers", [])
        is_main = threading.current_thread() is threading.main_thread()
        return _Watched(iterator, workers) if workers and is_main else iterator


class _WorkerDied(BaseException):
    """What a signal handler raises inside torch, which would take an Exception for a mistake of the queue's."""


class _Watched:
    """An iterator of a data loader that looks after its workers.

    While it waits for an item: a worker that dies in the middle of a message leaves a reader that waits for the rest,
    and what it had sent before cannot be opened any more, since it held the memory. And at its end: torch ends workers
    by an event whose lock the dead one may hold, and would wait for ever.
    """

    def __init__(self, iterator: Any, workers: list[Any]):
        self._iterator, self._workers = iterator, list(workers)

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> Any:
        before = signal.signal(signal.SIGCHLD, self._check)
        try:
            self._check()
            if self._find_dead() is not None:  # after its last item
                raise StopIteration
            return next(self._iterator)
        except _WorkerDied as died:
            raise RuntimeError(str(died)) from None
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            # What a worker held is gone a moment before it is known to be dead.
            self._abandon()
            raise RuntimeError(f"DataLoader worker: its memory is gone ({type(error).__name__}: {error})") from error
        finally:
            signal.signal(signal.SIGCHLD, before)
            if self._find_dead() is not None:
                self._abandon()

    def __del__(self) -> None:
        if self._find_dead() is not None:
            self._abandon()

    def _find_dead(self) -> Any:
        return next((worker for worker in self._workers if worker.exitcode not in (None, 0)), None)

    def _check(self, *_: object) -> None:
        """Raises: _WorkerDied: one did, and an item is still to come."""
        if self._iterator._tasks_outstanding and (dead := self._find_dead()) is not None:
            raise _WorkerDied(f"DataLoader worker (pid {dead.pid}) exited unexpectedly ({dead.exitcode})")

    def _abandon(self) -> None:
        """End what is left of the workers, and leave torch nothing to end."""
        self._iterator._shutdown = True
        for worker in self._workers:
            worker.kill()
        for queue in self._iterator._index_queues:
            queue.cancel_join_thread()


class StepSampler(Sampler[int]):
    """Numbers of the steps of the current epoch, counted over the whole run."""

    def __init__(self, global_step: Callable[[], int], steps_per_epoch: int):
        self._global_step = global_step
        self._steps_per_epoch = steps_per_epoch

    def __iter__(self) -> Iterator[int]:
        epoch = self._global_step() // self._steps_per_epoch
        return iter(range(epoch * self._steps_per_epoch, (epoch + 1) * self._steps_per_epoch))

    def __len__(self) -> int:
        return self._steps_per_epoch


class _Ahead(Dataset[Any]):
    """The dataset, with the item after the one asked for under way in a thread. Items are functions of their number."""

    def __init__(self, dataset: Dataset[Any]):
        self._dataset = dataset
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._next: tuple[int, Future[Any]] | None = None

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        number, future = self._next or (-1, None)
        item = future.result() if future is not None and number == index else self._dataset[index]
        self._next = index + 1, self._thread.submit(self._dataset.__getitem__, index + 1)
        return item


def _only_item(items: list[Any]) -> Any:
    return items[0]


def _ignore_signals(_worker: int) -> None:
    # A Ctrl-C or a scheduler's SIGTERM reaches workers, too; they end when the process they work for does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
