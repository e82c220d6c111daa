"""Measure what the memory model says: the peak of two updates of the dense trainer, in fp32 on a CPU, in a process of its own.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 OMP_NUM_THREADS=1 python tests/measure_memory.py 256 4 1024 8192 4 2

The shape is hidden, layers, intermediate, vocabulary, heads, key-value heads. Prints one line for baselines/memory.json. With these
settings glibc gives every larger block back, so that the resident size is what lives; in 16 bits a CPU makes fp32 copies that
no GPU has. A small model is trained before, so that libraries and their buffers are there when counting begins.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from peak import peak_mib, reset_peak

ROWS, LENGTH, PROMPT, HEAD_CHUNK = 2, 512, 16, 512
OPTIMIZER = {"name": "adamw", "lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def write(shape: list[int], folder: Path) -> None:
    """A random Qwen2 checkpoint, made in a child so that it leaves nothing in this process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, intermediate, vocab, heads, kv_heads = shape
    child = os.fork()
    if child == 0:
        config = Qwen2Config(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, tie_word_embeddings=False,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder)
        os._exit(0)
    os.waitpid(child, 0)


def update_twice(folder: Path, vocab: int, length: int) -> None:
    from suite.engines.batch import MiniBatch
    from suite.engines.trainers.load import load_trainer
    from suite.spec.algorithms import resolve

    train = {"engine": "dense", "score_batch_size": ROWS, "micro_batch_size": ROWS, "head_chunk_tokens": HEAD_CHUNK,
             "gradient_checkpointing": True, "grad_clip": 1.0, "optimizer": OPTIMIZER}  # fmt: skip
    trainer = load_trainer(folder, train, {"rollout": "fp32", "train": "fp32"}, 1.0)
    num = 2 * ROWS  # two micro-batches
    sequences = [(np.random.default_rng(i).integers(3, vocab, length).tolist(), PROMPT) for i in range(num)]
    logprobs = [np.full(length - PROMPT, -3.0, np.float32)] * num
    batch = MiniBatch(sequences, logprobs, logprobs, np.linspace(-1, 1, num, dtype=np.float32), length)
    for _ in range(2):
        trainer.update(batch, resolve("GRPO"))


def main(shape: list[int]) -> None:
    small, large = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    write([64, 2, 128, 512, 2, 2], small)
    write(shape, large)
    update_twice(small, 512, 64)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak()
    before = peak_mib()
    update_twice(large, shape[3], LENGTH)
    print(json.dumps({"shape": shape, "rows": ROWS, "length": LENGTH, "head_chunk_tokens": HEAD_CHUNK, "peak_mib": peak_mib() - before}))


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))
