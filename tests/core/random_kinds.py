"""More layers of random models, by what their forward pass does with parameters: functions, selections, shapes, sequences.

They are in the tables of :mod:`tests.core.random_features`, which says what those are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from .random_features import EITHER, REFUSE, VOCABULARY, Block, layer, parameter

# --- vectors: parameters in functions, transformed weights --------------------------------------------------------------


@layer("vector")
def parameter_list(rng, shape):
    weights = nn.ParameterList([parameter(shape[0], shape[0]) for _ in range(rng.randint(1, 3))])

    def run(m, x):
        for w in m.weights:
            x = torch.tanh(x @ w) + x
        return x

    return Block(run, weights=weights), shape


@layer("vector")
def parameter_dict(rng, shape):
    parts = nn.ParameterDict({"gate": parameter(3, shape[0]), "value": parameter(3, shape[0]), "shift": parameter(3)})

    def run(m, x):
        return torch.sigmoid(F.linear(x, m.parts["gate"])) * F.linear(x, m.parts["value"], m.parts["shift"])

    return Block(run, parts=parts), (3,)


@layer("vector")
def parameter_as_scale_and_shift(rng, shape):
    return Block(lambda m, x: x * m.one + m.one.square() - m.one, one=parameter(*shape)), shape


@layer("vector")
def weight_norm_by_hand(rng, shape):
    run = lambda m, x: F.linear(x, m.length[:, None] * F.normalize(m.direction, dim=1), m.bias)  # noqa: E731
    return Block(run, length=parameter(3), direction=parameter(3, shape[0]), bias=parameter(3)), (3,)


@layer("vector")
def low_rank_beside(rng, shape):
    """An adapter beside a layer, which may be frozen."""
    inner = nn.Linear(shape[0], 3).requires_grad_(rng.random() < 0.5)
    run = lambda m, x: m.inner(x) + 0.5 * (x @ m.down) @ m.up  # noqa: E731
    return Block(run, inner=inner, down=parameter(shape[0], 1), up=parameter(1, 3)), (3,)


@layer("vector")
def low_rank_merged(rng, shape):
    run = lambda m, x: F.linear(x, m.inner.weight + m.up @ m.down, m.inner.bias)  # noqa: E731
    return Block(run, inner=nn.Linear(shape[0], 3), down=parameter(1, shape[0]), up=parameter(3, 1)), (3,)


@layer("vector")
def masked_weight(rng, shape):
    block = Block(lambda m, x: F.linear(x, m.weight * m.kept, m.bias), weight=parameter(3, shape[0]), bias=parameter(3))
    block.register_buffer("kept", (torch.rand(3, shape[0]) > 0.3).float())
    return block, (3,)


@layer("vector")
def outer_product_weight(rng, shape):
    return Block(lambda m, x: x @ torch.outer(m.u, m.v), u=parameter(shape[0]), v=parameter(3)), (3,)


@layer("vector")
def reflection(rng, shape):
    run = lambda m, x: x - 2 * (x @ m.v)[:, None] * m.v / m.v.square().sum()  # noqa: E731
    return Block(run, v=parameter(*shape)), shape


@layer("vector")
def rotation(rng, shape):
    run = lambda m, x: x @ torch.linalg.matrix_exp(m.w - m.w.T)  # noqa: E731
    return Block(run, w=parameter(shape[0], shape[0])), shape


@layer("vector")
def solved(rng, shape):
    def run(m, x):
        eye = torch.eye(len(m.w), dtype=m.w.dtype)
        return torch.linalg.solve(eye + m.w @ m.w.T, x.to(m.w.dtype).T).T

    return Block(run, w=parameter(shape[0], shape[0])), shape


@layer("vector")
def learned_temperature(rng, shape):
    return Block(lambda m, x: m.inner(x) / m.t.exp(), inner=nn.Linear(shape[0], 3), t=parameter()), (3,)


@layer("vector")
def learned_slope(rng, shape):
    def run(m, x):
        h = m.inner(x)
        return torch.where(h > 0, h, m.slope * h)

    return Block(run, inner=nn.Linear(shape[0], 3), slope=parameter(3)), (3,)


@layer("vector")
def fourier_features(rng, shape):
    def run(m, x):
        h = x @ m.frequencies
        return torch.cat([h.sin(), h.cos()], 1)

    return Block(run, frequencies=parameter(shape[0], 2)), (4,)


@layer("vector")
def polynomial(rng, shape):
    return Block(lambda m, x: sum(c * x**k for k, c in enumerate(m.c)), c=parameter(3)), shape


@layer("vector")
def norm_by_hand(rng, shape):
    """RMS norm or layer norm of a model's own."""
    centred = rng.random() < 0.5

    def run(m, x):
        x = x - x.mean(-1, keepdim=True) if centred else x
        return m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2)

    return Block(run, weight=parameter(*shape)), shape


@layer("vector")
def running_statistics_by_hand(rng, shape):
    block = Block(
        lambda m, x: (x - m.mean) / m.spread * m.weight + m.bias, weight=parameter(*shape), bias=parameter(*shape)
    )
    block.register_buffer("mean", torch.randn(*shape))
    block.register_buffer("spread", torch.rand(*shape) + 0.5)
    return block, shape


@layer("vector")
def cosine_head(rng, shape):
    run = lambda m, x: m.scale * F.linear(F.normalize(x + 1, dim=1), F.normalize(m.weight, dim=1))  # noqa: E731
    return Block(run, weight=parameter(3, shape[0]), scale=parameter()), (3,)


@layer("vector")
def similarity_to_prototypes(rng, shape):
    """By cosine or by distance."""
    if rng.random() < 0.5:
        similar = nn.CosineSimilarity(dim=2)
        return Block(
            lambda m, x: m.similar(x[:, None] + 1, m.points[None]), similar=similar, points=parameter(3, *shape)
        ), (3,)
    return Block(lambda m, x: -(x[:, None] - m.points).square().sum(2), points=parameter(3, *shape)), (3,)


@layer("vector")
def hypernetwork(rng, shape):
    def run(m, x):
        return torch.einsum("noi,ni->no", m.maker(x).unflatten(1, (3, -1)), x)

    return Block(run, maker=nn.Linear(shape[0], 3 * shape[0])), (3,)


@layer("vector")
def gated_unit(rng, shape):
    run = lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x))  # noqa: E731
    return Block(run, gate=nn.Linear(shape[0], 3), up=nn.Linear(shape[0], 3), down=nn.Linear(3, 2)), (2,)


@layer("vector")
def heads_side_by_side(rng, shape):
    run = lambda m, x: torch.cat([m.one(x), m.two(torch.tanh(x))], 1)  # noqa: E731
    return Block(run, one=nn.Linear(shape[0], 2), two=nn.Linear(shape[0], 1, bias=False)), (3,)


@layer("vector")
def module_in_a_loop(rng, shape):
    """A block of blocks that is called several times, its layer twice in each."""
    part = Block(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(shape[0], shape[0]))

    def run(m, x):
        for _ in range(2):
            x = x + m.part(x)
        return x

    return Block(run, part=part), shape


@layer("vector")
def chain_in_place(rng, shape):
    def run(m, x):
        h = m.inner(x)
        h.add_(1).mul_(m.scale)
        h[:, 0] *= 0.5
        h[:, 1:].add_(m.shift)
        return h

    return Block(run, inner=nn.Linear(shape[0], 3), scale=parameter(3), shift=parameter(2)), (3,)


@layer("vector")
def checkpointed_functions(rng, shape):
    def part(x, w, b):
        return torch.tanh(F.linear(x, w, b))

    run = lambda m, x: m.last(checkpoint(part, x, m.w, m.b, use_reentrant=False))  # noqa: E731
    return Block(run, w=parameter(3, shape[0]), b=parameter(3), last=nn.Linear(3, 2)), (2,)


@layer("vector")
def spectrum(rng, shape):
    return Block(lambda m, x: torch.fft.rfft(m.inner(x)).abs(), inner=nn.Linear(shape[0], 4)), (3,)


# --- vectors: selections ------------------------------------------------------------------------------------------------


@layer("vector")
def soft_experts(rng, shape):
    def run(m, x):
        each = torch.stack([expert(x) for expert in m.experts], 1)
        return (m.gate(x).softmax(1)[..., None] * each).sum(1)

    experts = nn.ModuleList([nn.Linear(shape[0], 3) for _ in range(2)])
    return Block(run, gate=nn.Linear(shape[0], 2), experts=experts), (3,)


@layer("vector", EITHER)
def experts_by_mask(rng, shape):
    """Every expert sees the examples that are routed to it, which may be none."""

    def run(m, x):
        score, chosen = m.gate(x).softmax(1).max(1)
        out = torch.zeros(len(x), 3, dtype=score.dtype)
        for number, expert in enumerate(m.experts):
            mine = chosen == number
            if mine.any():
                out[mine] = expert(x[mine]).to(out.dtype)
        return out * score[:, None]

    experts = nn.ModuleList([nn.Linear(shape[0], 3) for _ in range(2)])
    return Block(run, gate=nn.Linear(shape[0], 2), experts=experts), (3,)


@layer("vector")
def experts_by_index(rng, shape):
    def run(m, x):
        score, chosen = m.gate(x).softmax(1).max(1)
        return torch.einsum("nio,ni->no", m.weights[chosen], x) * score[:, None]

    return Block(run, gate=nn.Linear(shape[0], 2), weights=parameter(2, shape[0], 3)), (3,)


@layer("vector", EITHER)
def experts_over_the_batch(rng, shape):
    """Experts that take a share of the batch each, the best for them: what the others are decides."""

    def run(m, x):
        score = m.gate(x).softmax(1)
        best = score[:, 0].topk(max(1, len(x) // 2)).indices
        return m.base(x).index_add(0, best, m.expert(x[best]) * score[best, :1])

    return Block(run, gate=nn.Linear(shape[0], 2), base=nn.Linear(shape[0], 3), expert=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def straight_through(rng, shape):
    def run(m, x):
        soft = m.inner(x).softmax(1)
        hard = F.one_hot(soft.argmax(1), 3).to(soft.dtype)
        return (hard - soft.detach() + soft) @ m.codes.to(soft.dtype)

    return Block(run, inner=nn.Linear(shape[0], 3), codes=parameter(3, 2)), (2,)


@layer("vector", REFUSE)
def gumbel(rng, shape):
    return Block(lambda m, x: F.gumbel_softmax(m.inner(x), hard=rng.random() < 0.5), inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def largest_features(rng, shape):
    return Block(lambda m, x: m.inner(x).topk(2, dim=1).values, inner=nn.Linear(shape[0], 4)), (2,)


# --- sequences ----------------------------------------------------------------------------------------------------------


@layer("sequence")
def causal_convolution(rng, shape):
    inner = nn.Conv1d(shape[1], 2, 2)
    return Block(lambda m, x: m.inner(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2), inner=inner), (shape[0], 2)


@layer("sequence")
def packed_recurrence(rng, shape):
    """Sequences of other lengths than their padding, in both directions or one."""
    kind, both = rng.choice((nn.LSTM, nn.GRU)), rng.random() < 0.6

    def run(m, x):
        lengths = 1 + (x[:, 1:, 0] > -0.5).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.inner(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    return Block(run, inner=kind(shape[1], 2, bidirectional=both, batch_first=True)), (shape[0], 4 if both else 2)


def rotated(x):
    """Pairs of features turned by an angle that grows with the position."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3
    one, two = x.chunk(2, -1)
    return torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1)


@layer("sequence")
def rotary_attention(rng, shape):
    """With two heads of queries for one of keys and values, causal or not."""
    causal = rng.random() < 0.5

    def run(m, x):
        q = rotated(m.q(x).unflatten(-1, (2, 2)).transpose(1, 2))
        k, v = (part[:, None].repeat_interleave(2, 1) for part in m.kv(x).chunk(2, -1))
        h = F.scaled_dot_product_attention(q, rotated(k), v, is_causal=causal)
        return m.out(h.transpose(1, 2).flatten(2))

    return Block(run, q=nn.Linear(shape[1], 4), kv=nn.Linear(shape[1], 4), out=nn.Linear(4, shape[1])), shape


@layer("sequence")
def attention_with_a_mask(rng, shape):
    """Of booleans, or of numbers that are learned."""
    kept = torch.ones(shape[0], shape[0], dtype=torch.bool).tril()
    learned = rng.random() < 0.5

    def run(m, x):
        h = m.inner(x)[:, None]
        return F.scaled_dot_product_attention(h, h, h, attn_mask=m.mask.to(h.dtype) if learned else kept)[:, 0]

    parts = {"mask": parameter(shape[0], shape[0])} if learned else {}
    return Block(run, inner=nn.Linear(shape[1], 2), **parts), (shape[0], 2)


@layer("sequence")
def decoder_layer(rng, shape):
    inner = nn.TransformerDecoderLayer(shape[1], 1, 2, dropout=0.0, batch_first=True)
    mask = torch.ones(shape[0], shape[0], dtype=torch.bool).triu(1)
    return Block(lambda m, x: m.inner(x, torch.tanh(x), tgt_mask=mask), inner=inner), shape


@layer("sequence")
def encoder_norm_first(rng, shape):
    inner = nn.TransformerEncoderLayer(
        shape[1], 1, 2, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    )
    mask = torch.zeros(shape[0], shape[0]).masked_fill(torch.ones(shape[0], shape[0]).triu(1).bool(), float("-inf"))
    return Block(lambda m, x: m.inner(x, src_mask=mask.to(x.dtype)), inner=inner), shape


@layer("sequence")
def mixed_positions(rng, shape):
    """A layer over positions, then one over features."""
    run = lambda m, x: m.features(m.places(x.transpose(1, 2)).transpose(1, 2))  # noqa: E731
    return Block(run, places=nn.Linear(shape[0], shape[0]), features=nn.Linear(shape[1], 2)), (shape[0], 2)


@layer("sequence", gives="vector")
def pooled_by_a_query(rng, shape):
    run = lambda m, x: ((x @ m.query).softmax(1)[..., None] * x).sum(1)  # noqa: E731
    return Block(run, query=parameter(shape[1])), shape[1:]


@layer("sequence", gives="vector")
def best_position(rng, shape):
    def run(m, x):
        best = m.score(x)[..., 0].argmax(1)
        return m.inner(x[torch.arange(len(x)), best])

    return Block(run, score=nn.Linear(shape[1], 1).requires_grad_(False), inner=nn.Linear(shape[1], 3)), (3,)


@layer("sequence")
def sorted_positions(rng, shape):
    return Block(lambda m, x: m.inner(x).sort(1).values, inner=nn.Linear(shape[1], 2)), (shape[0], 2)


@layer("sequence")
def decaying_state(rng, shape):
    """A state that decays and takes in, step by step."""

    def run(m, x):
        h, found = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.sigmoid(m.decay) * h + m.take * x[:, t]
            found.append(h)
        return torch.stack(found, 1)

    return Block(run, decay=parameter(shape[1]), take=parameter(shape[1])), shape


@layer("sequence")
def distance_bias(rng, shape):
    places = torch.arange(shape[0])
    distance = (places[:, None] - places).abs().float()
    run = lambda m, x: (x @ x.mT - m.slope * distance.to(x.dtype)).softmax(-1) @ x  # noqa: E731
    return Block(run, slope=parameter()), shape


@layer("sequence")
def linear_attention(rng, shape):
    def run(m, x):
        q, k = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1
        return torch.einsum("npi,nqi,nqj->npj", q, k, x) / torch.einsum("npi,nqi->np", q, k)[..., None]

    return Block(run, q=nn.Linear(shape[1], 2), k=nn.Linear(shape[1], 2)), shape


@layer("sequence")
def batch_norm_of_features(rng, shape):
    norm = nn.BatchNorm1d(shape[1])
    return Block(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=norm), shape


# --- images -------------------------------------------------------------------------------------------------------------


@layer("image")
def pooled_adaptively(rng, shape):
    pool = rng.choice((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))(2)
    return nn.Sequential(nn.Conv2d(shape[0], 2, 1), pool), (2, 2, 2)


@layer("image")
def upsampled(rng, shape):
    up = nn.Upsample(scale_factor=2, mode=rng.choice(("nearest", "bilinear")))
    return nn.Sequential(up, nn.Conv2d(shape[0], 2, 3, stride=2, padding=1)), (2, *shape[1:])


@layer("image")
def pixel_shuffle(rng, shape):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 1), nn.PixelShuffle(2), nn.AvgPool2d(2)), (1, *shape[1:])


@layer("image")
def unfolded_patches(rng, shape):
    def run(m, x):
        return m.inner(F.unfold(x, 2).mT).mT.unflatten(2, (x.shape[2] - 1, x.shape[3] - 1))

    return Block(run, inner=nn.Linear(4 * shape[0], 2)), (2, shape[1] - 1, shape[2] - 1)


@layer("image")
def squeeze_and_excite(rng, shape):
    run = lambda m, x: x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)) + 0.5)))  # noqa: E731
    return Block(run, down=nn.Conv2d(shape[0], 2, 1), up=nn.Conv2d(2, shape[0], 1)), shape


@layer("image")
def sampled_on_a_grid(rng, shape):
    """A spatial transformer: where pixels are taken from is learned from the image."""

    def run(m, x):
        eye = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=x.dtype)
        theta = eye + 0.1 * m.where(x.flatten(1)).to(x.dtype).unflatten(1, (2, 3))
        return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)

    return Block(run, where=nn.Linear(torch.Size(shape).numel(), 6)), shape


@layer("image")
def functional_instance_norm(rng, shape):
    run = lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias, eps=1e-2)  # noqa: E731
    return Block(run, weight=parameter(shape[0]), bias=parameter(shape[0])), shape


@layer("image")
def windows(rng, shape):
    """Attention in windows that are folded into the batch."""
    rows, columns = (2 if n % 2 == 0 else 1 for n in shape[1:])

    def run(m, x):
        h = x.unflatten(2, (-1, rows)).unflatten(4, (-1, columns)).permute(0, 2, 4, 3, 5, 1)
        q, k, v = m.packed(h.flatten(0, 2).flatten(1, 2)).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v).reshape(*h.shape[:5], 2)
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    return Block(run, packed=nn.Linear(shape[0], 6)), (2, *shape[1:])


@layer("image")
def shuffled_channels(rng, shape):
    run = lambda m, x: m.second(m.first(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))  # noqa: E731
    return Block(run, first=nn.Conv2d(shape[0], 4, 1), second=nn.Conv2d(4, 2, 1, groups=2)), (2, *shape[1:])


@layer("image")
def weight_by_channel(rng, shape):
    """A convolution with a standardised weight without a module, and max pooling by one."""

    def run(m, x):
        w = m.weight / (m.weight.flatten(1).norm(dim=1)[:, None, None, None] + 1e-3)
        return F.max_pool2d(F.conv2d(x, w * m.gain[:, None, None, None], padding=1), 2, stride=1, padding=1)

    return Block(run, weight=parameter(2, shape[0], 3, 3), gain=parameter(2)), (2, shape[1] + 1, shape[2] + 1)


# --- tokens -------------------------------------------------------------------------------------------------------------


@layer("tokens", gives="vector")
def embedding_bag_of_a_function(rng, shape):
    """Sums or maxima, the first with weights that may be learned."""
    mode = rng.choice(("sum", "max"))
    learned = mode == "sum" and rng.random() < 0.5

    def run(m, x):
        weights = m.weights.to(m.table.dtype).expand(len(x), -1) if learned else None
        return F.embedding_bag(x, m.table, mode=mode, per_sample_weights=weights)

    parts = {"weights": parameter(shape[0])} if learned else {}
    return Block(run, table=parameter(VOCABULARY, 3), **parts), (3,)


@layer("tokens", gives="sequence")
def one_hot_product(rng, shape):
    run = lambda m, x: F.one_hot(x, VOCABULARY).to(m.weight.dtype) @ m.weight  # noqa: E731
    return Block(run, weight=parameter(VOCABULARY, 3)), (shape[0], 3)


@layer("tokens", gives="sequence")
def factorised_table(rng, shape):
    """One table for two kinds of codes, and a projection."""
    run = lambda m, x: m.up(m.table(x) + m.table((3 * x) % VOCABULARY))  # noqa: E731
    return Block(run, table=nn.Embedding(VOCABULARY, 2), up=nn.Linear(2, 3, bias=False)), (shape[0], 3)


@layer("tokens", gives="vector")
def mean_of_words(rng, shape):
    """Over those that are no padding."""

    def run(m, x):
        kept = (x != 0).to(m.table.weight.dtype)[..., None]
        return (m.table(x) * kept).sum(1) / kept.sum(1).clamp(min=1)

    return Block(run, table=nn.Embedding(VOCABULARY, 3, padding_idx=0)), (3,)
