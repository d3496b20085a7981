"""One process of tensor parallelism that generates for ever: `dying_rank.py cpu|cuda eager|compiled MODEL`. Prints its rank and
process when it is about to."""

import os
import sys

import torch
from transformers import AutoModelForCausalLM

import zigzag_ext as zz
from zigzag_ext.study.loading import shared_out


def main(device: str, steps: str, folder: str) -> None:
    torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **shared_out()).eval()
    zz.enable(model, zz.Plan(["streaming"] * 2, sink=4, window=16), compile=steps == "compiled")
    ids = torch.ones(1, 20, dtype=torch.long, device=model.device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=3, **options)
    os.write(1, f"{os.environ['RANK']} {os.getpid()}\n".encode())  # whole lines, whatever the other process writes
    model.generate(ids, max_new_tokens=1 << 20, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
