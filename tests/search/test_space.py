"""What a search finds out about the parts of a model."""

import torch
from torch import nn

from rarefy.dependency.graph import trace
from rarefy.search.space import removal_scores
from rarefy.structured.importance import unit_scores


class Upwards(nn.Module):
    """Channels of `a` are read by a convolution, those of `b` by a transposed one alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.up(torch.relu(self.b(torch.relu(self.a(x)))))))


def test_units_that_a_score_cannot_observe_are_scored_by_their_weights():
    torch.manual_seed(0)
    net, x = Upwards().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    groups = {g.name: g for g in graph.groups if g.name in ("a.weight:0", "b.weight:0")}
    assert len(groups) == 2
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    scores = removal_scores(net, graph, list(groups.values()), "activation", data)
    observed, by_weights = groups["a.weight:0"], groups["b.weight:0"]
    assert torch.equal(
        scores[observed.name], unit_scores(net, graph, [observed], "activation", data=data)[observed.axis]
    )
    assert torch.equal(scores[by_weights.name], unit_scores(net, graph, [by_weights], "magnitude")[by_weights.axis])
