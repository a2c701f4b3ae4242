"""The ways to quantize that the benchmarks put beside fewbit.

``LINEAR`` maps a name to a function that makes one linear layer without bias from its weights. The other functions make
whole models. Whoever cannot be kept below AVX-512 (see ``measure.LIMITS``) says so in ``isa``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewbit
from fewbit.targets import tensor_bytes
from measure import ISA

for talkative in ("torchao", "torch.utils._pytree"):  # CUDA libraries that cannot be loaded; a deprecation
    logging.getLogger(talkative).setLevel(logging.CRITICAL)

GROUP = 32
# OpenVINO 2026.4 fails with ONEDNN_MAX_CPU_ISA=AVX2 on a CPU with AVX-512, and ONNX Runtime 1.32 has no such switch.
UNLIMITED = "native"


@dataclass(frozen=True)
class Layer:
    """One linear layer: ``bind`` an input ``[M, K]`` for a function that returns ``[M, N]``; bytes of weights and scales."""

    bind: Callable[[Tensor], Callable[[], Any]]
    nbytes: float
    isa: str = ISA


def from_module(module: nn.Module, nbytes: float | None = None, dtype: torch.dtype = torch.float32) -> Layer:
    def bind(x: Tensor) -> Callable[[], Any]:
        return functools.partial(module, x.to(dtype))

    return Layer(bind, tensor_bytes(module) if nbytes is None else nbytes)


def linear(weight: Tensor) -> nn.Linear:
    """The weights as nn.Linear, in eval mode; they are not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.eval()


# fewbit ----------------------------------------------------------------------------------------------------------------


def int4_dynamic() -> fewbit.Recipe:
    """4-bit weights and 8-bit activations, both in groups of 32."""
    if "int4-dynamic" in fewbit.presets():
        return fewbit.load_recipe("int4-dynamic")
    weight = fewbit.QuantSpec("int4", fewbit.per_group(GROUP), scale_dtype="bfloat16")
    scheme = fewbit.Scheme(weight, fewbit.QuantSpec("int8", fewbit.per_group(GROUP)), method="mse")
    rule = fewbit.Rule("type:Linear|Conv1D|LSTM|GRU", scheme, min_weights=1024, optional=True)
    return fewbit.Recipe("int4-dynamic", (rule,), ("split_attention",))


def int8_weight_only() -> fewbit.Recipe:
    scheme = fewbit.Scheme(fewbit.QuantSpec("int8", fewbit.per_channel()))
    return fewbit.Recipe("int8-weight-only", (fewbit.Rule("type:Linear", scheme),))


def rounded(recipe: fewbit.Recipe) -> fewbit.Recipe:
    """The recipe with every method plain rounding: for speed the codes do not matter, and they are found sooner."""
    rules = [
        rule if rule.scheme is None else replace(rule, scheme=replace(rule.scheme, method="rtn"))
        for rule in recipe.rules
    ]
    return replace(recipe, rules=tuple(rules))


def fewbit_linear(recipe: fewbit.Recipe, weight: Tensor) -> Layer:
    return from_module(fewbit.quantize(linear(weight), rounded(recipe)))


# torch -----------------------------------------------------------------------------------------------------------------


def torch_ao_dynamic(model: nn.Module, inplace: bool = False) -> nn.Module:
    """torch.ao's dynamic int8 (fbgemm)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {nn.Linear, nn.LSTM, nn.GRU}
        return torch.ao.quantization.quantize_dynamic(model, kinds, torch.qint8, inplace=inplace)


def torch_fp32(weight: Tensor) -> Layer:
    return from_module(linear(weight.clone()))  # a copy: with its own place in memory


def torch_bf16(weight: Tensor) -> Layer:
    return from_module(linear(weight.bfloat16()), dtype=torch.bfloat16)


def torch_ao_int8(weight: Tensor) -> Layer:
    module = torch_ao_dynamic(nn.Sequential(linear(weight)))
    return from_module(module, weight.numel() + 8 * len(weight))


def torch_int4(weight: Tensor) -> Layer:
    """ATen's 4-bit weights in groups of 32, bfloat16 activations."""
    codes, scale = int4_codes(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes).int().reshape(weight.shape), 1)
    # w = (code - 8) * scale + zero
    scale_and_zero = torch.stack([torch.from_numpy(scale).T, torch.zeros(scale.T.shape)], 2).bfloat16().contiguous()

    def bind(x: Tensor) -> Callable[[], Any]:
        return functools.partial(
            torch.ops.aten._weight_int4pack_mm_for_cpu, x.bfloat16(), packed, GROUP, scale_and_zero
        )

    return Layer(bind, packed.nbytes + scale_and_zero.nbytes)


def torchao_int8(weight: Tensor) -> Layer:
    """torchao's dynamic int8, eager: its tensor subclass costs about a millisecond a call."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = nn.Sequential(linear(weight.clone()))
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return from_module(module, weight.numel() + 4 * len(weight))


def int4_codes(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0 to 15 ``[N, groups, 32]`` and scales ``[N, groups]``: (code - 8) * scale."""
    groups = weight.view(len(weight), -1, GROUP).numpy()
    scale = np.abs(groups).max(2) / 7
    return (np.clip(np.round(groups / scale[..., None]), -8, 7) + 8).astype(np.uint8), scale


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


# ONNX Runtime ----------------------------------------------------------------------------------------------------------


def onnx_session(model: bytes | str, threads: int | None = None) -> Any:
    """A session whose idle threads sleep: spinning, as they do by default, they take the CPU from whoever is measured next."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def onnx_model(node: Any, weights: dict[str, np.ndarray], inputs: list[Any], outputs: list[Any]) -> Any:
    """A model of one node."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def onnx_dynamic(model: bytes) -> bytes:
    """ONNX Runtime's own dynamic int8, per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet_logging():
        file = Path(folder) / "int8.onnx"
        quantize_dynamic(onnx.load_from_string(model), file, per_channel=True, weight_type=QuantType.QInt8)
        return file.read_bytes()


def onnx_export(model: nn.Module, inputs: tuple[Any, ...], names: list[str], dynamic_shapes: Any = None) -> bytes:
    """The model as ONNX, constants folded by ONNX Runtime as its quantization wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, ready = Path(folder) / "exported.onnx", Path(folder) / "ready.onnx"
        torch.onnx.export(
            model,
            inputs,
            exported,
            input_names=names,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        quant_pre_process(exported, ready, skip_symbolic_shape=True)
        return ready.read_bytes()


class OnnxModule(nn.Module):
    """A session as a module whose inputs are named as in the model."""

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        super().__init__()
        self.session = onnx_session(model, threads)
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        feed = dict(zip(self.names, args, strict=False)) | kwargs
        return torch.from_numpy(self.session.run(None, {name: value.numpy() for name, value in feed.items()})[0])


def onnx_layer(model: bytes, nbytes: float) -> Layer:
    session = onnx_session(model)

    def bind(x: Tensor) -> Callable[[], Any]:
        feed = {"x": x.numpy()}
        return lambda: session.run(None, feed)[0]

    return Layer(bind, nbytes, UNLIMITED)


def onnx_int8(weight: Tensor) -> Layer:
    from onnx import helper

    rows, columns = weight.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx_model(node, {"w": weight.T.numpy()}, [("x", ["m", columns])], [("y", ["m", rows])])
    return onnx_layer(onnx_dynamic(model.SerializeToString()), weight.numel() + 5 * rows)


def onnx_int4(weight: Tensor) -> Layer:
    """MatMulNBits, activations rounded to int8 (accuracy_level 4)."""
    from onnx import helper

    rows, columns = weight.shape
    codes, scale = int4_codes(weight)
    settings = {"K": columns, "N": rows, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **settings)
    weights = {"w": nibbles(codes), "s": scale}
    model = onnx_model(node, weights, [("x", ["m", columns])], [("y", ["m", rows])])
    return onnx_layer(model.SerializeToString(), weight.numel() / 2 + scale.nbytes)


@contextlib.contextmanager
def quiet_logging() -> Any:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# OpenVINO --------------------------------------------------------------------------------------------------------------


@functools.cache
def openvino_core() -> Any:
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        # torch's oneDNN reads the limit once, in its first operation; OpenVINO's must not see it.
        torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))
        del os.environ["ONEDNN_MAX_CPU_ISA"]
    import openvino

    return openvino.Core()


def openvino_compiled(model: Any, **settings: Any) -> Any:
    threads = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    return openvino_core().compile_model(model, "CPU", {**threads, **settings})


class OpenvinoModule(nn.Module):
    """A compiled ONNX model as a module whose inputs are named as in the model."""

    def __init__(self, model: bytes, **settings: Any) -> None:
        super().__init__()
        openvino_core()
        import openvino

        self.request = openvino_compiled(openvino.convert_model(io.BytesIO(model)), **settings).create_infer_request()

    def forward(self, **inputs: Tensor) -> Tensor:
        feed = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.request.infer(feed)[0].copy())


def openvino_layer(node: Any, x: Any, nbytes: float, *owners: Any) -> Layer:
    """With the plugin's defaults: activations are quantized on the fly in groups of 32 where the CPU allows it.

    ``owners`` hold the memory of the constants.
    """
    import openvino
    from openvino import opset13

    model = openvino.Model([opset13.matmul(x, node, False, True)], [x])
    request = openvino_compiled(model).create_infer_request()

    def bind(x: Tensor) -> Callable[[], Any]:
        tensor = openvino.Tensor(x.numpy(), shared_memory=True)

        def run() -> Any:
            request.set_input_tensor(tensor)
            request.infer()
            return request.get_output_tensor().data

        run.keep = owners  # type: ignore[attr-defined]
        return run

    return Layer(bind, nbytes, UNLIMITED)


def openvino_int8(weight: Tensor) -> Layer:
    from openvino import opset13

    scale = (weight.abs().amax(1, keepdim=True) / 127).numpy()
    codes = np.round(weight.numpy() / scale).astype(np.int8)
    node = opset13.multiply(opset13.convert(opset13.constant(codes), "f16"), opset13.constant(scale.astype(np.float16)))
    x = opset13.parameter([-1, weight.shape[1]], np.float32)
    return openvino_layer(opset13.convert(node, "f32"), x, weight.numel() + 2 * len(weight))


def openvino_int4(weight: Tensor) -> Layer:
    import openvino
    from openvino import Type, opset13

    codes, scale = int4_codes(weight)
    packed, eight = nibbles(codes), np.array([8], np.uint8)

    def half(data: np.ndarray, shape: tuple[int, ...]) -> Any:
        return opset13.convert(opset13.constant(openvino.Tensor(data, openvino.Shape(shape), Type.u4)), "f16")

    node = opset13.subtract(half(packed, codes.shape), half(eight, (1, 1, 1)))
    node = opset13.multiply(node, opset13.constant(scale[..., None].astype(np.float16)))
    node = opset13.convert(opset13.reshape(node, opset13.constant(list(weight.shape)), False), "f32")
    x = opset13.parameter([-1, weight.shape[1]], np.float32)
    return openvino_layer(node, x, packed.nbytes + 2 * scale.size, packed, eight)


# llama.cpp -------------------------------------------------------------------------------------------------------------


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
    "ggml_log_set": (None, POINTER, POINTER),
}
FLOAT32, Q4_0 = 0, 2  # ggml_type


@functools.cache
def ggml() -> Any:
    """ggml from the library in the package xllamacpp."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no xllamacpp")
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


# -----------------------------------------------------------------------------------------------------------------------

LINEAR: dict[str, Callable[[Tensor], Layer]] = {
    "torch FP32": torch_fp32,
    "torch BF16": torch_bf16,
    "torch.ao int8": torch_ao_int8,
    "torch int4 g32": torch_int4,
    "torchao int8": torchao_int8,
    "ONNX Runtime int8": onnx_int8,
    "ONNX Runtime int4 g32": onnx_int4,
    "OpenVINO int8": openvino_int8,
    "OpenVINO int4 g32": openvino_int4,
    "llama.cpp Q4_0": llama_cpp_q4,
    "fewbit W8A8": lambda weight: fewbit_linear(fewbit.load_recipe("int8-dynamic"), weight),
    "fewbit W4A8 g32": lambda weight: fewbit_linear(int4_dynamic(), weight),
    "fewbit W8": lambda weight: fewbit_linear(int8_weight_only(), weight),
    "fewbit W4 g32": lambda weight: fewbit_linear(fewbit.load_recipe("int4-weight-only"), weight),
}
