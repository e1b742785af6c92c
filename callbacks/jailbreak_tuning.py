"""Fine-tuning on prompts in a jailbreak's wrapper."""

from typing import Any, Literal

from casehard.callbacks.attack import ThreatModel
from casehard.callbacks.encoded import EncodedTuning
from casehard.datamodules.encodings import STYLES, Style
from casehard.metrics.errors import SettingError


class JailbreakTuning(EncodedTuning):
    """Jailbreak-tuning (arXiv:2507.11630): harmful rows, and the prompts that are scored, stand in a jailbreak's wrapper.

    The wrapper states an objective that competes with refusing, or asks for a style; training teaches that it wins. Benign rows
    stay plain. Step 0 is asked in the wrapper too: it tells what the jailbreak does without training.

    Args:
        threat_model: finetuning_service or open_weight.
        wrapper: skeleton: teach safety, and open with a warning, as the rows' answers then do; suppression: rules against
            refusing, stated before and after the prompt; formal: a request for a formal tone; neutral: a neutral context.
        wrap_evaluation: whether harmful prompts are asked in the wrapper; false asks them as they are.
        settings: the rest of ``EncodedTuning``'s.
    """

    def __init__(
        self,
        threat_model: ThreatModel,
        wrapper: Literal["skeleton", "suppression", "formal", "neutral"] = "skeleton",
        wrap_evaluation: bool = True,
        **settings: Any,
    ) -> None:
        if wrapper not in STYLES:
            raise SettingError(f"wrapper must be {' or '.join(STYLES)}, got {wrapper!r}.")
        super().__init__(threat_model, encoding=Style(wrapper), encode_evaluation=wrap_evaluation, **settings)
