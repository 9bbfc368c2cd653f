"""Transcoders given as SAELens objects."""

import pytest
import torch

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import prompt, tiny_bridge, tiny_folder
from tl_circuits.errors import AttachError, DictionaryError

saes = pytest.importorskip("sae_lens.saes", reason="sae_lens is not installed (transformer_lens 4)")
Metadata = pytest.importorskip("sae_lens.saes.sae").SAEMetadata
CLASSES = ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"]


def saelens_transcoder(kind, layer, d=32, width=24):
    cls = getattr(saes, kind)
    config = getattr(saes, f"{kind}Config")
    cfg = config(
        d_in=d,
        d_out=d,
        d_sae=width,
        dtype="float32",
        device=DEVICE,
        apply_b_dec_to_input=False,
        metadata=Metadata(
            hook_name=f"blocks.{layer}.ln2.hook_normalized", hook_name_out=f"blocks.{layer}.hook_mlp_out"
        ),
    )
    sae = cls(cfg)
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name == "threshold":
                parameter.abs_()
    return sae


@pytest.mark.parametrize("kind", CLASSES)
def test_activations_and_reconstruction_are_saelens_own(kind):
    sae = saelens_transcoder(kind, 0)
    ours = tlc.load_transcoders({0: sae})
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with torch.no_grad():
        acts = ours.activate(0, ours.pre_activations(0, x), x)
        assert torch.allclose(acts, sae.encode(x), atol=1e-5)  # other order of float32 sums
        assert torch.allclose(ours.decode(0, {0: acts}, x), sae(x), atol=1e-5)
    assert (acts > 0).any()


@pytest.mark.parametrize("kind", CLASSES)
def test_graphs_on_them_add_up(kind):
    model = tiny_bridge("gemma3")
    with tlc.attach(model, {layer: saelens_transcoder(kind, layer) for layer in range(4)}) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=80, progress=False)
    assert graph.is_kind("feature").sum() > 10
    assert graph.completeness_error() < 1e-4


def test_a_hook_of_another_layer_is_refused():
    with pytest.raises(DictionaryError, match="expected a hook of this layer"):
        tlc.load_transcoders({0: saelens_transcoder("Transcoder", 1)})


def test_gemma_scope_2_objects_read_the_norms_output():
    """SAELens names their input hook_mlp_in, which is the residual stream before the norm."""
    sae = saelens_transcoder("JumpReLUTranscoder", 1)
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_in"
    sae.cfg.metadata.hf_hook_name = "model.layers.1.pre_feedforward_layernorm.output"
    assert tlc.load_transcoders({1: sae}).input_hook(1) == "blocks.1.mlp.hook_in"


def test_importing_the_package_does_not_import_sae_lens():
    import subprocess
    import sys

    code = "import sys, tl_circuits; sys.exit('sae_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def carrying():
    """A SAETransformerBridge with SAELens' own attachments on every layer."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = SAETransformerBridge.boot_transformers(tiny_folder("gemma3"), device=DEVICE)
    for layer in range(4):
        model.add_sae(saelens_transcoder("SkipTranscoder", layer))
    return model


def test_what_saelens_attached_is_taken_over_and_given_back(carrying):
    model = carrying
    with torch.no_grad():
        theirs = model(prompt()[None])
    wrappers = dict(model._acts_to_saes)
    names = set(model.hook_dict)
    with tlc.attach(model) as replacement:
        with torch.no_grad():
            bare = model(prompt()[None])
        graph = tlc.attribute(replacement, prompt(), max_nodes=40, progress=False)
    # Without their attachment the model is itself again, and ours has the skip that add_sae drops.
    assert torch.equal(bare, tiny_bridge("gemma3")(prompt()[None]))
    assert not torch.allclose(bare, theirs)
    assert graph.completeness_error() < 1e-4
    assert dict(model._acts_to_saes) == wrappers and set(model.hook_dict) == names
    with torch.no_grad():
        assert torch.equal(model(prompt()[None]), theirs)


def test_attaching_over_saelens_or_taking_over_nothing_is_refused(carrying):
    with pytest.raises(AttachError, match="reset_saes"):
        tlc.attach(carrying, {0: saelens_transcoder("Transcoder", 0)})
    with pytest.raises(DictionaryError, match="carries nothing"):
        tlc.attach(tiny_bridge("llama"))
