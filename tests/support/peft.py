"""Sets of few parameters for a tiny vision transformer, and a way to disturb them."""

from functools import partial

import torch

from cl_lightning.models import (
    SSF,
    VPT,
    Adapter,
    FiLM,
    LoRA,
    ParallelAdapters,
    Prefix,
    TwoRanks,
)
from support.pretrained import tiny_vit

SILENT = {  # at the beginning nothing changes
    "lora": LoRA,
    "lora of keys and values": partial(LoRA, parts="kv", learn_scale=True, targets=("blocks.0.*qkv",)),
    "adapter": Adapter,
    "adapter beside attention": partial(Adapter, place="attention", activation="gelu", learn_scale=True, blocks=[-1]),
    "adapter in a row": partial(Adapter, place="sequential"),
    "film": FiLM,
    "parallel": ParallelAdapters,
    "ssf without spread": partial(SSF, spread=0.0),
    "two ranks": partial(TwoRanks, high_rank=40),
}


LOUD = {
    "ssf": SSF,
    "vpt deep": VPT,
    "vpt shallow": partial(VPT, deep=False, spread=0.1),
    "vpt of a block": partial(VPT, blocks=[1]),
    "vpt from a block on": partial(VPT, blocks=[0], through=True, spread=0.1),
    "prefix": Prefix,
    "prefix, compensated": partial(Prefix, compensate=True),
    "prefix of lae": partial(Prefix, low=0.0, high=0.01, compensate=True, learn_scale=True),
}


ALL = SILENT | LOUD


MERGED = {"lora", "lora of keys and values", "ssf", "film", "parallel", "ssf without spread", "two ranks"}


def model():
    return tiny_vit().double()


def disturbed(make, net, seed=0):
    """In the model, with parameters as if they had been trained."""
    torch.manual_seed(seed)
    peft = make(net).double().eval()
    with torch.no_grad():
        for parameter in peft.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return peft
