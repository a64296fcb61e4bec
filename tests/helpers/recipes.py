"""Recipes as text."""

FULL = """\
name: full
about: every block once
seed: 7
data: {calibrate: wiki, train: wiki, samples: 8, train_samples: 16, tokens: 64, batch: 2, seed: 3}
stages:
  - prune: {layers: ["model.*", "re:.*q_proj"], ignore: lm_head, pattern: 2:4, score: wanda}
  - train:
      epochs: 2
      optimizer: {name: sgd, lr: 1e-4, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}
      lr_schedule: one-cycle
      prune:
        pattern: 4x1
        sparsity: 0.75
        schedule: linear
        steps: 4
        first: 0.5
        start: 0.1
        end: 0.9
        regrow: true
        reduce: l2
        scope: global
  - cast: {dtype: bf16}
evaluate:
  metric: perplexity
  data: wiki-test
  samples: 4
  max_degradation: 0.15
  latency: {batch: [1, 4], repeats: 3}
  decode: {prompt: 16, new: 4, repeats: 2}
save: {format: csr}
"""
