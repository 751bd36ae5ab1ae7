"""Compiling a network block by block: for training and sampling in earnest, where minutes of start-up are earned back.

A residual block or a transformer block is one graph, so pointwise operations join and the backward pass computes the
cheap ones again instead of keeping them. Whole networks take longer to compile, once per bucket, and gain little more.
"""

from __future__ import annotations

from torch import nn

from model.layers import BasicTransformerBlock, ResBlock
from model.vae import VAEResBlock

BLOCKS = (ResBlock, BasicTransformerBlock, VAEResBlock)
GRAPHS_PER_BLOCK = 16  # twice the 8 of: training or not, a batch of one or more, a square map or not


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compile each block of a U-Net or VAE in place, on its first call; gives the number of blocks.

    Parameters and the state dict's keys stay as they are. Sizes of batch and map are symbols of the graph, so all
    buckets share it: the first square map and the first other one compile, and no bucket after them. A block that
    cannot be one graph is an error, and so is one that needs more than GRAPHS_PER_BLOCK of them. Activation
    checkpointing works as before, around the compiled blocks. Raises ValueError where there is no block.
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no block that can be compiled")
    for block in blocks:
        # Blocks share their code but not their widths: without isolation, each would count against the others' limit.
        block.compile(
            backend=backend,
            fullgraph=True,
            dynamic=True,
            isolate_recompiles=True,
            recompile_limit=GRAPHS_PER_BLOCK,
        )
    return len(blocks)
