"""GGUF, the format of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Blocks of 32 weights of a row with scales in float16. Symmetric int4 becomes Q4_0, asymmetric Q4_1, int8 a row Q8_0; int6 a row
becomes Q6_K, whose blocks have 256 weights, or Q8_0 where rows are no multiple of that: the codes as they are, the scales
rounded to float16. llama.cpp rounds activations to 8 bits, so that its numbers differ a little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewbit.errors import CheckpointError, UnsupportedError, unknown
from fewbit.nn import QuantizedLayer
from fewbit.qtensor import QTensor
from fewbit.spec import per_channel
from fewbit.targets.native import load, next_name

BLOCK, SUPER_BLOCK = 32, 256
# llama.cpp computes by the architecture, which it knows by a name of its own.
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def export_gguf(folder: Path, out: Path) -> Path:
    """Write the language model in ``folder``, with its tokenizer, to the file ``out``; returns it.

    UnsupportedError without the package gguf, or for an architecture, scheme or tokenizer that the format or this writer
    does not have. CheckpointError if ``folder`` cannot be read or ``out`` cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("writing GGUF needs the package gguf: pip install 'fewbit[gguf]'.") from None
    model: Any = load(folder)
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in ARCHITECTURES:
        raise UnsupportedError(f"{folder}: {unknown('architecture', kind, ARCHITECTURES)}")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
    temporary = next_name(out.parent, out.name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out.parent}: cannot be made: {error}.") from error
    try:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _write_settings(writer, model.config, folder)
        _write_tokenizer(writer, folder, model.config.vocab_size)
        names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
        for name, weight in _weights(model).items():
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise UnsupportedError(f"{folder}: {name}: llama.cpp has no such tensor in {kind!r}.")
            order = _rotary_order(name, model.config) if ARCHITECTURES[kind] == "LLAMA" else None
            data, type_ = _encoded(name, weight, order)
            writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType[type_])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error}. Give a file that you may write to.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _weights(model: nn.Module) -> dict[str, Tensor | QTensor]:
    """Float tensors, and quantized weights by the name of the float one; tied ones once."""
    weights: dict[str, Tensor | QTensor] = {}
    done: set[int] = set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, QuantizedLayer) and id(module.weight_packed) not in done:
            done.add(id(module.weight_packed))
            weights[f"{dot}weight"] = module.qtensor()
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done:
                done.add(id(parameter))
                weights[dot + key] = parameter.detach()
    return weights


def _rotary_order(name: str, config: Any) -> Tensor | None:
    """The order of output channels in which llama.cpp turns neighbours into each other, where transformers turns halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def _encoded(name: str, weight: Tensor | QTensor, order: Tensor | None) -> tuple[NDArray[Any], str]:
    """The bytes of a tensor as ``[rows, bytes]``, or its numbers, and the name of its type."""
    if isinstance(weight, Tensor):
        weight = weight if order is None else weight[order]
        if weight.dim() == 1 or weight.dtype == torch.float32:
            return weight.float().numpy(), "F32"
        if weight.dtype == torch.float16:
            return weight.numpy(), "F16"
        return weight.contiguous().view(torch.uint8).numpy(), "BF16"
    spec, (rows, columns) = weight.spec, weight.shape
    by_row = spec.granularity == per_channel(0)
    size = columns if by_row else spec.granularity.group_size  # of what shares a scale
    fits = by_row or (spec.granularity.kind == "group" and size % BLOCK == 0)
    known = (spec.format == "int4" and not by_row) or (spec.format in ("int8", "int6") and spec.symmetric)
    if not known or not fits or spec.scale is not None or columns % BLOCK:
        raise UnsupportedError(
            f"{name}: found {spec.format} per {spec.granularity.kind}, {columns} columns; GGUF gets int4 in groups of a "
            f"multiple of {BLOCK}, or symmetric int8 or int6 in such groups or a row, with scales in one level, and rows of a "
            f"multiple of {BLOCK}. Recipe int4-symmetric makes such weights."
        )
    codes, scale = weight.codes, weight.scale_values
    zero = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point.float()
    if order is not None:
        codes, scale, zero = codes[order], scale[order], zero[order]
    if not bool(scale.half().isfinite().all()):
        raise UnsupportedError(
            f"{name}: a scale of {float(scale.max()):g} is beyond float16, which GGUF keeps scales in."
        )
    if spec.format == "int6" and by_row and columns % SUPER_BLOCK == 0:
        return _six_bits(codes, scale), "Q6_K"
    blocks = columns // BLOCK
    # The last group of a row may be short.
    scale, zero = (x.repeat_interleave(size // BLOCK, 1)[:, :blocks, None] for x in (scale, zero))
    codes = codes.view(rows, blocks, BLOCK)
    if spec.format != "int4":
        return _bytes(rows, scale, codes), "Q8_0"
    unsigned = (codes + 8).to(torch.uint8)  # the first half of a block in the low bits, the second in the high bits
    packed = unsigned[..., : BLOCK // 2] | (unsigned[..., BLOCK // 2 :] << 4)
    if weight.zero_point is None:
        return _bytes(rows, scale, packed), "Q4_0"
    return _bytes(rows, torch.cat([scale, -(zero + 8) * scale], 2), packed), "Q4_1"


def _six_bits(codes: Tensor, scale: Tensor) -> NDArray[np.uint8]:
    """Q6_K of int6 codes ``[rows, columns]`` with a scale a row. Each half of a block has four times 32 codes: in ``ql`` the
    first and the third share bytes, as the second and the fourth do, in ``qh`` all four."""
    rows, columns = codes.shape
    blocks = columns // SUPER_BLOCK
    quarters = (codes + 32).to(torch.uint8).view(rows, blocks, 2, 4, BLOCK)
    low, high = quarters & 15, quarters >> 4
    ql = low[..., :2, :] | (low[..., 2:, :] << 4)
    qh = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    ones = torch.ones(rows, blocks, SUPER_BLOCK // 16, dtype=torch.uint8)  # scales of scales
    d = scale.half().view(torch.uint8)[:, None].expand(rows, blocks, 2)
    data: NDArray[np.uint8] = torch.cat([ql.flatten(2), qh.flatten(2), ones, d], 2).numpy()
    return data.reshape(rows, -1)


def _bytes(rows: int, numbers: Tensor, codes: Tensor) -> NDArray[np.uint8]:
    """Rows of blocks: the numbers in float16, then the codes."""
    data: NDArray[np.uint8] = torch.cat(
        [numbers.half().contiguous().view(torch.uint8), codes.contiguous().view(torch.uint8)], 2
    ).numpy()
    return data.reshape(rows, -1)


def _write_settings(writer: Any, config: Any, folder: Path) -> None:
    rope: Mapping[str, Any] = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"{folder}: rotary embedding {rope['rope_type']!r} is not written to GGUF, 'default' is."
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def _write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """The tokenizer of tokenizer.json, byte-level or with SentencePiece's bytes."""
    import gguf

    path = folder / "tokenizer.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model, added = data["model"], {token["id"]: token for token in data.get("added_tokens") or ()}
        by_id = {
            **{index: token for token, index in model["vocab"].items()},
            **{i: t["content"] for i, t in added.items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"{path}: not a tokenizer that can be written to GGUF: {error}.") from None
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{path}: a tokenizer of type {model.get('type')!r} is not written to GGUF, 'BPE' is.")
    types = gguf.TokenType
    kinds = []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            kinds.append(types.UNUSED)
        elif token == model.get("unk_token"):
            kinds.append(types.UNKNOWN)
        elif index in added:
            kinds.append(types.CONTROL if added[index].get("special") else types.USER_DEFINED)
        else:
            kinds.append(types.BYTE if model.get("byte_fallback") and token.startswith("<0x") else types.NORMAL)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(size)])  # tokens are in the order of their merges
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(data, path))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=size).add_to_gguf(writer, quiet=True)


def _splitting(data: Any, path: Path) -> str:
    """llama.cpp's name of the way that a byte-level tokenizer splits texts before it merges."""
    text = json.dumps(data.get("pre_tokenizer"))
    if "Regex" in text:
        if r"\\p{N}{1,3}" in text:
            return "llama-bpe"
        if r"|\\p{N}|" in text:
            return "qwen2"
    elif "ByteLevel" in text:
        return "smollm" if '"Digits"' in text else "gpt-2"
    raise UnsupportedError(f"{path}: llama.cpp's name of its pre_tokenizer is not known here: {text[:200]}.")
