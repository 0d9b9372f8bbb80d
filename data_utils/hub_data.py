"""Data sets of the hubs by name: `hf:OWNER/NAME`, `ms:OWNER/NAME`, with a subset, a split and a sample if wanted.

    hf:OWNER/NAME  hf:OWNER/NAME/SUBSET  hf:OWNER/NAME:SPLIT  ms:OWNER/NAME/SUBSET:SPLIT#5000

The rows are written once into a parquet file of the user's cache and read like those of any file, so that every row is
trained or counted with its place: `hf:OWNER/NAME:SPLIT:ROW`, rows counted from 1. Standard library only; `datasets` and
`modelscope` are imported where they are needed.
"""

import functools
import hashlib
import inspect
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils.hub import explain_no_modelscope
from data_utils.model_path import can_reach
from data_utils.sources import DataError, Source, find_sources, split_weight

_PREFIXES = ("hf:", "ms:")
_NAME = r"[\w.-]+"
_FORM = re.compile(
    rf"(?P<hub>hf|ms):(?P<name>{_NAME}(?:/{_NAME})?)(?:/(?P<subset>{_NAME}))?(?::(?P<split>[\w.+\[\]:%-]+))?"
    r"(?:#(?P<sample>[1-9]\d{0,11}))?"
)


@dataclass(frozen=True)
class HubData:
    """A data set by its name on a hub, "hf" or "ms". sample: how many of its rows to take, or None for all."""

    hub: str
    name: str
    subset: str | None = None
    split: str | None = None
    sample: int | None = None

    @property
    def label(self) -> str:
        """The name as it was given, without the sample."""
        subset, split = f"/{self.subset}" if self.subset else "", f":{self.split}" if self.split else ""
        return f"{self.hub}:{self.name}{subset}{split}"


def find_data(paths: Sequence[str | Path], *, weighted: bool = False) -> list[Source]:
    """The data files behind paths (sources.find_sources) and behind names of the hubs, which are downloaded.

    weighted: whether a weight (`*2.5`) means anything here, as it does for training data.

    Raises: DataError: as find_sources; a name that is none, a data set that cannot be had.
    """
    found: list[Source] = []
    for path in paths if not weighted else ():
        if split_weight(str(path))[1] != 1:
            raise DataError(f"{path}: a weight (*) has an effect on training data only; leave it out")
    for path in paths:
        if str(path).startswith(_PREFIXES):
            name, weight = split_weight(str(path))
            wanted = read_name(name)
            file, label = _fetch(HubData(wanted.hub, wanted.name, wanted.subset, wanted.split))
            found.append(Source(file, wanted.sample, label, weight))
        else:
            found += find_sources([path])
    return found


def read_name(text: str) -> HubData:
    """The parts of a name. Raises: DataError: it has another form."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise DataError(f"{text}: expected {text[:3]}OWNER/NAME, then /SUBSET, :SPLIT and #ROWS where they are wanted")
    sample = match["sample"]
    return HubData(match["hub"], match["name"], match["subset"], match["split"], int(sample) if sample else None)


@functools.cache
def _fetch(wanted: HubData) -> tuple[Path, str]:
    """The parquet file of a data set's split, and its label with the split."""
    try:
        loaded = _load_from_hf(wanted) if wanted.hub == "hf" else _load_from_modelscope(wanted)
        data, split = _choose_split(loaded, wanted)
        label = HubData(wanted.hub, wanted.name, wanted.subset, split).label
        return _write_once(data, label), label
    except DataError:
        raise
    except Exception as error:  # whatever the libraries and the network may do
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = ""
        if "config name is missing" in line.lower():
            hint = f"; name a subset: {wanted.hub}:{wanted.name}/SUBSET"
        elif isinstance(error, ConnectionError):
            hint = "; it is not in the cache here: set HF_ENDPOINT to a mirror (https://hf-mirror.com), or name a file"
        raise DataError(f"{wanted.label}: cannot be loaded: {line}{hint}") from None


def _load_from_hf(wanted: HubData) -> Any:
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not os.environ.get("HF_HUB_OFFLINE") and not can_reach(hub):
        os.environ["HF_HUB_OFFLINE"] = "1"  # what is in its cache is taken without asking
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{wanted.label}: needs the package datasets: pip install datasets") from None
    return load_dataset(wanted.name, wanted.subset, split=wanted.split, **_without_code(load_dataset))


def _load_from_modelscope(wanted: HubData) -> Any:
    if (mistake := explain_no_modelscope(wanted.label)) is not None:
        raise DataError(mistake)
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise DataError(
            f"{wanted.label}: needs more of ModelScope: pip install 'modelscope[datasets]' ({error})"
        ) from None
    loaded = MsDataset.load(wanted.name, subset_name=wanted.subset, split=wanted.split, **_without_code(MsDataset.load))
    return {name: _as_hf(each) for name, each in loaded.items()} if isinstance(loaded, dict) else _as_hf(loaded)


def _as_hf(data: Any) -> Any:
    return data.to_hf_dataset() if hasattr(data, "to_hf_dataset") else data


def _without_code(load: Any) -> dict[str, Any]:
    """Code that comes with a data set never runs; newer versions of datasets cannot run any."""
    return {"trust_remote_code": False} if "trust_remote_code" in inspect.signature(load).parameters else {}


def _choose_split(loaded: Any, wanted: HubData) -> tuple[Any, str]:
    """The split that was named; else the only one, or `train`."""
    if not isinstance(loaded, dict):
        return loaded, wanted.split or str(getattr(loaded, "split", None) or "train")
    names = list(loaded)
    split = wanted.split or (names[0] if len(names) == 1 else "train")
    if split not in loaded:
        raise DataError(f"{wanted.label}: name a split: {', '.join(f'{wanted.label}:{name}' for name in names)}")
    return loaded[split], split


def _write_once(data: Any, label: str) -> Path:
    """The rows as a parquet file, named by what they are: one that is there already stays."""
    if not hasattr(data, "to_parquet"):
        raise DataError(f"{label}: is a {type(data).__name__}, not a table of rows; download its files, and name those")
    fingerprint = getattr(data, "_fingerprint", None) or f"{len(data)}"
    digest = hashlib.sha256(f"{label}\n{fingerprint}".encode()).hexdigest()[:32]
    file = _cache_root() / f"{digest}.parquet"
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{digest}.")
        os.close(descriptor)
        temporary = Path(name)
        try:
            data.to_parquet(str(temporary))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{label}: {file.parent}: cannot be written: {error.strerror or error}; make room") from None
    return file


def _cache_root() -> Path:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        root = Path(tempfile.gettempdir())
    return root / "finetune" / "hub-data"
