"""llama.cpp: ggml through ctypes, and its server, both in the package xllamacpp."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers.layer import Layer


class GgmlParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


POINTER, SIZE, INT, LONG, TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
GGML = {  # what is called of the C API: result, arguments
    "ggml_init": (POINTER, GgmlParams),
    "ggml_free": (None, POINTER),
    "ggml_new_tensor_2d": (POINTER, POINTER, INT, LONG, LONG),
    "ggml_mul_mat": (POINTER, POINTER, POINTER, POINTER),
    "ggml_new_graph": (POINTER, POINTER),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_get_data": (POINTER, POINTER),
    "ggml_backend_cpu_init": (POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, POINTER, INT),
    "ggml_backend_cpu_buffer_type": (POINTER,),
    "ggml_backend_cpu_reg": (POINTER,),
    "ggml_backend_reg_dev_get": (POINTER, POINTER, SIZE),
    "ggml_backend_reg_get_proc_address": (POINTER, POINTER, TEXT),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_tensor_set": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_graph_compute": (INT, POINTER, POINTER),
    "ggml_cpu_has_avx512": (INT,),
    "ggml_quantize_chunk": (SIZE, INT, POINTER, POINTER, LONG, LONG, LONG, POINTER),
    "ggml_log_set": (None, POINTER, POINTER),
}
FLOAT32, Q4_0 = 0, 2  # ggml_type


@functools.cache
def ggml() -> Any:
    """ggml from the library in the package xllamacpp."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("no xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("*.so"))))
    for name, (result, *arguments) in GGML.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.silent = ctypes.CFUNCTYPE(None, INT, TEXT, POINTER)(lambda level, text, data: None)
    library.ggml_log_set(ctypes.cast(library.silent, POINTER), None)
    return library


class GgmlMemory:
    """A ggml context whose tensors, once made, get memory of a buffer type; freed with the object."""

    def __init__(self) -> None:
        self.context = ggml().ggml_init(GgmlParams(1 << 20, None, True))
        self.buffer: int | None = None

    def allocate(self, kind: int) -> None:
        self.buffer = ggml().ggml_backend_alloc_ctx_tensors_from_buft(self.context, kind)
        if not self.buffer:
            raise MemoryError("ggml_backend_alloc_ctx_tensors_from_buft")

    def __del__(self) -> None:
        if self.buffer:
            ggml().ggml_backend_buffer_free(self.buffer)
        ggml().ggml_free(self.context)


def llama_cpp_q4(weight: Tensor) -> Layer:
    """ggml_mul_mat with Q4_0 weights in the interleaved layout (buffer type CPU_REPACK) that llama.cpp itself uses on x86."""
    import gguf

    library = ggml()
    backend = library.ggml_backend_cpu_init()
    library.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    registry = library.ggml_backend_cpu_reg()
    find = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    device = library.ggml_backend_reg_dev_get(registry, 0)
    repacked = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(find)(device)[0]
    rows, columns = weight.shape

    blocks = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    weights = GgmlMemory()
    w = library.ggml_new_tensor_2d(weights.context, Q4_0, columns, rows)
    weights.allocate(repacked)
    library.ggml_backend_tensor_set(w, blocks.ctypes.data, 0, blocks.nbytes)

    def bind(x: Tensor) -> Callable[[], Any]:
        memory = GgmlMemory()
        source = library.ggml_new_tensor_2d(memory.context, FLOAT32, columns, len(x))
        product = library.ggml_mul_mat(memory.context, w, source)
        graph = library.ggml_new_graph(memory.context)
        library.ggml_build_forward_expand(graph, product)
        memory.allocate(library.ggml_backend_cpu_buffer_type())
        library.ggml_backend_tensor_set(source, x.data_ptr(), 0, x.nbytes)
        numbers = (ctypes.c_float * (rows * len(x))).from_address(library.ggml_get_data(product))
        output = np.ctypeslib.as_array(numbers).reshape(len(x), rows)

        def run() -> Any:
            if library.ggml_backend_graph_compute(backend, graph) != 0:
                raise RuntimeError("ggml_backend_graph_compute failed")
            return output

        run.keep = (weights, memory)  # type: ignore[attr-defined]
        return run

    return Layer(bind, blocks.nbytes, "avx512" if library.ggml_cpu_has_avx512() else "avx2")


def ggml_rounded(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The float32 ``weight`` as llama.cpp rounds it to a type. ``importance``: E[x^2] of its columns, an "imatrix"."""
    import gguf

    of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[of]
    rows, columns = weight.shape
    weight, data = weight.contiguous(), np.empty((rows, columns // block * size), np.uint8)
    matters = None if importance is None else importance.float().contiguous()
    pointer = None if matters is None else matters.data_ptr()
    written = ggml().ggml_quantize_chunk(of, weight.data_ptr(), data.ctypes.data, 0, rows, columns, pointer)
    if written != data.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {kind}, expected {data.nbytes}")
    return torch.from_numpy(gguf.dequantize(data, of))


def q4_k_m(name: str, columns: int, layers: int) -> str:
    """The type that llama.cpp gives a linear layer in its mixture Q4_K_M (llama-quant.cpp, llama_tensor_get_type_impl). Rows
    that are no multiple of 256 get the next simpler type."""
    layer = int(name.split(".")[2])
    first = layers // 8
    more = layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
    kind = "Q6_K" if more and name.endswith(("v_proj", "down_proj")) else "Q4_K"
    return kind if columns % 256 == 0 else {"Q6_K": "Q8_0", "Q4_K": "Q5_0"}[kind]


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, file: Path) -> int:
    """A LlamaForCausalLM as GGUF, matrices in Q4_0, with a vocabulary that is only as large as needed.

    Returns the bytes of the weights that one token reads.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    special, letters = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"w{index}" for index in range(config.vocab_size - len(special) - len(letters))]
    writer.add_token_list([*special, *letters, *words])
    writer.add_token_scores([0.0] * config.vocab_size)
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * len(letters), *[kinds.NORMAL] * len(words)]
    )

    nbytes = 0

    def add(name: str, weight: Tensor) -> None:
        nonlocal nbytes
        array = weight.detach().float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            array = gguf.quantize(array, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        if name != "token_embd.weight" or config.tie_word_embeddings:
            nbytes += array.nbytes

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for path, name in GGUF_NAMES.items():
            weight = layer.get_submodule(path).weight
            if name in heads:  # llama.cpp interleaves the two halves that a rotary embedding turns into each other
                weight = weight.unflatten(0, (heads[name], 2, -1)).transpose(1, 2).flatten(0, 2)
            add(f"blk.{index}.{name}.weight", weight)
    add("output_norm.weight", model.model.norm.weight)
    add("token_embd.weight", model.model.embed_tokens.weight)
    if not config.tie_word_embeddings:
        add("output.weight", model.lm_head.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return nbytes


def llama_cpp_decode(file: Path, prompt: list[int], count: int, threads: int) -> float:
    """Median seconds a greedy token of three runs."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_ctx = 256
    settings.n_parallel = 1
    settings.verbosity = -1
    server = xllamacpp.Server(settings)
    request = {"prompt": prompt, "n_predict": count, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
    runs = [server.handle_completions({**request, "cache_prompt": False})["timings"] for _ in range(3)]
    return statistics.median(1e-3 * run["predicted_per_token_ms"] for run in runs)
