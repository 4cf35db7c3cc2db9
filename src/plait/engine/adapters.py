"""The adapters of a loaded model, by the names that requests choose them by."""

from __future__ import annotations

from pathlib import Path

from plait.errors import ConfigError, UnknownNameError, suggestion
from plait.nn import Adapter, Transformer, load_adapter

__all__ = ["Adapters"]


class Adapters(dict[str, Adapter]):
    """Adapters by name.

    Args:
        model: that they are for.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def add(self, folder: str | Path, name: str | None = None, *, use: bool = False) -> Adapter:
        """Load an adapter, which requests choose by its name: `generate(..., adapter="NAME")`.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`, as the `peft` package writes them.
            name: what to call it; the folder's name when left out.
            use: whether to answer with it wherever no other is chosen.

        Raises:
            ConfigError: the name is taken, empty or `none`.
            ModelFileError: the files are damaged, or do not fit the model.
            IncompatibleError: it was made for another model.
        """
        adapter = load_adapter(folder, self.model, name=name)
        if adapter.name in self or adapter.name in ("", "none"):
            raise ConfigError(
                f"An adapter cannot be called {adapter.name!r}: the name is taken. Give it another name, or remove the "
                "other one first."
            )
        self[adapter.name] = adapter
        if use:
            self.model.use(adapter)
        return adapter

    def find(self, name: str) -> Adapter | None:
        """The adapter of that name; the one in use for an empty name, and None for `none`.

        Raises:
            UnknownNameError: there is none.
        """
        if not name:
            return self.model.adapter
        if name == "none":
            return None
        if name not in self:
            raise UnknownNameError(
                f"No adapter is called {name!r}.{suggestion(name, self)} There are: {', '.join(sorted(self)) or 'none'}."
            )
        return self[name]
