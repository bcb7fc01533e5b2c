"""Every layer of ``torch.nn``, small enough to be differentiated twice by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A layer to be trained behind a linear map.

    Attributes:
        make: builds it.
        shape: of its input, the batch first.
        call: what to do with it and its input. Default: call it.
        refused: the words of the error, where it cannot be differentiated twice.
        constant: sets to zero what PyTorch defines to have no gradient, in a direction for the
            parameters.
        rounds: whether PyTorch computes its gradient by another kernel where that is to be
            differentiated again, so that recomputed steps differ in the last bits.
        recent: whether some supported versions of PyTorch have no such layer yet.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[Any, Tensor], Any] = lambda layer, x: layer(x)
    refused: str | None = None
    constant: Callable[[list[Tensor]], Any] | None = None
    rounds: bool = False
    recent: bool = False

    @property
    def missing(self) -> bool:
        """Whether this PyTorch has no such layer."""
        return self.recent and not hasattr(nn, self.name)


def _target(*shape: int) -> Tensor:
    return torch.linspace(-0.9, 1.1, math.prod(shape), dtype=torch.double).reshape(shape)


def _classes(n: int, k: int) -> Tensor:
    return torch.arange(n) % k


def _first(layer: Any, x: Tensor) -> Tensor:
    return layer(x)[0]


def _attention(layer: Any, x: Tensor) -> Tensor:
    return layer(x, x, x)[0]


def _self_attention(layer: Any, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def _unpool(pool: Callable[..., Any]) -> Callable[[Any, Tensor], Tensor]:
    def call(layer: Any, x: Tensor) -> Tensor:
        pooled, indices = pool(x, 2, return_indices=True)
        return layer(pooled, indices)

    return call


def _plain(name: str, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Layer:
    shown = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
    label = f"{name}({', '.join(shown)})" if shown else name
    return Layer(label, lambda: getattr(nn, name)(*args, **kwargs), shape)


def _loss(
    name: str, shape: tuple[int, ...], call: Callable[[Any, Tensor], Any], *args: Any, **kw: Any
) -> Layer:
    return Layer(name, lambda: getattr(nn, name)(*args, **kw), shape, call)


def _embedded(layer: Any, x: Tensor) -> Tensor:
    return layer(torch.tensor([[0, 2, 2], [1, 4, 0]])) + x.mean()


_1D, _2D, _3D = (2, 4, 6), (2, 4, 4, 4), (1, 2, 4, 4, 4)
_FLAT = (3, 6)
_SEQUENCE = (3, 2, 4)  # length, batch, features

# fmt: off
_ELEMENTWISE = [
    "AlphaDropout", "CELU", "Dropout", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish",
    "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "PReLU", "ReLU", "ReLU6", "RReLU",
    "SELU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
]
# fmt: on

LAYERS = [
    *(_plain(name, _FLAT) for name in _ELEMENTWISE),
    *(Layer(name, getattr(nn, name), _FLAT, rounds=True) for name in ("Mish", "SiLU")),
    _plain("GELU", _FLAT, approximate="tanh"),
    _plain("Threshold", _FLAT, 0.1, 0.2),
    _plain("GLU", _FLAT),
    *(_plain(name, _FLAT, dim=1) for name in ("Softmax", "LogSoftmax", "Softmin")),
    _plain("Softmax2d", _2D),
    _plain("Dropout1d", _1D),
    _plain("Dropout2d", _2D),
    _plain("Dropout3d", _3D),
    _plain("FeatureAlphaDropout", _2D),
    _plain("Linear", _FLAT, 6, 3),
    Layer("Bilinear", lambda: nn.Bilinear(6, 6, 2), _FLAT, lambda m, x: m(x, x.sin())),
    _plain("Flatten", _2D),
    Layer("Unflatten", lambda: nn.Unflatten(1, (2, 3)), _FLAT),
    _plain("Fold", (1, 8, 9), (4, 4), 2),
    _plain("Unfold", _2D, 2),
    _plain("ChannelShuffle", _2D, 2),
    _plain("PixelShuffle", _2D, 2),
    _plain("PixelUnshuffle", _2D, 2),
    # Convolutions.
    _plain("Conv1d", _1D, 4, 3, 3, padding=1),
    _plain("Conv2d", _2D, 4, 3, 3, padding=1, stride=2),
    _plain("Conv2d", _2D, 4, 4, 3, groups=2, padding=1, padding_mode="reflect"),
    _plain("Conv3d", _3D, 2, 3, 2),
    _plain("ConvTranspose1d", _1D, 4, 3, 3),
    _plain("ConvTranspose2d", _2D, 4, 3, 2, stride=2),
    _plain("ConvTranspose3d", _3D, 2, 2, 2),
    # Pooling.
    _plain("AvgPool1d", _1D, 2),
    _plain("AvgPool2d", _2D, 2),
    _plain("AvgPool3d", _3D, 2),
    _plain("MaxPool1d", _1D, 2),
    _plain("MaxPool2d", _2D, 2),
    _plain("MaxPool3d", _3D, 2),
    *(
        Layer(
            f"LPPool{n}d(3, 2)",
            lambda k=f"LPPool{n}d": getattr(nn, k)(3, 2),
            shape,
            lambda m, x: m(x.square() + 0.1),  # at 0 its gradient is not finite in PyTorch
        )
        for n, shape in ((1, _1D), (2, _2D), (3, _3D))
    ),
    _plain("AdaptiveAvgPool1d", _1D, 4),
    _plain("AdaptiveAvgPool2d", _2D, 3),
    _plain("AdaptiveAvgPool3d", _3D, 3),
    _plain("AdaptiveMaxPool1d", _1D, 4),
    _plain("AdaptiveMaxPool2d", _2D, 3),
    _plain("AdaptiveMaxPool3d", _3D, 3),
    _plain("FractionalMaxPool2d", _2D, 2, output_size=3),
    _plain("FractionalMaxPool3d", (1, 2, 5, 5, 5), 2, output_size=3),
    Layer("MaxUnpool1d", lambda: nn.MaxUnpool1d(2), _1D, _unpool(nn.functional.max_pool1d)),
    Layer("MaxUnpool2d", lambda: nn.MaxUnpool2d(2), _2D, _unpool(nn.functional.max_pool2d)),
    Layer("MaxUnpool3d", lambda: nn.MaxUnpool3d(2), _3D, _unpool(nn.functional.max_pool3d)),
    # Padding.
    *(
        _plain(f"{kind}Pad{n}d", shape, 1, *((0.5,) if kind == "Constant" else ()))
        for kind in ("Circular", "Constant", "Reflection", "Replication", "Zero")
        for n, shape in ((1, _1D), (2, _2D), (3, _3D))
    ),
    # Resampling.
    *(
        _plain("Upsample", shape, scale_factor=2, mode=mode)
        for mode, shape in (
            ("nearest", _2D),
            ("linear", _1D),
            ("bilinear", _2D),
            ("bicubic", _2D),
            ("trilinear", _3D),
        )
    ),
    _plain("UpsamplingBilinear2d", _2D, scale_factor=2),
    _plain("UpsamplingNearest2d", _2D, scale_factor=2),
    # Normalization.
    _plain("BatchNorm1d", _1D, 4),
    _plain("BatchNorm2d", _2D, 4),
    _plain("BatchNorm3d", _3D, 2),
    Layer("BatchNorm2d, eval()", lambda: nn.BatchNorm2d(4).eval(), _2D),
    _plain("BatchNorm1d", _1D, 4, momentum=None),
    Layer("GroupNorm(2, 4)", lambda: nn.GroupNorm(2, 4), _2D, rounds=True),
    _plain("InstanceNorm1d", _1D, 4, affine=True),
    _plain("InstanceNorm2d", _2D, 4, track_running_stats=True),
    _plain("InstanceNorm3d", _3D, 2),
    _plain("LayerNorm", _FLAT, 6),
    _plain("RMSNorm", _FLAT, 6),
    _plain("LocalResponseNorm", _2D, 2),
    Layer(
        "CrossMapLRN2d",
        lambda: nn.CrossMapLRN2d(2),
        _2D,
        refused="functions with out=... arguments don't support automatic differentiation",
    ),
    _plain("SyncBatchNorm", _2D, 4),
    # Recurrent.
    *(
        Layer(f"{name}, {words}", lambda n=name, k=kw: getattr(nn, n)(4, 3, **k), _SEQUENCE, _first)
        for name in ("RNN", "LSTM", "GRU")
        for words, kw in (
            ("one layer", {}),
            (
                "bidirectional, two layers, dropout",
                {"bidirectional": True, "num_layers": 2, "dropout": 0.3},
            ),
        )
    ),
    Layer("LSTM, proj_size=2", lambda: nn.LSTM(4, 3, proj_size=2), _SEQUENCE, _first),
    _plain("RNNCell", (3, 4), 4, 3),
    Layer("LSTMCell", lambda: nn.LSTMCell(4, 3), (3, 4), _first),
    _plain("GRUCell", (3, 4), 4, 3),
    # Attention.
    Layer("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2), _SEQUENCE, _attention),
    Layer(
        "MultiheadAttention, need_weights=False",
        lambda: nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True),
        _SEQUENCE,
        _self_attention,
    ),
    *(
        Layer(
            f"TransformerEncoderLayer, {words}",
            lambda k=kw, e=eval_: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **k).train(
                not e
            ),
            _SEQUENCE,
        )
        for words, kw, eval_ in (
            ("post-norm", {}, False),
            ("pre-norm, GELU", {"norm_first": True, "activation": "gelu"}, False),
            ("eval()", {}, True),
        )
    ),
    Layer(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(4, 2, 8, dropout=0.2),
        _SEQUENCE,
        lambda m, x: m(x, x.sin()),
    ),
    Layer(
        "TransformerEncoder, two layers",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        _SEQUENCE,
    ),
    Layer(
        "TransformerDecoder, two layers",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 2),
        _SEQUENCE,
        lambda m, x: m(x, x.sin()),
    ),
    Layer(
        "Transformer",
        lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
        _SEQUENCE,
        lambda m, x: m(x, x.sin()),
    ),
    # Embeddings.
    Layer("Embedding", lambda: nn.Embedding(5, 4), _FLAT, _embedded),
    Layer(
        "Embedding, padding_idx",
        lambda: nn.Embedding(5, 4, padding_idx=0),
        _FLAT,
        _embedded,
        constant=lambda u: u[-1][0].zero_(),
    ),
    *(
        Layer(
            f"Embedding, {option}",
            lambda k=option, v=value: nn.Embedding(5, 4, **{k: v}),
            _FLAT,
            _embedded,
            refused=words,
        )
        for option, value, words in (
            ("max_norm", 0.5, "changes its weights in place (max_norm)"),
            ("scale_grad_by_freq", True, "scales every gradient that passes it"),
            ("sparse", True, "use a dense one, such as nn.Embedding(..., sparse=False) gives"),
        )
    ),
    *(
        Layer(
            f"EmbeddingBag, {mode}",
            lambda m=mode: nn.EmbeddingBag(5, 4, mode=m),
            _FLAT,
            _embedded,
            refused="the derivative for '_embedding_bag_backward' is not implemented",
        )
        for mode in ("sum", "mean", "max")
    ),
    # Distances and losses.
    Layer("CosineSimilarity", nn.CosineSimilarity, _FLAT, lambda m, x: m(x, x.sin() + 1)),
    Layer("PairwiseDistance", nn.PairwiseDistance, _FLAT, lambda m, x: m(x, x.sin() + 1)),
    *(
        Layer(name, getattr(nn, name), _FLAT, lambda m, x: m(x, _target(3, 6)))
        for name in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss")
    ),
    *(
        Layer(name, getattr(nn, name), _FLAT, lambda m, x: m(x, _target(3, 6).sign()))
        for name in ("SoftMarginLoss", "HingeEmbeddingLoss")
    ),
    Layer("CrossEntropyLoss", nn.CrossEntropyLoss, _FLAT, lambda m, x: m(x, _classes(3, 6))),
    Layer(
        "MultiMarginLoss",
        nn.MultiMarginLoss,
        _FLAT,
        lambda m, x: m(x, _classes(3, 6)),
        refused="derivative for aten::multi_margin_loss_backward is not implemented",
    ),
    Layer(
        "CrossEntropyLoss, label smoothing",
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(6)),
        _FLAT,
        lambda m, x: m(x, _target(3, 6).softmax(1)),
    ),
    Layer("NLLLoss", nn.NLLLoss, _FLAT, lambda m, x: m(x.log_softmax(1), _classes(3, 6))),
    Layer("BCELoss", nn.BCELoss, _FLAT, lambda m, x: m(x.sigmoid(), _target(3, 6).sigmoid())),
    *(
        Layer(name, getattr(nn, name), _FLAT, lambda m, x: m(x, (_target(3, 6) > 0).double()))
        for name in ("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss")
    ),
    Layer(
        "MultiLabelMarginLoss",
        nn.MultiLabelMarginLoss,
        _FLAT,
        lambda m, x: m(x, torch.tensor([[0, 2, -1, 0, 0, 0]] * 3)),
        refused="derivative for aten::multilabel_margin_loss_backward is not implemented",
    ),
    Layer(
        "KLDivLoss",
        lambda: nn.KLDivLoss(reduction="batchmean"),
        _FLAT,
        lambda m, x: m(x.log_softmax(1), _target(3, 6).softmax(1)),
    ),
    Layer(
        "GaussianNLLLoss",
        nn.GaussianNLLLoss,
        _FLAT,
        lambda m, x: m(x, _target(3, 6), x.square() + 0.5),
    ),
    Layer(
        "CosineEmbeddingLoss",
        nn.CosineEmbeddingLoss,
        _FLAT,
        lambda m, x: m(x, x.sin() + 1, torch.tensor([1, -1, 1])),
    ),
    Layer(
        "MarginRankingLoss",
        lambda: nn.MarginRankingLoss(0.3),
        _FLAT,
        lambda m, x: m(x, x.square(), _target(3, 6).sign()),
    ),
    *(
        Layer(name, getattr(nn, name), _FLAT, lambda m, x: m(x, x.sin() + 0.3, x.cos()))
        for name in ("TripletMarginLoss", "TripletMarginWithDistanceLoss")
    ),
    Layer(
        "CTCLoss",
        nn.CTCLoss,
        (5, 2, 4),
        lambda m, x: m(
            x.log_softmax(2),
            torch.tensor([[1, 2], [3, 3]]),
            torch.tensor([5, 5]),
            torch.tensor([2, 2]),
        ),
        refused="derivative for aten::_ctc_loss_backward is not implemented",
    ),
    Layer(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 8, [3, 5], div_value=1.5),
        _FLAT,
        lambda m, x: m(x, torch.tensor([0, 4, 7])).loss,
    ),
    Layer(
        "LinearCrossEntropyLoss",
        lambda: nn.LinearCrossEntropyLoss(6, 5),
        _FLAT,
        lambda m, x: m(x, _classes(3, 5)),
        recent=True,
    ),
]
