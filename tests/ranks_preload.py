"""Imported once by the fork server of tests/ranks.py, so that every rank starts with these modules.

pytest, too: a rank imports the test's module, and the main module of the tests, which is pytest's own. Without it here
that was three quarters of the processor time of a short test. The first optimizer of a process imports torch._dynamo,
which takes each rank seconds.
"""

import functools
import gc
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")
# A graph's C++ is parsed rather than optimised. So it is compiled for no vectors, whose headers are the larger part, in
# the rank itself, without tries of what the processor has and without headers compiled ahead, which save nothing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

from megalm.engine.deepspeed_patches import decompose_tanh, limit_openmp_spin

decompose_tanh()
limit_openmp_spin()  # as launch/pretrain.py does, before torch is imported

import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch._inductor.config  # noqa: E402

import megalm.engine.zero_engine  # noqa: E402
import megalm.train.setup  # noqa: E402, F401
from megalm.engine import device  # noqa: E402
from megalm.engine.deepspeed_patches import import_muon_uncompiled  # noqa: E402

import_muon_uncompiled()

# What each run would import at its start.
for name in (
    *("typer.main", "typer.completion", "rich._emoji_codes", "sqlite3", "numpy.ma", "megalm.cli.options"),
    *("megalm.data.tokenizers.sentencepiece_tokenizer", "sentencepiece.sentencepiece_model_pb2", "filelock"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.comm.mori"),
):
    importlib.import_module(name)

# The base of the MFU alone, and a third of a short run's time. A rank that a launcher starts measures it in full.
device.measured_peak = functools.partial(device.measured_peak, repeats=1)
device._SECONDS = 0.0

torch._inductor.config.cpp.simdlen = 1
torch._inductor.config.cpp_cache_precompile_headers = False

gc.freeze()  # a rank's collections need not look through all of these again
