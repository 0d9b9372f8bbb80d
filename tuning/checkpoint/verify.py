"""Whether a merged checkpoint is what base and adapter are together, without either model in memory.

Models run a block at a time (a decoder layer, the embedding, the output layer): a block's weights are there while it
computes, and gone afterwards. The adapter runs as peft has it, unmerged; the merged model runs on what was merged,
after a look at the files: every tensor must be there, to the bit.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuning.checkpoint.adapter import read_adapter_config
from tuning.checkpoint.base_tensors import BaseTensors
from tuning.checkpoint.changes import redo_initialisation
from tuning.checkpoint.merge import Merge
from tuning.checkpoint.tensor_files import StoredTensor
from tuning.errors import SettingsError, explain_bad_files
from tuning.model.loading import hide_gptqmodel
from tuning.model.new_tokens import resize_model
from tuning.model.saved_adapter import adapters_off_meta

# Largest difference of float32 logits that rounding explains, relative to the largest logit.
TOLERANCE = 1e-4

_ROWS = 16  # of every matrix that are compared with peft's arithmetic
_PROBE_TOKENS = 256  # of a template that writes pages around a question, the last ones: logits of all are kept
_PART = 1 << 16  # elements that are compared at a time
_QUESTIONS = ["Who are you? 请用一句话介绍你自己。", "def fibonacci(n): # 1 + 1 = 🙂"]
_PEFT_PARTS = {"base_layer", "original_module", "token_adapter", "modules_to_save", "default"}


@dataclass(frozen=True)
class Comparison:
    """Two models' logits on probe texts, at every position."""

    max_difference: float
    max_logit: float
    top1_agreement: float

    @property
    def holds(self) -> bool:
        """Whether rounding in float32 explains the difference; a NaN does not, nor a dead model."""
        return self.max_logit > 0 and self.max_difference <= TOLERANCE * max(1.0, self.max_logit)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"max |dlogits| {self.max_difference:.2e} (largest logit {self.max_logit:.1f}), "
            f"top-1 {100 * self.top1_agreement:.4g} %"
        )


def compare_logits(expected: list[Tensor], actual: list[Tensor]) -> Comparison:
    """Compare two models' logits on the same probes."""
    positions = sum(len(logits) for logits in expected)
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, actual, strict=True))
    return Comparison(
        max_difference=float(torch.stack([(a - b).abs().max() for a, b in zip(expected, actual, strict=True)]).max()),
        max_logit=max(logits.abs().max().item() for logits in expected),
        top1_agreement=agreeing / positions,
    )


def build_probes(tokenizer: PreTrainedTokenizerBase, adapters: list[Path]) -> list[list[int]]:
    """Token ids of prompts in several languages, rendered with the chat template, and those whose rows were trained."""
    trained: set[int] = set()
    for adapter in adapters:
        indices = read_adapter_config(adapter).trainable_token_indices or []
        for ids in indices.values() if isinstance(indices, dict) else [indices]:
            trained |= {token_id for token_id in ids if type(token_id) is int} if isinstance(ids, list) else set()
    with explain_bad_files(f"{tokenizer.name_or_path}: the chat template cannot render a question"):
        probes = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in _QUESTIONS
        ]
        if not all(probes):
            raise ValueError("it writes nothing")
        return [ids[-_PROBE_TOKENS:] for ids in [*probes, *([sorted(trained)] if trained else [])]]


# ---- the adapter, and the merged model ----


def compute_adapter_logits(
    base: BaseTensors, model: PreTrainedModel, adapters: list[tuple[Path, float]], probes: list[list[int]]
) -> list[Tensor] | None:
    """Logits of base and adapters as peft itself has them: independent code, so that our mistakes show.

    model: as base's, plain, on the meta device but for buffers. adapters: with their weights.

    Returns: None where peft cannot add adapters up (anything but LoRA on layers).
    """
    configs = [read_adapter_config(path) for path, _ in adapters]
    added_up = [weight for _, weight in adapters] != [1.0]
    if added_up and not all(_adds_up(config) for config in configs):
        return None
    hide_gptqmodel()
    resize_model(model, base.num_rows)
    peft_model: Any = None
    for number, ((path, _), config) in enumerate(zip(adapters, configs, strict=True)):
        built = copy.deepcopy(config)
        if isinstance(config.init_lora_weights, str):
            built.init_lora_weights = False  # some look at the weights, which come later
        built.inference_mode = True
        with explain_bad_files(f"{path}: peft cannot load it"), adapters_off_meta():
            options: dict[str, Any] = {"config": built, "low_cpu_mem_usage": True}
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, str(path), **options)
            else:
                peft_model.load_adapter(str(path), str(number), peft_config=built, low_cpu_mem_usage=True)
    if added_up:
        names = ["default", *map(str, range(1, len(adapters)))]
        peft_model.base_model.set_adapter(names)
        for module in peft_model.modules():
            for name, (_, weight) in zip(names, adapters, strict=True):
                if isinstance(module, LoraLayer) and name in module.scaling:
                    module.scaling[name] *= weight

    def prepare(block: nn.Module) -> None:
        for module in block.modules():
            if isinstance(module, LoraLayer):
                redo_initialisation(module, configs[0])

    def fetch(name: str) -> Tensor:
        value = base.read(name)
        lowest, highest = torch.aminmax(value)
        if not bool((highest - lowest).isfinite()):  # isfinite() of the whole takes ten times as long
            raise SettingsError(
                f"{base.directory}: {name} has values that are not finite, so it is damaged; copy it again"
            )
        return value

    return stream_logits(peft_model, fetch, probes, prepare)


def _adds_up(config: LoraConfig) -> bool:
    more = (config.modules_to_save, config.trainable_token_indices, config.target_parameters, config.use_dora)
    return not any(more) and config.bias == "none" and not isinstance(config.init_lora_weights, str)


class SavedMerge:
    """A merged model with its files: hands out the merged tensors in float32, and holds the files against them.

    saved: of the files.
    """

    def __init__(self, merge: Merge, saved: BaseTensors):
        self._merge, self._saved = merge, saved
        self._left = set(merge.base.names())

    def fetch(self, name: str) -> Tensor:
        """A merged tensor. Raises: SettingsError: it is not what the files have, or not what peft makes of it."""
        value = self._merge.compute(name)
        if not self._is_copied(name) and not _is_rounded(self._saved.read(name, None), value):
            raise SettingsError(f"{self._saved.directory}: {name} does not load as it was saved")
        if name in self._merge.changed:
            self._check_rows(name, value)
        self._left.discard(name)
        return value

    def check_rest(self) -> None:
        """Look at what no probe came by. Raises: SettingsError: it was lost, or is another."""
        for name in sorted(self._left):
            self.fetch(name)
        base, saved = self._merge.base.stored, self._saved.stored
        of_model = {stored.name for source in self._merge.base.sources for stored in source.stored}
        for name, stored in base.items():
            if name in of_model:
                continue
            if not _is_same(stored, saved.get(name)):
                raise SettingsError(f"{self._saved.directory}: {name} of the base is not in it")

    def _is_copied(self, name: str) -> bool:
        """Whether a tensor is the base's own, byte for byte."""
        if self._merge.is_computed(name):
            return False
        source = self._merge.base.source_of[self._merge.base.own_name(name)]
        return all(_is_same(stored, self._saved.stored.get(stored.name)) for stored in source.stored)

    def _check_rows(self, name: str, value: Tensor) -> None:
        """Compare some rows with peft's own arithmetic."""
        rows = torch.linspace(0, len(value) - 1, min(_ROWS, len(value))).long()
        expected = self._merge.base.read(name, None)[rows].float()
        weight = expected.clone()
        for each in self._merge.list_touching(name):
            sample = each.changes.sample_rows(name, weight, rows)
            if sample is None:
                return
            expected += (sample - weight) * each.weight
        if (expected - value[rows]).abs().max() > TOLERANCE * max(float(expected.abs().max()), 1e-30):
            raise SettingsError(f"{self._saved.directory}: {name} is not what peft makes of it")


def _is_same(one: StoredTensor, other: StoredTensor | None) -> bool:
    """Whether two stored tensors have the same bytes."""
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(map(operator.eq, one.pieces(), other.pieces()))


def _is_rounded(saved: Tensor, value: Tensor) -> bool:
    """Whether a tensor is another one, rounded to its dtype. Compared in parts, which stay in the processor's cache."""
    if saved.shape != value.shape:
        return False
    parts = zip(saved.view(-1).split(_PART), value.contiguous().view(-1).split(_PART), strict=True)
    return all(torch.equal(part, other.to(part.dtype)) for part, other in parts)


# ---- a model, block by block ----


@torch.no_grad()
def stream_logits(
    model: nn.Module,
    fetch: Callable[[str], Tensor],
    probes: list[list[int]],
    prepare: Callable[[nn.Module], None] = lambda _: None,
) -> list[Tensor]:
    """Logits of every position of each probe: float32, [T, V].

    model: on the meta device but for buffers, and what an adapter trained. fetch: a tensor by its name there, as the
    model without an adapter has it. prepare: called with a block when its weights are there.
    """
    model.eval()
    width = max(map(len, probes))
    input_ids = torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in probes])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in probes])  # the padding comes last
    blocks = list(_find_blocks(model, ""))
    hooks: list[Any] = []
    for path, block in blocks:
        loaded = _Loaded(path, block, fetch)
        hooks += loaded.hook(prepare)
    try:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [each[: len(ids)].float() for each, ids in zip(logits, probes, strict=True)]


def _find_blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights are loaded together: layers of a list, and what holds weights of its own."""
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        own = any(True for _ in child.parameters(recurse=False)) or any(True for _ in child.buffers(recurse=False))
        if (
            (isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList))
            or own
            or isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ):
            yield inside, child
        else:
            yield from _find_blocks(child, inside)


class _Loaded:
    """A block's tensors: on the meta device, or there."""

    def __init__(self, path: str, block: nn.Module, fetch: Callable[[str], Tensor]):
        self._fetch = fetch
        self._block = block
        self._places = []  # where a tensor goes, its name in a plain model, and the meta tensor
        idle: list[str] = []  # what a trained module stands in for
        for inner, module in block.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                idle.append(f"{inner}.original_module".lstrip("."))
            if inner.startswith(tuple(idle)):
                continue
            where = ".".join(filter(None, (path, inner)))
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta and "trainable_tokens_original" not in where:
                        self._places.append((table, name, _plain_name(f"{where}.{name}"), tensor))

    def hook(self, prepare: Callable[[nn.Module], None]) -> list[Any]:
        """Load before the block computes, and unload afterwards. Returns: handles."""

        def before(block: nn.Module, _inputs: Any) -> None:
            self._load()
            prepare(block)

        return [
            self._block.register_forward_pre_hook(before),
            self._block.register_forward_hook(lambda *_: self._unload()),
        ]

    def _load(self) -> None:
        for table, name, plain, tensor in self._places:
            value = self._fetch(plain)
            table[name] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value

    def _unload(self) -> None:
        for table, name, _, tensor in self._places:
            table[name] = tensor


def _plain_name(path: str) -> str:
    """The name that a tensor inside peft's modules has in the plain model."""
    parts = path.split(".")
    while parts[:1] == ["base_model"]:  # PeftModel.base_model.model
        parts = parts[2:]
    return ".".join(part for part in parts if part not in _PEFT_PARTS)
