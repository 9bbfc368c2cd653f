"""Find out whether the checker is still the same after a notebook has run."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

CHECKER = "tl_circuits.course"


@dataclass(frozen=True)
class Seal:
    """What every name in the checker's modules stood for; ``code`` is what each function did."""

    names: tuple[tuple[ModuleType, str, Any, Any], ...]

    @classmethod
    def now(cls) -> "Seal":
        """The checker as it is now."""
        modules = [module for name, module in sys.modules.items() if name == CHECKER or name.startswith(f"{CHECKER}.")]
        kept = ((m, name, value, _code(value)) for m in modules for name, value in vars(m).items())
        return cls(tuple(kept))

    def broken(self) -> list[str]:
        """The names that stand for something else now, such as ``tl_circuits.course.grading.mark``."""
        return [
            f"{module.__name__}.{name}"
            for module, name, value, code in self.names
            if vars(module).get(name) is not value or _code(value) is not code
        ]


def _code(value: Any) -> Any:
    return getattr(value, "__code__", None)
