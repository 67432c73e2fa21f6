#!/usr/bin/env python3
"""The shape of a config.json with random weights through transformers: decode steps and prefills, to set beside ours.

gpu-peer.py SHAPE RESULT.json
"""
import json
import sys
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(sys.argv[1])
with torch.device("cuda"):
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except TypeError:  # transformers before 4.56
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16)
model.eval()
if model.dtype != torch.bfloat16:
    sys.exit(f"gpu-peer: the model is {model.dtype}")


@torch.inference_mode()
def seconds(batch, context, tokens):
    """The median time of a step of `tokens` tokens for each of `batch` sequences behind `context` others."""
    times = []
    for _ in range(6):
        cache = None
        if context:
            ids = torch.zeros((batch, context), dtype=torch.long, device="cuda")
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        ids = torch.zeros((batch, tokens), dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return sorted(times[1:])[2]


steps = []
for phase, batch, context, tokens in [
    ("prefill", 1, 0, 128), ("prefill", 1, 0, 1024), ("prefill", 1, 0, 8192),
    ("decode", 1, 128, 1), ("decode", 8, 128, 1), ("decode", 32, 128, 1), ("decode", 100, 128, 1),
]:
    took = seconds(batch, context, tokens)
    steps.append({"phase": phase, "batch": batch, "tokens": batch * tokens, "seconds": took})
    print(f"{phase:<8} {batch:>5} x {tokens:<5} {took * 1e3:9.2f} ms {batch * tokens / took:10.0f} tokens/s")
with open(sys.argv[2], "w") as file:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    json.dump({**versions, "dtype": str(model.dtype), "steps": steps}, file)
