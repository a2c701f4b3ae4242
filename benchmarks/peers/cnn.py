"""Static INT8 of a CNN by each peer, and FP32 beside it.

A function of ``CNN`` takes the float model in eval mode, batches of images that calibrate, an example to be ready for and a
folder for files; it returns a module from ``[N, C, H, W]`` to ``[N, classes]`` for any N, with as many threads as torch has
when it is made. ONNX Runtime's engines take every N as it comes. OpenVINO's and Inductor's are made for one shape, which is
faster: another shape is compiled when it first comes. What reads ONNX shares one export in the folder.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers.onnxruntime import OnnxModule, onnx_export, quiet_logging
from peers.openvino import openvino_compiled, openvino_core

Make = Callable[[nn.Module, Sequence[Tensor], Tensor, Path], nn.Module]


def exported(model: nn.Module, calibration: Sequence[Tensor], workdir: Path) -> bytes:
    """The float model as ONNX, whose input is ``x``."""
    file = workdir / "float.onnx"
    if not file.exists():
        # One image would make a batch of one a part of the graph.
        file.write_bytes(onnx_export(model, (calibration[0][:2],), ["x"], ({0: torch.export.Dim("batch")},)))
    return file.read_bytes()


def single_images(calibration: Sequence[Tensor]) -> list[Any]:
    return [image[None].numpy() for batch in calibration for image in batch]


def onnxruntime_fp32(model: nn.Module, calibration: Sequence[Tensor], example: Tensor, workdir: Path) -> nn.Module:
    return OnnxModule(exported(model, calibration, workdir))


def onnxruntime_static(
    model: nn.Module, calibration: Sequence[Tensor], example: Tensor, workdir: Path, reduce_range: bool = False
) -> nn.Module:
    """ONNX Runtime's own static int8: QDQ, weights per channel, ranges of activations by min and max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter(single_images(calibration))

        def get_next(self) -> Any:
            return next(({"x": item} for item in self.items), None)

    exported(model, calibration, workdir)
    file = workdir / "int8.onnx"
    with quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            workdir / "float.onnx", file, Reader(), QuantFormat.QDQ, per_channel=True, reduce_range=reduce_range
        )
    return OnnxModule(file.read_bytes())


class OpenvinoImages(nn.Module):
    """An OpenVINO model with one input and one output, compiled for each shape that comes."""

    def __init__(self, model: Any, example: Tensor) -> None:
        super().__init__()
        self.model = model
        self.threads = torch.get_num_threads()
        self.requests: dict[torch.Size, Any] = {}
        self(example)

    def request(self, shape: torch.Size) -> Any:
        if shape not in self.requests:
            self.model.reshape(list(shape))
            settings = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": "f32"}
            self.requests[shape] = openvino_compiled(self.model, **settings).create_infer_request()
        return self.requests[shape]

    def forward(self, x: Tensor) -> Tensor:
        import openvino

        request = self.request(x.shape)
        array = x.contiguous().numpy()
        request.set_input_tensor(openvino.Tensor(array, shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data.copy())  # the next call writes to the same place


def openvino_model(model: nn.Module, calibration: Sequence[Tensor], workdir: Path) -> Any:
    openvino_core()
    import openvino

    return openvino.convert_model(io.BytesIO(exported(model, calibration, workdir)))


def openvino_fp32(model: nn.Module, calibration: Sequence[Tensor], example: Tensor, workdir: Path) -> nn.Module:
    return OpenvinoImages(openvino_model(model, calibration, workdir), example)


def openvino_nncf(model: nn.Module, calibration: Sequence[Tensor], example: Tensor, workdir: Path) -> nn.Module:
    """nncf.quantize as it is by default: fast bias correction, the preset that it chooses itself."""
    converted = openvino_model(model, calibration, workdir)
    import nncf

    nncf.set_log_level(logging.ERROR)
    images = single_images(calibration)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # progress bars
        warnings.simplefilter("ignore")
        quantized = nncf.quantize(converted, nncf.Dataset(images), subset_size=len(images))
    return OpenvinoImages(quantized, example)


class Compiled(nn.Module):
    """A model by Inductor, with its weights as constants, compiled for each shape that comes."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.compiled = torch.compile(model, dynamic=False, options={"cpp_wrapper": True})
        self.shapes: set[torch.Size] = set()
        before = example.clone()
        self(example)
        # Inductor's int8 code writes to an input that is also added to the result of a quantized layer.
        if not torch.equal(before, example):
            raise RuntimeError("Inductor's code overwrote its input; it needs a copy.")

    def forward(self, x: Tensor) -> Tensor:
        # A tensor of inference mode, and other strides, would be compiled for again.
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone(memory_format=torch.contiguous_format) if x.is_inference() else x.contiguous()
            if x.shape in self.shapes:
                return self.compiled(x)
            self.shapes.add(x.shape)
            # Dynamo asks for it too, so that an option of torch.compile is not enough.
            with torch._inductor.config.patch(freezing=True), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.compiled(x)


def torch_compiled(model: nn.Module, calibration: Sequence[Tensor], example: Tensor, workdir: Path) -> nn.Module:
    return Compiled(model, example)


def torchao_pt2e(model: nn.Module, calibration: Sequence[Tensor], example: Tensor, workdir: Path) -> nn.Module:
    """torchao's PT2E for x86: X86InductorQuantizer's defaults, then Inductor."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not strict, the graph of a model with a shared ReLU module is one that the quantizer refuses.
        program = torch.export.export(
            model, (calibration[0][:2],), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True
        )
        prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
        for batch in calibration:
            prepared(batch)
        return Compiled(convert_pt2e(prepared), example)


CNN: dict[str, Make] = {
    "torch FP32": lambda model, calibration, example, workdir: model,
    "torch FP32 compiled": torch_compiled,
    "ONNX Runtime FP32": onnxruntime_fp32,
    "OpenVINO FP32": openvino_fp32,
    "ONNX Runtime static": onnxruntime_static,
    "ONNX Runtime static, reduce_range": partial(onnxruntime_static, reduce_range=True),
    "OpenVINO + NNCF": openvino_nncf,
    "torchao PT2E": torchao_pt2e,
}

PACKAGES = {
    "torch FP32 compiled": ("torch._inductor.compile_fx",),
    "torchao PT2E": ("torch._inductor.compile_fx", "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"),
    "ONNX Runtime": ("onnxscript", "onnxruntime.quantization"),
    "OpenVINO": ("onnxscript", "onnxruntime.quantization"),
    "OpenVINO + NNCF": ("nncf",),
}


def preload(name: str) -> None:
    """Import what a candidate needs, so that neither its time nor its memory are those of imports."""
    if "OpenVINO" in name:
        openvino_core()
    for part, packages in PACKAGES.items():
        if part in name:
            for package in packages:
                importlib.import_module(package)
