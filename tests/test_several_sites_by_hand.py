"""A graph of one block computed step by step with NumPy: autoencoders of attention's output and of the stream behind
it."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.test_any_site_by_hand import TOKENS, Block, D, H
from tests.tiny import checkpoint


def test_a_block_with_two_autoencoders_is_what_numpy_makes_of_it(tmp_path):
    config = GPT2Config(n_embd=D, n_layer=1, n_head=H, vocab_size=101, n_positions=16, bos_token_id=1, eos_token_id=2)
    folder = checkpoint(config, str(tmp_path), seed=3)
    w = {name: tensor.float() for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}
    wte, wpe = (w[f"transformer.{name}.weight"].numpy().astype(np.float64) for name in ("wte", "wpe"))
    tokens = wte[TOKENS] + wpe[: len(TOKENS)]
    block = Block(w, 0, tokens)
    added = block.mid - tokens  # what attention adds
    random = np.random.default_rng(0)
    # Three features each: of what attention adds (a) and of the stream behind the block (s).
    a_enc, s_enc = (random.normal(size=(3, D)) / np.abs(x).max() for x in (added, block.out))
    a_dec, s_dec = random.normal(size=(2, 3, D)) * 0.3
    a_bias, s_bias, b_dec = (
        random.normal(size=3) * 0.1 + 1.2,
        random.normal(size=3) * 0.1 + 1.2,
        random.normal(size=(2, D)) * 0.1,
    )
    a_acts, s_acts = np.maximum(added @ a_enc.T + a_bias, 0), np.maximum(block.out @ s_enc.T + s_bias, 0)
    a_error, s_error = added - a_acts @ a_dec - b_dec[0], block.out - s_acts @ s_dec - b_dec[1]

    def made(enc, dec, bias, constant, site):
        enc, dec, bias, constant = (torch.tensor(x, dtype=torch.float32) for x in (enc, dec, bias, constant))
        return tlc.load_dictionary({0: tlc.Transcoder(enc, dec, bias, constant, input_hook=site, output_hook=site)})

    parts = [
        made(s_enc, s_dec, s_bias, b_dec[1], "hook_resid_post"),
        made(a_enc, a_dec, a_bias, b_dec[0], "hook_attn_out"),
    ]
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device=DEVICE, dtype=torch.float32).eval()
    with tlc.attach(model, tlc.load_dictionary(parts)) as replacement:
        graph = tlc.attribute(replacement, torch.tensor(TOKENS), [5], skip_positions=[0], progress=False)

    last = len(TOKENS) - 1
    ln_f = w["transformer.ln_f.weight"].numpy().astype(np.float64)
    final_scale = np.sqrt(((block.out - block.out.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True) + 1e-5)
    target = wte[5] - wte.mean(0)  # GPT-2 ties the unembedding

    def logit(dout):
        """What a change of the last stream changes in the centred logit."""
        d = dout[last]
        return ((d - d.mean()) / final_scale[last] * ln_f) @ target

    def at_position(vector, position):
        changed = np.zeros((len(TOKENS), D))
        changed[position] = vector
        return changed

    def behind(dmid):
        """From the stream in the block's middle to the stream behind it."""
        return dmid + block.neurons(dmid)

    expected, positions = {}, range(1, len(TOKENS))
    for p in range(len(TOKENS)):
        own = at_position(tokens[p], p)
        # past attention, whose output is rebuilt, along the stream alone
        attended, along = block.attention(own), behind(own)
        expected |= {
            (f"token@{p}", f"L0.attn_out/F{f}@{q}"): attended[q] @ a_enc[f] for q in positions for f in range(3)
        }
        expected |= {
            (f"token@{p}", f"L0.resid_post/F{f}@{q}"): along[q] @ s_enc[f] for q in positions for f in range(3)
        }
        if p == 0:
            continue
        sources = [(f"L0.attn_out/F{f}@{p}", a_acts[p, f] * a_dec[f]) for f in range(3)] + [
            (f"L0.attn_out/error@{p}", a_error[p])
        ]
        for name, vector in sources:
            reached = behind(at_position(vector, p))
            expected |= {(name, f"L0.resid_post/F{f}@{q}"): reached[q] @ s_enc[f] for q in positions for f in range(3)}
        writes = [(f"L0.resid_post/F{f}@{p}", s_acts[p, f] * s_dec[f]) for f in range(3)] + [
            (f"L0.resid_post/error@{p}", s_error[p])
        ]
        expected |= {(name, "logit:0"): logit(at_position(vector, p)) for name, vector in writes}

    rows, compared = graph.adjacency(), 0
    for i, into in enumerate(graph.node_ids):
        for j, name in enumerate(graph.node_ids):
            value = expected.get((name, into), 0.0)
            assert abs(float(rows[i, j]) - value) < 1e-5 * max(1.0, abs(value)), (name, into)  # float32 against float64
            compared += value != 0.0
    assert compared > 25 and graph.completeness_error() < 1e-5
