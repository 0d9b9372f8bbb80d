"""Logits as plain transformers and peft give them, in a process that imports nothing of ours.

`python -m tests.library_logits` reads requests, a JSON object a line, and answers each with a line:

    {"base": DIR, "kind": "nf4", "adapter": DIR or null, "ids": [...], "out": FILE}  ->  "done"

kind: "nf4", "fp4", "int8" (quantised at loading) or "own" (as the checkpoint is). OUT is written by safetensors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


class Library:
    """The process. Close it."""

    def __init__(self, root: Path, directory: Path):
        self._out = directory / "logits.safetensors"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.library_logits"],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(directory / "server.err", "w"),  # noqa: SIM115
            text=True,
        )

    def logits(self, base, ids, *, kind="own", adapter=None):
        """[1, T, V]"""
        from safetensors.torch import load_file

        request = {"base": str(base), "kind": kind, "adapter": adapter and str(adapter), "ids": ids}
        self._process.stdin.write(json.dumps(request | {"out": str(self._out)}) + "\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()).strip() != '"done"':  # libraries print, too
            assert line, "the process ended; see its server.err"
        return load_file(self._out)["logits"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compute(base, kind, adapter, ids):
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config, options = AutoConfig.from_pretrained(base), {}
    if kind in ("nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True
        )
    elif kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif getattr(config, "quantization_config", {}).get("quant_method") == "gptq":
        config.quantization_config["backend"] = "torch"  # the one that computes in float32
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32, **options)
    for module in model.modules():  # bitsandbytes' inference on some CPUs fails for layers as narrow as these
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


if __name__ == "__main__":
    from safetensors.torch import save_file

    for line in sys.stdin:
        request = json.loads(line)
        out = request.pop("out")
        save_file({"logits": compute(**request)}, out)
        print('\n"done"', flush=True)
