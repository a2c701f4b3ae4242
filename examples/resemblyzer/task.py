"""LSTM speaker encoder on Debian's telephone prompts: cosine of each utterance's embedding to the FP32 embedding."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fewbit

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from speaker_encoder import SpeakerEncoder
from speech import HOP, PART_FRAMES, parts, read_wav

from fetch import fetched

RECIPE = "int8-dynamic"
BATCH_SIZE = 64


def load_model() -> SpeakerEncoder:
    file = fetched("resemblyzer") / "resemblyzer" / "pretrained.pt"
    weights = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerEncoder()
    # The training loss's scale and offset (similarity_*) play no part in the embedding.
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("similarity_")})
    return model.eval()


def read_utterances() -> list[Tensor]:
    """Spectrograms ``[P, 160, 40]`` of every spoken prompt of 1.6 s or more."""
    files = sorted((fetched("asterisk-core-sounds-en-wav") / "usr/share/asterisk/sounds").rglob("*.wav"))
    recordings = [read_wav(file) for file in files if file.parent.name != "silence"]
    return [parts(samples) for samples in recordings if len(samples) >= PART_FRAMES * HOP]


def task() -> fewbit.Task:
    model = load_model()
    utterances = read_utterances()
    windows = torch.cat(utterances).split(BATCH_SIZE)
    counts = [len(utterance) for utterance in utterances]

    @torch.inference_mode()
    def embed(model: nn.Module) -> Tensor:
        """Unit embeddings ``[utterances, 256]``: the mean over each utterance's windows."""
        embeddings = torch.cat([model(batch) for batch in windows])
        means = torch.stack([part.mean(0) for part in embeddings.split(counts)])
        return nn.functional.normalize(means, dim=1)

    reference = embed(model)

    def evaluate(model: nn.Module) -> Tensor:
        return (embed(model) * reference).sum(1)

    return fewbit.Task(model=model, calibration=None, evaluate=evaluate, example_inputs=windows[0])


if __name__ == "__main__":
    this = task()
    print(f"float         cosine to FP32 {this.evaluate(this.model).mean():.6f}")
    quantized = fewbit.quantize(this.model, RECIPE, calibration=this.calibration)
    print(f"{RECIPE}  cosine to FP32 {this.evaluate(quantized).mean():.6f}")
