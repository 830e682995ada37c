"""Training from stored features needs no tower: it can be put out of memory, and fetched again from its own repository."""

from typing import Any

from transformers import PreTrainedModel

from .base_models import load_base_model, verify_fingerprint


# What a model can do without for a while, and the attribute of the base model that holds it.
_UNLOADABLE = {"vision": "vision_tower", "audio": "audio_tower"}


class BaseModelUnloadingMixin:
    """`unload_base_model` and `load_base_model` for a model whose base model holds the towers."""

    def unload_base_model(self, part: str = "vision") -> None:
        """
        Frees a frozen tower. The model trains and writes from `vision_features`, and saves as before, for the tower has its
        home elsewhere; given pictures, it says what to do. Unloading what is not loaded does nothing.

        Args:
            part (`str`, defaults to `"vision"`): `"vision"` or `"audio"`.

        Raises:
            ValueError: for a tower that could not come back: it was trained or changed, or has no repository or folder.
        """
        attribute = self._unloadable(part)
        if getattr(self.base_model, attribute) is None:
            return
        if part not in self.base_model._parts_with_home or part in self.changed_parts():
            why = "was trained or changed" if part in self.base_model._parts_with_home else "has no repository or folder"
            raise ValueError(
                f"The {part} tower {why}, so it would be lost: save it by its own `save_pretrained`, and join the model anew "
                "from that folder."
            )
        setattr(self.base_model, attribute, None)
        self._gather_from_parents()
        self._keys_to_ignore_on_save = self._keys_with_home()

    def load_base_model(self, part: str = "vision", **kwargs: Any) -> None:
        """
        Loads a tower that is not loaded from where the config says, checks it, and freezes it. Loading what is loaded does
        nothing.

        Args:
            part (`str`, defaults to `"vision"`): `"vision"` or `"audio"`.
            kwargs: options of `from_pretrained` (`dtype`, `token`, `device_map`, …). The dtype is the recorded one by default,
                the device that of the word embeddings.

        Raises:
            ValueError: if the config has no record of it, or it is not the one that was recorded.
            OSError: the library's own, if its repository can't be reached.
        """
        attribute = self._unloadable(part)
        if getattr(self.base_model, attribute) is not None:
            return
        record = getattr(self.config, f"{part}_base_model")
        if record is None:
            raise ValueError(
                f"The config does not say where the {part} tower is: load the model anew, with "
                f'{part}_base_model="id or folder".'
            )
        module, found = load_base_model(
            part,
            record["name_or_path"],
            config=getattr(self.config, f"{part}_config"),
            revision=record["revision"],
            **{"dtype": record["dtype"], **kwargs},
        )
        verify_fingerprint(part, record, found)
        if "device_map" not in kwargs:
            module.to(self.get_input_embeddings().weight.device)
        self._attach(part, module, found)
        self._mark(part)
        self._gather_from_parents()
        self.freeze_base_models()
        self._keys_to_ignore_on_save = self._keys_with_home()

    def _unloadable(self, part: str) -> str:
        attribute = _UNLOADABLE.get(part)
        if attribute is None:
            raise ValueError(
                f"part={part!r}: of {sorted(_UNLOADABLE)} one can be unloaded and loaded again; every word goes through the "
                "language model."
            )
        if getattr(self.config, f"{part}_config") is None:
            raise ValueError(f"This model has no {part} tower.")
        return attribute

    @staticmethod
    def _refuse_without_home(part: str, parent: str | PreTrainedModel | None) -> None:
        if not isinstance(parent, str):
            raise ValueError(
                f"`load_{part}_tower=False` leaves the tower where it is, so name its repository or folder; got "
                f"{'none' if parent is None else f'a loaded {type(parent).__name__}'}."
            )


__all__ = ["BaseModelUnloadingMixin"]
