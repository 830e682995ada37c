"""Training on a stream that can be stopped and resumed anywhere: its place is kept in Trainer's checkpoints.

By itself `Trainer` reads all batches up to where it stopped, and throws them away; and as it does not know how long an epoch
of a stream is, it then starts the wrong one where it had passed the end of the first.
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging


logger = logging.get_logger(__name__)


class StreamCallback(TrainerCallback, ExportableState):
    """
    Keeps the place of a [`~modeling_frozen.data.streaming.RowStream`] in every checkpoint, so that
    `trainer.train(resume_from_checkpoint=True)` goes on with the rows that a run that was never stopped would see, and tells
    at the end of each epoch which rows were left out.

    Give it to `Trainer` itself (`callbacks=[StreamCallback()]`). It sets `ignore_data_skip`, for there is nothing to skip.
    The number of processes and of workers must be the same when resuming. `state.epoch` counts from the resumed epoch.

    Raises: ValueError where Trainer is set up so that rows would be read twice, lost, or not found again, with the way out.

    Example:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=stream, data_collator=collator, callbacks=[StreamCallback()])
    >>> trainer.train(resume_from_checkpoint=True)
    ```"""

    def __init__(self) -> None:
        self._stream: Any = None
        self._loader: Any = None
        self._batches = self._step = 0
        self._gathered: dict[str, Any] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        args.ignore_data_skip = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, train_dataloader)
        self._loader, self._stream, self._batches = train_dataloader, train_dataloader.dataset, 0
        self._gathered = None
        prefetch = (args.dataloader_prefetch_factor or 2) if args.dataloader_num_workers else 0
        self._stream.track(
            train_dataloader.base_dataloader.batch_size,
            args.dataloader_num_workers,
            prefetch + args.gradient_accumulation_steps + 2,
        )
        self._stream.epoch_offset = 0
        if not state.global_step:
            return
        callbacks: Any = state.stateful_callbacks  # as it was in the checkpoint, by the class's name
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {}).get("_gathered")
        if saved is None or saved["step"] != state.global_step:
            known = "no place in the stream" if saved is None else f"the stream's place at step {saved['step']}"
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds {known}: it was made without StreamCallback, or by a "
                "callback that saves where Trainer would not. Resume from another one. [errors.md#streams]"
            )
        if saved["setup"] != (now := self._setup(args)):
            raise ValueError(
                f"The checkpoint's place is in a stream of {saved['setup']}, and this is one of {now}: the rows would be "
                "others. Set it up as it was. [errors.md#streams]"
            )
        own = saved["places"][args.process_index]
        self._stream.load_state_dict(own)
        self._stream.epoch_offset = own["epoch"]  # Trainer counts from 0 again

    def _check(self, args: TrainingArguments, loader: Any) -> None:
        if args.world_size > 1:
            if getattr(args.accelerator_config, "dispatch_batches", None) is not False:
                raise ValueError(
                    "In several processes one of them would read the whole stream and deal out slices of batches: set "
                    'TrainingArguments(accelerator_config={"dispatch_batches": False}). [errors.md#streams]'
                )
            if epochs := [name for name in ("save_strategy", "eval_strategy") if getattr(args, name) == "epoch"]:
                raise ValueError(
                    f'{epochs[0]}="epoch": processes reach the end of a stream at different steps and would wait for each '
                    f'other. Use {epochs[0]}="steps". [errors.md#streams]'
                )
        if hasattr(getattr(loader.dataset, "dataset", None), "state_after"):
            raise ValueError(
                "This release of accelerate has every process read the whole stream and keep slices of it, so its place is "
                "not known: `pip install -U accelerate`. [errors.md#streams]"
            )
        if not hasattr(loader.dataset, "state_after"):
            raise ValueError(
                "StreamCallback is for `load_image_text(…, streaming=True)`; Trainer's loader reads a "
                f"{type(loader.dataset).__name__}. [errors.md#streams]"
            )
        if not args.ignore_data_skip:
            raise ValueError(
                "Give StreamCallback to Trainer(callbacks=[…]), or set TrainingArguments(ignore_data_skip=True)."
                " [errors.md#streams]"
            )
        if not args.dataloader_in_order:
            raise ValueError(
                "dataloader_in_order=False gives batches as they come: the place in the stream is not known."
                " [errors.md#streams]"
            )

    def _setup(self, args: TrainingArguments) -> dict[str, Any]:
        stream = self._stream
        return {
            "processes": args.world_size,
            "workers": args.dataloader_num_workers,
            "shards": stream.source.shards.count,
            "buffer_size": stream.buffer_size,
            "seed": stream.seed,
        }

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches, self._step = 0, state.global_step
        # Of its own, or each start of an iteration would move torch's global one, which a checkpoint restores.
        self._loader.base_dataloader.generator = torch.Generator().manual_seed(args.seed)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches += 1
        if args.world_size == 1 or control.should_save or control.should_evaluate:
            self._note(args, state)

    def _note(self, args: TrainingArguments, state: TrainerState) -> None:
        place = self._stream.state_after(self._batches)
        places = gather_object([place]) if args.world_size > 1 else [place]
        self._gathered = {"step": state.global_step, "setup": self._setup(args), "places": places}

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._step:  # Trainer would begin epoch after epoch, for ever
            raise ValueError(
                f"The stream ended after {self._batches} batches, before the {args.gradient_accumulation_steps} of one step: "
                "lower gradient_accumulation_steps or the batch size, or don't stream so few rows. [errors.md#streams]"
            )
        count, names = self._stream.left_out_after(self._batches)
        if count:
            process = f" of process {args.process_index}" if args.world_size > 1 else ""
            logger.warning(f"{count} row(s) left out of epoch {self._stream.epoch}{process}, the first: {'; '.join(names)}")

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"_gathered": self._gathered}}


__all__ = ["StreamCallback"]
