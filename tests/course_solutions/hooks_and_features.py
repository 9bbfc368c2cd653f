"""Reference solution of assignment 1."""


def activations_at(model, prompt, name):
    _, cache = model.run_with_cache(prompt, names_filter=name)
    return cache[name][0]


def pre_activations(transcoder, x):
    return x @ transcoder.W_enc.T + transcoder.b_enc


def feature_activations(transcoder, x):
    pre = pre_activations(transcoder, x)
    return torch.where((pre > transcoder.threshold) & (pre > 0), pre, 0.0)


def reconstruction_error(model, transcoder, layer, prompt):
    x = activations_at(model, prompt, f"blocks.{layer}.mlp.hook_in")
    output = activations_at(model, prompt, f"blocks.{layer}.hook_mlp_out")
    return output - (feature_activations(transcoder, x) @ transcoder.W_dec + transcoder.b_dec)


def ablate(model, transcoder, layer, prompt, position, feature):
    x = activations_at(model, prompt, f"blocks.{layer}.mlp.hook_in")
    written = feature_activations(transcoder, x)[position, feature] * transcoder.W_dec[feature]

    def without(output, hook):
        output = output.clone()
        output[:, position] -= written
        return output

    logits = model.run_with_hooks(prompt, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", without)])
    return logits[0, -1]
