"""Operator names in a graph.json of schema 1, with their names today: saved models of that schema still load."""

from __future__ import annotations

OLD_OP_NAMES = {
    "words.product": "rarefy.linear",
    "words.convolution": "rarefy.conv2d",
    "words.norm": "rarefy.norm",
    "words.rotate": "rarefy.rope",
    "words.pool": "rarefy.max_pool2d",
    "words.average": "rarefy.global_avg_pool",
    "words.embedding": "rarefy.embedding",
    "words.add": "rarefy.add",
    "words.times": "rarefy.mul",
    "words.activation": "rarefy.activation",
    "words.attention": "rarefy.attention",
    "words.additive": "rarefy.additive_mask",
    "words.recall": "rarefy.cached_attention",
}
