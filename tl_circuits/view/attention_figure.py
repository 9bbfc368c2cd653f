"""Pictures of QK attributions."""

from pathlib import Path
from typing import TYPE_CHECKING

from tl_circuits.support.figures import Picture, figure_class, save_figure

if TYPE_CHECKING:
    from tl_circuits.attention.qk import QKAttribution


def plot_score(qk: "QKAttribution", path: Path | None) -> Path | Picture:
    """Draw by which positions the query side and the key side of a score were written, as SVG, PNG or PDF.

    Without a path, a picture is returned.

    Raises:
        ImportError: if matplotlib is not installed; it names the extra.
        OutputError: for other endings.
    """
    names = [*(f"{i} {token}" for i, token in enumerate(qk.tokens)), "bias"]
    rows = [*range(qk.query + 1), len(qk.tokens)]
    last = max(qk.key, -1 if qk.baseline_key is None else qk.baseline_key)
    columns = [*range(last + 1), len(qk.tokens)]
    values = qk.by_position.to_numpy()[rows][:, columns]
    limit = max(abs(values).max(), 1e-30)
    figure = figure_class()(figsize=(2.5 + 0.4 * len(columns), 2 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit)
    axis.set_xticks(range(len(columns)), [names[i] for i in columns], rotation=60, ha="right")
    axis.set_yticks(range(len(rows)), [names[i] for i in rows])
    axis.set(xlabel="written at (key side)", ylabel="written at (query side)", title=qk.title)
    figure.colorbar(shown, ax=axis, label="part of the score")
    return save_figure(figure, path, overwrite=True)
