"""A graph of two layers computed step by step with NumPy: an autoencoder of the stream, and one of an MLP's output."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import checkpoint

TOKENS = [1, 9, 4, 7]
D, H, E = 8, 2, 4  # width, heads, entries of a head


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class Block:
    """One block of GPT-2: what it computes, with its pattern, denominators and activation ratios kept."""

    def __init__(self, w, i, x):
        g = {
            name: w[f"transformer.h.{i}.{name}"].numpy().astype(np.float64)
            for name in (
                "ln_1.weight",
                "ln_1.bias",
                "attn.c_attn.weight",
                "attn.c_attn.bias",
                "attn.c_proj.weight",
                "attn.c_proj.bias",
                "ln_2.weight",
                "ln_2.bias",
                "mlp.c_fc.weight",
                "mlp.c_fc.bias",
                "mlp.c_proj.weight",
                "mlp.c_proj.bias",
            )
        }
        self.g, self.x = g, x
        self.scale_1 = np.sqrt(((x - x.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True) + 1e-5)
        normed = (x - x.mean(1, keepdims=True)) / self.scale_1 * g["ln_1.weight"] + g["ln_1.bias"]
        q, k, v = np.split(normed @ g["attn.c_attn.weight"] + g["attn.c_attn.bias"], 3, axis=1)
        self.pattern = np.zeros((H, len(x), len(x)))
        for h in range(H):
            own = slice(h * E, (h + 1) * E)
            scores = q[:, own] @ k[:, own].T / np.sqrt(E)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            self.pattern[h] = weights / weights.sum(1, keepdims=True)
        z = np.concatenate([self.pattern[h] @ v[:, h * E : (h + 1) * E] for h in range(H)], 1)
        self.mid = x + z @ g["attn.c_proj.weight"] + g["attn.c_proj.bias"]
        self.scale_2 = np.sqrt(((self.mid - self.mid.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True) + 1e-5)
        read = (self.mid - self.mid.mean(1, keepdims=True)) / self.scale_2 * g["ln_2.weight"] + g["ln_2.bias"]
        pre = read @ g["mlp.c_fc.weight"] + g["mlp.c_fc.bias"]
        self.ratio = gelu(pre) / pre
        self.mlp = gelu(pre) @ g["mlp.c_proj.weight"] + g["mlp.c_proj.bias"]
        self.out = self.mid + self.mlp

    def attention(self, dx):
        """What a change ``dx`` of the block's input changes in what attention adds, patterns and denominators held."""
        g = self.g
        normed = (dx - dx.mean(1, keepdims=True)) / self.scale_1 * g["ln_1.weight"]
        v = normed @ g["attn.c_attn.weight"][:, 2 * D :]
        z = np.concatenate([self.pattern[h] @ v[:, h * E : (h + 1) * E] for h in range(H)], 1)
        return z @ g["attn.c_proj.weight"]

    def neurons(self, dmid):
        """What a change of the stream in the middle changes in the MLP's output, ratios held; constant at position
        0."""
        g = self.g
        normed = (dmid - dmid.mean(1, keepdims=True)) / self.scale_2 * g["ln_2.weight"]
        out = (self.ratio * (normed @ g["mlp.c_fc.weight"])) @ g["mlp.c_proj.weight"]
        out[0] = 0.0
        return out


def test_a_graph_of_two_layers_is_what_numpy_makes_of_it(tmp_path):
    config = GPT2Config(n_embd=D, n_layer=2, n_head=H, vocab_size=101, n_positions=16, bos_token_id=1, eos_token_id=2)
    folder = checkpoint(config, str(tmp_path), seed=3)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    w = {name: tensor.float() for name, tensor in weights.items()}
    wte, wpe = (w[f"transformer.{name}.weight"].numpy().astype(np.float64) for name in ("wte", "wpe"))
    tokens = wte[TOKENS] + wpe[: len(TOKENS)]
    first = Block(w, 0, tokens)
    second = Block(w, 1, first.out)
    random = np.random.default_rng(0)
    # Three features each; biases and decoders of the stream's (s) and of the second MLP's output (m).
    s_enc, m_enc = (
        random.normal(size=(3, D)) / np.abs(first.out).max(),
        random.normal(size=(3, D)) / np.abs(second.mlp).max(),
    )
    s_dec, m_dec = random.normal(size=(2, 3, D)) * 0.3
    s_bias, m_bias, b_dec = (
        random.normal(size=3) * 0.1 + 0.4,
        random.normal(size=3) * 0.1 + 0.4,
        random.normal(size=(2, D)) * 0.1,
    )
    s_acts, m_acts = np.maximum(first.out @ s_enc.T + s_bias, 0), np.maximum(second.mlp @ m_enc.T + m_bias, 0)
    s_error = first.out - s_acts @ s_dec - b_dec[0]
    m_error = second.mlp - m_acts @ m_dec - b_dec[1]

    def tensor(x):
        return torch.tensor(x, dtype=torch.float32)

    def made(enc, dec, bias, constant, site):
        return tlc.Transcoder(
            tensor(enc), tensor(dec), tensor(bias), tensor(constant), input_hook=site, output_hook=site
        )

    dictionary = tlc.load_dictionary(
        {
            0: made(s_enc, s_dec, s_bias, b_dec[0], "hook_resid_post"),
            1: made(m_enc, m_dec, m_bias, b_dec[1], "hook_mlp_out"),
        }
    )
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device=DEVICE, dtype=torch.float32).eval()
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, torch.tensor(TOKENS), [5], skip_positions=[0], progress=False)

    last = len(TOKENS) - 1
    ln_f = w["transformer.ln_f.weight"].numpy().astype(np.float64)
    final_scale = np.sqrt(((second.out - second.out.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True) + 1e-5)
    W_U = wte.T  # GPT-2 ties them
    target = W_U[:, 5] - W_U.mean(1)

    def logit(dout):
        """What a change of the last stream changes in the centred logit."""
        d = dout[last]
        return ((d - d.mean()) / final_scale[last] * ln_f) @ target

    def at_position(vector, position):
        made = np.zeros((len(TOKENS), D))
        made[position] = vector
        return made

    def through_second(dx):
        """From the rebuilt stream to the second MLP's output, and to the last stream beside it."""
        dmid = dx + second.attention(dx)
        return second.neurons(dmid), dmid

    expected = {}
    for p in range(len(TOKENS)):
        dmid = at_position(tokens[p], p) + first.attention(at_position(tokens[p], p))
        reached = dmid + first.neurons(dmid)
        expected |= {
            (f"token@{p}", f"L0/F{f}@{q}"): reached[q] @ s_enc[f] for q in range(1, len(TOKENS)) for f in range(3)
        }
        if p == 0:
            continue
        sources = [(f"L0/F{f}@{p}", s_acts[p, f] * s_dec[f]) for f in range(3)] + [(f"L0/error@{p}", s_error[p])]
        for name, vector in sources:
            at_mlp, beside = through_second(at_position(vector, p))
            expected[name, "logit:0"] = logit(beside)
            expected |= {(name, f"L1/F{f}@{q}"): at_mlp[q] @ m_enc[f] for q in range(1, len(TOKENS)) for f in range(3)}
        writes = [(f"L1/F{f}@{p}", m_acts[p, f] * m_dec[f]) for f in range(3)] + [(f"L1/error@{p}", m_error[p])]
        expected |= {(name, "logit:0"): logit(at_position(vector, p)) for name, vector in writes}

    rows, compared = graph.adjacency(), 0
    for i, into in enumerate(graph.node_ids):
        for j, name in enumerate(graph.node_ids):
            value = expected.get((name, into), 0.0)
            assert abs(float(rows[i, j]) - value) < 1e-5 * max(1.0, abs(value)), (name, into)  # float32 against float64
            compared += value != 0.0
    assert compared > 40 and graph.completeness_error() < 1e-5
