"""Head loadings in graphs with autoencoders or passed MLPs.

Between two attentions everything acts at one position: the residual stream, skips, and MLPs with held ratios. So a
source that has passed no head stands at its own position still, and a target that no head has carried back stands at
its own. The loading of a head is what the source gives the head's values, times how the head's output reaches the
target, times how much the head looks from one position to the other. Two heads one after the other meet at every
position between: what the first writes there is held against the gradient of what the second reads, carried back. A
rebuilt stream ends all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attention.head_paths import EdgeParts, Head, Largest, LayerHeads, layer_heads
from tl_circuits.attribution.engines.site_maps import MLP, BlockMaps
from tl_circuits.attribution.engines.site_sweep import SiteEngine
from tl_circuits.attribution.targets import Targets

AT_ONCE = 4096
"""Vectors that go through a passed MLP at once."""


@dataclass(frozen=True)
class SiteWriter:
    """What a source writes, ``vector``, at its position and its place (a number, -1 for a token)."""

    place: int
    position: int
    vector: Float[Tensor, " d"]


@dataclass(frozen=True)
class SiteArrival:
    """A target carried back without passing a head.

    ``heads``: by layer, its gradient at the outputs of the layer's heads. ``writes``: by number of the place, its
    gradient at the site where the dictionary there writes; -1 is the first block's input.
    """

    position: int
    heads: dict[int, Float[Tensor, "n_heads d_head"]]
    writes: dict[int, Float[Tensor, " d"]]


class SitePaths:
    """All heads of a retraced prompt, between the sites of its dictionaries."""

    def __init__(self, engine: SiteEngine):
        self._engine = engine
        self._heads: dict[int, LayerHeads] = {}

    def _layer_heads(self, layer: int) -> LayerHeads:
        if layer not in self._heads:
            block = self._engine.blocks[layer]
            into = block.own_heads.into if "attn.hook_z" in block.places else block.attention
            self._heads[layer] = layer_heads(into)
        return self._heads[layer]

    def arrive(self, target: Targets) -> SiteArrival:
        """Carry one target back through all blocks, along the stream and through MLPs alone."""
        return _Backward(self._engine, target).run()

    def parts(
        self, writers: Sequence[SiteWriter], arrival: SiteArrival, edges: Sequence[float], chains: int
    ) -> list[EdgeParts]:
        """Split the edges from several sources to a target; at most ``chains`` chains of two heads are listed each."""
        entering = [self._leave(writer) for writer in writers]
        largest = self._pairs(writers, entering, arrival, chains) if chains else [Largest(0) for _ in writers]
        together = zip(writers, entering, edges, largest, strict=True)
        return [self._part(writer, enters, arrival, edge, pairs.found()) for writer, enters, edge, pairs in together]

    def _part(
        self, writer: SiteWriter, entering: dict[int, Tensor], arrival: SiteArrival, edge: float,
        chains: list[tuple[tuple[Head, ...], float]],
    ) -> EdgeParts:  # fmt: skip
        residual = 0.0
        if writer.position == arrival.position and writer.place in arrival.writes:
            residual = float(writer.vector.double() @ arrival.writes[writer.place].double())
        found: dict[Head, float] = {}
        for layer, x in entering.items():
            if layer in arrival.heads:
                heads = self._layer_heads(layer)
                products = (heads.values(x[None])[:, 0] * arrival.heads[layer]).double().sum(-1)
                values = products * heads.mix[:, arrival.position, writer.position]
                found |= {(layer, head): value for head, value in enumerate(values.tolist())}
        rest = edge - residual - sum(found.values()) - sum(value for _, value in chains)
        return EdgeParts(residual, found, chains, rest)

    def _pairs(
        self, writers: Sequence[SiteWriter], entering: Sequence[dict[int, Tensor]], arrival: SiteArrival, chains: int
    ) -> list[Largest]:
        """The largest chains of two heads for each source, in one pass from the last layer to the first.

        ``reads`` holds what each head so far reads for the target, carried back to this layer at every position, and
        ``weights`` how much that head looks there from the target's position.
        """
        best, used = [Largest(chains) for _ in writers], arrival.position + 1
        like = self._engine.sources.tokens
        reads, weights = like.new_zeros(used, 0, like.shape[1]), like.new_zeros(0, used)
        names: list[Head] = []
        for layer in range(max(arrival.heads, default=-1), -1, -1):
            block = self._engine.blocks[layer]
            if "hook_resid_post" in block.places:
                reads, weights, names = reads[:, :0], weights[:0], []
            back = self._back_through_mlp(block, reads) if names else None
            through = reads if back is None else reads + back
            if "hook_resid_mid" in block.places:
                through, weights, names = through[:, :0], weights[:0], []
            written_to = reads if self._engine.parallel else through
            if names and not {"attn.hook_z", "hook_attn_out"} & block.places.keys():  # else what heads write is rebuilt
                heads = self._layer_heads(layer)
                for writer, enters, kept in zip(writers, entering, best, strict=True):
                    if layer in enters and writer.position < used:
                        written = heads.written(heads.values(enters[layer][None])[:, 0])
                        looks = heads.mix[:, :used, writer.position]
                        values = torch.einsum("pnd,hd,hp,np->hn", written_to, written, looks, weights)
                        kept.add(values, lambda h, n, layer=layer, names=names: ((layer, h), names[n]))
            reads = through
            if layer in arrival.heads:
                heads = self._layer_heads(layer)
                joining = heads.values_back(arrival.heads[layer])
                reads = torch.cat([reads, joining.expand(used, -1, -1)], dim=1)
                weights = torch.cat([weights, heads.mix[:, arrival.position, :used]])
                names = [*names, *((layer, head) for head in range(len(joining)))]
            if "hook_resid_pre" in block.places:
                reads, weights, names = reads[:, :0], weights[:0], []
        return best

    def _back_through_mlp(self, block: BlockMaps, g: Float[Tensor, "used n d_model"]) -> Tensor | None:
        """What comes back through a block's MLP to the stream that it reads; None if nothing does."""
        if "hook_mlp_out" in block.places:
            return None
        if block.passed is not None:
            used, n, d_model = g.shape
            positions = torch.arange(used, device=g.device).repeat_interleave(n)
            parts = zip(g.reshape(-1, d_model).split(AT_ONCE), positions.split(AT_ONCE), strict=True)
            return torch.cat([block.passed.transpose(part, at) for part, at in parts]).reshape(used, n, d_model)
        return None if block.at_mlp is None else self._engine.writes[block.at_mlp].through_skip(g, 0)

    def _leave(self, writer: SiteWriter) -> dict[int, Float[Tensor, " d_model"]]:
        """The source on the stream that each block's attention reads, as far as it reaches along the stream alone."""
        engine, at = self._engine, torch.tensor([writer.position])
        x = writer.vector if writer.place < 0 else None
        entering = {}
        for layer, block in enumerate(engine.blocks):
            own = {site: writer.vector for site, place in block.places.items() if place == writer.place}
            if "hook_resid_pre" in block.places:
                x = own.get("hook_resid_pre")
            if x is not None:
                entering[layer] = x
            before = x
            if "attn.hook_z" in own and "hook_attn_out" not in block.places:
                x = _plus(x, _out_of_heads(block, own["attn.hook_z"], writer.position))
            x = _plus(x, own.get("hook_attn_out"))
            if "hook_resid_mid" in block.places:
                x = own.get("hook_resid_mid")
            through = before if engine.parallel else x
            if through is not None and "hook_mlp_out" not in block.places:
                x = _plus(x, self._through_mlp(block, through, at))
            written = own.get(MLP, own.get("hook_mlp_out"))
            if written is not None:
                norm = engine.sources.layers[writer.place].norm
                x = _plus(x, written if norm is None else norm.push(written[None], at)[0])
            if "hook_resid_post" in block.places:
                x = own.get("hook_resid_post")
        return entering

    def _through_mlp(self, block: BlockMaps, x: Float[Tensor, " d_model"], at: Tensor) -> Tensor | None:
        if block.passed is not None:
            return block.passed.linear(x[None], at)[0]
        if block.at_mlp is None:
            return None
        source = self._engine.sources.layers[block.at_mlp]
        if source.skip is None or int(at) in self._engine.sources.skipped:
            return None
        read = block.own_read
        if read.norm is not None and read.stage == "normed":
            x = read.norm.push(x[None], at)[0]
        elif read.norm is not None and read.stage == "normalized":
            x = (x - x.mean() if read.norm.weights.centred else x) / read.norm.scale[at][0]
        out = x @ source.skip.T
        return out if source.norm is None else source.norm.push(out[None], at)[0]


class _Backward:
    """One target's gradient, from where it reads down to the first block's input."""

    def __init__(self, engine: SiteEngine, target: Targets):
        self._engine, self._target = engine, target
        self._place, self._at = int(target.place[0]), target.position
        self._heads: dict[int, Tensor] = {}
        self._writes: dict[int, Tensor] = {}

    def run(self) -> SiteArrival:
        engine, g = self._engine, None
        layer = len(engine.blocks) - 1
        if self._place == engine.end:
            g = engine.read_final.transpose(self._vector(engine.sources.tokens.shape[1])[None], self._at)[0][0]
        else:
            layer = engine.sources.places[self._place].layer
        for at in range(layer, -1, -1):
            g = self._block(at, engine.blocks[at], g)
        if g is not None:
            self._writes[-1] = g
        return SiteArrival(int(self._at), self._heads, self._writes)

    def _vector(self, width: int) -> Tensor:
        return self._target.vector[0, :width]

    def _rebuilt(self, place: int, g: Tensor | None) -> Tensor | None:
        """The gradient below a rebuilt stream: it ends, and begins anew if the target reads here."""
        self._write(place, g)
        return self._vector(self._engine.sources.tokens.shape[1]) if place == self._place else None

    def _write(self, place: int, g: Tensor | None) -> None:
        if g is not None:
            self._writes[place] = g

    def _block(self, layer: int, block: BlockMaps, g: Tensor | None) -> Tensor | None:
        if "hook_resid_post" in block.places:
            g = self._rebuilt(block.places["hook_resid_post"], g)
        end, back = g, self._through_mlp(block, g)
        g = g if self._engine.parallel else _plus(g, back)
        if "hook_resid_mid" in block.places:
            g = self._rebuilt(block.places["hook_resid_mid"], g)
        attended = end if self._engine.parallel else g
        self._attention(layer, block, attended)
        g = _plus(g, back) if self._engine.parallel else g
        return self._rebuilt(block.places["hook_resid_pre"], g) if "hook_resid_pre" in block.places else g

    def _through_mlp(self, block: BlockMaps, g: Tensor | None) -> Tensor | None:
        """What comes back through the MLP to the stream that it reads, the target's own reading there included."""
        engine, place = self._engine, block.at_mlp
        vector = self._vector(engine.sources.tokens.shape[1])
        if "hook_mlp_out" in block.places:
            self._write(block.places["hook_mlp_out"], g)
            return block.own_passed.transpose(vector[None], self._at)[0] if place == self._place else None
        if block.passed is not None:
            return None if g is None else block.passed.transpose(g[None], self._at)[0]
        if block.read is None or place is None:
            return None
        norm = engine.sources.layers[place].norm
        if g is not None:
            self._write(place, g if norm is None else norm.transpose(g[None], self._at)[0])
        through = None if g is None else engine.writes[place].through_skip(g[None, None], int(self._at))
        back = None if through is None else through[0, 0]
        return _plus(back, block.read.transpose(vector[None], self._at)[0][0]) if place == self._place else back

    def _attention(self, layer: int, block: BlockMaps, g: Tensor | None) -> None:
        """The gradient at the outputs of a block's heads.

        There is none if what they write is rebuilt and another node reads it.
        """
        n_heads, d_head = block.attention.W_O.shape[:2]
        at_z, at_out = block.places.get("attn.hook_z"), block.places.get("hook_attn_out")
        if at_out is not None:
            self._write(at_out, g)
            g = self._vector(self._engine.sources.tokens.shape[1]) if at_out == self._place else None
        if at_z is not None:
            if g is not None:
                self._writes[at_z] = block.own_heads.back(g[None], self._at)[0]
            if at_z == self._place:
                self._heads[layer] = self._vector(n_heads * d_head).unflatten(0, (n_heads, d_head))
        elif g is not None:
            self._heads[layer] = self._at_heads(block, g)

    def _at_heads(self, block: BlockMaps, g: Tensor) -> Tensor:
        return block.attention.at_heads(g[None])[:, 0]


def _out_of_heads(block: BlockMaps, z: Float[Tensor, " z"], position: int) -> Float[Tensor, " d_model"]:
    heads = block.own_heads
    out = z @ heads.W_O
    return out if heads.after is None else out / heads.after[position]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
