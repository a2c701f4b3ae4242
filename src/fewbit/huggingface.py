"""Quantized folders in transformers: after ``import fewbit``, `from_pretrained` reads what fewbit wrote.

    import fewbit
    model = AutoModelForCausalLM.from_pretrained("out/")

transformers finds readers of quantized folders in a table of its own. fewbit enters itself there as soon as both are imported,
in whichever order, and imports nothing of transformers before.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fewbit.errors import CheckpointError, PlanError, UnsupportedError
from fewbit.pipeline import PLAN, skeleton
from fewbit.source import CONFIG
from fewbit.targets.native import Checkpoint, check_fit, read_checkpoint, slots

METHOD = "fewbit"
TABLES = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Enter fewbit in transformers' tables now if they are imported, else when they are."""
    if TABLES in sys.modules:
        _try_to_register()
    elif not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())


class _AtImport(MetaPathFinder):
    """Finds the module of the tables where others find it, and registers once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _try_to_register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _try_to_register() -> None:
    try:
        _register()
    except (ImportError, AttributeError) as error:
        # Whoever imports transformers may not want fewbit at all.
        warnings.warn(
            f"from_pretrained will not read folders of fewbit: this transformers lacks {error}.", stacklevel=2
        )


def _register() -> None:
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class FewbitConfig(QuantizationConfigMixin):
        """What config.json says of the quantization; everything that counts is in plan.json."""

        def __init__(self, **settings: Any) -> None:
            self.__dict__.update(settings, quant_method=METHOD)

    class FewbitQuantizer(HfQuantizer):
        """Puts fewbit's layers in place before transformers loads the tensors, and ties them afterwards."""

        def validate_environment(self, *_: Any, **__: Any) -> None:
            if not self.pre_quantized:
                raise UnsupportedError(
                    "from_pretrained does not quantize: give a folder that fewbit.quantize_folder or fewbit.save wrote."
                )

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self.checkpoint = read_checkpoint(Path(kwargs["checkpoint_files"][0]).parent)
            replace_layers(model, self.checkpoint)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            tie(model, self.checkpoint)
            return model

        def is_serializable(self) -> bool:
            return False  # fewbit.save writes it

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

    auto.register_quantization_config(METHOD)(FewbitConfig)
    auto.register_quantizer(METHOD)(FewbitQuantizer)


def replace_layers(model: Any, checkpoint: Checkpoint) -> None:
    """Make ``model``, a float model of transformers on meta, the quantized one, in place and without its numbers."""
    try:
        twin: Any = skeleton(model, checkpoint.plan)
    except PlanError as error:
        raise CheckpointError(f"{checkpoint.folder}: does not fit {CONFIG}: {error}") from error
    check_fit(twin, checkpoint, as_configured=True)
    model._modules = twin._modules
    setattr(model, PLAN, checkpoint.plan)
    quantized = {name for tie in checkpoint.plan.ties for name in tie}
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {name: other for name, other in tied if name not in quantized}
    # What transformers ties or computes by itself is in the file under another name, or twice.
    kept = dict(model.state_dict())
    computed = {f"^{re.escape(name)}$" for name in checkpoint.entries if name not in kept}
    copies = {f"^{re.escape(name)}$" for name in checkpoint.aliases}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *computed}
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *copies}


def tie(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Make buffers that are one tensor in the checkpoint one tensor in the model."""
    places = slots(model)
    for name, other in checkpoint.aliases.items():
        module, key, _ = places[name]
        if key in module._buffers:
            owner, other_key, _ = places[other]
            module._buffers[key] = owner._buffers[other_key]
