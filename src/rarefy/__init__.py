"""Rarefy makes trained PyTorch models smaller and faster, and proves it.

receipt = rarefy.compress_(model, "recipe.yaml", data=batches)
rarefy.save(model, "out/")
model = rarefy.load("out/")

Public names load on first use (PEP 562), so `import rarefy` does not import torch.
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rarefy.common.after_import import after_import
from rarefy.common.version import __version__

if TYPE_CHECKING:
    from rarefy.checkpoint.export import export as export
    from rarefy.checkpoint.gguf_load import from_gguf as from_gguf
    from rarefy.checkpoint.inspect import inspect as inspect
    from rarefy.checkpoint.load import load as load
    from rarefy.checkpoint.save import save as save
    from rarefy.checkpoint.streamed_decoder import decoder_from_files as decoder_from_files
    from rarefy.common.errors import RarefyError as RarefyError
    from rarefy.common.report import Report as Report
    from rarefy.dependency.graph import groups as groups
    from rarefy.evaluation.receipt import Receipt as Receipt
    from rarefy.generation.compile import compile as compile
    from rarefy.generation.decoder import decoder as decoder
    from rarefy.generation.prompt_cache import PromptCache as PromptCache
    from rarefy.generation.sampling import generate as generate
    from rarefy.generation.sampling import stream as stream
    from rarefy.lowrank.layer_tying import tie_layers_ as tie_layers_
    from rarefy.lowrank.svd import factorize_ as factorize_
    from rarefy.migration.migrate import Migrated as Migrated
    from rarefy.migration.migrate import migrate as migrate
    from rarefy.model.masks import adopt_ as adopt_
    from rarefy.model.masks import fold_ as fold_
    from rarefy.model.masks import masks as masks
    from rarefy.onnx.export import export_onnx as export_onnx
    from rarefy.onnx.load import from_onnx as from_onnx
    from rarefy.pipeline.cast import cast_ as cast_
    from rarefy.pipeline.compress import compress_ as compress_
    from rarefy.pipeline.sensitivity import sensitivity as sensitivity
    from rarefy.pipeline.train_stage import Sparsifier as Sparsifier
    from rarefy.prune.prune import prune_ as prune_
    from rarefy.prune.solver_config import Solver as Solver
    from rarefy.quantization.codebook import share_ as share_
    from rarefy.quantization.quantize import quantize_ as quantize_
    from rarefy.recipe.schema import Recipe as Recipe
    from rarefy.runtime.accelerate import accelerate_ as accelerate_
    from rarefy.search.frontier import Frontier as Frontier
    from rarefy.search.optimize import optimize as optimize
    from rarefy.structured.cut import cut_ as cut_
    from rarefy.structured.head_pruning import prune_heads_ as prune_heads_
    from rarefy.structured.layer_drop import drop_layers_ as drop_layers_
    from rarefy.structured.permutation import permute_ as permute_
    from rarefy.train.distill import Distill as Distill
    from rarefy.train.distill import Distiller as Distiller
    from rarefy.train.fit import fit_ as fit_
    from rarefy.train.sparsity_config import Admm as Admm
    from rarefy.train.sparsity_config import Alternate as Alternate
    from rarefy.train.sparsity_config import Gradual as Gradual
    from rarefy.train.sparsity_config import Movement as Movement
    from rarefy.train.sparsity_config import Rewind as Rewind
    from rarefy.train.sparsity_config import Rigl as Rigl
    from rarefy.train.sparsity_config import SecondOrder as SecondOrder

_MODULES = {  # public name -> module that defines it
    "Admm": "rarefy.train.sparsity_config",
    "Alternate": "rarefy.train.sparsity_config",
    "Distill": "rarefy.train.distill",
    "Distiller": "rarefy.train.distill",
    "Frontier": "rarefy.search.frontier",
    "Gradual": "rarefy.train.sparsity_config",
    "Migrated": "rarefy.migration.migrate",
    "Movement": "rarefy.train.sparsity_config",
    "RarefyError": "rarefy.common.errors",
    "PromptCache": "rarefy.generation.prompt_cache",
    "Receipt": "rarefy.evaluation.receipt",
    "Recipe": "rarefy.recipe.schema",
    "Report": "rarefy.common.report",
    "Rewind": "rarefy.train.sparsity_config",
    "Rigl": "rarefy.train.sparsity_config",
    "SecondOrder": "rarefy.train.sparsity_config",
    "Solver": "rarefy.prune.solver_config",
    "Sparsifier": "rarefy.pipeline.train_stage",
    "accelerate_": "rarefy.runtime.accelerate",
    "adopt_": "rarefy.model.masks",
    "cast_": "rarefy.pipeline.cast",
    "compile": "rarefy.generation.compile",
    "compress_": "rarefy.pipeline.compress",
    "cut_": "rarefy.structured.cut",
    "decoder": "rarefy.generation.decoder",
    "decoder_from_files": "rarefy.checkpoint.streamed_decoder",
    "drop_layers_": "rarefy.structured.layer_drop",
    "export": "rarefy.checkpoint.export",
    "export_onnx": "rarefy.onnx.export",
    "factorize_": "rarefy.lowrank.svd",
    "fit_": "rarefy.train.fit",
    "fold_": "rarefy.model.masks",
    "from_gguf": "rarefy.checkpoint.gguf_load",
    "from_onnx": "rarefy.onnx.load",
    "generate": "rarefy.generation.sampling",
    "groups": "rarefy.dependency.graph",
    "inspect": "rarefy.checkpoint.inspect",
    "load": "rarefy.checkpoint.load",
    "masks": "rarefy.model.masks",
    "migrate": "rarefy.migration.migrate",
    "optimize": "rarefy.search.optimize",
    "permute_": "rarefy.structured.permutation",
    "prune_": "rarefy.prune.prune",
    "prune_heads_": "rarefy.structured.head_pruning",
    "quantize_": "rarefy.quantization.quantize",
    "save": "rarefy.checkpoint.save",
    "sensitivity": "rarefy.pipeline.sensitivity",
    "share_": "rarefy.quantization.codebook",
    "stream": "rarefy.generation.sampling",
    "tie_layers_": "rarefy.lowrank.layer_tying",
}

__all__ = [
    "Admm",
    "Alternate",
    "Distill",
    "Distiller",
    "Frontier",
    "Gradual",
    "Migrated",
    "Movement",
    "PromptCache",
    "RarefyError",
    "Receipt",
    "Recipe",
    "Report",
    "Rewind",
    "Rigl",
    "SecondOrder",
    "Solver",
    "Sparsifier",
    "__version__",
    "accelerate_",
    "adopt_",
    "cast_",
    "compile",
    "compress_",
    "cut_",
    "decoder",
    "decoder_from_files",
    "drop_layers_",
    "export",
    "export_onnx",
    "factorize_",
    "fit_",
    "fold_",
    "from_gguf",
    "from_onnx",
    "generate",
    "groups",
    "inspect",
    "load",
    "masks",
    "migrate",
    "optimize",
    "permute_",
    "prune_",
    "prune_heads_",
    "quantize_",
    "save",
    "sensitivity",
    "share_",
    "stream",
    "tie_layers_",
]


def _register_quantizer() -> None:
    with suppress(ImportError, AttributeError):  # of a transformers that is too old: it must still be importable
        import_module("rarefy.integrations.hf_quantizer").register()


after_import("transformers.quantizers.auto", _register_quantizer)  # so that AutoModel reads folders of `save`


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rarefy' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)  # a name out of the table above, never out of a file
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
