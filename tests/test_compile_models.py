"""Models that people use, compiled as they are normally called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_all_close
from torch import nn

import diffopt

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("graphs")

WORDS = 17


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
        )
    )


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


@pytest.mark.parametrize("masked", [False, True], ids=["all words", "a mask"])
@pytest.mark.parametrize("make", [_gpt2, _llama, _bert], ids=["gpt2", "llama", "bert"])
@pytest.mark.filterwarnings("ignore:.*loss_type")
def test_as_normally_called(make: Any, masked: bool) -> None:
    model = make().double()
    data = []
    for _ in range(3):
        words = torch.randint(0, WORDS, (2, 6))
        data.append({"input_ids": words, "labels": words})
        if masked:
            mask = torch.ones_like(words)
            mask[:, -1] = 0
            data[-1]["attention_mask"] = mask
    found = []
    for compile in (False, True):
        torch.manual_seed(1)
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, lambda m, b: m(**b), segment=1, compile=compile)
        grads = torch.autograd.grad(fast.losses.sum(), [*model.parameters()], allow_unused=True)
        found.append([g for g in grads if g is not None])
    assert_all_close(found[1], found[0], rtol=1e-9, atol=1e-12)
