"""Arms of the table of engines: each trains, saves, and says what it measured. Started by tests/forks.py, or by hand:

torchrun --nproc_per_node N -m tests.engines CHECKPOINT OUT ENGINE STEPS KIND/LAYOUT ...
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from data_utils.tokenizer import load_tokenizer
from tests import runs
from tests.conftest import ROOT
from tuning.checkpoint import result as checkpoint_module
from tuning.checkpoint.result import ResultWriter
from tuning.console import is_rank_0
from tuning.distributed.sharding import SHARDED, gather_tensor

OPTIONS = {
    "single": {},
    "ddp": {},
    "zero2": {"deepspeed": str(ROOT / "finetune" / "ds_config_zero2.json")},
    "zero3": {"deepspeed": str(ROOT / "finetune" / "ds_config_zero3.json")},
    "fsdp": {"fsdp": "full_shard"},
}


def describe_engine(trainer) -> str:
    """What really trains, by the objects and not by the settings."""
    wrapped, parameters = trainer.model_wrapped, list(trainer.model.parameters())
    name = type(wrapped).__name__
    if name == "DeepSpeedEngine":
        partitioned = all(hasattr(p, "ds_id") for p in parameters)
        return f"DeepSpeedEngine, stage {wrapped.zero_optimization_stage()}, partitioned {partitioned}"
    if any(isinstance(p, DTensor) for p in parameters):
        local, all_ = (sum(f(p) for p in parameters) for f in (lambda p: p.to_local().numel(), lambda p: p.numel()))
        return f"{name}, all DTensor {all(isinstance(p, DTensor) for p in parameters)}, a half {local <= 0.6 * all_}"
    return name


EXPECTED = {
    "single": "TrainingModel",
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine, stage 2, partitioned False",
    "zero3": "DeepSpeedEngine, stage 3, partitioned True",
    "fsdp": "FSDPTrainingModel, all DTensor True, a half True",
}


def run_arm(checkpoint: Path, out: Path, engine: str, steps: int, kind: str, layout: str):
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    rows, template = runs.example_rows(checkpoint)
    processes = 1 if engine == "single" else 2
    args = runs.run_arguments(out, kind=kind, batch=2, accumulation=4 // processes, steps=steps, **OPTIONS[engine])
    assert args.engine == engine and args.world_size == processes
    model = runs.build(checkpoint, kind, template, meta=engine in SHARDED and not is_rank_0())
    if engine in SHARDED and not is_rank_0():
        assert all(tensor.is_meta for tensor in model.parameters()), "only the first process holds the weights"
    trainer = runs.train_with(
        args, model, rows, packed=layout == "packed", **({"loraplus_lr_ratio": 8.0} if kind == "loraplus" else {})
    )
    assert describe_engine(trainer) == EXPECTED[engine], describe_engine(trainer)
    tokenizer = load_tokenizer(str(checkpoint))
    identity = {"path": str(checkpoint), "name": str(checkpoint), "revision": None}
    base = SimpleNamespace(identity=identity, compute_dtype=torch.float32)
    writer = ResultWriter(model, tokenizer, model.causal_lm.generation_config, base=base, facts=None)
    gathered = []
    checkpoint_module.gather_tensor = lambda tensor: gathered.append(tensor) or gather_tensor(tensor)
    result = writer.collect()
    assert kind == "full" or all(tensor.requires_grad for tensor in gathered), "of LoRA only the adapter"
    if is_rank_0():
        writer.write(out, result)
        (out / "measured.json").write_text(json.dumps(runs.measured(trainer)))
    else:
        assert not result, "only one process may hold the result"
    return trainer


if __name__ == "__main__":
    checkpoint, out, engine, steps, *arms = sys.argv[1:]
    for arm in arms:
        kind, layout = arm.split("/")
        trainer = run_arm(Path(checkpoint), Path(out) / arm, engine, int(steps), kind, layout)
    trainer.close()
