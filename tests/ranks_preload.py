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

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401

import megalm.engine.zero_engine
import megalm.train.setup  # noqa: F401

gc.freeze()  # a rank's collections need not look through all of these again
