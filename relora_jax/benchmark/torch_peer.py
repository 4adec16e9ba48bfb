"""PyTorch's side of `bench --peer=torch`: a process of its own, with its own threads and memory.

It reads its settings as one line of JSON and then, for each line, runs an update and writes its seconds. As
those run it who care: transformers' class with SDPA, for low-rank arms with PEFT's LoRA; clipping; fused
AdamW. Weights are float32, as here, and bfloat16 is by autocast; on a GPU the decoder is compiled, the loss
is PyTorch's in chunks, and products in float32 use TF32.
"""

# pyright: reportMissingImports=false
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

MODULES = ("torch", "transformers", "peft")  # the extra bench


def main() -> None:
    """Answers on stdout: first versions and threads, then the seconds of each update."""
    settings = json.loads(sys.stdin.readline())
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    update = prepared_update(settings, device)
    versions = {name: sys.modules[name].__version__ for name in MODULES if name in sys.modules}
    for _ in range(2):
        update()
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        update()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def prepared_update(settings: dict[str, Any], device: Any) -> Callable[[], float]:
    """A function that runs one update on the ids of the settings, waits for it, and returns its loss."""
    import torch
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    model = make_model(settings).to(device)
    base = model.get_base_model() if settings["lora"] else model
    backbone, head = base.model, base.lm_head
    if settings["recompute"]:
        base.gradient_checkpointing_enable()
    model.train()
    dtype = getattr(torch, settings["compute_dtype"])
    cast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        backbone = torch.compile(backbone)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **settings["optimizer"], fused=True)
    ids = torch.from_numpy(np.load(settings["ids"]).astype(np.int64)).to(device)
    # On CPUs, PyTorch's own choice of chunks takes five times as long as all logits at once.
    options = LinearCrossEntropyOptions() if device.type == "cuda" else None
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def update() -> float:
        with cast:
            hidden = backbone(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        loss = linear_cross_entropy(hidden.to(dtype), head.weight.to(dtype), targets, options=options)
        loss.backward()
        if settings["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(trained, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return update


def make_model(settings: dict[str, Any]) -> Any:
    """The model of `settings["model"]` (a config.json), with LoRA if `settings["lora"]` is not empty.

    As in ReLoRA, embeddings, norms and head are trained beside the factors; the base kernels are frozen.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {key: value for key, value in settings["model"].items() if key != "torch_dtype"}
    config = AutoConfig.for_model(**values | {"dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if settings["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**settings["lora"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            is_base = name.endswith(".base_layer.weight")
            parameter.requires_grad_(not is_base)
            if is_base:
                parameter.data = parameter.data.to(getattr(torch, settings["base_dtype"]))
    return model


if __name__ == "__main__":
    main()
