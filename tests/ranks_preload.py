"""Imported once by the fork server of tests/ranks.py, so that every rank starts with these modules.

pytest, too: a rank imports the test's module, and the main module of the tests, which is pytest's own. Without it here
that was three quarters of the processor time of a short test. The first optimizer of a process imports torch._dynamo,
which takes each rank seconds.
"""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")

from megalm.engine.deepspeed_patches import decompose_tanh, limit_openmp_spin

decompose_tanh()
limit_openmp_spin()  # as launch/pretrain.py does, before torch is imported

import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import megalm.engine.zero_engine  # noqa: E402
import megalm.train.setup  # noqa: E402, F401
from megalm.engine.deepspeed_patches import import_muon_uncompiled  # noqa: E402

import_muon_uncompiled()

gc.freeze()  # a rank's collections need not look through all of these again
