"""GGUF: the codes as they are, and llama.cpp computes the same."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import CheckpointError, QuantSpec, Recipe, Rule, Scheme, UnsupportedError, per_channel, per_group
from fewbit.pipeline import sites_of
from fewbit.targets.gguf import export_gguf

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")
GROUPS = per_group(32)
Quantizer = Callable[[Any, QuantSpec], Path]
WEIGHTS = {
    "Q4_0": QuantSpec("int4", GROUPS, scale_dtype="bfloat16"),
    "Q4_1": QuantSpec("int4", GROUPS, symmetric=False),
    "Q8_0": QuantSpec("int8", per_channel(0)),
    "Q6_K": QuantSpec("int6", per_channel(0)),
    "Q4_0 in groups of 64": QuantSpec("int4", per_group(64), scale_dtype="bfloat16"),
}
# llama.cpp in a process of its own: what it logs and leaves behind is not ours.
LLAMA_CPP = """
import json, sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.n_ctx, settings.n_parallel, settings.verbosity = 256, 1, -1
server = xllamacpp.Server(settings)
request = {"prompt": json.loads(sys.argv[2]), "n_predict": 64, "samplers": ["top_k"], "top_k": 1}
answer = server.handle_completions({**request, "ignore_eos": True, "n_probs": 1})
tokens = answer["choices"][0]["logprobs"]["content"]
print(json.dumps([[token["id"], token["logprob"]] for token in tokens]))
"""


@pytest.fixture
def quantized_folder(write_tokenizer: Callable[[Path], None], tmp_path: Path) -> Quantizer:
    """A model of transformers with a tokenizer, quantized to a folder."""

    def make(model: Any, weight: QuantSpec) -> Path:
        model.save_pretrained(tmp_path / "hf")
        write_tokenizer(tmp_path / "hf")
        recipe = Recipe("test", (Rule("type:Linear|Embedding", Scheme(weight)),))
        return fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", recipe)

    return make


def llama_cpp(file: Path, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """64 tokens that llama.cpp goes on with, and their log probabilities."""
    command = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(prompt)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer = json.loads(result.stdout.strip().splitlines()[-1])
    return [token for token, _ in answer], torch.tensor([logprob for _, logprob in answer])


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


@pytest.mark.skipif(not has_llama_cpp(), reason="needs xllamacpp")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_llama_cpp_computes_the_same(
    decoder: Callable[..., Any], quantized_folder: Quantizer, name: str, tied: bool, kind: str, tmp_path: Path
) -> None:
    if name != "llama" and kind != "Q4_0":
        pytest.skip("one kind is enough")
    hidden = 256 if kind == "Q6_K" else 128
    sizes = {"vocab_size": 512, "hidden_size": hidden, "intermediate_size": 256, "tie_word_embeddings": tied}
    head = {"head_dim": 32} if name == "qwen3" else {}
    model = decoder(name, torch.float32, **sizes, **head)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 4
        elif name == "qwen2" and parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    file = export_gguf(quantized_folder(model, WEIGHTS[kind]), tmp_path / "model.gguf")
    prompt = [5, 77, 300, 41, 41, 8, 222, 9, 130]
    tokens, logprobs = llama_cpp(file, prompt)
    assert len(tokens) == 64
    with torch.no_grad():
        logits = fewbit.load(tmp_path / "out")(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    own = expected[torch.arange(64), torch.tensor(tokens)]
    # It rounds activations to 8 bits, which may decide between tokens that are nearly as probable.
    assert float((own - logprobs).abs().max()) < 0.15
    assert float((expected.amax(-1) - own).max()) < 0.15


@pytest.mark.skipif(not has_llama_cpp(), reason="needs xllamacpp")
def test_the_same_text_from_a_model_that_knows_one(
    decoder: Callable[..., Any], quantized_folder: Quantizer, tmp_path: Path
) -> None:
    model = decoder("llama", torch.float32, vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    text = torch.randint(3, 480, (80,), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(input_ids=text[None], labels=text[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = quantized_folder(model, WEIGHTS["Q4_0"])
    tokens, _ = llama_cpp(export_gguf(folder, tmp_path / "model.gguf"), text[:10].tolist())
    made = fewbit.load(folder).generate(text[None, :10], max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert tokens == made[0, 10:].tolist() == text[10:74].tolist()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_numbers_are_those_of_the_model_up_to_float16(
    decoder: Callable[..., Any], quantized_folder: Quantizer, kind: str, tmp_path: Path
) -> None:
    model = decoder("qwen2", torch.float32, vocab_size=512, hidden_size=256, intermediate_size=544)
    folder = quantized_folder(model, WEIGHTS[kind])
    reader = gguf.GGUFReader(export_gguf(folder, tmp_path / "model.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    sites = dict(sites_of(fewbit.load(folder)))
    assert found["blk.0.attn_q.weight"].tensor_type.name == kind.split()[0]
    for theirs, ours in (("blk.2.ffn_down", "model.layers.2.mlp.down_proj"), ("token_embd", "model.embed_tokens")):
        tensor = found[f"{theirs}.weight"]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weight: Any = sites[ours].weight
        torch.testing.assert_close(values, weight, atol=2e-3 * float(weight.abs().max()), rtol=0)
    assert found["output_norm.weight"].tensor_type.name == "F32"


def test_settings_and_tokenizer(decoder: Callable[..., Any], quantized_folder: Quantizer, tmp_path: Path) -> None:
    folder = quantized_folder(decoder(vocab_size=512), WEIGHTS["Q8_0"])
    reader = gguf.GGUFReader(export_gguf(folder, tmp_path / "deep" / "model.gguf"))

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    assert field("general.architecture") == "llama" and field("llama.attention.head_count_kv") == 2
    tokens = field("tokenizer.ggml.tokens")
    assert len(tokens) == 512 and tokens[1] == "</s>" and tokens[511] == "[PAD511]"
    kinds = field("tokenizer.ggml.token_type")
    assert (
        kinds[1] == gguf.TokenType.CONTROL and kinds[5] == gguf.TokenType.NORMAL and kinds[511] == gguf.TokenType.UNUSED
    )
    assert field("tokenizer.ggml.pre") == "gpt-2" and len(field("tokenizer.ggml.merges")) > 100
    assert field("tokenizer.ggml.eos_token_id") == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (QuantSpec("int4", per_group(16)), "found int4 per group, .* columns"),
        (QuantSpec("nf4", GROUPS), "found nf4 per group"),
        (QuantSpec("int8"), "found int8 per tensor"),
        (QuantSpec("int8", per_group(16)), "found int8 per group"),
        (QuantSpec("int6", per_channel(1)), "found int6 per channel"),
        (QuantSpec("uint8", per_channel(0), symmetric=False), "found uint8 per channel"),
    ],
    ids=["small-groups", "nf4", "per-tensor", "small-groups-8", "by-column", "uint8"],
)
def test_schemes_that_do_not_fit(
    decoder: Callable[..., Any], quantized_folder: Quantizer, weight: QuantSpec, message: str, tmp_path: Path
) -> None:
    folder = quantized_folder(decoder(vocab_size=512), weight)
    with pytest.raises(UnsupportedError, match=message):
        export_gguf(folder, tmp_path / "file" / "model.gguf")
    assert not list((tmp_path / "file").iterdir())


def test_other_models_and_tokenizers_are_refused(
    decoder: Callable[..., Any], quantized_folder: Quantizer, tmp_path: Path
) -> None:
    folder = quantized_folder(decoder(vocab_size=512), WEIGHTS["Q4_0"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for change in (
        {"model": {**tokenizer["model"], "type": "WordPiece"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": 1},
    ):
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **change}))
        with pytest.raises(UnsupportedError, match=r"tokenizer.json: "):
            export_gguf(folder, tmp_path / "model.gguf")
    decoder("phi", vocab_size=512).save_pretrained(tmp_path / "phi")
    fewbit.quantize_folder(tmp_path / "phi", tmp_path / "phi-out", "int4-symmetric")
    with pytest.raises(UnsupportedError, match="unknown architecture 'phi'"):
        export_gguf(tmp_path / "phi-out", tmp_path / "model.gguf")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    decoder(vocab_size=512, rope_parameters=rope).save_pretrained(tmp_path / "rope")
    fewbit.quantize_folder(tmp_path / "rope", tmp_path / "rope-out", "int4-symmetric")
    with pytest.raises(UnsupportedError, match="rotary embedding 'linear' is not written"):
        export_gguf(tmp_path / "rope-out", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_place_that_cannot_be_written(
    decoder: Callable[..., Any], quantized_folder: Quantizer, tmp_path: Path
) -> None:
    folder = quantized_folder(decoder(vocab_size=512), WEIGHTS["Q4_0"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file: cannot be made"):
        export_gguf(folder, tmp_path / "file" / "model.gguf")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fewbit\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
