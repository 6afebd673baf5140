"""Imported once by the fork server of tests/ranks.py, so that every rank starts with these modules."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")

import deepspeed  # noqa: F401
import torch  # noqa: F401

import megalm.engine.zero  # noqa: F401
