"""Reference solution of assignment 2."""


def read_direction(model, cache, transcoder, layer, position, feature):
    scale = cache[f"blocks.{layer}.ln2.hook_scale"][0, position]
    return transcoder.W_enc[feature] * model.blocks[layer].ln2.weight / scale


def through_attention(model, cache, layer, gradient):
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
    at_keys = torch.einsum("hqk,qd->hkd", pattern, gradient)
    at_values = torch.einsum("hkd,hed->hke", at_keys, model.W_O[layer])
    at_input = torch.einsum("hke,hde->kd", at_values, model.W_V[layer])
    scale = cache[f"blocks.{layer}.ln1.hook_scale"][0]
    return gradient + at_input * model.blocks[layer].ln1.weight / scale


def effects_on(cache, transcoder, at_mlp_out, at_embedding):
    row = {}
    embedding = cache["hook_embed"][0]
    x, output = cache["blocks.0.mlp.hook_in"][0], cache["blocks.0.hook_mlp_out"][0]
    pre = x @ transcoder.W_enc.T + transcoder.b_enc
    acts = torch.where(pre > transcoder.threshold, pre.relu(), 0.0)
    error = output - acts @ transcoder.W_dec - transcoder.b_dec
    for position in range(len(embedding)):
        row[f"token@{position}"] = float(embedding[position] @ at_embedding[position])
        if position == 0:
            continue
        row[f"L0/error@{position}"] = float(error[position] @ at_mlp_out[position])
        for feature in acts[position].nonzero()[:, 0].tolist():
            effect = acts[position, feature] * (transcoder.W_dec[feature] @ at_mlp_out[position])
            row[f"L0/F{feature}@{position}"] = float(effect)
    return row


def row_bias(cache, transcoders, feature, at_mlp_out):
    bias = transcoders[1].b_enc[feature]
    bias = bias + (at_mlp_out[1:] @ transcoders[0].b_dec).sum()
    return float(bias + cache["blocks.0.hook_mlp_out"][0, 0] @ at_mlp_out[0])


def trace(model, transcoders, prompt, position, feature):
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
        gradient = torch.zeros_like(cache["hook_embed"][0])
        gradient[position] = read_direction(model, cache, transcoders[1], 1, position, feature)
        at_mlp_out = through_attention(model, cache, 1, gradient)
        at_embedding = through_attention(model, cache, 0, at_mlp_out)
        return effects_on(cache, transcoders[0], at_mlp_out, at_embedding)
