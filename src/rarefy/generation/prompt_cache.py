"""Prompts that begin as earlier ones did: what a decoder has read of them is kept."""

from __future__ import annotations

from threading import Lock
from typing import Any

from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.generation.kv_cache import TILE, Cache


class PromptCache:
    """Keeps the keys and values of the last text, so that the next prompt is read from where it differs.

    Pass one object to several calls of `generate` or `stream`: to those of a conversation, whose prompts grow, or to
    those that share a system prompt. Of the common beginning whole pages of 64 tokens are not read again; the rest of
    the prompt is. Several prompts of a call share their memory. Generated tokens were read one by one: in 8 bits their
    keys differ from those of a prompt by what rounding loses, and so may the text. Of several texts the first is kept,
    of a beam search the prompt. Prompts with padding are read whole, and nothing of them is kept. A second call
    that uses the object at the same time raises DataError.

    Attributes:
        ids: the tokens that are kept.
        reused: tokens of the last call's prompts that were not read again.

    Cost: a comparison of ids. Memory: the KV cache of the last text, until the object is deleted.

    Example:
        >>> import torch
        >>> import rarefy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> decoder = rarefy.decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval())
        >>> kept = PromptCache()
        >>> text = decoder.generate(torch.arange(70)[None] % 32, max_new_tokens=5, prompt_cache=kept)
        >>> text = decoder.generate(torch.cat([text, torch.tensor([[1, 5]])], 1), max_new_tokens=5, prompt_cache=kept)
        >>> kept.reused
        64
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reused = 0
        self._decoder: Any = None
        self._cache: Cache | None = None
        self._lock = Lock()

    def begin(self, decoder: Any, ids: Tensor, capacity: int, precision: str | None) -> Cache:
        """Return a cache for prompts [batch, tokens] that holds the pages that are known of them.

        The last token is never among them: it is read for its logits.

        `keep` must follow.

        Raises:
            DataError: another text uses this object.
        """
        if not self._lock.acquire(blocking=False):
            raise DataError("prompt_cache is in use by a text that has not ended: pass each thread its own")
        try:
            return self._begin(decoder, ids, capacity, precision)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, decoder: Any, ids: Tensor, capacity: int, precision: str | None) -> Cache:
        precision = precision or decoder.cache_precision
        old, batch = self._cache, len(ids)
        usable = old is not None and self._decoder is decoder and old.precision == precision
        known = _common(self.ids, ids[:, :-1]) // TILE * TILE if usable else 0
        if not usable:
            old = self._cache = None
        self.ids, self.reused, self._decoder = self.ids[:known], known, decoder
        if old is not None and batch == old.batch == 1 and old.max_tokens >= capacity:
            old.past = known
            return old
        room = max(capacity, 2 * old.max_tokens) if old is not None and batch == 1 else capacity
        if decoder.max_tokens is not None:
            room = max(capacity, min(room, decoder.max_tokens))
        cache = decoder.cache(batch, room, None, precision)
        if old is not None and known:
            cache.take(old, known)
        return cache

    def keep(self, cache: Cache, ids: Tensor) -> None:
        """Keep a cache, whose first sequence has read these ids [tokens]."""
        self._cache, self.ids = cache, ids[: cache.past].tolist()
        self._lock.release()


def _common(known: list[int], ids: Tensor) -> int:
    """Return with how many known tokens all prompts begin."""
    count = min(len(known), ids.shape[1])
    differs = (ids[:, :count] != ids.new_tensor(known[:count])).any(0)
    return int(differs.int().argmax()) if bool(differs.any()) else count
