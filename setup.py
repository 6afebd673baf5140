"""Package metadata. `make` installs the exact versions of requirements.lock; the ranges here are what works."""

from setuptools import find_packages, setup

setup(
    name="megalm",
    version="0.1.0",
    description="Large-model pretraining with DeepSpeed, every parallel mode proven on a CPU",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megalm", "megalm.*"]),
    package_data={
        "megalm": [
            "presets/**/*.yaml",
            "tracking/report/*.html",
            "tracking/report/*.css",
            "rehearsal/*.cpp",
            "py.typed",
        ]
    },
    install_requires=[
        "torch>=2.9,<2.14",
        "deepspeed==0.19.8",
        "numpy>=1.26",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.20",
        "pyarrow>=17",
        "mlflow>=3.4",
        "pydantic>=2.9",
        "hjson>=3.1",
        "typer>=0.15",
        "rich>=13",
        "PyYAML>=6",
        "safetensors>=0.5",
        "matplotlib>=3.9",
        "backports.zstd>=1.0",
        "datasketch>=2.0",
        "orjson>=3.10",
        "psutil>=6",
        "tqdm>=4.66",
        "Jinja2>=3.1",
        "filelock>=3.30",
        "fsspec>=2024.6",
    ],
    extras_require={
        "gpu-rehearsal": ["triton>=3.5"],  # tests/gpu_rehearsal/test_kernels.py
        "gpu-metrics": ["nvidia-ml-py>=12.535"],  # temperatures, and MLflow's system metrics of NVIDIA GPUs
        "gguf": ["gguf>=0.17"],  # megalm export --to gguf
        "eval": ["lm-eval==0.4.13"],  # megalm evaluate --tasks
        "tensorboard": ["tensorboard>=2.16"],
        "s3": ["s3fs>=2024.6"],  # s3:// addresses of inputs and copies
        "gs": ["gcsfs>=2024.6"],
        "hf": ["huggingface_hub>=0.27"],  # hf:// addresses of inputs
        "wandb": ["wandb>=0.19"],
    },
    entry_points={"console_scripts": ["megalm = megalm.cli.main:main"]},
)
