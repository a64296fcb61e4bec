"""SmolLM2-135M in `rarefy.decoder` and in llama.cpp, timed alternately: tokens per second, and perplexity.

    python language.py                all variants, and all files in the fastest build of llama.cpp that is installed;
                                      10 minutes on two idle cores
    python language.py --only Q8_0 Q4_0 --builds xllamacpp node-llama-cpp
    python language.py --table        only print what was measured last

Two builds of llama.cpp come in packages: `pip install xllamacpp` (AVX2 at most), and `npm install --prefix build
@node-llama-cpp/linux-x64@3.22.1` with kernels for AVX-512, VNNI and AMX. The second one also has llama.cpp's quantizer.
It writes the files below 8 bits, with an importance matrix from the articles that calibrate ours. Their C interface is
called directly, without tokenizer, sampler or server. Each file runs with flash attention and without, and the faster
one counts, for decode and prompts apart. Appends one JSON line per file to results/language.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rarefy
import tables
from rarefy.data import builtin, sources
from rarefy.evaluation.profiling import quartiles
from rarefy.model import hf
from recording import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "language.jsonl"
FILES = HERE / "build" / "gguf"
NODE = HERE / "build" / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
BUILDS = ("xllamacpp", "node-llama-cpp")
QUANTIZER = "node-llama-cpp"  # the build that exports llama.cpp's quantizer
AS_SHIPPED = "Q4_1"
FTYPES = {"Q6_K": 18, "Q4_K_M": 15, "IQ4_NL": 25, "Q4_0": 2}  # llama_ftype of files that llama.cpp's quantizer writes
KINDS = ("F32", "Q8_0", *FTYPES, AS_SHIPPED)
FLASH = {"flash attention": 1, "no flash attention": 0}  # llama_flash_attn_type
CHOOSES = -1  # llama_flash_attn_type: llama.cpp decides
PAUSE = 0.2  # seconds: the threads of the previous engine fall asleep
PROMPT, NEW, READ = 32, 128, 512  # tokens: prompt before decoding, decoded, prompt of the prefill timing


def gguf_files(folder: Path = FILES) -> dict[str, Path]:
    """Return SmolLM2-135M as GGUF files by number format, written once into `folder`; AS_SHIPPED is the packaged file.

    Without the build of llama.cpp that has a quantizer, those of FTYPES are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"smollm2-135m.{kind}.gguf" for kind in KINDS if kind != AS_SHIPPED}
    for kind in ("F32", "Q8_0"):
        if not files[kind].exists():
            rarefy.export(builtin.model_folder("smollm2-135m"), files[kind], to="gguf", type=kind.lower())
    missing = [kind for kind in FTYPES if not files[kind].exists()]
    if missing and QUANTIZER in libraries():
        means = input_squares()
        for kind in missing:
            write_quantized(files["F32"], files[kind], FTYPES[kind], means)
    found = {kind: file for kind, file in files.items() if file.exists()}
    return {**found, AS_SHIPPED: builtin.find("smollm2-135m")}


def calibration() -> Any:
    """Return the articles that calibrate masks, GPTQ and llama.cpp's importance matrix."""
    tokenizer = hf.load_tokenizer(builtin.model_folder("smollm2-135m"))
    return sources.batches("wiki", sources.Take(samples=16, tokens=512, batch=4), tokenizer=tokenizer)


PARTS = {  # of a layer, in transformers and in llama.cpp
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@torch.no_grad()
def input_squares() -> dict[str, np.ndarray]:
    """Return the mean square of each input of each linear layer, which is llama.cpp's importance matrix."""
    model: Any = hf.load_folder(str(builtin.model_folder("smollm2-135m"))).float().eval()
    sums: dict[str, list[Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        for part, name in PARTS.items():
            squares = sums.setdefault(f"blk.{number}.{name}.weight", [])
            layer.get_submodule(part).register_forward_pre_hook(
                lambda _, args, found=squares: found.append(args[0].flatten(0, -2).square().mean(0))
            )
    for batch in calibration():
        model(input_ids=batch["input_ids"])
    return {name: torch.stack(squares).mean(0).numpy() for name, squares in sums.items()}


def write_quantized(source: Path, out: Path, ftype: int, means: Mapping[str, np.ndarray]) -> None:
    """Write a GGUF file with llama.cpp's quantizer."""
    lib = load(libraries()[QUANTIZER])
    lib.llama_model_quantize_default_params.restype = QuantizeParams
    lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]
    params = lib.llama_model_quantize_default_params()
    if [*params.flags] != [False, True, False, False, False, False] or params.imatrix:
        raise RuntimeError("llama.cpp's quantizer has other parameters than those of v0.5.0, which are declared here")
    entries = [
        Importance(n.encode(), v.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), v.size) for n, v in means.items()
    ]
    params.ftype, params.imatrix = ftype, (Importance * (len(entries) + 1))(*entries)
    partial_file = out.with_suffix(".partial")
    if lib.llama_model_quantize(str(source).encode(), str(partial_file).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantize {source}: {''.join(LOGGED)[-500:]}")
    partial_file.rename(out)


def libraries() -> dict[str, Path]:
    """Return the builds of llama.cpp that are installed, the fastest last."""
    package = importlib.util.find_spec("xllamacpp")
    places = [Path(p) for p in (package.submodule_search_locations or [])] if package else []
    found = [next((f for p in places for f in p.glob("xllamacpp*.so")), None), next(NODE.glob("libllama.*so*"), None)]
    return {n: f for n, f in zip(BUILDS, found) if f}


class Struct(ctypes.Structure):
    """A structure of llama.cpp passed by value, with only its first members declared. It is larger than any of them,
    which the calling conventions of x86-64 and aarch64 allow for structures passed in memory."""

    _fields_ = (("head", ctypes.c_uint32 * 16), ("rest", ctypes.c_uint64 * 120))


class Importance(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.POINTER(Importance)),
        ("others", ctypes.c_void_p * 3),
    )


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_print_system_info": (ctypes.c_char_p, []),
    "llama_log_set": (None, [LOG, ctypes.c_void_p]),
    "llama_model_default_params": (Struct, []),
    "llama_context_default_params": (Struct, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, Struct]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, Struct]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_attach_threadpool": (None, [ctypes.c_void_p] * 3),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_batch_get_one": (Batch, [ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "ggml_backend_load_all_from_path": (None, [ctypes.c_char_p]),
    "ggml_backend_reg_by_name": (ctypes.c_void_p, [ctypes.c_char_p]),
    "ggml_backend_reg_get_proc_address": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_threadpool_params_default": (Struct, [ctypes.c_int]),
}
LOGGED: list[str] = []  # what llama.cpp logged


@LOG
def _log(_level: int, text: bytes, _data: Any) -> None:
    LOGGED.append(text.decode(errors="replace"))


@cache
def load(file: Path) -> ctypes.CDLL:
    """Return a loaded build of llama.cpp with its kernels for this CPU."""
    lib = ctypes.CDLL(str(file))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log, None)
    lib.ggml_backend_load_all_from_path(str(file.parent).encode())
    lib.llama_backend_init()
    return lib


def system_info(library: Path) -> str:
    """Return the vector extensions that a build of llama.cpp reports."""
    return load(library).llama_print_system_info().decode().strip(" |")


class LlamaCpp:
    """A GGUF file in llama.cpp. It has its own threads, so give it its own process."""

    def __init__(
        self, file: Path, threads: int, library: Path | None = None, context: int = 1024, flash: int = CHOOSES
    ):
        self.library = library or list(libraries().values())[-1]
        self.lib, self.threads = load(self.library), threads
        start = len(LOGGED)
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        known = [*params.head[:3], *(ctypes.c_int32(v).value for v in params.head[10:14])]
        if not self.model or known != [512, 2048, 512, *[CHOOSES] * 4]:  # tokens of context, of a batch, of a step
            raise RuntimeError(f"llama.cpp cannot load {file}: {''.join(LOGGED[start:])[-500:]}")
        params.head[0], params.head[13] = context, flash & 0xFFFFFFFF
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context for {file}: {''.join(LOGGED[start:])[-500:]}")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        pool = self._pool()
        self.lib.llama_attach_threadpool(self.context, pool, pool)
        self.vocab: int = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.buffers = [
            l.split(":")[-1].strip() for l in "".join(LOGGED[start:]).splitlines() if "model buffer size" in l
        ]

    def close(self) -> None:
        """Free its memory."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def decode(self, prompt: list[int], new: int) -> tuple[float, list[int]]:
        """Return tokens per second of greedy decoding after a prompt, and the tokens."""
        self._read(prompt)
        ids, began = [], time.perf_counter()
        for _ in range(new):
            ids.append(int(self._last().argmax()))
            self._step(ids[-1:])
        self._last()
        return new / (time.perf_counter() - began), ids

    def prefill(self, ids: list[int]) -> float:
        """Return tokens per second of reading a prompt, up to the logits of its last token."""
        began = time.perf_counter()
        self._read(ids)
        self._last()
        return len(ids) / (time.perf_counter() - began)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits [tokens, vocabulary] after each token of a text."""
        n = len(ids)
        token, pos, ones = (ctypes.c_int32 * n)(*ids), (ctypes.c_int32 * n)(*range(n)), (ctypes.c_int32 * n)(*[1] * n)
        zero, every = ctypes.pointer(ctypes.c_int32(0)), (ctypes.c_int8 * n)(*[1] * n)
        sequences = (ctypes.POINTER(ctypes.c_int32) * n)(*[zero] * n)
        self._clear()
        self._run(Batch(n, token, None, pos, ones, sequences, every))
        found = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (n, self.vocab)).copy()

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def _read(self, ids: list[int]) -> None:
        self._clear()
        self._step(ids)

    def _step(self, ids: list[int]) -> None:
        held = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to this array
        self._run(self.lib.llama_batch_get_one(held, len(ids)))

    def _run(self, batch: Batch) -> None:
        failed = self.lib.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama.cpp failed with code {failed}: {''.join(LOGGED)[-500:]}")

    def _last(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def _pool(self) -> Any:
        """Return a thread pool that spins between steps, as llama.cpp's own programs use. It is never freed, because a
        backend keeps a pointer to it."""
        params = self.lib.ggml_threadpool_params_default(self.threads)
        cpu = self.lib.ggml_backend_reg_by_name(b"CPU")
        new = self.lib.ggml_backend_reg_get_proc_address(cpu, b"ggml_threadpool_new")
        return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(new)(ctypes.addressof(params))


def perplexity(model: Any, windows: Tensor) -> float:
    """Return the perplexity on tokens [windows, tokens], as rarefy.evaluation.metrics.perplexity does."""
    total, count = 0.0, 0
    for ids in windows:
        logits = torch.from_numpy(model.logits(ids.tolist()))[:-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / count)


def windows() -> Tensor:
    """Return the 24 windows of 512 tokens of held-out articles on which all perplexities are measured."""
    take = sources.Take(samples=24, tokens=512, batch=8)
    tokenizer = hf.load_tokenizer(builtin.model_folder("smollm2-135m"))
    batches: Any = sources.batches("wiki-test", take, tokenizer=tokenizer)
    return torch.cat([b["input_ids"] for b in batches])


def rates(models: Mapping[Any, Any], ids: list[int], repeats: int) -> dict[Any, dict[str, Any]]:
    """Return quartiles of tokens per second of decode and prefill, timed alternately. `models` have the methods decode
    and prefill of LlamaCpp."""
    found: dict[Any, dict[str, list[float]]] = {n: {"decode": [], "prefill": []} for n in models}
    for round_ in range(repeats + 1):
        for name, model in models.items():
            time.sleep(PAUSE)
            decode, prefill = model.decode(ids[:PROMPT], NEW)[0], model.prefill(ids[:READ])
            if round_:  # the first round warms up
                found[name]["decode"].append(decode)
                found[name]["prefill"].append(prefill)
    return {n: {k: [(q := quartiles(v)).low, q.median, q.high] for k, v in f.items()} for n, f in found.items()}


def llama_cpp(build: str, kind: str, flash: str) -> tuple[LlamaCpp, dict[str, Any]]:
    """Return a GGUF file loaded in a build, with or without flash attention, and its record."""
    library, file = libraries()[build], gguf_files()[kind]
    model = LlamaCpp(file, torch.get_num_threads(), library, flash=FLASH[flash])
    record = {"engine": "llama.cpp", "build": build, "file": kind, "bytes": file.stat().st_size}
    return model, {**record, "system": system_info(library), "buffers": model.buffers}


OURS: dict[str, tuple[float, dict[str, Any] | None, str | None]] = {  # sparsity, options of quantize_, precision
    "fp32": (0.0, None, None),
    "8 bits": (0.0, None, "int8"),
    "6 bits": (0.0, {"weights": "int6", "group": 32}, "int8"),
    "4 bits": (0.0, {"weights": "int4", "group": 32, "symmetric": False}, "int8"),
    "4 bits, calibrated": (0.0, {"weights": "int4", "group": 32, "solver": "obs"}, "int8"),
    "50 %, 8 bits": (0.5, None, "int8"),
    "70 %, 8 bits": (0.7, None, "int8"),
}
FILES_OF_OURS = {f"{kind} file": kind for kind in ("Q8_0", "Q4_0", AS_SHIPPED)}  # run as they are


class Ours:
    """A decoder with the methods of LlamaCpp."""

    def __init__(self, made: Any):
        self.made = made

    def decode(self, prompt: list[int], new: int) -> tuple[float, list[int]]:
        """Return tokens per second of greedy decoding after a prompt, and the tokens."""
        cache = self.made.cache(1, len(prompt) + new)
        logits = self.made(torch.tensor([prompt]), cache, last=True)
        ids, began = [], time.perf_counter()
        for _ in range(new):
            ids.append(int(logits[0, -1].argmax()))
            logits = self.made(torch.tensor([ids[-1:]]), cache, last=True)
        return new / (time.perf_counter() - began), ids

    def prefill(self, ids: list[int]) -> float:
        """Return tokens per second of reading a prompt, up to the logits of its last token."""
        began = time.perf_counter()
        self.made(torch.tensor([ids]), last=True)
        return len(ids) / (time.perf_counter() - began)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits [tokens, vocabulary] after each token of a text."""
        return self.made(torch.tensor([ids]))[0].numpy()


def ours(name: str) -> tuple[Ours, dict[str, Any]]:
    """Return a decoder and its record. Masks are Wanda's, and `refit` updates the remaining weights. Articles that no
    perplexity is measured on calibrate both it and what is calibrated of 4 bits (GPTQ)."""
    if name in FILES_OF_OURS:
        return _with_size(rarefy.decoder_from_files(gguf_files()[FILES_OF_OURS[name]]), name)
    sparsity, quantize, precision = OURS[name]
    folder = builtin.model_folder("smollm2-135m")
    model = hf.load_folder(str(folder)).float().eval()
    data = calibration() if sparsity or "solver" in (quantize or {}) else None
    if sparsity:
        settings = {"score": "wanda", "solver": "refit", "layers": "model.layers.*", "data": data}
        rarefy.prune_(model, "unstructured", sparsity=sparsity, **settings)
    if quantize:
        rarefy.quantize_(model, layers="model.layers.*", **quantize, data=data)
    rarefy.fold_(model)
    return _with_size(rarefy.decoder(model, precision=precision), name)


def _with_size(made: Any, name: str) -> tuple[Ours, dict[str, Any]]:
    """Return a decoder and its record."""
    with TemporaryDirectory() as out:
        size = rarefy.save(made, Path(out) / "decoder")
    return Ours(made), {"engine": "rarefy", "file": name, "bytes": size}


class Isolated:
    """A model of `make(*args)` in its own process, with the methods of LlamaCpp. It sleeps while other engines run.

    record  what `make` returned about the model
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()
        self.record: dict[str, Any] = self._answer()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: (self.pipe.send((name, args)), self._answer())[1]

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the engine's process ended with {self.process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def serve(pipe: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Build a model in this process, then answer calls of its methods."""
    try:
        hf.no_bars()
        model, record = make(*args)
        pipe.send(record)
        while True:
            name, given = pipe.recv()
            pipe.send(perplexity(model, *given) if name == "perplexity" else getattr(model, name)(*given))
    except EOFError:
        pass  # the parent has closed the pipe
    except BaseException as error:
        pipe.send(error)
        raise


def engines(only: list[str], builds: list[str], ways: list[str], repeats: int = 7) -> Iterator[dict[str, Any]]:
    """Yield the records of all engines, timed alternately, each in its own process."""
    found = libraries()
    for build in [b for b in builds or (BUILDS if not found else ()) if b not in found]:
        print(f"without llama.cpp of {build}: not installed")
    here = gguf_files()
    for kind in [k for k in only or KINDS if k not in here]:
        print(f"without {kind}: {QUANTIZER}, which has llama.cpp's quantizer, is not installed")
    theirs = [(b, k) for b in builds or list(found)[-1:] if b in found for k in only or KINDS if k in here]
    names: dict[tuple[str, ...], tuple[Any, ...]] = {(b, k, f): (llama_cpp, b, k, f) for b, k in theirs for f in FLASH}
    names |= {("ours", way): (ours, way) for way in ways}
    text, models = windows(), {}
    for name, how in names.items():
        models[name] = Isolated(*how)
    quality = {name: model.perplexity(text) for name, model in models.items()}
    figures = rates(models, text[0].tolist(), repeats)
    for way in ways:
        name = ("ours", way)
        yield {**models[name].record, "perplexity": quality[name], **figures[name]}
    for build, kind in theirs:
        both = {flash: figures[build, kind, flash] for flash in FLASH}
        best = {phase: max(FLASH, key=lambda f, p=phase: both[f][p][1]) for phase in ("decode", "prefill")}
        settings = {p: {"setting": f, "tried": {f: both[f][p][1] for f in FLASH}} for p, f in best.items()}
        record = models[build, kind, best["decode"]].record
        yield {**record, "perplexity": min(quality[build, kind, f] for f in FLASH), "settings": settings,
               **{phase: both[flash][phase] for phase, flash in best.items()}}  # fmt: skip
    for model in models.values():
        model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=[])
    parser.add_argument("--builds", nargs="*", choices=BUILDS, default=[])
    every = [*OURS, *FILES_OF_OURS]
    parser.add_argument("--ours", nargs="*", choices=every, default=every)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    if not args.table:
        keep(args.out, [lambda: engines(args.only, args.builds, args.ours, args.repeats)])
    tables.show("language")


if __name__ == "__main__":
    main()
