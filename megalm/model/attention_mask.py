"""Which tokens of a sample may see each other: documents, in the form that each attention kernel takes.

Shapes: B batch, T sequence. No [T, T] mask is made where memory counts: the CPU's attention compares document numbers
block by block, flex attention on a GPU gets a mask of blocks, most of them empty or full. Only attention dropout,
which neither kernel has, makes the dense mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # tokens; what flex attention's kernels are tuned for


@dataclass(frozen=True)
class DocumentMask:
    """Made once a batch by `document_mask`, then read by every block.

    Args:
        documents: [B, T] document numbers.
        blocks: the same for flex attention; None on a CPU.
    """

    documents: Tensor
    blocks: BlockMask | None

    def dense(self) -> Tensor:
        """[B, 1, T, T], true where attention is allowed: the same document, not later."""
        length = self.documents.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.documents.device).tril()
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return (earlier & same).unsqueeze(1)


def document_mask(documents: Tensor) -> DocumentMask:
    """[B, T] document numbers -> the mask for attention on their device."""
    blocks = None if documents.device.type == "cpu" else flex_blocks(documents)
    return DocumentMask(documents, blocks)


def flex_blocks(documents: Tensor) -> BlockMask:
    """[B, T] -> which blocks of queries see which blocks of keys, and the rule inside a block.

    From the lowest and highest document of each block: `create_block_mask` would ask for every pair of tokens.
    """

    def allowed(batch: Any, _: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch, length = documents.shape
    blocks = -(-length // _BLOCK)
    last = documents[:, -1:].expand(batch, blocks * _BLOCK - length)
    by_block = torch.cat((documents, last), dim=1).view(batch, blocks, _BLOCK)
    lowest, highest = by_block.amin(-1), by_block.amax(-1)  # [B, n]
    place = torch.arange(blocks, device=documents.device)
    earlier = place.unsqueeze(1) > place
    meet = (lowest.unsqueeze(2) <= highest.unsqueeze(1)) & (lowest.unsqueeze(1) <= highest.unsqueeze(2))
    one = lowest == highest
    whole = earlier & one.unsqueeze(2) & one.unsqueeze(1) & (lowest.unsqueeze(2) == lowest.unsqueeze(1))
    part = meet & (earlier | (place.unsqueeze(1) == place)) & ~whole  # [B, n, n]
    return BlockMask.from_kv_blocks(
        *_ordered(part), *_ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, n] -> how many blocks of keys each of queries meets [B, 1, n]; [B, 1, n, n] starts with their numbers."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), numbers.int().unsqueeze(1)
