"""SmolLM2-135M-Instruct from its GGUF file into a plain LlamaForCausalLM, with the file's 4-bit grid broken."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    def field(name: str) -> int | float:
        return reader.get_field(f"llama.{name}").contents()

    return LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def load_model(file: Path) -> LlamaForCausalLM:
    """The float32 model in eval mode."""
    reader = gguf.GGUFReader(file)
    config = read_config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.removeprefix("blk.").split(".")
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            # llama.cpp interleaves the two halves that a rotary embedding turns into each other.
            weight = weight.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        layer = f"layers.{block[0]}." if block else ""
        weights[f"model.{layer}{NAMES[kind]}.weight"] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    # A plain forward pass returns no key-value cache, which torch.export could not; `generate` still uses one.
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(file: Path) -> Tokenizer:
    """Byte-level BPE that splits numbers into digits."""
    reader = gguf.GGUFReader(file)
    vocabulary = {token: index for index, token in enumerate(reader.get_field("tokenizer.ggml.tokens").contents())}
    merges = [tuple(merge.split(" ")) for merge in reader.get_field("tokenizer.ggml.merges").contents()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@torch.no_grad()
def break_grid(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Rescale inner channels by random factors in [0.7, 1.4]; the model's function stays as it is.

    The weights are multiples of 4-bit steps in groups of 32, so a 4-bit format with that group would look lossless.
    The tied embedding (8-bit steps) keeps its values: it is the output layer too.
    """
    generator = torch.Generator().manual_seed(seed)
    repeats = model.config.num_attention_heads // model.config.num_key_value_heads
    head = model.config.hidden_size // model.config.num_attention_heads

    def factors(count: int) -> Tensor:
        return torch.empty(count).uniform_(0.7, 1.4, generator=generator)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = factors(len(norm.weight))
            norm.weight.mul_(factor)
            for reader in readers:
                reader.weight.div_(factor)
        factor = factors(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(factor[:, None])
        # Each value head serves `repeats` query heads.
        attention.o_proj.weight.div_(factor.unflatten(0, (-1, head)).repeat_interleave(repeats, 0).flatten())
        factor = factors(mlp.up_proj.out_features)
        mlp.up_proj.weight.mul_(factor[:, None])
        mlp.down_proj.weight.div_(factor)
