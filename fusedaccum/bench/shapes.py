"""The parameter shapes of models: given, of a config, or GPT-2's and Llama's."""

from __future__ import annotations

import math
import re
from pathlib import Path

Shapes = list[tuple[int, ...]]


def parse(text: str) -> Shapes:
    """`4096x4096,50257x768*2,768`: shapes, each maybe a number of times.

    Raises:
        ValueError: naming the part that is none.
    """
    found: Shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:x\d+)*)(?:\*(\d+))?\s*", part)
        shape = tuple(int(size) for size in match[1].split("x")) if match else ()
        times = int(match[2] or 1) if match else 0
        if not match or not all(shape) or not times:
            raise ValueError(
                f"--shapes got {part.strip()!r}; a shape is sizes from 1 on joined by x, maybe * "
                "and how many of it: 4096x4096, 768 or 768x3072*12"
            )
        found += [shape] * times
    return found


def _block(dim: int) -> Shapes:
    """A layer of GPT-2's kind."""
    return [
        *((dim,), (dim,)),
        *((dim, 3 * dim), (3 * dim,), (dim, dim), (dim,)),
        *((dim,), (dim,)),
        *((dim, 4 * dim), (4 * dim,), (4 * dim, dim), (dim,)),
    ]


def gpt(dim: int, vocabulary: int, positions: int, layers: int) -> Shapes:
    """GPT-2's shapes; the head is the token embedding."""
    return [(vocabulary, dim), (positions, dim), *_block(dim) * layers, (dim,), (dim,)]


def llama(
    dim: int, key_value: int, hidden: int, vocabulary: int, layers: int, *, is_tied: bool
) -> Shapes:
    """Llama's shapes; `key_value` is the width of all key heads together.

    Args:
        is_tied: whether the head is the token embedding.
    """
    block: Shapes = [
        *((dim, dim), (key_value, dim), (key_value, dim), (dim, dim)),
        *((hidden, dim), (hidden, dim), (dim, hidden)),
        *((dim,), (dim,)),
    ]
    head: Shapes = [] if is_tied else [(vocabulary, dim)]
    return [(vocabulary, dim), *block * layers, (dim,), *head]


# Models that need no config: GPT-2, TinyLlama 1.1B and Llama 3.1 8B.
PRESETS: dict[str, Shapes] = {
    "gpt2": gpt(768, 50257, 1024, 12),
    "llama-1b": llama(2048, 256, 5632, 32_000, 22, is_tied=False),
    "llama-8b": llama(4096, 1024, 14336, 128_256, 32, is_tied=False),
}


def default(device_type: str) -> tuple[str, Shapes]:
    """What is measured without being asked: beyond any cache, and quick enough for the machine."""
    if device_type == "cuda":
        return "GPT-2", PRESETS["gpt2"]
    return "a small GPT", gpt(512, 16384, 512, 6)


def is_there(path: str) -> bool:
    """Whether a file or folder of that name exists; "" is none, where Path("") is the current."""
    return bool(path) and Path(path).exists()


def of_model(path: str, instead: str = "--shapes") -> Shapes:
    """Shapes of the model that a transformers config describes; no weight is read or made.

    Args:
        path: a folder with a config.json, or the file itself.
        instead: the option that needs no transformers.

    Raises:
        ValueError: where it, or transformers, is not there, or the config describes no model that
            transformers knows.
    """
    if not is_there(path):
        raise ValueError(f"--model got {path!r}, which does not exist; a folder or a config.json")
    try:
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(
            f"--model needs transformers ({error}): pip install transformers, or use {instead}"
        ) from error
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(config)
            except ValueError:  # no language model: an encoder, say
                model = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--model got {path!r}, which transformers cannot use: {reason}"
        ) from error
    return [tuple(param.shape) for param in model.parameters()]


def count(shapes: Shapes) -> int:
    """Parameters in all."""
    return sum(math.prod(shape) for shape in shapes)
