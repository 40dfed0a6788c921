"""What DeBERTa v1, v2 and v3 add to an encoder: disentangled attention, and a convolution in v2-xlarge."""

import torch
from torch import nn
from torch.nn.functional import linear

from flowattn.models._layers import SelfAttention
from flowattn.ops.attention_scores import DisentangledBias, deberta_lut


class RelativePositions(nn.Module):
    """The embeddings (2 * span, d) that every layer projects to its tables, and the lut into these tables.

    max_distance: as in DisentangledBias.deberta. norm: applied to the embeddings, or None.
    """

    def __init__(self, embedding, span, max_distance=None, norm=None):
        super().__init__()
        self.embedding, self.span, self.norm = embedding, span, norm
        self.register_buffer("lut", deberta_lut(span, max_distance), persistent=False)

    def forward(self):
        embeddings = self.embedding.weight[: 2 * self.span]
        if self.lut.device != embeddings.device:  # the model that shares the embedding was moved, this module was not
            self.lut = self.lut.to(embeddings.device)
        return embeddings if self.norm is None else self.norm(embeddings), self.lut


class DisentangledAttention(SelfAttention):
    """Self-attention with content-to-position and position-to-content terms (He et al. 2021, as released).

    position_keys, position_queries: modules that project the position embeddings to the tables, or None without that
        term. position_dropout acts on the embeddings before. terms: the c of scale = (c D) ** -0.5.
    """

    def __init__(self, heads, qkv, dropout, *, terms, position_keys=None, position_queries=None, position_dropout=None):
        super().__init__(heads, qkv, dropout)
        self.terms, self.position_dropout = terms, position_dropout
        self.position_keys, self.position_queries = position_keys, position_queries

    def forward(self, x, plan, positions=None):
        q, k, v = self.project(x)
        bias, projections = None, (self.position_keys, self.position_queries)
        if any(project is not None for project in projections):
            embeddings, lut = positions
            embeddings = self.position_dropout(embeddings)
            tables = (p if p is None else p(embeddings).unflatten(-1, (self.heads, -1)) for p in projections)
            bias = DisentangledBias(*tables, lut)
        return self.attend(q, k, v, plan, scale=(q.shape[-1] * self.terms) ** -0.5, bias=bias)


class InterleavedProjection(nn.Module):
    """The one projection of DeBERTa v1: rows of q, k and v alternate by head; only queries and values have a bias."""

    def __init__(self, heads, in_proj, q_bias, v_bias):
        super().__init__()
        self.heads, self.in_proj, self.q_bias, self.v_bias = heads, in_proj, q_bias, v_bias

    def forward(self, x):
        biases = torch.stack([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # (3, H * D)
        biases = biases.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten()
        return linear(x, self.in_proj.weight, biases.to(x.dtype))


class InterleavedAttention(DisentangledAttention):
    """DisentangledAttention with an InterleavedProjection."""

    def project(self, x):
        return self.qkv(x).unflatten(-1, (self.heads, 3, -1)).unbind(2)


class ConvolvedLayer(nn.Module):
    """norm(layer(x) + activation(dropout(conv(x)))), the convolution along the rows of each sequence, zeros around it.

    Windows are gathered, (T, width, d), and multiplied at once.
    """

    def __init__(self, layer, conv, norm, dropout, activation):
        super().__init__()
        self.layer, self.conv, self.norm, self.dropout, self.activation = layer, conv, norm, dropout, activation

    def forward(self, x, plan, positions=None):
        windows = torch.cat([x, x.new_zeros(1, x.shape[1])])[self._neighbours(plan)]  # (T, width, d)
        groups = self.conv.groups
        weight = self.conv.weight.unflatten(0, (groups, -1))  # (groups, d / groups, d / groups, width)
        mixed = torch.einsum("tkgc,gock->tgo", windows.unflatten(2, (groups, -1)), weight).flatten(1)
        mixed = self.activation(self.dropout(mixed + self.conv.bias))
        return self.norm(self.layer(x, plan, positions) + mixed)

    def _neighbours(self, plan):
        """The rows (T, width) around each packed row, T for those that belong to another sequence or to none."""
        width, total = self.conv.kernel_size[0], plan.indices.shape[0]
        sequence = plan.indices // max(plan.padded_len, 1)  # negative in unused rows
        rows = torch.arange(total, device=sequence.device)[:, None]
        around = rows + torch.arange(width, device=sequence.device) - width // 2
        inside = (around >= 0) & (around < total) & (sequence >= 0)[:, None]
        around = around.clamp(0, max(total - 1, 0))
        return around.where(inside & (sequence[around] == sequence[:, None]), total)
