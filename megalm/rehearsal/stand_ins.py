"""Replacements of what a CPU build of torch or a fake tensor cannot do, each with its reason; the rest runs as it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

_ampere = 8


def install(capability: tuple[int, int], sequence_length: int) -> None:
    """Replace them for the rest of the process."""
    _torch()
    _kernels(capability)
    _distributed()
    _deepspeed(sequence_length)


def _torch() -> None:
    # `nn.Module.to` swaps fake tensors with their copies, which fails where a hook holds them; `.data` serves, once a
    # fake tensor's device follows its data.
    torch.utils.swap_tensors = _take_data  # type: ignore[assignment]
    data = torch.Tensor.data

    def set_data(tensor: Any, value: Any) -> None:
        data.__set__(tensor, value)  # type: ignore[attr-defined]
        tensor.fake_device = value.device

    FakeTensor.data = property(data.__get__, set_data)  # type: ignore[attr-defined,assignment]
    # Values that the host takes from its own copy.
    FakeTensor.numpy = lambda tensor, **_: np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))  # type: ignore[method-assign]
    FakeTensor.tolist = lambda tensor: tensor.numpy().tolist()  # type: ignore[method-assign]
    # FakeTensorMode would open a CUDA context.
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[attr-defined,assignment]



def _take_data(old: Tensor, new: Tensor) -> None:
    old.data = new


def _kernels(capability: tuple[int, int]) -> None:
    """A CPU build has no fused kernels for "cuda" and would take these functions apart: call what CUDA would run."""
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention")  # not the function of its name
    whole = functional.scaled_dot_product_attention

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
        if query.device.type != "cuda":
            return whole(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        flash = attn_mask is None and query.dtype != torch.float32 and capability[0] >= _ampere
        if enable_gqa and not flash:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if flash:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False)[0]
        if attn_mask is not None:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).expand(
                *query.shape[:3], key.shape[2]
            )
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal
        )[0]

    functional.scaled_dot_product_attention = attention
    # Layer norm keeps the same for its backward pass as the fused RMS norm, and a mean for each token.
    functional.rms_norm = lambda x, shape, weight=None, eps=None: functional.layer_norm(x, shape, weight, None, eps)
    # Called without torch.compile, which would compile kernels; the operator itself holds no scores.
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[attr-defined]


def _distributed() -> None:
    """Every group is of torch's fake backend, which sends nothing and needs no other rank."""
    new_group = dist.new_group

    def fake_group(*args: Any, **options: Any) -> Any:
        return new_group(*args, **{**options, "backend": "fake"})

    dist.new_group = dist.distributed_c10d.new_group = fake_group


def _deepspeed(sequence_length: int) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3

    # ZeRO 3 compares numbers that rank 0 sent with its own: no rank has sent any.
    for module in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
        for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, name):
                setattr(module, name, _agrees)
    # The C++ update of offloaded states reads memory, which fake tensors have none of.
    CPUAdamBuilder.load = lambda *_, **__: _NoUpdate()
    AsyncIOBuilder.load = lambda *_, **__: _NoUpdate()

    # The stage before has sent no size of its hidden states.
    def received(engine: Any, _: Any) -> Any:
        stage = engine.module
        size = [engine.train_micro_batch_size_per_gpu(), sequence_length // stage.slices, stage.hidden_size]
        return engine._allocate_or_extend_buffers(0, size, next(stage.parameters()).dtype)

    PipelineEngine._recv_tensor_meta = received


def _agrees(*_: Any, **__: Any) -> None:
    return None


class _NoUpdate:
    """A compiled extension each of whose functions does nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0
