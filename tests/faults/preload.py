"""What the fork server imports before the first fork; it computes nothing, so that no thread exists to be lost."""

import peft.tuners.lora
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama

import lf_lightning.cli
import lf_lightning.commands.phases
import lf_lightning.data.tokenizer
import tests.stages.contract_rewards

__all__ = ["lf_lightning", "peft", "tests", "transformers"]
