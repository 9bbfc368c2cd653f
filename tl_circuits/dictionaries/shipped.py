"""Sets of transcoders whose files come with this package, so that they open by name without a network.

The built-in model's own set, `tiny-facts`, is in ``builtin/``.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tl_circuits.dictionaries.formats.four_bit_files import CONFIG
from tl_circuits.dictionaries.prompt_rules import published_rule
from tl_circuits.dictionaries.published import Published, find_published
from tl_circuits.dictionaries.repository import LocalFolder
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import PromptRule
from tl_circuits.models import BUILTIN_FOLDER, PACKAGED


@dataclass(frozen=True)
class ShippedSet:
    """A set in this package: its name, its folder, and the name of its model (``tlc.load_model``)."""

    name: str
    folder: Path
    model: str
    description: str

    @property
    def there(self) -> bool:
        """Whether this installation has its files."""
        return (self.folder / CONFIG).is_file()

    @property
    def prompt_rule(self) -> PromptRule:
        """The set's prompt rule, as :attr:`ShortName.prompt_rule`."""
        return published_rule(self.model)


_SMOLLM2 = ShippedSet(
    name="smollm2-135m-small",
    folder=BUILTIN_FOLDER.parent / "smollm2_135m_small",
    model=PACKAGED["smollm2-135m"].name,
    description="TopK, skip, four bits a number",
)
SHIPPED = {one.name: one for one in (_SMOLLM2,)}


def shipped_sets() -> list[ShippedSet]:
    """The sets that this installation has."""
    return [one for one in SHIPPED.values() if one.there]


def find_shipped(name: str) -> Published:
    """The files of the set called ``name``, one of :data:`SHIPPED`; DictionaryError if this installation lacks them."""
    one = SHIPPED[name]
    if not one.there:
        raise DictionaryError(
            f"the transcoders {name!r} are not in this installation of tl_circuits: there is no {one.folder / CONFIG}. Install a "
            f"version that has them, or name others for {one.model}; `tl-circuits models` lists what there is."
        )
    return replace(find_published(LocalFolder(one.folder)), name=name, made_for=one.model)
