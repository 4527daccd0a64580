"""Logits of GPTQ folders by their real consumers; run by an interpreter that has gptqmodel and optimum installed.

python gptqmodel_logits.py TOKENS.npy FOLDER ... : writes FOLDER.gptqmodel.npy, FOLDER.transformers.npy, or .error
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from gptqmodel import GPTQModel
from transformers import AutoModelForCausalLM


def by_gptqmodel(folder):
    return GPTQModel.load(folder, device="cpu").model


def by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)


def main():
    tokens = torch.from_numpy(np.load(sys.argv[1])).long()
    for folder in sys.argv[2:]:
        for name, load in (("gptqmodel", by_gptqmodel), ("transformers", by_transformers)):
            try:
                with torch.no_grad():
                    logits = load(folder)(tokens).logits
                np.save(f"{folder}.{name}.npy", logits.float().numpy())
            except Exception as error:  # the test says which combination failed, and how
                Path(f"{folder}.{name}.error").write_text(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(0)  # gptqmodel's threads outlive main


main()
