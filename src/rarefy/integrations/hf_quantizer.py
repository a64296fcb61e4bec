"""Folders of `rarefy.save` in `from_pretrained` of transformers: Rarefy as one of its quantization methods.

`config.json` of a saved folder names the method "rarefy". transformers then asks `RarefyQuantizer`, which gives the
model the structure of the folder and decodes each weight. transformers itself sees a checkpoint of placeholders, one
for each tensor: it handles base models and heads, ties, missing weights, devices and types as for any other checkpoint.

`import rarefy` calls `register` as soon as transformers' quantizers are imported.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from rarefy.model.checked_folder import source_of
from rarefy.model.config_names import IMPLEMENTATIONS

METHOD = "rarefy"
OLDEST = "5.18"  # of transformers: the first whose quantizers see the config before files are looked for
FIRST_FILE = "weights-00001.safetensors"  # transformers looks for a file; this one tells where the folder is
MARK = ":rarefy"  # the end of a placeholder's name
RECORDS = ("factors", "tied", "inputs")  # records of structure by module name
log = logging.get_logger(__name__)


def register() -> None:
    """Add Rarefy to transformers' quantization methods, if it is not one of them yet."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = RarefyConfig
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = RarefyQuantizer


class RarefyConfig(QuantizationConfigMixin):
    """The `quantization_config` of a saved folder: it says nothing but that Rarefy wrote the folder.

    Attributes:
        quant_method: "rarefy".
        dequantize: whether the loaded model is an ordinary model of its class, to be trained and saved as such.
    """

    def __init__(self, **_: Any):
        self.quant_method: Any = METHOD
        self.dequantize = False

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON."""
        return {"quant_method": METHOD}


class RarefyQuantizer(HfQuantizer):
    """Loads a folder of `rarefy.save` into the model that transformers built from its config."""

    requires_calibration = True  # there is no quantization while loading: rarefy.quantize_ does it

    def __init__(self, quantization_config: Any, **options: Any):
        super().__init__(quantization_config, **options)
        self.dtype: torch.dtype | None = None
        self.engine: Any = None  # a compiled model or decoder
        self.grids: dict[str, Any] = {}  # of weights loaded so far, by their names in the model

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ImportError if transformers is too old."""
        if not hasattr(HfQuantizer, "update_attn_implementation"):
            import transformers

            raise ImportError(
                f"transformers {transformers.__version__} cannot load Rarefy's folders by from_pretrained, "
                f'which needs {OLDEST} or later: pip install "transformers>={OLDEST}", or use rarefy.load'
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Return the config, with the file that transformers looks for."""
        parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})]
        names = (getattr(p, "_attn_implementation", None) for p in parts)
        kernel = next((n for n in names if n is not None and n not in IMPLEMENTATIONS), None)
        if kernel is not None:  # transformers would fetch and run it
            raise ValueError(f"the config requests attention code of the hub, {kernel}: remove attn_implementation")
        config.transformers_weights = FIRST_FILE
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of the model's weights unchanged."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        from rarefy.checkpoint import compiled_model
        from rarefy.formats import container

        del model.config.transformers_weights
        folder = source_of(Path(checkpoint_files[0]).parent)
        saved = container.read(folder)
        if compiled_model.is_compiled(saved):
            with torch.device("cpu"):
                self._read_engine(saved, model, folder)
            self._replace(checkpoint_files, [])
            return
        with torch.device("cpu"):  # transformers builds the model on the meta device
            self._fit(saved, model, folder)
        shared = set(getattr(model, "all_tied_weights_keys", {}))  # transformers ties them itself
        self._replace(checkpoint_files, [*saved.names, *(name for name in saved.aliases if name not in shared)])

    def _replace(self, checkpoint_files: list[str], names: Iterable[str]) -> None:
        """Give transformers, which reads this list next, a file of placeholders."""
        file = Path(tempfile.mkdtemp()) / "model.safetensors"
        self.remove = weakref.finalize(self, shutil.rmtree, file.parent, True)  # also if loading fails
        save_file({name + MARK: np.zeros(1, np.uint8) for name in names}, file)
        checkpoint_files[:] = [str(file)]

    def _read_engine(self, saved: Any, model: Any, folder: Path) -> None:
        """Read a compiled model, and let transformers look for no weights."""
        from rarefy.checkpoint import compiled_model
        from rarefy.common.errors import ModelError

        compiled_from = (getattr(model.config, "architectures", None) or [""])[0]
        if compiled_from != type(model).__name__:
            raise ModelError(
                f"{folder} holds a compiled {compiled_from}: load it as that class, not as {type(model).__name__}"
            )
        config: Any = self.quantization_config
        self.engine, config.dequantize = compiled_model.load(saved), True
        model.all_tied_weights_keys, model._keys_to_ignore_on_load_missing = {}, {""}
        for module in model.modules():
            module._is_hf_initialized = True

    def _fit(self, saved: Any, model: Any, folder: Path) -> None:
        """Give the model the structure of the folder."""
        from rarefy.checkpoint.fit_structure import restore_records_, restore_structure_
        from rarefy.common.errors import ModelError

        structure = saved.meta.get("structure")
        structure = structure if isinstance(structure, dict) else {}
        if structure.get("library") != "transformers":
            raise ModelError(f"{folder} holds no model of transformers: load it with rarefy.load")
        self.saved, self.records = saved, {n: saved.meta[n] for n in RECORDS if saved.meta.get(n)}
        self.part = model
        self.saved_dtype = getattr(torch, str(structure.get("dtype")), None)
        config: Any = self.quantization_config
        cut = saved.meta.get("cut")
        by_config = not isinstance(cut, dict) or cut.get("config") is True  # the class builds what was cut
        config.dequantize = not self.records and by_config
        if structure.get("class") == type(model).__name__:
            restore_structure_(saved, model, structure, folder)
            return
        if not by_config:
            raise ModelError(
                f"{folder} holds a {structure.get('class')} cut to sizes that no config expresses: load it as that "
                f"class, not as {type(model).__name__}, or with rarefy.load"
            )
        self.part = model.base_model
        meta = {n: _renamed(r, saved, f"{model.base_model_prefix}.") for n, r in self.records.items()}
        self.records = {n: r for n, r in meta.items() if r}
        restore_records_(replace(saved, index={**saved.index, "meta": self.records}), self.part, structure, folder)

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> list[Any]:
        """Return the conversion that decodes a weight: names in the folder are those of the loaded model."""
        from transformers.core_model_loading import WeightConverter

        return [WeightConverter(MARK, "", [_decoder_class()(self)])]

    def weight(self, name: str, model: Any) -> torch.Tensor:
        """Return the weight of the folder for a parameter of the model."""
        prefix = f"{model.base_model_prefix}."
        stored = self.saved.index["tensors"].keys() | self.saved.aliases.keys()
        source = next(n for n in (name, name.removeprefix(prefix), prefix + name) if n in stored)
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        tensor, self.grids[name] = self.saved.weight(source, shape)
        if self.dtype is not None and self.dtype != self.saved_dtype and tensor.is_floating_point():
            tensor, self.grids[name] = tensor.to(self.dtype), None
        return tensor

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from rarefy.checkpoint.load import attach_receipt_
        from rarefy.lowrank import layer_tying
        from rarefy.model.quant_grid import record_grid_

        self.remove()
        if self.engine is not None:
            from rarefy.integrations.hf_adapter import become_adapter_

            become_adapter_(model.to("meta"), self.engine)
            return
        for name, grid in self.grids.items():
            owner, _dot, leaf = name.rpartition(".")
            record_grid_(model.get_submodule(owner), leaf, grid)
        if self.records.get("tied"):  # transformers gave each block weights of its own
            layer_tying.forget_(self.part)
            layer_tying.restore_(self.part, self.records["tied"], self.saved.path)
        if self.part is model:
            attach_receipt_(model, self.saved)
        del self.saved, self.part, self.remove  # the quantizer may stay with the model, which may be copied

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return False, and say how the model is saved: asked only of structures that its class does not have."""
        log.warning("this model has layers that its class does not build: save it with rarefy.save(model, folder)")
        return False

    @property
    def is_trainable(self) -> bool:
        """Return True: weights are ordinary parameters."""
        return True


def _renamed(record: Mapping[str, Any], saved: Any, prefix: str) -> dict[str, Any]:
    """Return a record by the module names of a base model."""
    if not any(name.startswith(prefix) for name in saved.names):
        return dict(record)
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


@cache
def _decoder_class() -> Any:
    """Return the operation of a conversion; its base class is imported late, as transformers does."""
    from transformers.core_model_loading import ConversionOps

    class Decode(ConversionOps):
        """Replaces a placeholder by the weight."""

        def __init__(self, hf_quantizer: RarefyQuantizer):
            self.hf_quantizer = hf_quantizer

        def __deepcopy__(self, memo: Any) -> Decode:
            return self

        def convert(self, input_dict: Any, *, full_layer_name: str = "", model: Any = None, **_: Any) -> Any:
            """Return {name: weight}."""
            return {full_layer_name: self.hf_quantizer.weight(full_layer_name, model)}

        @property
        def reverse_op(self) -> ConversionOps:
            raise NotImplementedError("rarefy.save writes the folder")

    return Decode
