"""FrozenPrefixHubCallback: makes every commit that Trainer pushes a whole repository, with code and our card.

`Trainer(push_to_hub=True)` pushes config and weights in mid-training, but neither the code that loads them nor a card
(it copies four files from the checkpoint), and its own card at the end overwrites the one that is there and drops what
the Hub files a repository by. What lies in the output folder is pushed with the rest, so what is missing is put there.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..hub import auto_map_of, warn_of_local_paths, write_code
from .card import CARD_NAME, frozen_prefix_model, write_model_card
from .edits import edited_metadata, is_edited


logger = logging.get_logger(__name__)


class FrozenPrefixHubCallback(TrainerCallback):
    """
    Add it to a Trainer that pushes to the Hub: `trainer.add_callback(FrozenPrefixHubCallback(trainer))`.

    It writes code and card into the output folder when training begins, and refreshes them before each push (config
    and weights come from the checkpoint, and name the code already). A card that a person edited, there or on the Hub,
    is kept. Trainer's pickle of its arguments, which may hold the Hub's token, stays out of the repository (`.gitignore`).

    It stands in for `create_model_card` of this trainer, and of no other, and takes the same arguments; `license`,
    `language`, `tags` and `dataset` go into the card.

    Args:
        trainer: the Trainer, whose model is a frozen-prefix model (PEFT's wrapper around it is fine).
        metrics: scores beside their blind baselines, as [`write_model_card`] takes them. They can be set later:
            `callback.metrics = …`, before the last push.
        dataset: what it is trained on, as [`write_model_card`] takes it. Default: what the train dataset says.
    """

    def __init__(self, trainer: Trainer, *, metrics: Mapping[str, Any] | None = None, dataset: Any = None) -> None:
        frozen_prefix_model(trainer.model)  # says now, not after hours, if it is another kind of model
        self.trainer, self.metrics, self.dataset = trainer, metrics, dataset
        # transformers documents no hook here: `push_to_hub` calls `on_push_begin` first, and writes its own card over ours
        # right before the upload. A subclass of Trainer would be one, but a callback must serve the Trainer that is there.
        trainer.create_model_card = self.create_model_card  # type: ignore[method-assign, assignment]  # see above

    @property
    def folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir))  # never None once TrainingArguments are made

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.push_to_hub:
            self._complete()

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._complete()

    def create_model_card(self, **kwargs: Any) -> None:
        """Stands in for `Trainer.create_model_card`; takes what that takes."""
        if not self.trainer.is_world_process_zero():
            return
        metadata = {key: kwargs[key] for key in ("license", "language") if kwargs.get(key)}
        for key, name in (("tags", "tags"), ("dataset_tags", "datasets")):
            if kwargs.get(key):
                metadata[name] = [kwargs[key]] if isinstance(kwargs[key], str) else list(kwargs[key])
        dataset = kwargs.get("dataset")
        if isinstance(dataset, list | tuple):
            dataset = ", ".join(dataset)
        self._write_card(dataset=dataset, metadata=metadata)

    def _complete(self) -> None:
        if not self.trainer.is_world_process_zero():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_code(self.folder, auto_map_of(frozen_prefix_model(self.trainer.model)))
        warn_of_local_paths(self.folder)
        self._write_card()

    def _repo_id(self) -> str | None:
        return getattr(self.trainer, "hub_model_id", None) or self.trainer.args.hub_model_id

    def _write_card(self, *, dataset: Any = None, metadata: Mapping[str, Any] | None = None) -> None:
        self._adopt_edited_card()
        write_model_card(
            self.folder,
            self.trainer.model,
            repo_id=self._repo_id(),
            training=self.trainer,
            metrics=self.metrics,
            dataset=dataset if dataset is not None else self.dataset,
            metadata=metadata,
        )

    def _adopt_edited_card(self) -> None:
        """Takes over a card that a person edited on the Hub, maybe while this training ran: a push would undo it."""
        repo_id = getattr(self.trainer, "hub_model_id", None)
        path = self.folder / CARD_NAME
        here = path.read_text(encoding="utf-8-sig", errors="replace") if path.exists() else ""
        if not repo_id or is_edited(here):
            return
        args = self.trainer.args
        try:
            file = hf_hub_download(repo_id, CARD_NAME, revision=args.hub_revision, token=args.hub_token)
            there = Path(file).read_text(encoding="utf-8-sig", errors="replace")
            known = edited_metadata(here)
            news = [key for key, value in edited_metadata(there).items() if key not in known or known[key] != value]
            if is_edited(there) or news:
                shutil.copyfile(file, path)
        except Exception as error:  # no card there yet, or no network: the push itself will say so
            logger.debug(f"No card of `{repo_id}` could be read: {error}")


__all__ = ["FrozenPrefixHubCallback"]
