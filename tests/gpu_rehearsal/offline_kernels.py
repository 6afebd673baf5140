"""Compile megalm's kernels for a GPU that is not there: Inductor writes them, Triton compiles them, none is launched.

`python offline_kernels.py LIBRARY CAPABILITY SHARED_BYTES` prints a JSON list of [kernel, bytes of shared memory, bytes
of machine code], with the library of fake_cuda_library.py. A process of its own: torch.cuda is replaced.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

from megalm.rehearsal.fake_cuda_library import load_library

_HEADS, _LENGTH, _CHUNK, _VOCABULARY = 8, 1024, 1024, 50304


def main() -> None:
    library, capability, shared = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ |= {
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool would be of processes with a real torch.cuda
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
        "TORCHINDUCTOR_USE_STATIC_TRITON_LAUNCHER": "0",
    }
    load_library(library)
    importlib.import_module("torch._dynamo")  # before torch.cuda is replaced, as in rehearsal_process.py

    found: list[tuple[str, int, int]] = []
    _fake_gpu(capability, shared)
    _record(found)
    for function, arguments in _functions(capability):
        _compile(function, arguments)
    print(json.dumps(found))  # noqa: T201
    sys.stdout.flush()
    os._exit(0)


def _fake_gpu(capability: int, shared: int) -> None:
    import torch
    import triton.runtime.driver
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    from megalm.rehearsal import stand_ins
    from megalm.rehearsal.fake_cuda import FakeCuda, GpuProperties
    from megalm.rehearsal.watcher import Watcher

    major, minor = divmod(capability, 10)
    FakeCuda(GpuProperties("GPU", 80 << 30, major, minor, shared), 1, Watcher()).install()
    for owner, name, value in stand_ins._of_torch(Watcher()):
        setattr(owner, name, value)
    # Inductor's interface has taken torch.cuda's own functions already.
    for name in (
        "get_device_properties",
        "current_device",
        "device_count",
        "is_available",
        "synchronize",
        "set_device",
    ):
        setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    CudaInterface.Worker.get_device_properties = staticmethod(torch.cuda.get_device_properties)  # type: ignore[method-assign]
    CudaInterface.get_compute_capability = staticmethod(lambda _=None: capability)  # type: ignore[method-assign]
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[attr-defined,assignment]

    class Driver:
        """What Triton's compiler asks of a driver."""

        class utils:
            @staticmethod
            def get_device_properties(_: int) -> dict[str, int]:
                return {"max_shared_mem": shared, "multiprocessor_count": 108, "warpSize": 32, "max_num_regs": 65536}

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int = 0) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda:0")

    triton.runtime.driver.set_active(Driver())


def _record(found: list[tuple[str, int, int]]) -> None:
    """Compile each kernel's first configuration, without loading it."""
    import torch._inductor.runtime.triton_helpers as helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def precompile(tuner: Any, *_: Any, **__: Any) -> None:
        kernel = tuner._precompile_config(tuner.configs[0]).kernel
        found.append((tuner.fn.__name__, kernel.metadata.shared, len(kernel.asm["cubin"])))

    CachingAutotuner.precompile = precompile  # type: ignore[method-assign,assignment]
    helpers.set_driver_to_gpu = lambda: None


def _functions(capability: int) -> Iterator[tuple[Callable[..., Any], list[Callable[[], Any]]]]:
    """What a run compiles on a GPU: the loss of a chunk, attention under a document mask, a block."""
    import torch

    from megalm.model.attention_kernels import flex_blocks
    from megalm.model.loss import chunk_loss

    low = {"device": "cuda:0", "dtype": torch.bfloat16 if capability >= 80 else torch.float16}
    logits = lambda: torch.empty(_CHUNK, _VOCABULARY, **low)  # noqa: E731
    labels = lambda: torch.zeros(_CHUNK, device="cuda:0", dtype=torch.int64)  # noqa: E731
    yield lambda scores, targets: chunk_loss(scores, targets, True), [logits, labels]

    flex_attention = torch.ops.higher_order.flex_attention  # what torch.compile makes of the function of this name
    options = {"PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False}
    options |= {"WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "BACKEND": "AUTO"}

    def attention(query: Any, key: Any, value: Any, outer: Any, documents: Any) -> Any:
        *blocks, allowed = flex_blocks(documents, documents).as_tuple()

        def mask(batch: Any, head: Any, row: Any, column: Any, documents: Any) -> Any:
            """The model's rule, with its documents as an argument, which the compiler makes of a closure."""
            cells = dict(zip(allowed.__code__.co_freevars, allowed.__closure__, strict=True))
            closure = tuple({**cells, "documents": CellType(documents)}.values())
            rule = FunctionType(allowed.__code__, allowed.__globals__, closure=closure)
            return rule(batch, head, row, column)

        scores = lambda score, *_: score  # noqa: E731
        scale = query.shape[-1] ** -0.5
        mixed, *_ = flex_attention(query, key, value, scores, (*blocks, mask), scale, options, (), (documents,))
        return mixed, *torch.autograd.grad(mixed, (query, key, value), outer)

    for width in (64, 128):
        heads = lambda width=width: torch.empty(2, _HEADS, _LENGTH, width, **low, requires_grad=True)  # noqa: E731
        documents = lambda: torch.zeros(2, _LENGTH, device="cuda:0", dtype=torch.int32)  # noqa: E731
        yield attention, [heads, heads, heads, heads, documents]


def _compile(function: Callable[..., Any], arguments: list[Callable[[], Any]]) -> None:
    import torch.nn.attention.flex_attention as flex
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # traced as the operator
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        given = [make() for make in arguments]
        graph = make_fx(function, decomposition_table=select_decomp_table())(*given)
    with tracing(TracingContext(mode)), V.set_fake_mode(mode):
        compile_fx_inner(graph, given)


if __name__ == "__main__":
    main()
