"""Packaging: lower bounds only, so that an installed jax is left alone.

requirements.txt has the tested versions; requirements-floors.txt has these bounds as pins, to test them.
"""

import pathlib

from setuptools import find_packages, setup

README = pathlib.Path(__file__).with_name("README.md")

setup(
    name="pasta_jax",
    version="0.1.0",
    description="Learned asynchronous decoding in JAX: a model marks independent parts of its answer, and they are decoded at once.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["pasta_jax", "pasta_jax.*"]), "pasta_jax.configs"],
    package_dir={"pasta_jax.configs": "configs"},
    package_data={
        "pasta_jax": [
            "py.typed",
            "annotate/*.toml",
            "data/almanac/**",
            "decoding/*.html",
            "demo/*.txt",
            "judges/*.toml",
            "reproduce/templates/*",
            "serve/*.html",
        ]
    },
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12.0",
        "jax>=0.8.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "protobuf>=7.36.1",  # what the protocol buffers of sentencepiece 0.2.3 need
        "requests>=2.31",
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.8.1"],
        "cuda": ["jax[cuda12]>=0.8.1"],
        "hf": ["huggingface_hub>=0.30", "jinja2>=3.1", "tokenizers>=0.20"],
        "gguf": ["gguf>=0.17.0", "tokenizers>=0.20"],
        "zstd": ["zstandard>=0.22; python_version < '3.14'"],  # later Pythons have it
        "parquet": ["pyarrow>=17.0"],
        "datasets": ["datasets>=3.0"],
        "tfds": ["array_record>=0.8.1", "tensorflow-datasets>=4.9.10"],
        "grain": ["array_record>=0.8.1", "grain>=0.2.15"],
        "serve": ["starlette>=0.40.0", "uvicorn>=0.31.0"],
        "inspect": ["inspect-ai>=0.3.285"],
        "lm-eval": ["lm-eval>=0.4.13"],
        "plot": ["jinja2>=3.1", "matplotlib>=3.9"],
        "kernels": ["tokamax==0.0.17; python_version >= '3.12'"],  # inner functions of it
        "tb": ["tensorboardX>=2.6.2.2"],
        "wandb": ["wandb>=0.31"],  # the first that goes with protobuf 7
    },
    entry_points={
        "console_scripts": ["pasta = pasta_jax.console:command"],
        "inspect_ai": ["pasta_jax = pasta_jax.adapters.inspect_ai:provider"],
    },
    classifiers=[
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
