"""Logits as plain transformers and peft give them, nothing of ours imported: python -m tests.library_logits ...

BASE KIND ADAPTER OUT [ID ...]: KIND is "nf4", "fp4", "int8" (quantised at loading) or "own" (as the checkpoint is);
ADAPTER may be "-". Writes the logits of the ids into OUT (safetensors).
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

if __name__ == "__main__":
    base, kind, adapter, out, *ids = sys.argv[1:]
    config = AutoConfig.from_pretrained(base)
    options = {}
    if kind in ("nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True
        )
    elif kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif getattr(config, "quantization_config", {}).get("quant_method") == "gptq":
        config.quantization_config["backend"] = "torch"  # the one that computes in float32
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32, **options)
    for module in model.modules():  # bitsandbytes packs weights otherwise for inference on some CPUs, for wider layers
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if adapter != "-":
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([list(map(int, ids))])).logits
    save_file({"logits": logits}, out)
