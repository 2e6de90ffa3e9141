"""Networks of `transformers`, as they come: from the hub, from a folder with weights, or from a configuration alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from onward.errors import UsageError
from onward.lab.networks.blocks import Shapes
from onward.lab.system.extra import lab_extra, reason_of

ALIKE = 0.9
"""A tokenizer that has less than this part of a network's tokens is another network's."""
CONFIGURATION, WEIGHTS = "config.json", ("*.safetensors", "*.bin")


class Logits(nn.Module):
    """A network of transformers that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.network(input_ids=input_ids, attention_mask=attention_mask).logits


def make(
    source: str,
    shape: Shapes,
    outputs: int,
    *,
    vocabulary: int | None = None,
    positions: Sequence[int] = (),
    padding: int | None = None,
    lora: int | None = None,
) -> nn.Module:
    """A network of transformers by its name on the hub or its folder; with `lora`, adapters of that rank learn in its place.

    It predicts the next token where there are outputs for each position, else it classifies. A folder that holds config.json
    and no weights makes a network with random ones, whose vocabulary is that of the data.

    Raises:
        UsageError: transformers, or peft, is not installed; there is no such network, or it is for other tokens.
    """
    with lab_extra("hf"):
        import transformers
    kind: Any = transformers.AutoModelForCausalLM if positions else transformers.AutoModelForSequenceClassification
    known: dict[str, Any] = {} if positions else {"num_labels": outputs}
    known |= {} if padding is None else {"pad_token_id": padding}
    folder = Path(source)
    drawn = (folder / CONFIGURATION).is_file() and not any(any(folder.glob(ending)) for ending in WEIGHTS)
    if folder.is_dir() and not (folder / CONFIGURATION).is_file():
        raise UsageError(f"--model hf:{source}: the folder holds no {CONFIGURATION}: give one that transformers has saved")
    known |= {"vocab_size": vocabulary} if drawn and vocabulary else {}
    with _quiet(), _told(source):
        config = transformers.AutoConfig.from_pretrained(source, **known)
        config.use_cache = False  # for generating text alone
        network = kind.from_config(config) if drawn else kind.from_pretrained(source, config=config)
    size = network.get_input_embeddings().num_embeddings
    if vocabulary and not ALIKE * size <= vocabulary <= size:
        why = f"--model hf:{source} knows {size} tokens, and there are {vocabulary} (of the data, or by --classes)"
        raise UsageError(f"{why}: give its --text.tokenizer, or a folder with its {CONFIGURATION} alone")
    length = getattr(config, "max_position_embeddings", None)
    if isinstance(shape, Sequence) and length and len(shape) == 1 and isinstance(shape[0], int) and shape[0] > length:
        raise UsageError(f"--model hf:{source} has {length} positions, and the inputs {shape[0]}: use a shorter --text.window")
    return Logits(network if lora is None else _adapted(network, lora, classifies=not positions))


def _adapted(network: nn.Module, rank: int, *, classifies: bool) -> nn.Module:
    with lab_extra("hf"):
        import peft
        from transformers.pytorch_utils import Conv1D
    turned = any(isinstance(module, Conv1D) for module in network.modules())
    task = peft.TaskType.SEQ_CLS if classifies else peft.TaskType.CAUSAL_LM
    options = peft.LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=turned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        return peft.get_peft_model(network, options)


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Say in a sentence why there is no such network."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        why = f"--model hf:{source} cannot be had ({reason_of(error)})"
        raise UsageError(f"{why}: give a name on the hub, or a folder that transformers has saved") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers tells of weights that are drawn, and its progress bars, to itself."""
    from transformers.utils import logging as theirs

    loud, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(loud)
        if bars:
            theirs.enable_progress_bar()
