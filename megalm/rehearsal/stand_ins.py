"""Replacements of what a CPU build of torch or a fake tensor cannot do; all else runs as it is."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from megalm.engine import cpp_extensions
from megalm.parallel import expert_parallel
from megalm.rehearsal.watcher import Watcher

# The object, the name of its attribute, and what takes its place.
Replacement = tuple[Any, str, Any]

_AMPERE = 8  # has flash attention, from this major capability on


def install(capability: tuple[int, int], watcher: Watcher) -> None:
    """Replace them for the rest of the process."""
    replaced = _of_torch(watcher), _kernels(capability), _of_deepspeed(), _of_experts()
    for owner, name, value in chain(*replaced):
        setattr(owner, name, value)
    # Without a kernel for "cuda" autograd would take it apart, and hold each of five results.
    torch.library.impl("aten::silu_backward", "cuda", lambda gradient, _: torch.empty_like(gradient))


def _of_torch(watcher: Watcher) -> Iterator[Replacement]:
    # `nn.Module.to` swaps fake tensors, which fails where a hook holds them: take the other's data instead, and let a
    # fake tensor's device follow its data.
    data: Any = torch.Tensor.data

    def set_data(tensor: Any, value: Tensor) -> None:
        data.__set__(tensor, value)
        tensor.fake_device = value.device

    yield FakeTensor, "data", property(data.__get__, set_data)
    yield torch.utils, "swap_tensors", set_data

    # The host may look into its own copy of a tensor, which has no values.
    def numpy(tensor: Tensor, **_: Any) -> npt.NDArray[Any]:
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def tolist(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            watcher.note("read", tensor)
        return numpy(tensor).tolist()

    yield FakeTensor, "numpy", numpy
    yield FakeTensor, "tolist", tolist

    # A CPU build pins no memory. The thread that prepares batches has real tensors, and no dispatch mode to see it.
    pin_memory = torch.Tensor.pin_memory

    def pinned(tensor: Tensor, *args: Any) -> Tensor:
        return pin_memory(tensor, *args) if isinstance(tensor, FakeTensor) else watcher.pin(tensor)

    yield torch.Tensor, "pin_memory", pinned
    # It would open a CUDA context.
    yield FakeTensorMode, "avoid_device_init", property(lambda _: True)

    # Of fake tensors, torch before 2.13 takes the type of such a total for a factor. It is the only place of a result.
    addmm = torch.addmm

    def add_product(total: Tensor, *factors: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return addmm(total, *factors, **options) if out_dtype is None else total

    yield torch, "addmm", add_product

    # Groups of torch's fake backend send nothing and need no other rank; gloo's would connect to them.
    new_group = dist.new_group

    def fake_group(*args: Any, **options: Any) -> Any:
        return new_group(*args, **{**options, "backend": "fake"})

    yield dist, "new_group", fake_group
    yield dist.distributed_c10d, "new_group", fake_group


def _kernels(capability: tuple[int, int]) -> Iterator[Replacement]:
    """A CPU build has no fused kernels for "cuda" and would take these functions apart: call what CUDA would run."""
    on_cpu = functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type == "cpu":
            return on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None and query.dtype != torch.float32 and capability[0] >= _AMPERE:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False)[0]
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        bias = None
        if attn_mask is not None:  # a mask becomes a bias in the queries' type
            bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal)[0]

    # Layer norm keeps for its backward pass what the fused RMS norm keeps, and a mean of each token.
    def rms_norm(x: Tensor, size: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return functional.layer_norm(x, size, weight, None, eps or 0.0)

    yield functional, "scaled_dot_product_attention", attention
    yield functional, "rms_norm", rms_norm
    # Without torch.compile, which would compile a kernel, flex attention holds all scores; its operator holds none.
    module = importlib.import_module("torch.nn.attention.flex_attention")
    yield module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True
    # torch.compile differentiates a soft cap while no hook of autograd is at work. Those of a recomputed block take it
    # for the block's backward pass: they compute the whole block at once, and keep it.
    operator = importlib.import_module("torch._higher_order_ops.flex_attention")
    differentiated = operator.create_fw_bw_graph

    def without_hooks(*args: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return differentiated(*args)

    yield operator, "create_fw_bw_graph", without_hooks


def _of_deepspeed() -> Iterator[Replacement]:
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3

    # ZeRO 3 compares rank 0's numbers, which it has received, with its own: nothing is received.
    for module in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
        for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, name):
                yield module, name, lambda *_: None
    # Extensions in C++ read memory, which a fake tensor has none of: none is compiled, nor waits for a compilation.
    yield cpp_extensions, "compiling_alone", contextlib.nullcontext
    for builder in (CPUAdamBuilder, AsyncIOBuilder):
        yield builder, "load", lambda *_, **__: _NoExtension()


def _of_experts() -> Iterator[Replacement]:
    read = expert_parallel.rows_of_ranks

    # The host reads how many rows travel, which have no values: as many to each rank as they would be in balance.
    def balanced(rows: int, sent: Tensor, arriving: Tensor) -> tuple[list[int], list[int]]:
        to_each, _ = read(rows, sent, arriving)
        each = [rows // len(to_each) + (rank < rows % len(to_each)) for rank in range(len(to_each))]
        return each, each

    yield expert_parallel, "rows_of_ranks", balanced


class _NoExtension:
    """A compiled extension whose functions do nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0
