# SPDX-License-Identifier: Apache-2.0
"""`lora_config` by its first name; it lives in `training.lora`."""

from .training.lora import lora_config


__all__ = ["lora_config"]
