"""Tiny models and data that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit


class ConvNet(nn.Module):
    """Convolutions with batch norm, a skip connection and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    """An embedding, a bidirectional LSTM and a head; every matrix is large enough for the presets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 64)
        self.lstm = nn.LSTM(64, 48, bidirectional=True, batch_first=True)
        self.head = nn.Linear(96, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Encoder(nn.Module):
    """Two transformer layers with their attention, large enough for the presets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def randomize_norms(model: nn.Module) -> None:
    """Statistics and parameters of batch norms as training leaves them."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)


@pytest.fixture(scope="session")
def net() -> type[Net]:
    """For small networks written where they are needed."""
    return Net


@pytest.fixture(scope="session")
def static() -> fewbit.Recipe:
    """int8-static for every layer, whatever it costs."""
    return replace(fewbit.load_recipe("int8-static"), sensitive=None)


@pytest.fixture(scope="session")
def fashion() -> fewbit.Task:
    """The demo's real model and data: not to be changed."""
    return fewbit.load_task(Path(__file__).parents[1] / "examples" / "fashion_mnist" / "task.py")


@pytest.fixture
def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = ConvNet()
    randomize_norms(model)
    return model.eval()


@pytest.fixture
def tagger() -> nn.Module:
    torch.manual_seed(1)
    return Tagger().eval()


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(2)
    return Encoder().eval()


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 4)).eval()


@pytest.fixture
def images() -> list[Tensor]:
    """Four batches for ``cnn``."""
    generator = torch.Generator().manual_seed(10)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]


@pytest.fixture
def tokens() -> list[Tensor]:
    """Three batches for ``tagger`` and ``encoder``."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 200, (3, 7), generator=generator) for _ in range(3)]


@pytest.fixture
def vectors() -> list[Tensor]:
    """Four batches for ``mlp``."""
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(8, 256, generator=generator) for _ in range(4)]


def language_model(name: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """A tiny random decoder of transformers in eval mode; ``settings`` of its configuration."""
    import transformers

    common = {
        "vocab_size": 192,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    sizes: dict[str, Any] = {
        "llama": {},
        "qwen2": {},
        "qwen3": {"head_dim": 16},
        "mistral": {},
        "gemma": {"head_dim": 16},
        "phi": {},
        "phi3": {},
        "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "mixtral": {"num_local_experts": 4},
    }
    own = {**({} if name == "gpt2" else common), **sizes[name], "vocab_size": 192, "pad_token_id": 0, **settings}
    config = transformers.AutoConfig.for_model(name, **own)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="session")
def decoder() -> Callable[..., Any]:
    """``language_model``."""
    return language_model


@pytest.fixture(scope="session")
def decoder_batch() -> dict[str, Tensor]:
    """Two texts for ``decoder``, the second one shorter and padded on its left."""
    tokens = torch.randint(3, 192, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Writes a byte-level BPE tokenizer of ASCII to a folder: 480 tokens, each of which is a text of its own."""

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<s>", "</s>"], initial_alphabet=letters)
        text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().encode("ascii", "ignore").decode()
        tokenizer.train_from_iterator([text], trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

    return write
