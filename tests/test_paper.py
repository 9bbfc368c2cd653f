"""A model of two layers whose every edge is worked out by hand.

d_model 4, one head, values and outputs the identity, queries and keys zero, so that every pattern
is uniform over the past; MLPs zero, so that an error node is minus its layer's reconstruction and
the residual stream is what tokens and attention make of it.

  token A = (2,0,0,0), token B = (0,0,2,0); root mean square of each is 1, so norms divide by 1.
  Layer 0: attention's output weight is zero. Feature 0: reads (1,0,0,0), writes (0,3,0,0).
           On A it is active with 2, on B with 0.
  Layer 1: at B, attention adds (A+B)/2 = (1,0,1,0); the stream is (1,0,3,0), root mean square
           s = sqrt(10/4). Feature 0: reads (0,1,½,0), writes (0,0,0,2).
           Its pre-activation: ½·3/s = 1.5/s.
    from token B: itself 2 and half of it by attention, 3 in all, times ½, over s:   1.5/s
    from token A: nothing, its coordinate is not read
    from feature 0 of layer 0: 2·3 halved by attention, over s:                       3/s
    from layer 0's error at A: minus that:                                           -3/s
  Output: the stream at B is still (1,0,3,0), again over s. Token 5's unembedding is (0,0,1,1),
  the others' mean is set to zero. Logit 3/s.
    from token A: 0;   from token B: 3/s
    from feature 0 of layer 1: (1.5/s)·2/s = 3/s²;  from layer 1's error at B: -3/s²
    from feature 0 of layer 0 and its error: nothing, (0,3,0,0) is not read by (0,0,1,1)
"""

import math

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import tokenizer

S = math.sqrt(10 / 4)
A, B, ANSWER = 3, 4, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=4,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=101,
        max_position_embeddings=8,
        rms_norm_eps=1e-12,
    )
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        made.model.embed_tokens.weight[A, 0] = 2.0
        made.model.embed_tokens.weight[B, 2] = 2.0
        attention = made.model.layers[1].self_attn
        attention.v_proj.weight.copy_(torch.eye(4))
        attention.o_proj.weight.copy_(torch.eye(4))
        made.lm_head.weight[ANSWER] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        made.lm_head.weight[ANSWER + 1] = -torch.tensor([0.0, 0.0, 1.0, 1.0])  # the mean over the vocabulary is 0
    folder = str(tmp_path_factory.mktemp("paper"))
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, device=DEVICE)


def by_hand():
    edges = {
        ("token@1", "L1/F0@1"): 1.5 / S,
        ("L0/F0@0", "L1/F0@1"): 3 / S,
        ("L0/error@0", "L1/F0@1"): -3 / S,
        ("token@1", "logit:0"): 3 / S,
        ("L1/F0@1", "logit:0"): 3 / S**2,
        ("L1/error@1", "logit:0"): -3 / S**2,
        ("token@0", "L0/F0@0"): 2.0,
    }
    return edges


@pytest.mark.parametrize("engine", ["linear", "autograd"])
def test_every_edge_is_what_the_paper_says(model, engine):
    def feature(read, write):
        return tlc.Transcoder(torch.tensor([read]), torch.tensor([write]), torch.zeros(1), torch.zeros(4))

    dictionary = {0: feature([1.0, 0, 0, 0], [0.0, 3, 0, 0]), 1: feature([0.0, 1, 0.5, 0], [0.0, 0, 0, 2])}
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, [A, B], [ANSWER], engine=engine, progress=False)
    found = {(e.source, e.target): e.weight for e in graph.edges.itertuples() if abs(e.weight) > 1e-6}
    assert found == pytest.approx(by_hand(), abs=1e-5)
    value = dict(zip(graph.nodes.id, graph.nodes.value, strict=True))
    assert value["logit:0"] == pytest.approx(3 / S, abs=1e-5)
    assert value["L1/F0@1"] == pytest.approx(1.5 / S, abs=1e-5)
    assert float(graph.nodes.bias.abs().max()) < 1e-6
    assert graph.completeness_error() < 1e-6
