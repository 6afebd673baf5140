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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


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
    """[B, T] -> which blocks of queries see which blocks of keys, and the rule inside a block."""

    def allowed(batch: Any, _: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch, length = documents.shape
    return create_block_mask(allowed, batch, None, length, length, device=str(documents.device))
